"""Multimodal vectors of the items: creative_emb/ -> one float32 table per feature."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np

from files.atomic_io import DataError, atomic_write, reading
from files.data_folder import digest_of_ids
from files.feature_cache import Feature, cached, map_array
from files.safe_pickle import load_pickle

_VECTORS = 1024  # of Parquet, read at once; 16 MB of float32 at width 4096
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_VECTOR_FILE = r"(?:emb_(.+)_\d+|([^.]+))\.(?:pkl|npy)"

log = logging.getLogger("hstu")


def load_vectors(
    data_dir: str | Path,
    feature_ids: Sequence[str],
    item_ids: Mapping[Any, int],
    num_items: int,
    *,
    trust_pickle: bool = False,
    prefix: str = "emb",
) -> dict[str, Feature]:
    """Vector features of the items out of creative_emb/, as float32 memmaps.

    Args:
        data_dir: folder of creative_emb/.
        feature_ids: vector features, as `find_vectors` names them.
        item_ids: original item id -> row 1..num_items; text "123" and number 123 are one id. Dense
            tables do not need it.
        num_items: items without padding; tables have one row more.
        prefix: of the cache's files; another one for other rows than the data's items.
        trust_pickle: run whatever a .pkl holds, instead of refusing all but plain data.

    Raises:
        DataError: a feature has no file, widths differ, a value is not finite, or no id matches.
    """
    data_dir, available, features = Path(data_dir), find_vectors(data_dir), {}
    if absent := [i for i in feature_ids if i not in available]:
        there = ", ".join(available) or "none"
        missing = ", ".join(absent)
        raise DataError(f"{data_dir}/creative_emb: no vectors for {missing}; there are {there}")
    ids_hash = digest_of_ids(item_ids.items())
    for i in feature_ids:
        source, files = available[i], _files(available[i])
        settings = {i: ("emb", None, num_items, None if is_by_re_id(source) else ids_hash)}

        def build(paths: dict[str, Path | None], source=source, files=files) -> dict[str, Feature]:
            log.info("%s: reading vectors", source)
            rows = (row for f in files for row in _rows(f, item_ids, num_items, trust_pickle))
            return {i: _fill(source, rows, num_items, path) for i, path in paths.items()}

        features |= cached(data_dir, prefix, files, settings, build)
        share = features[i].present[1:].mean()
        text = f"{100 * share:.1f} % of {num_items:,} items have a vector, width {features[i].size}"
        (log.info if share >= 0.5 else log.warning)("creative_emb/%s: %s", i, text)
    return features


def find_vectors(data_dir: str | Path) -> dict[str, Path]:
    """Vector file or folder per feature id.

    `81.pkl`, `emb_81_32.pkl`: a dict original id -> vector. `emb_81_32/`, `emb_81_32_parquet/`:
    JSON lines or Parquet with `anonymous_cid` and `emb`. `81.npy`, `emb_81_32.npy`: float
    (num_items + 1, W) by re-id, a row of NaN for an item without a vector; row 0 is passed over.

    Raises:
        DataError: a feature has two sources.
    """
    found: dict[str, Path] = {}
    for path in sorted((Path(data_dir) / "creative_emb").glob("*")):
        pattern = r"emb_(.+)_\d+(?:_parquet)?" if path.is_dir() else _VECTOR_FILE
        if match := re.fullmatch(pattern, path.name):
            i = match[match.lastindex]
            if i in found:
                raise DataError(f"{path}: feature {i} has {found[i].name} too; keep one of them")
            found[i] = path
    return found


def is_by_re_id(source: Path) -> bool:
    """Whether a file of `find_vectors` is a dense table, which needs no original ids."""
    return source.suffix == ".npy"


def _files(source: Path) -> list[Path]:
    """The file, or a folder's files without _SUCCESS, checksums and notes.

    Raises:
        DataError: there is none, or one is compressed.
    """
    if source.is_file():
        return [source]
    known = ("", ".json", ".jsonl", ".parquet")
    paths = [path for path in sorted(source.iterdir()) if path.name[0] not in "._"]
    if packed := [path for path in paths if path.suffix in PACKED]:
        raise DataError(f"{packed[0]}: compressed; unpack it")
    files = [path for path in paths if path.suffix in known]
    if not files:
        raise DataError(f"{source}: empty, expected *.json, part-00000 ... or *.parquet")
    numbers = {int(m[1]) for m in (re.match(r"part-(\d+)", path.name) for path in files) if m}
    if missing := sorted({*range(max(numbers, default=-1) + 1)} - numbers):
        log.warning("%s: no part-%05d; is a file missing?", source, missing[0])
    return files


def _rows(
    path: Path, item_ids: Mapping[Any, int], num_items: int, trust_pickle: bool
) -> Iterator[tuple[Path, int, Any, Any]]:
    """The file, a row of the table, its original id and its vector, for each of our items there."""
    if is_by_re_id(path):
        yield from ((path, row, row, vector) for row, vector in _dense_rows(path, num_items))
        return
    for original, vector in _pairs(path, trust_pickle):
        row = _row_of(path, item_ids, original)
        if row is not None:
            yield path, row, original, vector


def _dense_rows(path: Path, num_items: int) -> Iterator[tuple[int, np.ndarray]]:
    with reading(path):
        table = map_array(path)
    if table.ndim != 2 or table.dtype.kind != "f" or len(table) != num_items + 1:
        expected = f"expected float ({num_items + 1}, width)"
        raise DataError(f"{path}: {table.dtype} {table.shape}, {expected}")
    for row in range(1, num_items + 1):
        if not np.isnan(table[row]).all():
            yield row, table[row]


def _pairs(path: Path, trust_pickle: bool) -> Iterable[tuple[Any, Any]]:
    """(original id, vector) of one file."""
    if path.suffix != ".pkl":
        return _parquet_pairs(path) if path.suffix == ".parquet" else _line_pairs(path)
    table = load_pickle(path, trust=trust_pickle)
    if not isinstance(table, dict):
        raise DataError(f"{path}: a {type(table).__name__}, expected a dict id -> vector")
    return table.items()


def _line_pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                pair = record["anonymous_cid"], record["emb"]
            except (ValueError, KeyError, TypeError) as error:
                found, expected = f"{type(error).__name__} {error}", '"anonymous_cid" and "emb"'
                raise DataError(f"{path}: line {number}: {found}; expected {expected}") from error
            yield pair


def _parquet_pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow; pip install pyarrow") from error
    with reading(path), parquet.ParquetFile(path) as file:
        columns = ["anonymous_cid", "emb"]
        if missing := set(columns) - set(file.schema_arrow.names):
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(_VECTORS, columns=columns):
            ids, vectors = batch.column("anonymous_cid"), batch.column("emb")
            yield from zip(ids.to_pylist(), vectors.to_numpy(zero_copy_only=False), strict=True)


def _row_of(source: Path, item_ids: Mapping, original: Any) -> int | None:
    """Row of an original id, as it is or in the other spelling; None: not one of our items."""
    if not isinstance(original, str | int | float | np.number):
        raise DataError(f"{source}: id {original!r:.60}, expected text or a number")
    row = item_ids.get(original)
    if row is None and isinstance(original, str):
        is_number = original.isdecimal() and len(original) < 20 and str(int(original)) == original
        return item_ids.get(int(original)) if is_number else None
    return item_ids.get(str(original)) if row is None else row


def _fill(source: Path, rows: Iterable[tuple], num_items: int, target: Path | None) -> Feature:
    """The table of `rows`, written to `target` as they come, never all in memory; None: there."""
    present, table = np.zeros(num_items + 1, bool), None
    with atomic_write(target) if target else nullcontext() as file:
        for path, row, original, vector in rows:
            values = _vector(path, original, vector, None if table is None else table.shape[1])
            if table is None:
                table = _empty_table(file, (num_items + 1, len(values)))
            table[row] = values
            present[row] = True
        if table is None:
            reason = "every vector in it is missing (NaN)"
            if not is_by_re_id(source):
                reason = "none of its ids is an item of indexer.pkl (text and numbers are alike)"
            raise DataError(f"{source}: {reason}; it is empty or of another data set")
        if file is not None:
            table.flush()
    return Feature("emb", table.shape[1], table, present=present)


def _empty_table(file: IO[bytes] | None, shape: tuple[int, int]) -> np.ndarray:
    """Zeros, as a memory map of `file`; None: in memory."""
    if file is None:
        return np.zeros(shape, np.float32)
    table = np.lib.format.open_memmap(file.name, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # a map over a full disk would end the process
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    return table


def _vector(source: Path, original: Any, vector: Any, width: int | None) -> np.ndarray:
    """(width,) float32, finite."""
    where = f"{source}: id {original!r}"
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(vector, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: {vector!r:.60}, expected a list of numbers") from error
    if values.ndim != 1 or not len(values) or width not in (None, len(values)):
        found = "x".join(map(str, values.shape)) or "none"
        raise DataError(f"{where} has width {found}, expected {width or 'a list of numbers'}")
    if not np.isfinite(values).all():
        raise DataError(f"{where}: NaN or Infinity in its vector; correct or remove it")
    return values
