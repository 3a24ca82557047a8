"""A log of events in one table (CSV, JSON lines or Parquet; .gz too) to a data folder.

A row is an event: who, what, when and, if you like, how. Columns of a table of items and of one of
users become features; what became of each is printed, and flags override it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine.flags import at_least, between
from files.atomic_io import DataError, exit_code
from files.data_writer import check_folder, leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE, Sequences, gather
from table_features import ROLES, make_features, names_of, read_table, read_vectors
from table_source import (
    NOT_AVAILABLE,
    Rows,
    Texts,
    are_numbers,
    check_columns,
    finite,
    parsed,
    ranked,
    read_rows,
    texts_of,
    time_of,
)

# A log whose median time reaches the k-th limit is not in unit k: 1e11 seconds are the year 5138.
TIME_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
TIME_LIMITS = (1e11, 1e14, 1e17)
MAX_ACTION_TYPES = 1000  # a column with more values than this holds no types
VECTOR_ID = "81"  # the vectors that main.py uses without being asked


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
    return exit_code(lambda: convert(args))


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("events", type=Path, help=".csv, .tsv, .jsonl or .parquet, also .gz")
    parser.add_argument("data_dir", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="the data that data_dir holds")
    log = parser.add_argument_group("events").add_argument
    log("--user", default="user", metavar="COL", help="column of user ids")
    log("--item", default="item", metavar="COL", help="column of item ids")
    log("--time", default="timestamp", metavar="COL", help="of numbers or ISO dates; none: no time")
    log("--order", metavar="COL", help="orders a user's events of one time; else as in the file")
    action_help = "one: its values are the types; several of 0 and 1: the first that is set counts"
    log("--action", nargs="+", default=[], metavar="COL", help=action_help)
    log("--header", nargs="+", metavar="COL", help="names for a CSV file without a line of them")
    drop_help = "leave out events without user, item or time; else the first is an error"
    log("--drop_incomplete", action="store_true", help=drop_help)
    log("--min_user_events", type=at_least(1), default=1, help="drop users with fewer")
    log("--min_item_events", type=at_least(1), default=1, help="drop items with fewer")

    split = parser.add_argument_group("splits").add_argument
    split("--split", choices=list(SPLITTERS), default="leave_one_out", help="what is held out")
    cuts_help = "of --split time: where valid and test begin, as ISO date, Unix seconds or share"
    split("--cuts", nargs=2, type=cut, default=[0.8, 0.9], metavar="TIME", help=cuts_help)
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
    args = parser.parse_args(argv)
    for flag, kind in {"cuts": "time", "held_out": "user", "seed": "user"}.items():
        if args.split != kind and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} is for --split {kind}")
    if args.item_names and not args.item_features:
        parser.error("--item_names is a column of --item_features: name that table, too")
    return args


def convert(args: argparse.Namespace) -> None:
    check_folder(args.data_dir, args.overwrite)
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise DataError(
            f"{args.data_dir}: a file, expected a folder to write or none; name another"
        )
    for path in (args.item_features, args.user_features, args.item_vectors):
        if path is not None and not path.exists():  # before the log, which may take minutes
            raise DataError(f"{path}: No such file or directory")
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
    events["timestamp"] = seconds(log.times[kept][order], args)
    show_actions(events["action_type"], log.action_names)
    is_twin = (events[1:] == events[:-1]) & (users[order][1:] == users[order][:-1])
    if is_twin.any():
        print(f"repeated: {is_twin.sum():,} events equal the one before them; all are kept")
    offsets = np.concatenate([[0], np.bincount(users).cumsum()])
    splits = SPLITTERS[args.split](events, offsets, args)
    for split, part in splits.items():
        print(f"{split}: {len(part.user_ids):,} sequences, {len(part.events):,} events")
    if args.split == "time" and not all(len(splits[name].user_ids) for name in ("valid", "test")):
        raise DataError(
            f"{args.events}: no event to predict after a cut of --cuts; expected Unix seconds "
            f"between {events['timestamp'].min()} and {events['timestamp'].max()}, or shares"
        )
    if np.diff(splits["train"].offsets).max(initial=0) < 2:
        raise DataError(f"{args.events}: no user has two events to train on; split otherwise")
    tables = {
        "item": read_table(args.item_features, args.item_key, args.item, item_ids),
        "user": read_table(args.user_features, args.user_key, args.user, user_ids),
    }
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
        action_names=log.action_names,
        overwrite=args.overwrite,
    )
    counts = f"{len(user_ids):,} users, {len(item_ids):,} items, {len(events):,} events"
    print(f"wrote {args.data_dir}: {counts}")


# ------------------------------------------------------------------------------------------- events


def read_log(args: argparse.Namespace) -> Log:
    users, items, types = Texts(), Texts(), Texts()
    actions, times, ties, num_dropped = [], [], [], 0
    time_like_first = one_kind_of_time()
    has_times, remark = args.time != "none", "; --drop_incomplete leaves out events without"
    columns = [args.user, args.item, *args.action, *[args.time] * has_times]
    columns += [args.order] if args.order else []
    for rows in read_rows(args.events, columns, args.header):
        if not times:
            check_columns(rows, columns)
            if others := [name for name in rows.records[0] if name not in columns]:
                print(f"{args.events.name}: columns not used: {', '.join(others)}")
        if args.drop_incomplete:
            total, needed = len(rows.records), [args.user, args.item, *[args.time] * has_times]
            rows = complete(rows, needed)
            num_dropped += total - len(rows.records)
        users.extend(parsed(rows, args.user, not_missing, "an id" + remark))
        items.extend(parsed(rows, args.item, not_missing, "an id" + remark))
        zeros, dates = [0.0] * len(rows.records), f"a number or an ISO date, all alike{remark}"
        times.append(parsed(rows, args.time, time_like_first, dates) if has_times else zeros)
        ties.append(parsed(rows, args.order, finite, "a number") if args.order else zeros)
        if len(args.action) == 1:
            types.extend(texts_of(rows, args.action[0]))
        else:
            actions.append(strongest(rows, args.action))
    if num_dropped:
        print(f"{args.events.name}: left out {num_dropped:,} events without user, item or time")
    if not users.texts:
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


def complete(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows in which all of these columns have a value."""
    texts = zip(*(texts_of(rows, column) for column in columns), strict=True)
    kept = [k for k, values in enumerate(texts) if not any(map(is_missing, values))]
    lines, records = ([column[k] for k in kept] for column in (rows.lines, rows.records))
    return Rows(rows.path, lines, records)


def not_missing(text: str) -> str:
    if is_missing(text):
        raise ValueError("no id")
    return text


def is_missing(text: str) -> bool:
    """Of an id, a time or a number."""
    return text in ("", NOT_AVAILABLE)


def one_kind_of_time() -> Callable[[str], float]:
    """`time_of`, for numbers alone or dates alone: the numbers may be milliseconds."""
    is_number = None

    def parse(text: str) -> float:
        nonlocal is_number
        value = time_of(text)
        if is_number is None:
            is_number = are_numbers([text])
        elif is_number != are_numbers([text]):
            raise ValueError("of another kind")
        return value

    return parse


def cut(text: str) -> float:
    """An argparse type: `time_of`."""
    try:
        return time_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date, Unix time or share") from error


def is_set(text: str) -> bool:
    truths = {"": False, "false": False, "true": True}
    return truths[text.lower()] if text.lower() in truths else finite(text) != 0


def strongest(rows: Rows, columns: Sequence[str]) -> np.ndarray:
    """Per row n if the first of n columns is set, else n - 1 if the second is, ..., 0 if none.

    -1 where there are no columns.
    """
    types = np.full(len(rows.records), 0 if columns else -1, np.int32)
    for k, column in enumerate(reversed(columns), 1):
        types[np.array(parsed(rows, column, is_set, "0 or 1"), bool)] = k
    return types


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


def seconds(times: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Whole Unix seconds; the unit is told from the size.

    Raises:
        DataError: the times are dates without dashes, or one of them is far from all others.
    """
    unit = sum(np.median(times) >= limit for limit in TIME_LIMITS)
    values = np.floor(times / 1000**unit)
    if are_dates(times):
        raise DataError(
            f"{args.events}: {args.time} is {times[0]:.0f} and so on, a date in digits alone; "
            "expected Unix times or ISO dates such as 2024-01-03"
        )
    farthest = np.abs(values).argmax()
    if abs(values[farthest]) >= TIME_LIMITS[0]:
        raise DataError(
            f"{args.events}: {args.time} {times[farthest]:.0f} among {TIME_UNITS[unit]}: no time "
            "of this age; correct or remove the row"
        )
    values = values.astype(np.int64)
    first, last = (np.datetime64(int(value), "s") for value in (values.min(), values.max()))
    if args.time != "none":
        print(f"time: {args.time} in {TIME_UNITS[unit]}, {first} to {last}")
    return values


def are_dates(times: np.ndarray) -> bool:
    """Whether all numbers read as year, month and day: 20240103."""
    years, days = np.divmod(times, 10_000)
    months, days = np.divmod(days, 100)
    parts = ((years, 1900, 2099), (months, 1, 12), (days, 1, 31))
    return all(((low <= part) & (part <= high)).all() for part, low, high in parts)


def show_actions(actions: np.ndarray, names: Sequence[str]) -> None:
    if not names:
        print("actions: unknown; if the log has a column of them, name it with --action")
        return
    shares = np.bincount(actions + 1, minlength=len(names) + 1) / len(actions)
    types = zip(
        ["unknown", *(f"{k} = {name}" for k, name in enumerate(names))], shares, strict=True
    )
    print("actions: " + ", ".join(f"{name} {share:.1%}" for name, share in types if share))


# ------------------------------------------------------------------------------------------- splits


def split_by_time(
    events: np.ndarray, offsets: np.ndarray, args: argparse.Namespace
) -> dict[str, Sequences]:
    """Train: events before the first cut; valid, test: users with an event in the time after it.

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


if __name__ == "__main__":
    sys.exit(main())
