"""Matrices as vector indexes read them, `.fbin` and `.u64bin`, and folders of an export of them.

The convention of big-ann-benchmarks and cuVS: uint32 n, uint32 d, then n rows of d numbers.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from files.atomic_io import (
    DataError,
    atomic_write,
    file_entry,
    sweep_temporaries,
    write_hashed,
    write_json,
)

log = logging.getLogger("hstu")

EMB_DTYPES = {".fbin": np.dtype("<f4"), ".u64bin": np.dtype("<u8")}


def save_emb(emb: np.ndarray, save_path: str | Path) -> None:
    """Write a matrix as vector indexes read it: uint32 n, uint32 d, then the rows.

    Args:
        emb: (n, d) float for `*.fbin`; (n, d) or (n,) integers for `*.u64bin` (-1 is stored as
            2^64 - 1, int64's bits).
        save_path: ends in .fbin (float32) or .u64bin (uint64), all little-endian.

    Raises:
        DataError: a row is not finite: an index built on it would hang or be corrupt.
        ValueError: another suffix, or more than 2^31 - 1 rows or columns.
    """
    path = Path(save_path)
    with atomic_write(path) as file:
        file.writelines(emb_pieces(path, emb.shape, [emb]))


def emb_pieces(
    path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> Iterator[bytes | memoryview]:
    """What `save_emb` writes for the matrix of `shape` whose rows are `chunks`: a header, and each.

    `path` names the format, and the file in errors, which are those of `save_emb`.
    """
    if path.suffix not in EMB_DTYPES or len(shape) not in (1, 2) or max(shape) >= 2**31:
        raise ValueError(f"{path}: {shape} as {path.suffix!r} is no .fbin or .u64bin matrix")
    n, d = shape if len(shape) == 2 else (*shape, 1)
    yield np.array([n, d], "<u4").tobytes()
    row = 0
    for chunk in chunks:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused below
            rows = np.ascontiguousarray(chunk, EMB_DTYPES[path.suffix]).reshape(len(chunk), d)
        if path.suffix == ".fbin" and not np.isfinite(rows).all():
            row += int(np.argmin(np.isfinite(rows).all(1)))
            raise DataError(f"{path}: row {row} is not finite; the model has diverged, lower --lr")
        yield rows.reshape(-1).data
        row += len(rows)
    assert row == n, f"{path}: {row} rows, but the header says {n}"


def load_emb(path: str | Path) -> np.ndarray:
    """(n, d) memory map of what `save_emb` wrote; `*.u64bin` as int64, so that -1 is -1 again.

    Raises:
        DataError: the size is not the one that the header says.
    """
    path = Path(path)
    dtype = EMB_DTYPES[path.suffix]
    header = np.fromfile(path, "<u4", 2)
    shape = tuple(int(size) for size in header)
    expected = 8 + math.prod(shape) * dtype.itemsize if len(shape) == 2 else 8
    if path.stat().st_size != expected:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, but its header makes {expected}; "
            "the file is truncated, export again"
        )
    # Copy on write: torch warns of memory that it could not write to.
    matrix = np.memmap(path, dtype, "c", 8, shape) if all(shape) else np.empty(shape, dtype)
    return matrix.view("<i8") if path.suffix == ".u64bin" else matrix


def publish(
    folder: Path,
    shape: tuple[int, int],
    embeddings: Iterable[np.ndarray],
    arrays: Mapping[str, np.ndarray],
    origin: Mapping[str, Any],
    *followers: Path,
    tables: Mapping[str, Callable[[IO[bytes]], None]] | None = None,
) -> None:
    """Write an export's files, and last the manifest that names their sizes and hashes.

    Args:
        folder: made if it is not there.
        shape: (n, d) of the embeddings.
        embeddings: their rows in order, (c, d) at a time; two chunks at most are in memory.
        arrays: the other matrices, (n, ...) each, `id.u64bin` among them. They and `tables` are
            written after the embeddings, and may be filled while those come.
        origin: goes into the manifest.
        followers: folders of exports that go with the old files, and not with these.
        tables: file name -> what writes the file's content.

    Raises:
        DataError: no index takes these vectors; the export that was there is as it was.
        OSError: the same after a full disk, say. If renaming fails, there is no manifest.
    """
    check_size(folder, *shape)
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder)
    named_rows = warn_of_zeros(folder, embeddings, arrays["id.u64bin"])
    contents = {"embedding.fbin": (shape, named_rows)}
    contents |= {name: (array.shape, [array]) for name, array in arrays.items()}
    files = {}
    with ExitStack() as complete:  # at its end all files are renamed, and not before
        for name, (size, rows) in contents.items():
            file = complete.enter_context(atomic_write(folder / name))
            files[name] = write_hashed(file, emb_pieces(folder / name, size, rows))
        for name, write in (tables or {}).items():
            file = complete.enter_context(atomic_write(folder / name))
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a full disk shows before anything is renamed
            files[name] = file_entry(file.name)
        for old in (folder, *followers):
            (old / "manifest.json").unlink(missing_ok=True)
    n, d = shape
    write_json(folder / "manifest.json", {"n": n, "d": d, **origin, "files": files})
    log.info("wrote %s: %s vectors of width %d", folder, f"{n:,}", d)


def check_size(folder: Path, n: int, d: int) -> None:
    if n == 0 or d == 1:
        raise DataError(
            f"{folder}: {n} vectors of width {d}, but an index needs one at least, of width 2 or "
            "more; train with larger --hidden_units"
        )


def warn_of_zeros(
    folder: Path, chunks: Iterable[np.ndarray], ids: np.ndarray
) -> Iterator[np.ndarray]:
    """The chunks as they come, (c, d) each; after the last a warning of the rows that are zero."""
    row, found = 0, []
    for chunk in chunks:
        zeros = np.flatnonzero(chunk[:, 0] == 0)  # few, and any(1) of all is slow
        found += ids[row + zeros[~chunk[zeros].any(1)]].tolist()
        yield chunk
        row += len(chunk)
    if found:
        text = f"{len(found)} vectors are zero, so that no query finds them, the first"
        log.warning("%s: %s: %s", folder, text, ", ".join(map(str, found[:3])))
