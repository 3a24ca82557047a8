"""Features' columns as memory maps, kept beside the data until their sources change.

In `data_dir/.cache/`, `{stem}.{values,offsets,present}.npy` count only with their `{stem}.json`,
which is written last and names the content that they were built from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
import tokenize
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from files.atomic_io import (
    atomic_write,
    read_json,
    reading,
    sha256_of,
    sweep_temporaries,
    write_json,
)

CACHE_VERSION = 1  # raise it when a parser comes to read the same source differently
LONGEST_NAME = 100  # bytes of a quoted id; a file's name has 255, a Chinese letter takes nine

log = logging.getLogger("hstu")


class Feature(NamedTuple):
    """A column: one value, list or vector per item (or user); row 0 is padding and all zero.

    R = items + 1 rows, V listed values in all, W wide. Arrays may be read-only memmaps.
    """

    kind: str  # "sparse", "array", "continual", "emb", or a kind registered in features.PARSERS
    size: int  # sparse, array: cardinality (values 0..size, 0 unknown); continual: 1; emb: W
    values: np.ndarray  # sparse (R,), array (V,) int32; continual (R,), emb (R, W) float32, raw
    offsets: np.ndarray | None = None  # array: (R + 1,) int64, row r is values[o[r]:o[r + 1]]
    present: np.ndarray | None = None  # emb: (R,) bool, True: the item has a vector


def cached(
    data_dir: Path,
    prefix: str,
    num_rows: int,
    sources: Sequence[Path],
    settings: Mapping[str, Sequence[Any]],
    build: Callable[[dict[str, Path]], dict[str, Feature]],
) -> dict[str, Feature]:
    """Features as memory maps, by id; `build` makes those that are not cached as they are now.

    A reader takes no lock. A builder does, so that processes started together build once; it
    removes the key first and writes it last, so that a kill leaves nothing that looks complete.

    Args:
        data_dir: folder of the sources and of .cache.
        prefix: with which the stems begin.
        num_rows: of the tables, without padding.
        sources: files in data_dir whose content counts.
        settings: feature id -> what its table depends on besides, as JSON has it.
        build: gets feature id -> stem; it may write `{stem}.values.npy` itself.

    Raises:
        DataError: a source cannot be read.
    """
    content = [CACHE_VERSION, num_rows, _hashes(data_dir, sources)]
    keys = {i: [*content, *setting] for i, setting in settings.items()}
    folder = data_dir / ".cache"
    features = {i: _open(_stem(folder, prefix, i), key) for i, key in keys.items()}
    if all(features.values()):
        return features
    try:
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sweep_temporaries(folder)
            return _complete(folder, prefix, keys, build)
    except OSError as error:
        log.info("%s: %s, so tables are built again in every run", folder, error.strerror or error)
    with tempfile.TemporaryDirectory() as temporary:  # an open memmap outlives its file
        return _complete(Path(temporary), prefix, keys, build)


def _complete(
    folder: Path, prefix: str, keys: Mapping[str, list], build: Callable
) -> dict[str, Feature]:
    stems = {i: _stem(folder, prefix, i) for i in keys}
    features = {i: _open(stems[i], key) for i, key in keys.items()}
    missing = {i: stem for i, stem in stems.items() if not features[i]}
    for stem in missing.values():
        Path(f"{stem}.json").unlink(missing_ok=True)
    for i, feature in (build(missing) if missing else {}).items():
        _save(stems[i], keys[i], feature)
        features[i] = _open(stems[i], keys[i])
    return features


def _stem(folder: Path, prefix: str, feature_id: str) -> Path:
    name = quote(feature_id, safe="")
    if len(name) > LONGEST_NAME:
        name = f"sha256={hashlib.sha256(feature_id.encode()).hexdigest()[:32]}"  # quotes have no =
    return folder / f"{prefix}-{name}"


def _save(stem: Path, key: list, feature: Feature) -> None:
    sizes = {}
    for field in ("values", "offsets", "present"):
        array, target = getattr(feature, field), Path(f"{stem}.{field}.npy")
        if array is None:
            continue
        if not isinstance(array, np.memmap):  # a memmap was written in place, by its builder
            with atomic_write(target) as file:
                np.save(file, array)
        sizes[field] = os.path.getsize(target)
    entry = {"key": key, "kind": feature.kind, "size": feature.size, "bytes": sizes}
    write_json(f"{stem}.json", entry)


def _open(stem: Path, key: list) -> Feature | None:
    """The cached feature; None where it is absent, damaged or of other content."""
    key_path = Path(f"{stem}.json")
    try:
        text = key_path.read_bytes()
        entry = json.loads(text)
        arrays = {}
        for field, size in entry["bytes"].items():
            path = f"{stem}.{field}.npy"
            arrays[field] = map_array(path)
            if os.path.getsize(path) != size:
                return None
        is_current = entry["key"] == key and key_path.read_bytes() == text  # not rebuilt meanwhile
        return Feature(entry["kind"], entry["size"], **arrays) if is_current else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


def map_array(path: str | Path) -> np.ndarray:
    """A read-only memory map of a .npy file; any damage is an OSError, EOFError or ValueError."""
    try:
        return np.load(path, mmap_mode="r")
    except (SyntaxError, tokenize.TokenError) as error:  # numpy lets them out of a damaged header
        raise ValueError(f"damaged header ({error})") from error


def _hashes(data_dir: Path, paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by file name, taken anew only where size, mtime or ctime is not that of last time.

    ctime, because mtime can be set back: an edit that keeps both size and mtime counts too.
    """
    memo_path = data_dir / ".cache" / "sources.json"
    memo: dict[str, dict] = {}
    with suppress(ValueError, TypeError):  # absent or damaged
        memo = dict(read_json(memo_path))
    fresh = {}
    for path in paths:
        with reading(path):
            stat, name = path.stat(), path.relative_to(data_dir).as_posix()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            known = memo.get(name, {"stamp": None})
            is_same = known["stamp"] == stamp
            fresh[name] = known if is_same else {"stamp": stamp, "sha256": sha256_of(path)}
    if memo | fresh != memo:
        with suppress(OSError):
            memo_path.parent.mkdir(exist_ok=True)
            write_json(memo_path, memo | fresh)
    return {name: entry["sha256"] for name, entry in fresh.items()}
