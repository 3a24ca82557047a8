"""Feature files -> one column per feature: what feature_types.json lists of a *_feat_dict.json."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic_io import DataError, read_json
from files.feature_cache import Feature, cached
from files.json_stream import read_pairs
from files.sequences import gather_ranges

_RECORDS = 20_000  # parsed at once

_BAD_VALUE = (ValueError, TypeError, OverflowError)  # what a parser may raise

log = logging.getLogger("hstu")


class RawColumn(NamedTuple):
    """What a parser gets: some rows of one feature, in any order."""

    kind: str
    size: int  # the feature's entry in feat_statistics.json, 0 without one
    default: Any  # from feature_default_value.json, else 0 ([] for arrays)
    notes: Counter  # counts what was tolerated, by description; logged once per feature
    values: list  # a raw JSON value per row, the default where the key is missing or null


def load_features(
    data_dir: str | Path, side: str, num_rows: int, wanted: str | Sequence[str] = "all"
) -> dict[str, Feature]:
    """Sparse, array, continual and custom features of the items or the users, by feature id.

    Args:
        data_dir: folder of feature_types.json, feat_statistics.json, `side`_feat_dict.json.
        side: "item" or "user".
        num_rows: items (or users) without padding; tables have one row more.
        wanted: "all", "none" or feature ids of this side.

    Returns:
        The features in the order of feature_types.json; {} where there are no feature files.

    Raises:
        DataError: a file or a value is bad, or a wanted feature does not exist.
        ValueError: no such side.
    """
    if side not in ("item", "user"):
        raise ValueError(f"side is {side!r}, expected 'item' or 'user'")
    data_dir = Path(data_dir)
    source = data_dir / f"{side}_feat_dict.json"
    columns = {} if wanted == "none" else _list_columns(data_dir, side, wanted)
    if columns and not source.exists():
        if side == "item" or wanted != "all":
            raise DataError(f"{source}: missing, but feature_types.json lists {', '.join(columns)}")
        log.info("%s: missing, so user features are off", source)
        return {}
    # A custom parser may change without any file changing, so its columns are not cached.
    own = [i for i, c in columns.items() if PARSERS[c.kind] in (_sparse, _array, _continual)]
    custom = [i for i in columns if i not in own]

    def build(feature_ids: Iterable[str]) -> dict[str, Feature]:
        return _scan(source, {i: columns[i] for i in feature_ids}, num_rows)

    features = build(custom) if custom else {}
    settings = {i: (columns[i].kind, columns[i].size, columns[i].default, num_rows) for i in own}
    if own:
        features |= cached(data_dir, side, [source], settings, build)
    return {i: features[i] for i in columns}


# ---- feature_types.json and its companions -------------------------------------------------------


def _list_columns(data_dir: Path, side: str, wanted: str | Sequence[str]) -> dict[str, RawColumn]:
    """A column without values per wanted feature of this side."""
    path = data_dir / "feature_types.json"
    if not path.exists() and (data_dir / f"{side}_feat_dict.json").exists():
        raise DataError(f"{path}: missing; list the features of {side}_feat_dict.json in it")
    kinds = _read_kinds(path)
    tables = [i for i, (owner, kind) in kinds.items() if owner == side and kind != "emb"]
    chosen = tables if wanted == "all" else [str(i) for i in wanted]
    if unknown := [i for i in chosen if i not in tables]:
        there = ", ".join(tables) or "none"
        raise DataError(f"{path}: no feature {', '.join(unknown)} of {side}s; there are {there}")
    sizes_path, defaults_path = (
        data_dir / name for name in ("feat_statistics.json", "feature_default_value.json")
    )
    sizes, defaults = _read_optional(sizes_path), _read_optional(defaults_path)
    kinds = {i: kinds[i][1] for i in tables if i in chosen}
    coded = [i for i, kind in kinds.items() if kind in ("sparse", "array")]
    if bad := [i for i in coded if type(sizes.get(i)) is not int or not 0 <= sizes[i] < 2**31]:
        found = ", ".join(f"{i} ({sizes.get(i, 'missing')!r:.20})" for i in bad)
        raise DataError(
            f"{sizes_path}: no cardinality (a whole number) for {found} of {path.name}; add it"
        )
    absent = [i for i in kinds if i not in defaults]
    if absent and defaults_path.exists():
        names = ", ".join(absent)
        log.warning("%s: no value for %s; 0, or an empty list, is used", defaults_path, names)
    columns = {}
    for i, kind in kinds.items():
        default = defaults.get(i, [] if kind == "array" else 0)
        size = 1 if kind == "continual" else sizes.get(i, 0)
        columns[i] = RawColumn(kind, size, default, Counter(), [])
    return columns


def _read_kinds(path: Path) -> dict[str, tuple[str, str]]:
    """Side and kind of every feature."""
    kinds: dict[str, tuple[str, str]] = {}
    for key, ids in _read_optional(path).items():
        side, _, kind = key.partition("_")
        if side not in ("item", "user") or (kind not in PARSERS and key != "item_emb"):
            known = ", ".join(f"item_{kind}, user_{kind}" for kind in PARSERS)
            raise DataError(f"{path}: unknown kind {key!r}; there are item_emb, {known}")
        if not isinstance(ids, list):
            raise DataError(f"{path}: {key} is {ids!r:.60}, expected a list of feature ids")
        for i in map(str, ids):
            if i in kinds:
                raise DataError(f"{path}: feature {i} is listed twice; an id must be unique")
            kinds[i] = side, kind
    return kinds


def _read_optional(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: {value!r:.60}, expected an object")
    return value


# ---- parsers: a kind's column of JSON values -> Feature ------------------------------------------


def _sparse(column: RawColumn) -> Feature:
    return Feature("sparse", column.size, _codes(column.values, column))


def _array(column: RawColumn) -> Feature:
    values = column.values
    if scalars := sum(type(value) is not list for value in values):
        column.notes["single values read as lists of one"] += scalars
        values = [value if type(value) is list else [value] for value in values]
    offsets = np.zeros(len(values) + 1, np.int64)
    lengths = np.array([len(value) for value in values])

    np.cumsum(lengths, out=offsets[1:])
    codes = _codes(list(itertools.chain.from_iterable(values)), column)
    return Feature("array", column.size, codes, offsets)


def _continual(column: RawColumn) -> Feature:
    if set(map(type, column.values)) - {int, float}:
        raise ValueError("not a number")
    with np.errstate(over="ignore"):
        values = np.array(column.values, np.float64).astype(np.float32)
        default = np.float32(column.default)
    bad = ~np.isfinite(values)
    if bad.any() and not np.isfinite(default):
        raise ValueError("the default, too, is not finite in float32")
    if bad.any():
        column.notes["values not finite in float32 read as the default"] += int(bad.sum())
        values[bad] = default
    return Feature("continual", 1, values)


def _codes(values: list, column: RawColumn) -> np.ndarray:
    """(V,) int32 in 0..size; text, a value not seen in training, is 0 and counted."""
    types = Counter(map(type, values))
    if texts := types.pop(str, 0):
        column.notes["text values (not seen in training) read as 0"] += texts
        values = [0 if type(value) is str else value for value in values]
    if types.keys() - {int}:
        raise ValueError("not a whole number")
    codes = np.array(values, np.int64)
    if len(codes) and not 0 <= codes.min() <= codes.max() <= column.size:
        raise ValueError(f"outside 0..{column.size}, the cardinality in feat_statistics.json")
    return codes.astype(np.int32)


# A custom kind: PARSERS["mykind"] = parser, and its feature ids under "item_mykind" (or
# "user_mykind") in feature_types.json. The parser sees some rows at a time, so a row may depend on
# its own value only. It returns a Feature of as many rows, values (rows, ...) or flat values with
# offsets, and raises ValueError for a bad value; file, item, feature and value are put before it.
PARSERS: dict[str, Callable[[RawColumn], Feature]]
PARSERS = {"sparse": _sparse, "array": _array, "continual": _continual}


# ---- item_feat_dict.json, user_feat_dict.json -> columns -----------------------------------------


def _scan(source: Path, columns: dict[str, RawColumn], num_rows: int) -> dict[str, Feature]:
    """One pass over the file; in memory are the columns and one block of records."""
    log.info("%s: reading %d features", source, len(columns))
    blocks = {i: [_default_row(source, i, column)] for i, column in columns.items()}
    rows = [np.zeros(0, np.int64)]
    pairs = read_pairs(source)
    while batch := list(itertools.islice(pairs, _RECORDS)):
        rows.append(np.array([_row_id(source, num_rows, *pair) for pair in batch]))
        for i, column in columns.items():
            blocks[i].append(_parse(source, i, column, batch))
    for i, column in columns.items():
        for text, count in column.notes.items():
            log.warning("%s: feature %s: %d %s", source, i, count, text)
    # Per row its place in the blocks: 0 is the default; of a key that occurs twice the last counts.
    place = np.zeros(num_rows + 1, np.int64)
    place[np.concatenate(rows)] = np.arange(1, sum(map(len, rows)) + 1)
    return {i: _take(blocks.pop(i), place) for i in columns}


def _default_row(source: Path, i: str, column: RawColumn) -> Feature:
    try:
        return PARSERS[column.kind](column._replace(values=[column.default], notes=Counter()))
    except _BAD_VALUE as error:
        path = source.with_name("feature_default_value.json")
        raise DataError(f"{path}: feature {i} = {column.default!r:.60}: {error}") from error


def _row_id(source: Path, num_rows: int, key: str, record: Any) -> int:
    row = int(key) if key.isdecimal() and len(key) < 12 else 0
    if not 1 <= row <= num_rows:
        raise DataError(f"{source}: key {key!r:.60}, expected a re-id in 1..{num_rows}")
    if type(record) is not dict:
        raise DataError(f"{source}: {source.name[:4]} {key} = {record!r:.60}, expected an object")
    return row


def _parse(source: Path, i: str, column: RawColumn, batch: list) -> Feature:
    values = [record.get(i) for _, record in batch]
    if None in values:
        values = [column.default if value is None else value for value in values]
    try:
        return PARSERS[column.kind](column._replace(values=values))
    except _BAD_VALUE as error:
        for (key, _), value in zip(batch, values, strict=True):  # again one by one, for the name
            try:
                PARSERS[column.kind](column._replace(values=[value]))
            except _BAD_VALUE as reason:
                place = f"{source.name[:4]} {key}, feature {i} = {value!r:.60}"
                raise DataError(f"{source}: {place}: {reason}") from error
        raise DataError(f"{source}: feature {i}: {error}") from error


def _take(blocks: list[Feature], place: np.ndarray) -> Feature:
    """Rows `place` (R,) of the joined blocks; row 0 becomes all zero, or empty."""
    values = np.concatenate([block.values for block in blocks])
    if blocks[0].offsets is None:
        values = values[place]
        values[0] = 0
        return blocks[0]._replace(values=values)
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    ends = np.cumsum(lengths)
    starts, ends = (ends - lengths)[place], ends[place]
    ends[0] = starts[0]
    values, offsets = gather_ranges(values, starts, ends)
    return blocks[0]._replace(values=values, offsets=offsets)
