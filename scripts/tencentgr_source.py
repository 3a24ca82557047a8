"""The files of TencentGR as the competition ships them -> blocks of checked sequences.

JSON lines (seq.jsonl, predict_seq.jsonl, predict_set.jsonl) or the folders of the Parquet release.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from tqdm import tqdm

from files.atomic_io import DataError
from files.safe_pickle import load_pickle
from files.sequences import EVENT_DTYPE
from table_database import NO_DOWNLOADS, first_line, path_text

try:
    from orjson import loads as fast_loads
except ImportError:
    fast_loads = json.loads

ACTIONS = ["exposure", "click", "conversion"]
SAME_AS_ITEM = "111"  # a feature with a value per item: it says what the item's id says
BLOCK_BYTES = 4 << 20  # of JSON lines, parsed at once
BLOCK_ROWS = 10_000  # of Parquet, parsed at once
RECORD = "[user, item, user features, item features, action, time]"
# An event's item features: they follow null user features and precede an action and a time. A brace
# in a text spoils what is left of the line, which is then parsed whole.
ITEM_FEATURES = re.compile(rb"null, ?(\{[^}]*\})(?=, ?(?:\d|null), ?\d)")
FAULTS = (ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError)


class Limits(NamedTuple):
    """Re-ids run from 1 to these."""

    num_users: int
    num_items: int


class Block(NamedTuple):
    """Some users. A user is a re-id, or as text an original id."""

    events: np.ndarray  # (E,) EVENT_DTYPE: known items only, each user's in order of time
    lengths: np.ndarray  # (S,) int64, at least 1
    users: list[int | str]  # (S,)
    profiles: list[tuple[int | str, str]]  # user, JSON text of its features
    kinds: dict[str, set[type]]  # user feature -> types of its values
    counts: Counter  # what there was, by description
    left_out: Sequence[int | str | None] = ()  # users without an event of a known item
    num_lines: int = 0
    # Items and the CRC-32 of the features that stand in a line, each pair once: those of
    # item_feat_dict.json count, but they should not differ.
    item_sums: np.ndarray = np.empty((0, 2), np.int64)  # (n, 2)


class LineError(Exception):
    """Its args: lines of the block before it, its first byte in the file, what is wrong."""


# ------------------------------------------------------------------------------------- JSON lines


def read_blocks(
    folder: Path, name: str, limits: Limits, num_workers: int, trust_pickle: bool
) -> Iterator[Block]:
    """The sequences and profiles of `name`.jsonl, or of the Parquet release."""
    if (folder / name).is_dir():
        return chain(
            parquet_sequences(folder / name, limits), parquet_profiles(folder / "user_feat", limits)
        )
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise DataError(f"{path}: no such file, nor a folder {name} of Parquet files")
    return line_blocks(path, limits, num_workers, trust_pickle)


def line_blocks(
    path: Path, limits: Limits, num_workers: int, trust_pickle: bool
) -> Iterator[Block]:
    """Blocks of lines in the order of the file, parsed by `num_workers` processes."""
    size, num_lines, num_users = path.stat().st_size, 0, 0
    jobs = [(path, at, at + BLOCK_BYTES, limits) for at in range(0, size, BLOCK_BYTES)]
    with (
        # Ctrl-C goes to all processes of a terminal; this one alone has something to say.
        ProcessPoolExecutor(
            num_workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        ) as pool,
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            for block in (pool.map if num_workers > 1 else map)(read_lines, jobs):
                yield block
                num_lines += block.num_lines
                num_users += block.counts["lines"]
                bar.update(min(BLOCK_BYTES, size - bar.n))
        except LineError as error:
            number, at, reason = error.args
            raise DataError(
                f"{path}: line {num_lines + number + 1}, from byte {at}: {reason}; "
                f"expected a list of {RECORD}"
            ) from error
    offsets_path = path.with_name(f"{path.stem}_offsets.pkl")
    if offsets_path.exists():
        offsets = load_pickle(offsets_path, trust=trust_pickle)
        if not isinstance(offsets, Sized) or len(offsets) != num_users:
            raise DataError(
                f"{offsets_path}: does not list {num_users} lines, as {path.name} has; one of the "
                "two is truncated or of another set (without offsets, every line is read)"
            )


def read_lines(job: tuple[Path, int, int, Limits]) -> Block:
    """The lines of a file that begin in a range of bytes."""
    path, start, end, limits = job
    starts, lines = [], []
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (at := file.tell()) < end and (line := file.readline()):
            starts.append(at)
            lines.append(line)
    with suppress(*FAULTS):
        parts = [ITEM_FEATURES.split(line) for line in lines]  # every other one: features
        short = [b"null,null".join(rest[::2]) for rest in parts]
        return parse_lines(short, fast_loads, limits, [rest[1::2] for rest in parts])
    with suppress(*FAULTS):
        return parse_lines(lines, json.loads, limits)
    for number, (at, line) in enumerate(zip(starts, lines, strict=True)):
        try:
            parse_lines([line], json.loads, limits)
        except FAULTS as error:
            raise LineError(number, at, reason_of(error)) from error
    raise AssertionError(f"{path}: lines that are bad together and good alone")


def parse_lines(
    lines: list[bytes],
    loads: Callable[[bytes], Any],
    limits: Limits,
    features_of: Sequence[list[bytes]] | None = None,
) -> Block:
    """The block of these lines; blank ones are passed over.

    `features_of`: of each line the texts of the items' features, which were cut out.

    Raises:
        any of FAULTS: a line is not what it should be.
    """
    counts, kinds = Counter(), {}
    users, lengths, events, profiles, sums = [], [], [], [], set()
    for line, texts in zip(lines, features_of or repeat(()), strict=False):
        if not line.strip():
            continue
        records = loads(line)
        user = user_of(records, limits)
        seen = [record for record in records if record[1] is not None]
        features = [record[2] for record in records if record[2] is not None]
        counts["lines"] += 1
        counts["lines without a profile"] += not features
        if features:
            counts["profiles before the last record"] += records[-1][2] is None
            profiles.append((user, features_text(features[-1], counts, kinds)))
        if len(seen) + len(features) != len(records):
            nothing = sum(record[1] is None and record[2] is None for record in records)
            counts["records of neither item nor profile, left out"] += nothing
        users.append(user)
        lengths.append(len(seen))
        events += seen
        if len(texts) == len(seen):  # else it is not known whose they are
            sums |= set(zip([record[1] for record in seen], map(crc32, texts), strict=True))
    columns = [[record[k] for record in events] for k in (1, 4, 5)]
    block = make_block(users, lengths, columns, limits.num_items, counts)
    block = block._replace(profiles=profiles, kinds=kinds, num_lines=len(lines))
    return block._replace(item_sums=np.array(list(sums), np.int64).reshape(-1, 2))


def user_of(records: list, limits: Limits) -> int | str | None:
    """The one user of a line's records, None where there are none."""
    if type(records) is not list or set(map(len, records)) - {6}:
        raise ValueError("not a list of records of six fields")
    users = {record[0] for record in records} - {None}
    if len(users) != bool(records):
        raise ValueError(f"{len(users)} users, expected one")
    return checked_user(users.pop(), limits) if users else None


def checked_user(user: Any, limits: Limits) -> int | str:
    is_known = type(user) is int and 1 <= user <= limits.num_users
    if not is_known and (type(user) is not str or not user):
        raise ValueError(f"user {user!r:.40}, expected 1..{limits.num_users} or text")
    return user


def features_text(features: dict, counts: Counter, kinds: dict[str, set[type]]) -> str:
    """JSON of a profile's or an item's features, with 0 for text: a value not seen in training."""
    clean = {}
    for i, value in features.items():
        values = value if type(value) is list else [value]
        types = kinds.setdefault(i, set())
        if num_texts := sum(type(v) is str for v in values):
            counts["text values of features, read as 0"] += num_texts
            values = [0 if type(v) is str else v for v in values]
        elif value is not None:
            types.add(type(value))
        if i != SAME_AS_ITEM:
            clean[i] = values if type(value) is list else values[0]
    return json.dumps(clean, allow_nan=False)


def make_block(
    users: list, lengths: list[int], columns: list[list], num_items: int, counts: Counter
) -> Block:
    """A block without profiles. `columns` are the events' items, actions and times, unchecked."""
    items, actions, times = columns
    item_ids = whole_numbers("item", items, 1, 2**63 - 1)
    events = np.empty(len(items), EVENT_DTYPE)
    events["item_id"] = np.where(item_ids <= num_items, item_ids, 0)
    codes = [-1 if action is None else action for action in actions]
    events["action_type"] = whole_numbers("action type", codes, -1, len(ACTIONS) - 1)
    events["timestamp"] = whole_numbers("time", times, 0, 2**63 - 1)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    steps, is_same_row = np.diff(events["timestamp"]), np.diff(rows) == 0
    num_unsorted = len(np.unique(rows[1:][is_same_row & (steps < 0)]))
    if num_unsorted:  # a stable sort: equal times stay in the order of the file
        events = events[np.lexsort((events["timestamp"], rows))]
    is_known = events["item_id"] > 0
    known_lengths = np.bincount(rows[is_known], minlength=len(lengths))
    counts["events"] += len(events)
    counts["events of items that indexer.pkl lacks, left out"] += int((~is_known).sum())
    counts["events without an action type"] += int((events["action_type"] < 0).sum())
    counts["events at the time of the event before"] += int((is_same_row & (steps == 0)).sum())
    counts["users out of the order of time, sorted"] += num_unsorted
    counts["users without an event of a known item, left out"] += int((known_lengths == 0).sum())
    left_out = [user for user, n in zip(users, known_lengths, strict=True) if not n]
    users = [user for user, n in zip(users, known_lengths, strict=True) if n]
    lengths = known_lengths[known_lengths > 0]
    return Block(events[is_known], lengths, users, [], {}, counts, left_out)


def whole_numbers(name: str, values: list, low: int, high: int) -> np.ndarray:
    """(E,) int64; a ValueError names the first that is no whole number in low..high."""
    if set(map(type, values)) <= {int} and (
        not values or (low <= min(values) and max(values) <= high)
    ):
        return np.array(values, np.int64)
    k = next(k for k, v in enumerate(values) if type(v) is not int or not low <= v <= high)
    raise ValueError(f"event {k + 1} has {name} {values[k]!r:.40}, expected {low}..{high}")


def reason_of(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos} of it"
    return str(error) if type(error) is ValueError else f"{type(error).__name__} {error!s:.200}"


def has_candidates(folder: Path) -> bool:
    return (folder / "predict_set.jsonl").exists() or (folder / "candidate").is_dir()


def candidates(folder: Path) -> Iterator[tuple[int, int, dict]]:
    """Retrieval id, original item id and features of each candidate."""
    path, at = folder / "predict_set.jsonl", 0
    if not path.exists():
        yield from parquet_candidates(folder / "candidate")
        return
    with open(path, "rb") as file:
        for number, line in enumerate(tqdm(file, desc=path.name, disable=None), 1):
            try:
                record = json.loads(line)
                candidate = (
                    whole_id(record["retrieval_id"]),
                    whole_id(record["creative_id"]),
                    dict(record["features"]),
                )
            except FAULTS as error:
                raise DataError(
                    f"{path}: line {number}, from byte {at}: {reason_of(error)}; "
                    'expected {"creative_id": ..., "retrieval_id": ..., "features": {...}}'
                ) from error
            yield candidate
            at += len(line)


def whole_id(value: Any) -> int:
    """The value as an unsigned integer; text of digits is one."""
    number = int(value) if type(value) is str and value.isdecimal() else value
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"id {value!r:.40}, expected 0..2^63 - 1")
    return number


# ------------------------------------------------------------------------------------ the Parquet


def parquet_batches(
    folder: Path, columns: str = "*", expected: str = "a Parquet file"
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Some thousand rows at a time, as dicts, each batch with its file's name.

    `columns`: of SQL, after SELECT. `expected`: what a message says of a file without them.
    """
    try:
        import duckdb
    except ImportError as error:
        raise DataError(
            f"{folder}: Parquet is read with DuckDB; pip install -r requirements-data.txt"
        ) from error
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DataError(f"{folder}: no *.parquet file there")
    with duckdb.connect(config=NO_DOWNLOADS) as connection:
        for path in tqdm(paths, desc=folder.name, unit="file", disable=None):
            try:
                relation = f"read_parquet({path_text(path)})"
                found = connection.execute(f"SELECT {columns} FROM {relation}")
                names = [name for name, *_ in found.description]
                while rows := found.fetchmany(BLOCK_ROWS):
                    yield path, [dict(zip(names, row, strict=True)) for row in rows]
            except duckdb.Error as error:
                raise DataError(f"{path}: {first_line(error):.200}; expected {expected}") from error


def parquet_rows(folder: Path, parse: Callable[[dict], Any]) -> Iterator[Any]:
    """`parse` of each row, a dict without the columns that are null."""
    for path, rows in parquet_batches(folder):
        for row in rows:
            try:
                value = parse({name: v for name, v in row.items() if v is not None})
            except FAULTS as error:
                raise DataError(f"{path}: {reason_of(error)} in {row!r:.200}") from error
            yield value


def parquet_sequences(folder: Path, limits: Limits) -> Iterator[Block]:
    names = "item_id", "action_type", "timestamp"
    expected = f"user_id and seq, a list of {', '.join(names)}"
    lists = ", ".join(f"[event.{name} FOR event IN seq] AS {name}" for name in names)
    for path, rows in parquet_batches(folder, f"user_id, {lists}", expected):
        try:
            users = [checked_user(row["user_id"], limits) for row in rows]
            columns = [list(chain.from_iterable(row[name] or () for row in rows)) for name in names]
            lengths = [len(row["item_id"] or ()) for row in rows]
            counts = Counter({"lines": len(users)})
            block = make_block(users, lengths, columns, limits.num_items, counts)
        except FAULTS as error:
            raise DataError(f"{path}: {reason_of(error)}; expected {expected}") from error
        yield block


def parquet_profiles(folder: Path, limits: Limits) -> Iterator[Block]:
    """Blocks without sequences."""
    counts, kinds = Counter(), {}
    empty = np.empty(0, EVENT_DTYPE), np.empty(0, np.int64), []

    def parse(row: dict) -> tuple[int | str, str]:
        user = checked_user(row.pop("user_id"), limits)
        return user, features_text(row, counts, kinds)

    profiles = parquet_rows(folder, parse)
    while chunk := list(islice(profiles, BLOCK_ROWS)):
        yield Block(*empty, chunk, kinds, counts)
        counts.clear()


def parquet_items(folder: Path) -> Iterator[tuple[int, str]]:
    """Re-id and JSON text of the features of each item."""
    return parquet_rows(
        folder, lambda row: (int(row.pop("item_id")), features_text(row, Counter(), {}))
    )


def parquet_candidates(folder: Path) -> Iterator[tuple[int, int, dict]]:
    def parse(row: dict) -> tuple[int, int, dict]:
        retrieval_id = whole_id(row.pop("retrieval_id"))
        original = whole_id(row.pop("creative_id" if "creative_id" in row else "item_id"))
        return retrieval_id, original, {name: seen_value(v) for name, v in row.items()}

    return parquet_rows(folder, parse)


def seen_value(value: Any) -> Any:
    """A feature of a candidate; text where its struct says that training lacks the value."""
    if type(value) is not dict:
        return value
    is_cold = value["cold_start"] if "cold_start" in value else value["is_str"]
    return "" if is_cold else int(value["feature_value"])
