"""Feature files -> dense tables and their caches (JSON, pickled or listed vectors).

Sources are parsed once, streaming, into `data_dir/.cache/`: `.npy` files that open as memmaps, and
a key file per feature, written last, that names the content they were built from.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from atomic_io import DataError, atomic_write, read_json, sha256_of, sweep_temporaries, write_json
from safe_pickle import load_pickle

CACHE_VERSION = 1  # raise it when a parser comes to read the same source differently
_TEXT_BLOCK = 1 << 22  # characters
_LONGEST_RECORD = 1 << 26  # characters; a broken file is not read to its end as one record
_RECORDS = 20_000  # parsed at once
_VECTORS = 1024  # parsed at once; 130 MB of Python floats at width 4096
_MAX_PROBLEMS = 20  # shown
_LONGEST_LIST = 10_000  # values; every batch that holds such an item embeds them all
_BAD_VALUE = (ValueError, TypeError, OverflowError)  # what a parser may raise

_VECTOR_FILE = r"(?:emb_(.+)_\d+|([^.]+))\.(?:pkl|npy)"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*([,}])")

log = logging.getLogger("hstu")


class Feature(NamedTuple):
    """A column: one value, list or vector per item (or user); row 0 is padding and all zero.

    R = items + 1 rows, V listed values in all, W wide. Arrays may be read-only memmaps.
    """

    kind: str  # "sparse", "array", "continual", "emb", or a kind registered in PARSERS
    size: int  # sparse, array: cardinality (values 0..size, 0 unknown); continual: 1; emb: W
    values: np.ndarray  # sparse (R,), array (V,) int32; continual (R,), emb (R, W) float32, raw
    offsets: np.ndarray | None = None  # array: (R + 1,) int64, row r is values[o[r]:o[r + 1]]
    present: np.ndarray | None = None  # emb: (R,) bool, True: the item has a vector


class Column(NamedTuple):
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
        wanted: "all", "none" or feature ids; those of the other side are passed over.

    Returns:
        The features in the order of feature_types.json; {} where there are no feature files.

    Raises:
        DataError: a file or a value is bad, or a wanted feature does not exist.
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
    if own:
        content = [CACHE_VERSION, num_rows, _hashes(data_dir, [source])]
        features |= _cached(data_dir, side, {i: [*content, *columns[i][:3]] for i in own}, build)
    return {i: features[i] for i in columns}


def load_vectors(
    data_dir: str | Path,
    feature_ids: Sequence[str],
    item_ids: Mapping[Any, int],
    num_items: int,
    *,
    trust_pickle: bool = False,
) -> dict[str, Feature]:
    """Vector features of the items out of creative_emb/, as float32 memmaps.

    Args:
        data_dir: folder of creative_emb/.
        feature_ids: vector features, as `find_vectors` names them.
        item_ids: original item id -> row 1..num_items; text "123" and number 123 are one id.
        num_items: items without padding; tables have one row more.
        trust_pickle: run whatever a .pkl holds, instead of refusing all but plain data.

    Raises:
        DataError: a feature has no file, widths differ, a value is not finite, or no id matches.
    """
    available, features = find_vectors(data_dir), {}
    if absent := [i for i in feature_ids if i not in available]:
        raise DataError(
            f"{Path(data_dir) / 'creative_emb'}: no vectors for {', '.join(absent)}; "
            f"there are {', '.join(available) or 'none'}"
        )
    digest = hashlib.sha256()
    for batch in _batches(item_ids.items(), _RECORDS):
        digest.update(repr(batch).encode(errors="backslashreplace"))
    for i in feature_ids:
        parts = _parts(available[i])
        key = [CACHE_VERSION, num_items, _hashes(Path(data_dir), parts), digest.hexdigest()]

        def build(stems: dict[str, Path], i: str = i, parts: list[Path] = parts) -> dict:
            log.info("%s: reading vectors", available[i])
            pairs = ((p, *pair) for p in parts for pair in _pairs(p, num_items, trust_pickle))
            return {i: _fill(available[i], pairs, item_ids, num_items, stems[i])}

        features |= _cached(Path(data_dir), "emb", {i: key}, build)
        share = features[i].present[1:].mean()
        log.log(
            logging.INFO if share >= 0.5 else logging.WARNING,
            "creative_emb/%s: %.1f %% of %s items have a vector, width %d",
            *(i, 100 * share, f"{num_items:,}", features[i].size),
        )
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


# ---- feature_types.json and its companions -------------------------------------------------------


def _list_columns(data_dir: Path, side: str, wanted: str | Sequence[str]) -> dict[str, Column]:
    """A column without values per wanted feature of this side."""
    path = data_dir / "feature_types.json"
    if not path.exists() and (data_dir / f"{side}_feat_dict.json").exists():
        raise DataError(f"{path}: missing; list the features of {side}_feat_dict.json in it")
    kinds = _read_kinds(path)
    tables = [i for i, (_, kind) in kinds.items() if kind != "emb"]
    chosen = tables if wanted == "all" else [str(i) for i in wanted]
    if unknown := [i for i in chosen if i not in tables]:
        raise DataError(
            f"{path}: no feature {', '.join(unknown)}; there are {', '.join(tables) or 'none'}"
        )
    sizes = _read_optional(data_dir / "feat_statistics.json")
    defaults = _read_optional(data_dir / "feature_default_value.json")
    kinds = {i: kind for i, (owner, kind) in kinds.items() if owner == side and i in chosen}
    coded = [i for i, kind in kinds.items() if kind in ("sparse", "array")]
    if bad := [i for i in coded if type(sizes.get(i)) is not int or not 0 <= sizes[i] < 2**31]:
        found = ", ".join(f"{i} ({sizes.get(i, 'missing')!r:.20})" for i in bad)
        raise DataError(
            f"{data_dir / 'feat_statistics.json'}: no cardinality (a whole number) for {found}, "
            "which feature_types.json lists"
        )
    absent = [i for i in kinds if i not in defaults]
    if absent and (path := data_dir / "feature_default_value.json").exists():
        log.warning("%s: no value for %s; 0, or an empty list, is used", path, ", ".join(absent))
    return {
        i: Column(
            kind, sizes.get(i, 0), defaults.get(i, [] if kind == "array" else 0), Counter(), []
        )
        for i, kind in kinds.items()
    }


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


def _sparse(column: Column) -> Feature:
    return Feature("sparse", column.size, _codes(column.values, column))


def _array(column: Column) -> Feature:
    values = column.values
    if scalars := sum(type(value) is not list for value in values):
        column.notes["single values read as lists of one"] += scalars
        values = [value if type(value) is list else [value] for value in values]
    offsets = np.zeros(len(values) + 1, np.int64)
    lengths = np.array([len(value) for value in values])
    if lengths.max(initial=0) > _LONGEST_LIST:
        raise ValueError(f"{lengths.max()} values, at most {_LONGEST_LIST} are taken")
    np.cumsum(lengths, out=offsets[1:])
    codes = _codes(list(itertools.chain.from_iterable(values)), column)
    return Feature("array", column.size, codes, offsets)


def _continual(column: Column) -> Feature:
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


def _codes(values: list, column: Column) -> np.ndarray:
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
PARSERS: dict[str, Callable[[Column], Feature]] = {
    "sparse": _sparse,
    "array": _array,
    "continual": _continual,
}


# ---- item_feat_dict.json, user_feat_dict.json -> columns -----------------------------------------


def _scan(source: Path, columns: dict[str, Column], num_rows: int) -> dict[str, Feature]:
    """One pass over the file; in memory are the columns and one block of records."""
    log.info("%s: reading %d features", source, len(columns))
    blocks = {i: [_default_row(source, i, column)] for i, column in columns.items()}
    rows = [np.zeros(0, np.int64)]
    for batch in _batches(_records(source), _RECORDS):
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


def _default_row(source: Path, i: str, column: Column) -> Feature:
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


def _parse(source: Path, i: str, column: Column, batch: list) -> Feature:
    values = [record.get(i) for _, record in batch]
    if None in values:
        values = [column.default if value is None else value for value in values]
    try:
        return PARSERS[column.kind](column._replace(values=values))
    except _BAD_VALUE as error:
        problems = []
        for (key, _), value in zip(batch, values, strict=True):  # again one by one, for the names
            try:
                PARSERS[column.kind](column._replace(values=[value]))
            except _BAD_VALUE as reason:
                problems.append(f"{source.name[:4]} {key}, feature {i} = {value!r:.60}: {reason}")
        if len(problems) > _MAX_PROBLEMS:
            problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS} more"]
        shown = "\n  ".join(problems) or f"feature {i}: {error}"
        raise DataError(f"{source}: {shown}") from error


def _take(blocks: list[Feature], place: np.ndarray) -> Feature:
    """Rows `place` (R,) of the joined blocks; row 0 becomes all zero, or empty."""
    values = np.concatenate([block.values for block in blocks])
    if blocks[0].offsets is None:
        values = values[place]
        values[0] = 0
        return blocks[0]._replace(values=values)
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    starts = (np.cumsum(lengths) - lengths)[place]
    lengths = lengths[place]
    lengths[0] = 0
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return blocks[0]._replace(values=values[index], offsets=offsets)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) pairs of one JSON object, however long; of a key that occurs twice, both."""
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        text, position = file.read(_TEXT_BLOCK), 0
        start = re.match(r"[ \t\n\r]*\{[ \t\n\r]*(\}?)", text)
        if not start:
            raise DataError(f"{path}: no JSON object; the file is empty, truncated or not JSON")
        at, is_closed = start.end(), bool(start[1])
        while not is_closed:
            try:
                key, value, end = _pair(text, at)
            except ValueError as error:  # the pair goes on in the next block, or is broken
                block = file.read(_TEXT_BLOCK)
                text, at, position = text[at:] + block, 0, position + at
                if not block or len(text) > _LONGEST_RECORD:
                    raise DataError(
                        f"{path}: behind character {position}: {error}; truncated or not JSON"
                    ) from error
                continue
            yield key, value
            at, is_closed = end.end(), end[1] == "}"
        if (text[at:] + file.read(_TEXT_BLOCK)).strip(" \t\n\r"):
            raise DataError(f"{path}: text behind the end of the object; remove it")


def _pair(text: str, at: int) -> tuple[str, Any, re.Match[str]]:
    """A key, its value, and the `,` or `}` without which a number might go on in the next block."""
    key, at = _DECODER.raw_decode(text, _SPACE.match(text, at).end())
    colon = _COLON.match(text, at)
    if not isinstance(key, str) or not colon:
        raise ValueError('expected "key":')
    value, at = _DECODER.raw_decode(text, colon.end())
    end = _END.match(text, at)
    if not end:
        raise ValueError("expected , or }")
    return key, value, end


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what reading `path` may raise into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: {error}; the file is damaged or in another format") from error


def _batches(values: Iterable, size: int) -> Iterator[list]:
    values = iter(values)
    while batch := list(itertools.islice(values, size)):
        yield batch


# ---- creative_emb/ -> tables ---------------------------------------------------------------------


def _parts(source: Path) -> list[Path]:
    """The file, or a folder's files without _SUCCESS, checksums and notes."""
    if source.is_file():
        return [source]
    known = ("", ".json", ".jsonl", ".parquet")
    parts = [p for p in sorted(source.iterdir()) if p.name[0] not in "._" and p.suffix in known]
    if not parts:
        raise DataError(f"{source}: empty, expected *.json, part-00000 ... or *.parquet")
    return parts


def _pairs(path: Path, num_items: int, trust_pickle: bool) -> Iterable[tuple[Any, Any]]:
    """(original id, vector) of one file; of a dense table (row, vector)."""
    if path.suffix == ".npy":
        return _dense_pairs(path, num_items)
    if path.suffix != ".pkl":
        return _parquet_pairs(path) if path.suffix == ".parquet" else _line_pairs(path)
    table = load_pickle(path, trust=trust_pickle)
    if not isinstance(table, dict):
        raise DataError(f"{path}: a {type(table).__name__}, expected a dict id -> vector")
    return table.items()


def _dense_pairs(path: Path, num_items: int) -> Iterator[tuple[int, np.ndarray]]:
    with _reading(path):
        table = _map(path)
    if table.ndim != 2 or table.dtype.kind != "f" or len(table) != num_items + 1:
        raise DataError(
            f"{path}: {table.dtype} {table.shape}, expected float ({num_items + 1}, width)"
        )
    for row in range(1, num_items + 1):
        if not np.isnan(table[row]).all():
            yield row, table[row]


def _line_pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                    pair = record["anonymous_cid"], record["emb"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}: line {number}: {type(error).__name__} {error}; "
                        'expected {"anonymous_cid": ..., "emb": [...]}'
                    ) from error
                yield pair


def _parquet_pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow; pip install pyarrow") from error
    with _reading(path), parquet.ParquetFile(path) as file:
        columns = ["anonymous_cid", "emb"]
        if missing := set(columns) - set(file.schema_arrow.names):
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(_VECTORS, columns=columns):
            ids, vectors = batch.column("anonymous_cid"), batch.column("emb")
            yield from zip(ids.to_pylist(), vectors.to_numpy(zero_copy_only=False), strict=True)


def _fill(source: Path, pairs: Iterable, item_ids: Mapping, num_items: int, stem: Path) -> Feature:
    """The vectors of our items, written to `stem`.values.npy as they come; never all in memory."""
    present = np.zeros(num_items + 1, bool)
    table = None
    with atomic_write(f"{stem}.values.npy") as file:
        for path, original, vector in pairs:
            row = original if path.suffix == ".npy" else _row_of(path, item_ids, original)
            if row is None:
                continue
            values = _vector(path, original, vector, None if table is None else table.shape[1])
            if table is None:
                shape = (num_items + 1, len(values))
                table = np.lib.format.open_memmap(file.name, "w+", np.float32, shape)
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))  # else SIGBUS
            table[row] = values
            present[row] = True
        if table is None:
            raise DataError(
                f"{source}: none of its ids is an item of indexer.pkl (text and numbers compare "
                "alike); it is empty or of another data set"
            )
        table.flush()
    return Feature("emb", table.shape[1], table, present=present)


def _row_of(source: Path, item_ids: Mapping, original: Any) -> int | None:
    """Row of an original id, as it is or in the other spelling; None: not one of our items."""
    if not isinstance(original, str | int | float | np.number):
        raise DataError(f"{source}: id {original!r:.60}, expected text or a number")
    row = item_ids.get(original)
    if row is None and isinstance(original, str):
        is_number = original.isdecimal() and len(original) < 20 and str(int(original)) == original
        return item_ids.get(int(original)) if is_number else None
    return item_ids.get(str(original)) if row is None else row


def _vector(source: Path, original: Any, vector: Any, width: int | None) -> np.ndarray:
    """(width,) float32, finite."""
    where = f"{source}: id {original!r}"
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(vector, np.float32)
    except _BAD_VALUE as error:
        raise DataError(f"{where}: {vector!r:.60}, expected a list of numbers") from error
    if values.ndim != 1 or not len(values) or len(values) != (width or len(values)):
        found = "x".join(map(str, values.shape)) or "none"
        raise DataError(f"{where} has width {found}, expected {width or 'a list of numbers'}")
    if not np.isfinite(values).all():
        raise DataError(f"{where}: NaN or Infinity in its vector; correct or remove it")
    return values


# ---- data_dir/.cache: {stem}.{values,offsets,present}.npy count only with their {stem}.json ------


def _cached(
    data_dir: Path,
    prefix: str,
    keys: dict[str, list],
    build: Callable[[dict[str, Path]], dict[str, Feature]],
) -> dict[str, Feature]:
    """Features as memmaps, by id; `build` makes those that are not cached under their key.

    A reader takes no lock. A builder does, so that processes started together build once; it
    removes the key first and writes it last, so that a kill leaves nothing that looks complete.
    """
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


def _complete(folder: Path, prefix: str, keys: dict[str, list], build: Callable) -> dict:
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
    return folder / f"{prefix}-{quote(feature_id, safe='')}"


def _save(stem: Path, key: list, feature: Feature) -> None:
    sizes = {}
    for field in ("values", "offsets", "present"):
        array, target = getattr(feature, field), Path(f"{stem}.{field}.npy")
        if array is None:
            continue
        if not isinstance(array, np.memmap):  # a memmap was written in place, by _fill
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
            arrays[field] = _map(path)
            if os.path.getsize(path) != size:
                return None
        is_current = entry["key"] == key and key_path.read_bytes() == text  # not rebuilt meanwhile
        return Feature(entry["kind"], entry["size"], **arrays) if is_current else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


def _map(path: str | Path) -> np.ndarray:
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
    with suppress(DataError):
        memo = _read_optional(memo_path)
    fresh = {}
    for path in paths:
        with _reading(path):
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
