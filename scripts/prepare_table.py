"""A log of events in one table, in any common form, to a data folder.

A row is an event: who, what, when and, if you like, how. Columns of a table of items and of one of
users become features; what became of each is printed, and flags override it. Needs DuckDB:
pip install -r requirements-data.txt.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from table_vectors import read_vectors

from engine.flags import at_least, between
from files.atomic_io import DataError, exit_code
from files.data_writer import check_folder, write_dataset
from files.sequences import Sequences, gather, gather_ranges, last_two_of
from history_source import time_of
from table_database import database, events_of_each
from table_features import ROLES, make_features
from table_like import read_earlier
from table_log import Events, Log, read_log
from table_sides import names_of, read_table
from table_source import Form, files_of
from table_times import UNITS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

VECTOR_ID = "81"  # the vectors that main.py uses without being asked
CHUNK = 2_000_000  # events of a split in memory at once


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    return exit_code(lambda: convert(args))


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    events_help = "CSV, JSON or Parquet, also compressed: a file, several, a folder, a 'pattern*'"
    parser.add_argument("events", type=Path, nargs="+", help=events_help)
    parser.add_argument("data_dir", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="the data that data_dir holds")
    like_help = "earlier folder: what it knows keeps its number, what is new gets the next ones"
    parser.add_argument("--like", type=Path, metavar="DIR", help=like_help)
    add_event_flags(parser.add_argument_group("events").add_argument)
    add_form_flags(parser.add_argument_group("form of the files").add_argument)
    add_split_flags(parser.add_argument_group("splits").add_argument)
    add_feature_flags(parser.add_argument_group("features").add_argument)
    args = parser.parse_args(argv)
    kinds = {"cuts": "time", "time_targets": "time", "held_out": "user", "seed": "user"}
    for flag, kind in (kinds | {"target_actions": "leave_one_out"}).items():
        if args.split != kind and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} is for --split {kind}")
    if args.item_names and not args.item_features:
        parser.error("--item_names is a column of --item_features: name that table, too")
    if args.time == "none" and (args.time_format or args.time_unit):
        parser.error("--time_format and --time_unit are of a column of times, but --time is none")
    if args.target_actions and not args.action:
        parser.error("--target_actions are types of the column --action: name that, too")
    if args.split_column and args.split != parser.get_default("split"):
        parser.error("--split_column says the splits: leave out --split")
    if args.format == "sequences":
        args.time, args.user, args.item = "none", "user", "item"
    return args


def add_event_flags(flag: Callable) -> None:
    flag("--user", default="user", metavar="COL", help="column of user ids")
    flag("--item", default="item", metavar="COL", help="column of item ids")
    flag("--time", default="timestamp", metavar="COL", help="of numbers or dates; none: no time")
    flag("--time_format", metavar="FORMAT", help="of dates, as of strptime: '%%m/%%d/%%Y %%H:%%M'")
    flag("--time_unit", choices=UNITS, help="of numbers; None: told from their size")
    order_help = (
        "orders a user's events of one time, else as in the file; words after it: their order"
    )
    flag("--order", nargs="+", metavar="COL", help=order_help)
    action_help = "one: its values are the types; several of 0 and 1: the first that is set counts"
    flag("--action", nargs="+", default=[], metavar="COL", help=action_help)
    drop_help = "leave out events without user, item or time; else the first is an error"
    flag("--drop_incomplete", action="store_true", help=drop_help)
    repeated_help = (
        "equal: events equal to the user's one before; items: later events of a user and an item"
    )
    flag("--drop_repeated", choices=("equal", "items"), help=repeated_help)
    flag("--min_user_events", type=at_least(1), default=1, help="drop users with fewer")
    flag("--min_item_events", type=at_least(1), default=1, help="drop items with fewer")


def add_form_flags(flag: Callable) -> None:
    form_help = "sequences: a line is a user and then the items, by blanks, oldest first"
    flag("--format", choices=("auto", "sequences"), default="auto", help=form_help)
    for side in ("", "item_", "user_"):
        what = f"the table of {side[:-1]}s" if side else "the events"
        names_help = f"names of the columns of {what}, where no first line has them"
        flag(f"--{side}header", nargs="+", metavar="COL", help=names_help)
    delimiter_help = "between the fields of the events; ' ': any blanks; None: the first lines tell"
    flag("--delimiter", metavar="TEXT", help=delimiter_help)
    quote_help = "around fields of all tables; none: quotes are characters as any other"
    flag("--quote", default='"', metavar="CHAR", help=quote_help)
    flag("--events_in", metavar="COL", help="column with a list of objects, an event each")
    list_help = "between the events of a row, where its item (and time, action) is a list; none: "
    list_help += "items are no lists, though they look so"
    flag("--list_delimiter", metavar="TEXT", help=list_help)


def add_split_flags(flag: Callable) -> None:
    flag("--split", choices=list(SPLITTERS), default="leave_one_out", help="what is held out")
    column_help = "column that says of each event train, valid or test, instead of --split"
    flag("--split_column", metavar="COL", help=column_help)
    cuts_help = "of --split time: where valid and test begin, as ISO date, Unix seconds or share"
    flag("--cuts", nargs=2, type=cut, default=[0.8, 0.9], metavar="TIME", help=cuts_help)
    targets_help = "of --split time: a user's last event of valid's time is predicted, or each"
    flag("--time_targets", choices=("last", "each"), default="last", help=targets_help)
    actions_help = "action types whose events leave_one_out holds out, with all before as history"
    flag("--target_actions", nargs="+", default=[], metavar="TYPE", help=actions_help)
    share = between(0, 0.5)
    flag("--held_out", type=share, default=0.1, help="of --split user: share, in valid as in test")
    flag("--seed", type=at_least(0), default=42, help="of --split user: decides who is held out")


def add_feature_flags(flag: Callable) -> None:
    for side in ("item", "user"):
        flag(f"--{side}_features", type=Path, metavar="FILE", help=f"table of {side}s")
        key_help = f"its column of {side} ids; else the one named as in the events, or the first"
        flag(f"--{side}_key", metavar="COL", help=key_help)
    for role in ROLES:
        flag(f"--{role}", nargs="+", default=[], metavar="COL", help="columns, or *patterns*")
    flag("--item_names", metavar="COL", help="column of the items' table with text for people")
    flag("--item_vectors", type=Path, metavar="FILE", help=".npz or .parquet: ids, vectors")


def cut(text: str) -> float:
    """An argparse type: a number, or the Unix seconds of an ISO date."""
    try:
        return time_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date, Unix time or share") from error


def unescape(found: re.Match) -> str:
    """A tab, or a character by its number, as a shell cannot easily write it."""
    return found[0].encode().decode("unicode_escape")


def convert(args: argparse.Namespace) -> None:
    check_folder(args.data_dir, args.overwrite)
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise DataError(
            f"{args.data_dir}: a file, expected a folder to write or none; name another"
        )
    for path in (args.item_features, args.user_features, args.item_vectors):
        if path is not None and not path.exists():  # before the log, which may take minutes
            raise DataError(f"{path}: No such file or directory")
    earlier = read_earlier(args.like)
    log_files = [path for place in args.events for path in files_of(place)]
    form = Form(
        args.header,
        re.sub(r"\\(t|x[0-9a-fA-F]{2})", unescape, args.delimiter) if args.delimiter else None,
        "" if args.quote == "none" else args.quote,
        args.format == "sequences",
        args.events_in,
        args.list_delimiter,
    )
    with database(args.data_dir) as connection:
        log = read_log(connection, args, args.data_dir, form, earlier)
        show_actions(connection, log.action_names, len(earlier.action_names))
        spans = split_events(connection, log, args)
        tables = read_tables(connection, args, log_files, form)
        roles = {role: getattr(args, role) for role in ROLES}
        features = make_features(tables, roles, events_of_each(connection, "item"), earlier)
        vectors = {}
        if args.item_vectors:
            temporary = args.data_dir / ".tables"
            arguments = connection, args.item_vectors, log.item_ids, temporary
            vectors[VECTOR_ID] = read_vectors(*arguments)
        write_dataset(
            args.data_dir,
            {split: pieces(log.events.records, span) for split, span in spans.items()},
            item_ids=log.item_ids,
            user_ids=log.user_ids,
            num_action_types=len(log.action_names),
            item_features=features["item"],
            user_features=features["user"],
            item_vectors=vectors,
            item_names=names_of(tables["item"], args.item_names) if args.item_names else None,
            action_names=log.action_names,
            targets={"test": "none"} if args.split == "none" else None,
            overwrite=args.overwrite,
        )
    counts = f"{len(log.user_ids):,} users, {len(log.item_ids):,} items"
    print(f"wrote {args.data_dir}: {counts}, {len(log.events.records):,} events")


def read_tables(
    connection: DuckDBPyConnection, args: argparse.Namespace, log_files: list[Path], form: Form
) -> dict:
    used = {"item": [args.item, args.user], "user": [args.user, args.item]}
    others = [args.time, *args.action, *(args.order or [])[:1]]
    tables = {}
    for side in ("item", "user"):
        path = getattr(args, f"{side}_features")
        if path is not None:
            own = Form(getattr(args, f"{side}_header"), None, form.quote)
            key = getattr(args, f"{side}_key")
            columns = used[side] + others
            tables[side] = read_table(connection, side, path, own, key, log_files, columns)
    return tables


def show_actions(connection: DuckDBPyConnection, names: list[str], num_known: int) -> None:
    if not names:
        print("actions: unknown; if the log has a column of them, name it with --action")
        return
    found = connection.execute(
        "SELECT action, count(*) / sum(count(*)) OVER () FROM sorted GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    shares = [
        f"{'unknown' if k < 0 else f'type {k} is {names[k]!r}'}: {share:.1%}" for k, share in found
    ]
    new = f"; new: {', '.join(names[num_known:])}" if 0 < num_known < len(names) else ""
    print("actions: " + ", ".join(shares) + new)


# ------------------------------------------------------------------------------------------- splits


class Span(NamedTuple):
    """The sequences of a split, as places in the log's records."""

    starts: np.ndarray  # (B,) int64
    ends: np.ndarray  # (B,) int64
    users: np.ndarray  # (B,) int64 re-ids
    is_kept: np.ndarray | None = None  # (E,) bool: other events of a span are left out


def split_events(
    connection: DuckDBPyConnection, log: Log, args: argparse.Namespace
) -> dict[str, Span]:
    events = log.events
    if others := set(args.target_actions) - set(log.action_names):
        known = ", ".join(log.action_names)
        raise DataError(f"--target_actions: no type {', '.join(others)}; there are {known}")
    args.target_types = [log.action_names.index(name) for name in args.target_actions]
    splitter = by_column if args.split_column else SPLITTERS[args.split]
    spans = splitter(connection, events, args)
    for split, span in spans.items():
        print(f"{split}: {len(span.users):,} sequences, {lengths_of(span).sum():,} events")
    needs_targets = args.split == "time" or args.split_column
    if needs_targets and not all(len(spans[name].users) for name in ("valid", "test")):
        times = events.records["timestamp"]
        where = f"in {args.split_column}; expected events of valid and of test that are not first"
        if args.split == "time":
            where = "after a cut of --cuts; expected Unix seconds between "
            where += f"{times.min()} and {times.max()}, or shares"
        raise DataError(f"{args.events[0]}: no event to predict {where}")
    if lengths_of(spans["train"]).max(initial=0) < 2:
        raise DataError(f"{args.events[0]}: no user has two events to train on; split otherwise")
    return spans


def lengths_of(span: Span) -> np.ndarray:
    if span.is_kept is None:
        return span.ends - span.starts
    before = np.concatenate([[0], np.cumsum(span.is_kept)])
    return before[span.ends] - before[span.starts]


def pieces(records: np.ndarray, span: Span) -> Iterator[Sequences]:
    """The sequences of a split, some million events at a time."""
    total = np.cumsum(span.ends - span.starts)
    first = 0
    while first < len(span.users):
        done = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, done + CHUNK, "right")))
        part = slice(first, last)
        piece = gather(records, span.starts[part], span.ends[part], span.users[part])
        if span.is_kept is not None:
            kept = gather_ranges(span.is_kept, span.starts[part], span.ends[part])[0]
            before = np.concatenate([[0], np.cumsum(kept)])
            piece = piece._replace(events=piece.events[kept], offsets=before[piece.offsets])
        yield piece
        first = last


def leave_one_out(_: DuckDBPyConnection, events: Events, args: argparse.Namespace) -> dict:
    """The last event is test, the one before it valid; with --target_actions, of these types.

    Users with fewer than two such events after their first only train.
    """
    starts, ends = events.offsets[:-1], events.offsets[1:]
    users = np.arange(1, len(ends) + 1)
    last, before = ends - 1, ends - 2
    if args.target_types:
        actions = events.records["action_type"]
        last, before = last_two_of(actions, events.offsets, args.target_types)
    is_long, is_there = before > starts, ends > starts
    if few := int((is_there & ~is_long).sum()):
        print(
            f"users: {few:,} of {is_there.sum():,} have too few events to be evaluated, and only "
            "train"
        )
    if later := int((ends - 1 - last)[is_long].sum()):
        print(
            f"events: {later:,} after the last one of --target_actions are in no split; to export "
            "what users want now, convert with --split none --like this folder"
        )
    return {
        "train": chosen(starts, np.where(is_long, before, ends), is_there),
        "valid": Span(starts[is_long], before[is_long] + 1, users[is_long]),
        "test": Span(starts[is_long], last[is_long] + 1, users[is_long]),
    }


def split_by_time(
    connection: DuckDBPyConnection, events: Events, args: argparse.Namespace
) -> dict[str, Span]:
    """Train: events before the first cut; valid, test: users with an event in the time after it.

    Their sequences hold all that came before, too, and the target is the last event of that time;
    with --time_targets each, there is a sequence for each event of it.
    """
    cuts = sorted(quantile(connection, c) if 0 < c < 1 else c for c in args.cuts)
    starts, ends = events.offsets[:-1], events.offsets[1:]
    first, second = (starts + events_of_each(connection, "user", f"time < {cut!r}") for cut in cuts)
    spans = {"train": chosen(starts, first, first > starts)}
    for split, old, end in (("valid", first, second), ("test", second, ends)):
        spans[split] = chosen(starts, end, (end > old) & (end - starts >= 2))
        if args.time_targets == "each":
            begin = np.minimum(np.maximum(old, starts + 1), end)  # the first has no history
            users = np.repeat(np.arange(len(starts)), end - begin)
            places = gather_ranges(np.arange(ends[-1]), begin, end)[0]
            spans[split] = Span(starts[users], places + 1, users + 1)
    return spans


def quantile(connection: DuckDBPyConnection, share: float) -> float:
    """As np.quantile has it: linear between the two times around it."""
    place = share * (connection.execute("SELECT count(*) FROM sorted").fetchone()[0] - 1)
    values = connection.execute(
        f"SELECT time FROM sorted ORDER BY time LIMIT 2 OFFSET {int(place)}"
    ).fetchall()
    low, high = values[0][0], values[-1][0]
    return float(low + (place - int(place)) * (high - low))


def split_by_user(
    _: DuckDBPyConnection, events: Events, args: argparse.Namespace
) -> dict[str, Span]:
    """Valid and test: a share each of the users with two events or more, whole; train: the rest."""
    starts, ends = events.offsets[:-1], events.offsets[1:]
    users = np.random.default_rng(args.seed).permutation(np.flatnonzero(ends - starts >= 2))
    count = round(args.held_out * len(users))
    part = np.where(ends > starts, 0, -1)
    part[users[:count]], part[users[count : 2 * count]] = 1, 2
    names = ("train", "valid", "test")
    return {name: chosen(starts, ends, part == k) for k, name in enumerate(names)}


def split_none(_: DuckDBPyConnection, events: Events, args: argparse.Namespace) -> dict[str, Span]:
    """Train and test: every user, whole; what comes next in test is not known."""
    everyone = chosen(events.offsets[:-1], events.offsets[1:], np.diff(events.offsets) > 0)
    return {"train": everyone, "test": everyone}


def by_column(_: DuckDBPyConnection, events: Events, args: argparse.Namespace) -> dict[str, Span]:
    """Train: its events; valid, test: a sequence for each of their events, with all before it."""
    users = np.repeat(np.arange(1, len(events.offsets)), np.diff(events.offsets))
    starts = events.offsets[users - 1]
    parts = events.parts if len(events.parts) else np.zeros(len(users), np.int8)
    is_train = parts == 0
    has_train = np.bincount(users[is_train], minlength=len(events.offsets))[1:] > 0
    spans = {
        "train": chosen(events.offsets[:-1], events.offsets[1:], has_train)._replace(
            is_kept=is_train
        )
    }
    for k, split in enumerate(("valid", "test"), 1):
        targets = np.flatnonzero((parts == k) & (np.arange(len(users)) > starts))
        spans[split] = Span(starts[targets], targets + 1, users[targets])
    return spans


def chosen(starts: np.ndarray, ends: np.ndarray, is_chosen: np.ndarray) -> Span:
    return Span(starts[is_chosen], ends[is_chosen], np.flatnonzero(is_chosen) + 1)


SPLITTERS: dict[str, Callable[..., dict[str, Span]]] = {
    "leave_one_out": leave_one_out,
    "time": split_by_time,
    "user": split_by_user,
    "none": split_none,
}


if __name__ == "__main__":
    sys.exit(main())
