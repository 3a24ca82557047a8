"""A log of events in one table (CSV, JSON lines or Parquet; .gz too) to a data folder.

A row is an event: who, what, when and, if you like, how. Columns of a table of items and of one of
users become features; what became of each is printed, and flags override it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from atomic_io import DataError
from data_folder import EVENT_DTYPE, Sequences, gather
from data_writer import Column, leave_one_out, write_dataset
from flags import at_least, between

ROWS = 50_000  # read at once
MISSING = {"", "nan", "NaN", "null", "NULL", "None"}
# A log whose median time reaches the k-th limit is not in unit k: 1e11 seconds are the year 5138.
TIME_UNITS, TIME_LIMITS = ("seconds", "milliseconds", "microseconds"), (1e11, 1e14)
MAX_ACTION_TYPES = 1000  # a column with more values than this holds no types
DELIMITERS = "|;, "  # of lists
ROLES = ("sparse", "array", "continual", "drop")
SKEWED = 30  # a positive number whose largest is this many medians becomes log(1 + x)
VECTOR_ID = "81"  # the vectors that main.py uses without being asked


class Rows(NamedTuple):
    """Some rows of a table, one after the other."""

    path: Path
    lines: Sequence[int]  # where each ends in the file, from 1; in Parquet its number
    records: Sequence[dict[str, Any]]  # column -> value


class Texts:
    """A column of text: row k holds texts[codes[k]]; codes count up in order of appearance."""

    def __init__(self, values: Sequence[str] = ()):
        self._code_of: dict[str, int] = {}
        self._parts: list[np.ndarray] = []
        self.extend(values)

    def extend(self, values: Sequence[str]) -> None:
        of = self._code_of
        self._parts.append(np.array([of.setdefault(v, len(of)) for v in values], np.int32))

    @property
    def codes(self) -> np.ndarray:
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    @property
    def texts(self) -> list[str]:
        return list(self._code_of)


class Log(NamedTuple):
    """The events as their file has them."""

    users: Texts
    items: Texts
    actions: np.ndarray  # (E,) int32, -1 unknown
    action_names: list[str]  # of type 0, 1, ...
    times: np.ndarray  # (E,) float64, in the file's unit
    ties: np.ndarray  # (E,) float64, orders a user's events of one time


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    try:
        convert(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("events", type=Path, help=".csv, .tsv, .jsonl or .parquet; .gz behind it")
    parser.add_argument("data_dir", type=Path, help="folder to write")
    log = parser.add_argument_group("events").add_argument
    log("--user", default="user", metavar="COL", help="column of user ids")
    log("--item", default="item", metavar="COL", help="column of item ids")
    log("--time", default="timestamp", metavar="COL", help="of numbers or ISO dates; none: no time")
    log("--order", metavar="COL", help="orders a user's events of one time; else as in the file")
    action_help = "one: its values are the types; several of 0 and 1: the first that is set counts"
    log("--action", nargs="+", default=[], metavar="COL", help=action_help)
    log("--header", nargs="+", metavar="COL", help="names for a CSV file without a line of them")
    log("--min_user_events", type=at_least(1), default=1, help="drop users with fewer")
    log("--min_item_events", type=at_least(1), default=1, help="drop items with fewer")

    split = parser.add_argument_group("splits").add_argument
    split("--split", choices=list(SPLITTERS), default="leave_one_out", help="what is held out")
    cuts_help = "of --split time: where valid and test begin, as ISO date, Unix seconds or share"
    split("--cuts", nargs=2, type=time_of, default=[0.8, 0.9], metavar="TIME", help=cuts_help)
    share = between(0, 0.5)
    split("--held_out", type=share, default=0.1, help="of --split user: share, in valid as in test")
    split("--seed", type=at_least(0), default=42, help="of --split user: decides who is held out")

    features = parser.add_argument_group("features").add_argument
    for side in ("item", "user"):
        features(f"--{side}_features", type=Path, metavar="FILE", help=f"table of {side}s")
        key_help = f"its column of {side} ids; else the one named as in the events, or the first"
        features(f"--{side}_key", metavar="COL", help=key_help)
    for role in ROLES:
        features(f"--{role}", nargs="+", default=[], metavar="COL", help="columns, or *patterns*")
    features("--item_names", metavar="COL", help="column of the items' table with text for people")
    features("--item_vectors", type=Path, metavar="FILE", help=".npz or .parquet: ids, vectors")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    log = read_log(args)
    kept = frequent(log.users.codes, log.items.codes, args.min_user_events, args.min_item_events)
    user_ids, users = number(log.users, kept)
    item_ids, items = number(log.items, kept)
    lost = len(log.users.texts) - len(user_ids), len(log.items.texts) - len(item_ids)
    print(
        f"{args.events.name}: {len(kept):,} events; dropped {(~kept).sum():,}, "
        f"of {lost[0]:,} users and {lost[1]:,} items with too few"
    )
    if not kept.any():
        raise DataError(f"{args.events}: no event is left; lower --min_user_events, _item_events")
    order = np.lexsort((log.ties[kept], log.times[kept], users))  # stable
    events = np.empty(len(order), EVENT_DTYPE)
    events["item_id"] = items[order] + 1
    events["action_type"] = log.actions[kept][order]
    events["timestamp"] = seconds(log.times[kept][order], args.time)
    show_actions(events["action_type"], log.action_names)
    offsets = np.concatenate([[0], np.bincount(users).cumsum()])
    splits = SPLITTERS[args.split](events, offsets, args)
    for split, part in splits.items():
        print(f"{split}: {len(part.user_ids):,} sequences, {len(part.events):,} events")
    if np.diff(splits["train"].offsets).max(initial=0) < 2:
        raise DataError(f"{args.events}: no user has two events to train on; split otherwise")
    tables = read_tables(args, item_ids, user_ids)
    features = make_features(tables, {role: getattr(args, role) for role in ROLES})
    vectors = {}
    if args.item_vectors:
        vectors[VECTOR_ID] = read_vectors(args.item_vectors, item_ids)
    write_dataset(
        args.data_dir,
        splits,
        item_ids=item_ids,
        user_ids=user_ids,
        num_action_types=len(log.action_names),
        item_features=features["item"],
        user_features=features["user"],
        item_vectors=vectors,
        item_names=names_of(tables["item"], args.item_names) if args.item_names else None,
    )
    counts = f"{len(user_ids):,} users, {len(item_ids):,} items, {len(events):,} events"
    print(f"wrote {args.data_dir}: {counts}")


# ------------------------------------------------------------------------------------------- tables


def read_rows(path: Path, columns: Sequence[str], header: Sequence[str] | None) -> Iterator[Rows]:
    """A table's rows, ROWS at a time, with a progress bar; no `columns`: all of them."""
    is_parquet = path.suffix == ".parquet"
    with reading(path):
        yield from parquet_rows(path, columns) if is_parquet else text_rows(path, header)


def check_columns(rows: Rows, columns: Sequence[str]) -> None:
    absent = [c for c in columns if not any(c in record for record in rows.records)]
    if absent:
        found = ", ".join(rows.records[0])
        raise DataError(f"{rows.path}: no column {', '.join(absent)}; there are {found}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading `path` may raise into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        what = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DataError(f"{path}: {what}; it is missing, damaged or in another format") from error


def text_rows(path: Path, header: Sequence[str] | None) -> Iterator[Rows]:
    is_json = path.name.removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson"))
    with open(path, "rb") as raw, progress(path, path.stat().st_size, "B") as bar:
        plain = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        file = io.TextIOWrapper(plain, "utf-8-sig", newline="")
        records = json_records(path, file) if is_json else csv_records(path, file, header)
        while chunk := list(itertools.islice(records, ROWS)):
            bar.update(raw.tell() - bar.n)
            yield Rows(path, *zip(*chunk, strict=True))


def progress(path: Path, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=path.name, unit=unit, unit_scale=True, leave=False, disable=None)


def csv_records(
    path: Path, file: TextIO, header: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record); the first line decides what separates the fields."""
    first = file.readline()
    delimiter = max(",\t;|", key=first.count)
    lines = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
    try:
        names = header or next(lines)
        if not first or len(set(names)) < len(names):
            raise DataError(f"{path}: line 1 is {first!r:.60}, expected the names of the columns")
        for fields in lines:
            if len(fields) == len(names):
                yield lines.line_num, dict(zip(names, fields, strict=True))
            elif fields:
                raise DataError(
                    f"{path}: line {lines.line_num} has {len(fields)} fields, expected "
                    f"{len(names)} ({', '.join(names)}) separated by {delimiter!r}"
                )
    except csv.Error as error:
        raise DataError(f"{path}: line {lines.line_num}: {error}; correct its quotes") from error


def json_records(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                record = json.loads(text)
                if "\\ud" in text.lower():  # half a surrogate pair could not be written again
                    json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {line}: {error}; expected a JSON object") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}: line {line} is {text!r:.60}, expected a JSON object")
            yield line, record


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Rows]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow; pip install pyarrow") from error
    with parquet.ParquetFile(path) as file, progress(path, file.metadata.num_rows, "row") as bar:
        first = 1
        for batch in file.iter_batches(ROWS, columns=columns or None):
            yield Rows(path, range(first, first + len(batch)), batch.to_pylist())
            first += len(batch)
            bar.update(len(batch))


def texts_of(rows: Rows, column: str) -> list[str]:
    """The column as text; missing values as ""."""
    values = [record.get(column) for record in rows.records]
    texts = [value if type(value) is str else plain_text(value) for value in values]
    return ["" if text in MISSING else text for text in texts]


def plain_text(value: Any) -> str:
    """None ends as a word of MISSING."""
    if isinstance(value, list):
        return DELIMITERS[0].join(map(plain_text, value))
    return str(int(value) if isinstance(value, bool) else value)


def parsed(rows: Rows, column: str, parse: Callable[[str], Any], expected: str) -> list:
    """The column's values; where `parse` raises ValueError, the line is refused."""
    values = []
    for line, text in zip(rows.lines, texts_of(rows, column), strict=True):
        try:
            values.append(parse(text))
        except ValueError as error:
            raise DataError(
                f"{rows.path}: line {line}: {column} is {text!r:.60}, expected {expected}"
            ) from error
    return values


# ------------------------------------------------------------------------------------------- events


def read_log(args: argparse.Namespace) -> Log:
    users, items, types = Texts(), Texts(), Texts()
    actions, times, ties = [], [], []
    has_times = args.time != "none"
    columns = [args.user, args.item, *args.action, *[args.time] * has_times]
    columns += [args.order] if args.order else []
    for rows in read_rows(args.events, columns, args.header):
        if not times:
            check_columns(rows, columns)
        users.extend(parsed(rows, args.user, not_missing, "an id"))
        items.extend(parsed(rows, args.item, not_missing, "an id"))
        zeros, dates = [0.0] * len(rows.records), "a number or an ISO date"
        times.append(parsed(rows, args.time, time_of, dates) if has_times else zeros)
        ties.append(parsed(rows, args.order, finite, "a number") if args.order else zeros)
        if len(args.action) == 1:
            types.extend(texts_of(rows, args.action[0]))
        else:
            actions.append(strongest(rows, args.action))
    if not times:
        raise DataError(f"{args.events}: no events in it")
    if len(args.action) == 1:
        ranks, names = ranked(types.texts)
        actions = [ranks[types.codes] - 1]
    else:
        names = ["none", *reversed(args.action)] if args.action else []
    if len(names) > MAX_ACTION_TYPES:
        found = f"{len(names):,} different values in {args.action[0]}"
        raise DataError(f"{args.events}: {found}, expected at most {MAX_ACTION_TYPES:,} types")
    actions, times, ties = map(np.concatenate, (actions, times, ties))
    return Log(users, items, actions, names, times, ties)


def not_missing(text: str) -> str:
    if not text:
        raise ValueError("no id")
    return text


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def time_of(text: str) -> float:
    """A number as it is, or the Unix seconds of an ISO date or time, in UTC unless it says so."""
    try:
        return finite(text)
    except ValueError:
        moment = datetime.fromisoformat(text.removesuffix(" UTC"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def is_set(text: str) -> bool:
    truths = {"": False, "false": False, "true": True}
    return truths[text.lower()] if text.lower() in truths else finite(text) != 0


def strongest(rows: Rows, columns: Sequence[str]) -> np.ndarray:
    """Per row n if the first of n columns is set, else n - 1 if the second is, ..., 0 if none.

    -1 where there are no columns.
    """
    types = np.full(len(rows.records), 0 if columns else -1, np.int32)
    for k, column in enumerate(reversed(columns), 1):
        types[np.array(parsed(rows, column, is_set, "0 or 1"))] = k
    return types


def ranked(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """1, 2, ... for each distinct text, in order of number if all are numbers; 0 for a missing."""
    known = [text for text in texts if text]
    known.sort(key=float if are_numbers(known) else None)
    rank = {text: k for k, text in enumerate(known, 1)}
    return np.array([rank.get(text, 0) for text in texts], np.int32), known


def are_numbers(texts: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(text)) for text in texts)
    except ValueError:
        return False


def frequent(users: np.ndarray, items: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    """(E,) bool, the largest set of events in which each user and item has so many at least."""
    kept, before = np.ones(len(users), bool), -1
    while kept.sum() != before:
        before = kept.sum()
        for ids, least in ((users, min_user), (items, min_item)):
            kept &= np.bincount(ids[kept], minlength=ids.max() + 1)[ids] >= least
    return kept


def number(column: Texts, kept: np.ndarray) -> tuple[list, np.ndarray]:
    """The ids that are left, rising, whole numbers if all of them are; and each event's, from 0."""
    codes, texts = column.codes[kept], column.texts
    ids = {code: texts[code] for code in np.unique(codes).tolist()}
    if all(re.fullmatch(r"0|[1-9][0-9]{0,17}", text) for text in ids.values()):
        ids = {code: int(text) for code, text in ids.items()}
    order = sorted(ids, key=ids.__getitem__)
    place = np.zeros(len(texts), np.int32)
    place[order] = np.arange(len(order))
    return [ids[code] for code in order], place[codes]


def seconds(times: np.ndarray, name: str) -> np.ndarray:
    """Whole Unix seconds; the unit is told from the size."""
    unit = sum(np.median(times) >= limit for limit in TIME_LIMITS)
    values = np.floor(times / 1000**unit).astype(np.int64)
    first, last = (np.datetime64(int(value), "s") for value in (values.min(), values.max()))
    if name != "none":
        print(f"time: {name} in {TIME_UNITS[unit]}, {first} to {last}")
    return values


def show_actions(actions: np.ndarray, names: Sequence[str]) -> None:
    shares = np.bincount(actions + 1, minlength=len(names) + 1) / len(actions)
    types = zip(
        ["unknown", *(f"{k} = {name}" for k, name in enumerate(names))], shares, strict=True
    )
    print("actions: " + ", ".join(f"{name} {share:.1%}" for name, share in types if share))


# ------------------------------------------------------------------------------------------- splits


def split_by_time(
    events: np.ndarray, offsets: np.ndarray, args: argparse.Namespace
) -> dict[str, Sequences]:
    """Train: events before the first cut; valid, test: users with an event in the time behind.

    Their sequences hold all that came before, too, and the target is the last event of that time.
    """
    times, starts = events["timestamp"], offsets[:-1]
    cuts = sorted(np.quantile(times, c) if 0 < c < 1 else c for c in args.cuts)
    users = np.repeat(np.arange(len(starts)), np.diff(offsets))
    first, second = (starts + np.bincount(users[times < c], minlength=len(starts)) for c in cuts)
    splits = {"train": chosen(events, starts, first, first > starts)}
    for split, before, end in (("valid", first, second), ("test", second, offsets[1:])):
        splits[split] = chosen(events, starts, end, (end > before) & (end - starts >= 2))
    return splits


def split_by_user(
    events: np.ndarray, offsets: np.ndarray, args: argparse.Namespace
) -> dict[str, Sequences]:
    """Valid and test: a share each of the users with two events or more, whole; train: the rest."""
    starts, ends = offsets[:-1], offsets[1:]
    users = np.random.default_rng(args.seed).permutation(np.flatnonzero(ends - starts >= 2))
    count = round(args.held_out * len(users))
    part = np.zeros(len(starts), np.int8)
    part[users[:count]], part[users[count : 2 * count]] = 1, 2
    names = ("train", "valid", "test")
    return {name: chosen(events, starts, ends, part == k) for k, name in enumerate(names)}


def chosen(
    events: np.ndarray, starts: np.ndarray, ends: np.ndarray, is_chosen: np.ndarray
) -> Sequences:
    return gather(events, starts[is_chosen], ends[is_chosen], np.flatnonzero(is_chosen) + 1)


SPLITTERS: dict[str, Callable[..., dict[str, Sequences]]] = {
    "leave_one_out": lambda events, offsets, _: leave_one_out(events, offsets),
    "time": split_by_time,
    "user": split_by_user,
}


# ----------------------------------------------------------------------------------------- features


def read_tables(
    args: argparse.Namespace, item_ids: list, user_ids: list
) -> dict[str, dict[str, Texts]]:
    tables: dict[str, dict[str, Texts]] = {"item": {}, "user": {}}
    if args.item_features:
        tables["item"] = read_table(args.item_features, args.item_key, args.item, item_ids)
    if args.user_features:
        tables["user"] = read_table(args.user_features, args.user_key, args.user, user_ids)
    return tables


def read_table(path: Path, key: str | None, event_column: str, ids: list) -> dict[str, Texts]:
    """The columns of a table but its key, a row for each of the ids; an id's last row counts."""
    place = {str(i): k for k, i in enumerate(ids)}
    records: list[dict[str, Any]] = [{}] * len(ids)
    num_rows = 0
    for rows in read_rows(path, (), None):
        first = rows.records[0]
        key = key or (event_column if event_column in first else next(iter(first)))
        check_columns(rows, [key])
        num_rows += len(rows.records)
        for text, record in zip(texts_of(rows, key), rows.records, strict=True):
            if text in place:
                records[place[text]] = record
    found = sum(map(bool, records))
    if not found:
        raise DataError(f"{path}: column {key} holds no id of the events; name it with --*_key")
    print(
        f"{path.name}: {found:,} of {len(ids):,} ids are in column {key}; dropped "
        f"{num_rows - found:,} rows, of no event or with a later row of the same id"
    )
    names, rows = dict.fromkeys(itertools.chain(*records)), Rows(path, (), records)
    return {name: Texts(texts_of(rows, name)) for name in names if name != key}


def names_of(table: dict[str, Texts], name: str) -> list[str]:
    if name not in table:
        raise DataError(f"--item_names: no column {name}; there are {', '.join(table) or 'none'}")
    texts = table[name].texts
    return [texts[code] for code in table[name].codes]


def make_features(
    tables: dict[str, dict[str, Texts]], roles: dict[str, list[str]]
) -> dict[str, dict[str, Column]]:
    """A feature per column that is worth one; what became of each column is shown."""
    names = [name for table in tables.values() for name in table]
    for pattern in itertools.chain(*roles.values()):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(
                f"no column is called {pattern}; there are {', '.join(names) or 'none'}"
            )
    features: dict[str, dict[str, Column]] = {}
    for side, table in tables.items():
        features[side], kept = {}, {}
        for name, column in table.items():
            asked = [r for r in ROLES if any(fnmatchcase(name, p) for p in roles[r])]
            content = column.codes.tobytes()
            role, detail = (asked[0], "as asked") if asked else guess(column, kept.get(content))
            if role != "drop":
                kept[content] = name
                is_taken = side == "user" and name in features["item"]
                feature_id = f"user_{name}" if is_taken else name
                features[side][feature_id], detail = BUILDERS[role](name, column)
            print(f"  {side}  {name:24} {role:10} {detail}")
    return features


def guess(column: Texts, twin: str | None) -> tuple[str, str]:
    """The role of a column, and the reason to drop it; `twin` has a value for each of its own."""
    known = [text for text in column.texts if text]
    num_known = int((~missing(column)).sum())
    if len(column.texts) < 2:
        return "drop", "constant"
    if are_numbers(known) and not all(float(text).is_integer() for text in known):
        return "continual", ""
    role = "array" if delimiter_of(known) else "sparse"
    if role == "sparse" and len(known) > num_known / 2:
        return "drop", f"{len(known):,} different values in {num_known:,} rows"
    return ("drop", f"a copy of {twin}") if twin else (role, "")


def missing(column: Texts) -> np.ndarray:
    """(n,) bool."""
    return np.array([not text for text in column.texts], bool)[column.codes]


def delimiter_of(texts: Sequence[str]) -> str | None:
    """What separates lists: it leaves no more pieces than texts; a blank, only whole numbers."""
    for delimiter in DELIMITERS:
        pieces = {piece for text in texts for piece in pieces_of(text, delimiter)}
        is_list = len(pieces) <= len(texts) and any(delimiter in text for text in texts)
        if is_list and (delimiter != " " or all(map(str.isdecimal, pieces))):
            return delimiter
    return None


def pieces_of(text: str, delimiter: str) -> list[str]:
    return [piece.strip() for piece in text.split(delimiter) if piece.strip()]


def sparse_column(_: str, column: Texts) -> tuple[Column, str]:
    ranks, known = ranked(column.texts)
    detail = f"{len(known):,} values, {1 - missing(column).mean():.1%} known"
    return Column("sparse", ranks[column.codes].tolist()), detail


def array_column(_: str, column: Texts) -> tuple[Column, str]:
    texts = column.texts
    used = [d for d in DELIMITERS if any(d in text for text in texts)]
    delimiter = delimiter_of(texts) or (used or DELIMITERS)[0]
    lists = [pieces_of(text, delimiter) for text in texts]
    pieces = list(dict.fromkeys(itertools.chain(*lists)))
    rank = dict(zip(pieces, ranked(pieces)[0].tolist(), strict=True))
    values = [[rank[piece] for piece in lists[code]] for code in column.codes]
    mean = sum(map(len, values)) / len(values)
    return Column("array", values), f"{len(pieces):,} values, {mean:.1f} per row, by {delimiter!r}"


def continual_column(name: str, column: Texts) -> tuple[Column, str]:
    """Numbers; a missing one is the median, and skewed ones become log(1 + x)."""
    bad = [text for text in column.texts if text and not are_numbers([text])]
    if bad or not any(column.texts):
        raise DataError(f"column {name}: {bad[:1]} is no number; choose another role for it")
    is_missing = missing(column)
    values = np.array([float(text or 0) for text in column.texts])[column.codes]
    median = np.median(values[~is_missing])
    values[is_missing] = median
    detail = f"{values.min():.4g} to {values.max():.4g}, median {median:.4g}"
    if is_missing.any():
        detail += f", {is_missing.sum():,} missing read as that"
    if values.min() >= 0 and values.max() > SKEWED * median:
        values, detail = np.log1p(values), f"log(1 + x), x {detail}"
    return Column("continual", values.tolist()), detail


BUILDERS = {"sparse": sparse_column, "array": array_column, "continual": continual_column}


def read_vectors(path: Path, item_ids: list) -> np.ndarray:
    """(X, W) float32, NaN for items without a vector."""
    with reading(path):
        ids, vectors = parquet_vectors(path) if path.suffix == ".parquet" else npz_vectors(path)
    row_of = {str(i): row for row, i in enumerate(ids)}
    rows = np.array([row_of.get(str(i), -1) for i in item_ids])
    found = np.flatnonzero(rows >= 0)
    if not len(found):
        raise DataError(f"{path}: none of its {len(ids):,} ids is an item of the events")
    table = np.full((len(rows), vectors.shape[1]), np.nan, np.float32)
    table[found] = vectors[rows[found]]
    bad = found[~np.isfinite(table[found]).all(1)]
    if len(bad):
        raise DataError(f"{path}: the vector of {item_ids[bad[0]]} is not finite; correct it")
    print(f"{path.name}: {len(found):,} of {len(rows):,} items have a vector of {table.shape[1]}")
    return table


def npz_vectors(path: Path) -> tuple[list, np.ndarray]:
    """The rows of the file's one float matrix, and their ids: its one array of that length."""
    with open(path, "rb") as file:
        content = np.load(file)
        arrays = {"": content} if isinstance(content, np.ndarray) else dict(content.items())
    matrices = [a for a in arrays.values() if a.ndim == 2 and a.dtype.kind == "f"]
    ids = [a for a in arrays.values() if a.ndim == 1 and [len(a)] == [len(m) for m in matrices]]
    if len(ids) != 1:
        found = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items())
        raise DataError(f"{path}: {found}; expected ids [n] and float vectors [n, width]")
    return ids[0].tolist(), matrices[0]


def parquet_vectors(path: Path) -> tuple[list, np.ndarray]:
    records = [record for rows in read_rows(path, (), None) for record in rows.records]
    if not records:
        raise DataError(f"{path}: no rows in it")
    is_list = {name: isinstance(value, list) for name, value in records[0].items()}
    if sorted(is_list.values()) != [False, True]:
        raise DataError(f"{path}: {list(is_list)}, expected a column of ids and one of vectors")
    id_column, column = sorted(is_list, key=is_list.get)
    return [r[id_column] for r in records], np.array([r[column] for r in records], np.float32)


if __name__ == "__main__":
    sys.exit(main())
