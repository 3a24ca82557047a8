"""Feature columns as memory maps, kept beside the data until their sources change.

`.cache/NAME-KEY.FIELD.npy` in the data folder. KEY is a hash of all that the column depends on, the
size and time of change of its sources among it: a file that is there is current.
"""

from __future__ import annotations

import hashlib
import logging
import tokenize
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from files.atomic_io import atomic_write, reading, sweep_temporaries

CACHE_VERSION = 2  # raise it when a parser comes to read the same source differently
LONGEST_NAME = 60  # letters of a quoted id

log = logging.getLogger("hstu")


class Feature(NamedTuple):
    """A column: one value, list or vector per item (or user); row 0 is padding and all zero.

    R = items + 1 rows, V listed values in all, W wide. Arrays may be read-only memmaps.
    """

    kind: str  # "sparse", "array", "continual", "emb", or one registered in files.features.PARSERS
    size: int  # sparse, array: cardinality (values 0..size, 0 unknown); continual: 1; emb: W
    values: np.ndarray  # sparse (R,), array (V,) int32; continual (R,), emb (R, W) float32, raw
    offsets: np.ndarray | None = None  # array: (R + 1,) int64, row r is values[o[r]:o[r + 1]]
    present: np.ndarray | None = None  # emb: (R,) bool, True: the item has a vector


def cached(
    data_dir: Path,
    prefix: str,
    sources: Sequence[Path],
    settings: Mapping[str, tuple],
    build: Callable[[dict[str, Path | None]], dict[str, Feature]],
) -> dict[str, Feature]:
    """Features as memory maps, by id; `build` makes those that are not cached as they are now.

    Two processes that build at the same time both do the work, and the last rename wins.

    Args:
        data_dir: folder of .cache.
        prefix: with which the files' names begin.
        sources: files whose size and time of change count.
        settings: feature id -> its kind, its size or None for the width, and what else counts.
        build: gets feature id -> path; it may write the values there itself. None: in memory.

    Raises:
        DataError: a source cannot be read.
    """
    folder, stamps = data_dir / ".cache", [_stamp(path) for path in sources]
    stems = {
        i: folder / f"{prefix}-{_name(i)}-{_key(stamps, setting)}"
        for i, setting in settings.items()
    }
    features = {i: _open(stem, *settings[i][:2]) for i, stem in stems.items()}
    missing = [i for i, feature in features.items() if feature is None]
    if not missing:
        return features
    try:
        folder.mkdir(exist_ok=True)
        sweep_temporaries(folder)
        built = build({i: Path(f"{stems[i]}.values.npy") for i in missing})
        for i, feature in built.items():
            _save(stems[i], feature)
            features[i] = _open(stems[i], *settings[i][:2])
    except OSError as error:
        log.info("%s: %s, so tables are built again in every run", folder, error.strerror or error)
        features |= build(dict.fromkeys(missing))
    return features


def _name(feature_id: str) -> str:
    name = quote(feature_id, safe="")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}={_key(feature_id)}"


def _stamp(path: Path) -> tuple[str, int, int]:
    with reading(path):
        stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _key(*content: Any) -> str:
    return hashlib.sha256(repr((CACHE_VERSION, content)).encode(errors="replace")).hexdigest()[:16]


def _save(stem: Path, feature: Feature) -> None:
    """Write the arrays, the values last; remove those of other keys."""
    for field in ("offsets", "present", "values"):
        array = getattr(feature, field)
        if array is not None and not isinstance(array, np.memmap):  # which lies there already
            with atomic_write(f"{stem}.{field}.npy") as file:
                np.save(file, array)
    name = stem.name.rpartition("-")[0]
    for old in stem.parent.glob(f"{name}-????????????????.*.npy"):
        if not old.name.startswith(stem.name):
            old.unlink(missing_ok=True)


def _open(stem: Path, kind: str, size: int | None) -> Feature | None:
    """The cached feature; None where it is absent or damaged."""
    arrays = {}
    with suppress(OSError, ValueError, EOFError):
        for field in (*{"array": ["offsets"], "emb": ["present"]}.get(kind, []), "values"):
            arrays[field] = map_array(f"{stem}.{field}.npy")
        return Feature(kind, arrays["values"].shape[1] if size is None else size, **arrays)
    return None


def map_array(path: str | Path) -> np.ndarray:
    """A read-only memory map of a .npy file; any damage is an OSError, EOFError or ValueError."""
    try:
        return np.load(path, mmap_mode="r")
    except (SyntaxError, tokenize.TokenError) as error:  # numpy lets them out of a damaged header
        raise ValueError(f"damaged header ({error})") from error
