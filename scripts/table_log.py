"""A log of events in a DuckDB database: checked, its ids numbered, sorted, then on disk as records.

Sizes of the log stay in the database and in files; memory takes what is of the size of the users.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from files.atomic_io import DataError
from files.sequences import EVENT_DTYPE
from table_database import Table, check_columns, count, events_of_each, place, reading, refuse, text
from table_like import Earlier, show_new
from table_sides import are_numbers, ranked
from table_source import Form, open_table
from table_times import NUMBER, Times, read_times

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MAX_ACTION_TYPES = 1000  # a column with more values than this holds no types
MANY_ACTION_TYPES = 50  # a column of numbers with more values than this may hold no types
CHUNK = 2_000_000  # events at once in memory
LARGE = 5_000_000  # events whose temporary files are worth a line
DISK_BYTES = 50  # per event of temporary files, measured by benchmarks/convert_table.py
ROUNDED = r"[0-9]\.[0-9]+[eE]\+?[0-9]+|[1-9][0-9]{16,}\.0*"  # a number that has lost digits
WHOLE = r"0|[1-9][0-9]{0,17}"
PARTS = {"train": 0, "valid": 1, "val": 1, "validation": 1, "dev": 1, "test": 2}


class Events(NamedTuple):
    """The events in order: of users, and of time within each."""

    records: np.ndarray  # (E,) EVENT_DTYPE, in a file
    offsets: np.ndarray  # (S + 1,) int64; user k + 1 has records offsets[k] to offsets[k + 1] - 1
    parts: np.ndarray  # (E,) int8: 0 train, 1 valid, 2 test as the log says; empty if it does not


class Log(NamedTuple):
    """What a folder needs to know of the events."""

    events: Events
    user_ids: list  # original ids in the order of the re-ids
    item_ids: list
    action_names: list[str]  # of type 0, 1, ...


def read_log(
    connection: DuckDBPyConnection,
    args: argparse.Namespace,
    folder: Path,
    form: Form,
    earlier: Earlier,
) -> Log:
    """The events; the tables `users` and `items` (id, re_id) stay in the database.

    What `earlier` knows keeps its numbers, and has them even if it is not in this log.

    Raises:
        DataError: a value is not what it should be, or something is doubtful.
    """
    table = open_table(connection, args.events, folder, form)
    read_texts(connection, table, args, form)
    num_rows = count(connection, "log")
    if num_rows >= LARGE:
        size = num_rows * DISK_BYTES / 1e9
        print(f"temporary files: about {size:.1f} GB in {folder}", flush=True)
    check_complete(connection, table, args)
    if not count(connection, "log"):
        raise DataError(f"{table.paths[0]}: no events in it")
    times = read_times(connection, table, args)
    if args.split_column:
        words = ", ".join(map(text, PARTS))
        is_other = f"coalesce(lower(part), '') NOT IN ({words})"
        refuse(connection, table, is_other, "part", args.split_column, "train, valid or test")
    types, names = action_types(connection, table, args, earlier.action_names)
    ties = tie_expression(connection, table, args)
    for side in ("user", "item"):
        give_codes(connection, table, args, side)
    make_events(connection, times, types, ties)
    keep_wanted(connection, table, args)
    ids = [give_re_ids(connection, side, earlier) for side in ("user", "item")]
    sort_events(connection, times)
    if args.time != "none":
        times.show(connection, args)
    return Log(write_records(connection, folder), *ids, names)


# ---------------------------------------------------------------------------- reading


def read_texts(
    connection: DuckDBPyConnection, table: Table, args: argparse.Namespace, form: Form
) -> None:
    """The table `log`: user, item, time, tie, part, and actions a0, a1, ... as text or NULL."""
    named = {"user": args.user, "item": args.item}
    named |= {"time": args.time} if args.time != "none" else {}
    named |= {"tie": args.order[0]} if args.order else {}
    named |= {"part": args.split_column} if args.split_column else {}
    named |= {f"a{k}": column for k, column in enumerate(args.action)}
    if not table.columns:
        raise DataError(f"{table.paths[0]}: no events in it")
    check_columns(table, list(named.values()))
    if others := [column for column in table.columns if column not in named.values()]:
        print(f"{table.name}: columns not used: {', '.join(others)}")
    texts = {name: table.columns[column] for name, column in named.items()}
    texts |= {"place": "filename"} if len(table.paths) > 1 else {}
    if table.texts:
        broken = " OR ".join(
            f"coalesce(contains({value}, chr(10)), false)" for value in table.texts
        )
        texts["is_broken"] = f"({broken})"
    whole = ", ".join(f"{value} AS {name}" for name, value in texts.items())
    with reading(table.paths[0], table):
        rows = f"(SELECT {whole} FROM {table.relation})"
        rows = unfolded(connection, table, rows, list(texts), named, form)
        columns = ", ".join(
            name if name in ("place", "is_broken") else f"known({name}) AS {name}" for name in texts
        )
        connection.execute(f"CREATE TABLE log AS SELECT {columns} FROM {rows}")
    if table.texts and count(connection, "log WHERE is_broken"):
        path, number = place(connection, table, "is_broken")
        raise DataError(
            f"{path}: event {number} has a quote that is closed in a later line alone, expected a "
            "row a line; double its quotes, and quote the field, or --quote none"
        )


def unfolded(
    connection: DuckDBPyConnection,
    table: Table,
    rows: str,
    names: Sequence[str],
    named: dict[str, str],
    form: Form,
) -> str:
    """The relation with a row per event, where a row's columns are lists of a user's events."""
    if form.list_delimiter == "none":
        return rows
    sample = f"(SELECT trimmed(item) AS item FROM {rows} WHERE item IS NOT NULL LIMIT 1000)"
    bracketed = "item[1] = '[' AND item[-1] = ']'"
    literal, one, other = connection.execute(
        f"SELECT coalesce(bool_and({bracketed}), false), "
        f"any_value(item) FILTER (WHERE {bracketed} AND contains(item, ',')), "
        f"any_value(item) FILTER (WHERE NOT ({bracketed})) FROM {sample}"
    ).fetchone()
    if one and other:
        raise DataError(
            f"{table.paths[0]}: {named['item']} holds lists such as {one!r:.60} and single values "
            f"such as {other!r:.60}; write lists in all rows, or in none"
        )
    if not literal and form.list_delimiter is None:
        refuse_lists(connection, table, sample, named["item"])
        return rows
    if literal:
        is_list = "coalesce(bool_and(trimmed({0})[1] = '['), false)"
        split = (
            """from_json(CASE WHEN json_valid({0}) THEN {0} ELSE replace({0}, '''', '"') END, """
        )
        split += """'["VARCHAR"]')"""
    else:
        separator = text(form.list_delimiter)
        split = f"string_split(trimmed({{0}}), {separator})"
        lengths = f"len({split}) = len({split.format('item')})"  # a date may have blanks, too
        is_list = f"coalesce(bool_or(contains({{0}}, {separator})) AND bool_and({lengths}), false)"
    values = [n for n in names if n not in ("user", "place", "is_broken")]
    claims = ", ".join(is_list.format(name) for name in values)
    found = connection.execute(f"SELECT {claims} FROM (FROM {rows} LIMIT 1000)").fetchone()
    lists = [name for name, is_one in zip(values, found, strict=True) if is_one or name == "item"]
    expressions = {n: split.format(n) if n in lists else n for n in names}
    arrays = ", ".join(f"{value} AS {name}" for name, value in expressions.items())
    rows = f"(SELECT {arrays} FROM {rows})"
    for name in lists:
        differ = f"{rows} WHERE coalesce(len({name}), 0) <> coalesce(len(item), 0)"
        if number := count(connection, differ):
            raise DataError(
                f"{table.paths[0]}: {number:,} rows have lists of different lengths in "
                f"{named['item']} and {named[name]}, expected a value of each for every event"
            )
    print(f"{table.name}: {', '.join(named[n] for n in lists)} hold lists, an event per element")
    single = ", ".join(f"unnest({n}) AS {n}" if n in lists else n for n in names)
    return f"(SELECT {single} FROM {rows})"


def refuse_lists(connection: DuckDBPyConnection, table: Table, sample: str, column: str) -> None:
    """Ids that are lists of ids by a delimiter would be taken for items of their own."""
    for separator in (" ", "|", ";", ","):
        pieces = (
            f"SELECT item, unnest(string_split(item, {text(separator)})) AS piece FROM {sample}"
        )
        whole, parts, longest, example = connection.execute(
            f"SELECT count(DISTINCT item), count(DISTINCT piece), "
            f"count(DISTINCT item) FILTER (WHERE contains(item, {text(separator)})), "
            f"max(item) FILTER (WHERE contains(item, {text(separator)})) FROM ({pieces})"
        ).fetchone()
        if longest > whole / 2 and parts <= whole:
            raise DataError(
                f"{table.paths[0]}: {column} holds lists such as {example!r:.60}, expected an item "
                f"per row; --list_delimiter {separator!r} reads an event per element, "
                "--list_delimiter none each as one id"
            )


def check_complete(connection: DuckDBPyConnection, table: Table, args: argparse.Namespace) -> None:
    columns = {"user": args.user, "item": args.item}
    columns |= {"time": args.time} if args.time != "none" else {}
    is_missing = {name: f"({name} IS NULL OR {name} = 'NA')" for name in columns}
    if args.drop_incomplete:
        condition = " OR ".join(is_missing.values())
        if number := count(connection, f"log WHERE {condition}"):
            connection.execute(
                f"CREATE TABLE complete AS SELECT * FROM log WHERE NOT ({condition}) ORDER BY rowid"
            )
            connection.execute("DROP TABLE log; ALTER TABLE complete RENAME TO log")
            print(f"{table.name}: left out {number:,} events without user, item or time")
        return
    remark = "; --drop_incomplete leaves out events without"
    for name, column in columns.items():
        what = "an id" if name != "time" else "a number or a date, all alike"
        refuse(connection, table, is_missing[name], name, column, what + remark)


def action_types(
    connection: DuckDBPyConnection,
    table: Table,
    args: argparse.Namespace,
    earlier: list[str],
) -> tuple[str, list[str]]:
    """An expression of an event's action type, and the types' names, the earlier ones first."""
    if not args.action:
        if earlier:
            print(
                f"warning: {args.like} has the action types {', '.join(earlier)}, but no --action "
                "names their column here: all actions are unknown"
            )
        return "-1", earlier
    if len(args.action) > 1:
        names = list(dict.fromkeys([*earlier, "none", *reversed(args.action)]))
        cases = []
        for k, column in enumerate(args.action):
            is_set = f"CASE lower(a{k}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE "
            is_set += f"CASE WHEN regexp_full_match(a{k}, '{NUMBER}') THEN a{k}::DOUBLE END END"
            bad = f"a{k} IS NOT NULL AND ({is_set}) IS NULL"
            refuse(connection, table, bad, f"a{k}", column, "0 or 1")
            cases.append(f"WHEN ({is_set}) <> 0 THEN {names.index(column)}")
        return f"CASE {' '.join(cases)} ELSE {names.index('none')} END", names
    distinct = "SELECT DISTINCT a0 FROM log WHERE a0 IS NOT NULL ORDER BY a0"
    found = [name for (name,) in connection.execute(distinct).fetchall()]
    where = f"{table.paths[0]}: "
    if len(found) > MAX_ACTION_TYPES:
        raise DataError(
            f"{where}{len(found):,} different values in {args.action[0]}, expected at most "
            f"{MAX_ACTION_TYPES:,} types"
        )
    types, names = ranked(found, earlier)
    if len(names) > MANY_ACTION_TYPES and are_numbers(names):
        print(
            f"warning: {args.action[0]} holds {len(names):,} different numbers ({names[0]}, "
            f"{names[1]}, ...), a type for each; is it a column of types?"
        )
    connection.execute("CREATE TABLE types (name VARCHAR, type INTEGER)")
    connection.executemany(
        "INSERT INTO types VALUES (?, ?)", list(zip(found, (types - 1).tolist(), strict=True))
    ) if found else None
    return "coalesce((SELECT type FROM types WHERE name = a0), -1)", names


def tie_expression(connection: DuckDBPyConnection, table: Table, args: argparse.Namespace) -> str:
    if not args.order:
        return "0"
    column, *words = args.order
    if words:
        listed = "[" + ", ".join(map(text, words)) + "]"
        refuse(
            connection,
            table,
            f"NOT coalesce(list_contains({listed}, tie), false)",
            "tie",
            column,
            f"one of {', '.join(words)}",
        )
        return f"list_position({listed}, tie)"
    bad = f"NOT coalesce(regexp_full_match(tie, '{NUMBER}'), false)"
    refuse(
        connection, table, bad, "tie", column, "a number, or words after its name in their order"
    )
    return "tie::DOUBLE"


# ---------------------------------------------------------------------------- ids


def give_codes(
    connection: DuckDBPyConnection, table: Table, args: argparse.Namespace, side: str
) -> None:
    """The table `user_codes` or `item_codes`: text, id, code. 5.0 is 5 where all ids are whole."""
    column, path = getattr(args, side), table.paths[0]
    distinct = f"(SELECT DISTINCT {side} AS text FROM log)"
    is_whole, has_points, rounded = connection.execute(
        f"SELECT bool_and(regexp_full_match(text, '[0-9]+(\\.0*)?')), "
        f"count(*) FILTER (WHERE contains(text, '.')), "
        f"min(text) FILTER (WHERE regexp_full_match(text, '{ROUNDED}')) FROM {distinct}"
    ).fetchone()
    if rounded is not None:
        raise DataError(
            f"{path}: {column} holds {rounded}, a number that has lost digits as a float; write "
            "ids as text or as whole numbers"
        )
    value = "regexp_replace(text, '\\.0*$', '')" if is_whole and has_points else "text"
    if is_whole and has_points:
        print(f"{column}: {has_points:,} ids are written as 5.0 is; they are read as 5")
    connection.execute(
        f"CREATE TABLE {side}_codes AS SELECT text, id, dense_rank() OVER (ORDER BY id)::INTEGER "
        f"AS code FROM (SELECT text, {value} AS id FROM {distinct})"
    )
    bare = "regexp_replace(regexp_replace(id, '^0+([0-9])', '\\1'), '\\.0*$', '')"
    number, first, second = connection.execute(
        f"SELECT coalesce(sum(n - 1), 0), min(a), arg_min(b, a) FROM (SELECT count(*) AS n, "
        f"min(id) AS a, max(id) AS b FROM (SELECT DISTINCT id FROM {side}_codes) "
        f"WHERE regexp_full_match(id, '[0-9.]+') GROUP BY {bare} HAVING count(*) > 1)"
    ).fetchone()
    if number:
        print(
            f"warning: {number:,} ids in {column} differ from others by zeros or by .0 alone, the "
            f"first: {first!r} and {second!r}"
        )


def make_events(connection: DuckDBPyConnection, times: Times, types: str, ties: str) -> None:
    """The table `events` in place of `log`: numbers alone, and the event's place in the file."""
    columns = connection.execute("DESCRIBE log").fetchall()
    part = "part" if any(name == "part" for name, *_ in columns) else "'train'"
    parts = " ".join(f"WHEN '{name}' THEN {k}" for name, k in PARTS.items())
    connection.execute(
        f"CREATE TABLE events AS SELECT u.code AS user, i.code AS item, ({types})::INTEGER AS "
        f"action, {times.value} AS time, {ties} AS tie, log.rowid AS row, "
        f"(CASE lower({part}) {parts} END)::TINYINT AS part FROM log "
        "JOIN user_codes u ON log.user = u.text JOIN item_codes i ON log.item = i.text"
    )
    connection.execute("DROP TABLE log")


def keep_wanted(connection: DuckDBPyConnection, table: Table, args: argparse.Namespace) -> None:
    """Drop repeated events if asked, then users and items with too few, until all have enough."""
    if args.drop_repeated:
        before = count(connection, "events")
        order = "ORDER BY time, tie, row"
        condition = f"row_number() OVER (PARTITION BY user, item {order}) = 1"
        if args.drop_repeated == "equal":
            window = f"OVER (PARTITION BY user {order})"
            condition = " OR ".join(
                f"{name} IS DISTINCT FROM lag({name}) {window}"
                for name in ("item", "action", "time")
            )
        replace_events(connection, f"SELECT * FROM events QUALIFY {condition}")
        print(f"dropped {before - count(connection, 'events'):,} repeated events")
    total, before = count(connection, "events"), -1
    lost = [count(connection, f"(SELECT DISTINCT {side} FROM events)") for side in ("user", "item")]
    limits = {"user": args.min_user_events, "item": args.min_item_events}
    while max(limits.values()) > 1 and count(connection, "events") != before:
        before = count(connection, "events")
        for side, least in limits.items():
            enough = f"SELECT {side} FROM events GROUP BY {side} HAVING count(*) >= {least}"
            replace_events(connection, f"SELECT * FROM events WHERE {side} IN ({enough})")
    left = count(connection, "events")
    lost = [
        n - count(connection, f"(SELECT DISTINCT {side} FROM events)")
        for n, side in zip(lost, ("user", "item"), strict=True)
    ]
    print(
        f"{table.name}: {total:,} events; dropped {total - left:,}, of {lost[0]:,} users and "
        f"{lost[1]:,} items with too few"
    )
    if not left:
        raise DataError(
            f"{table.paths[0]}: no event is left; lower --min_user_events, _item_events"
        )


def replace_events(connection: DuckDBPyConnection, query: str) -> None:
    connection.execute(f"CREATE TABLE kept AS {query}")
    connection.execute("DROP TABLE events; ALTER TABLE kept RENAME TO events")


def give_re_ids(connection: DuckDBPyConnection, side: str, earlier: Earlier) -> list:
    """The table `users` or `items`: code, id (text), re_id from 1; the ids in this order.

    Those of the earlier folder come first, the code of one that is not in the log is NULL. New ones
    are rising, as whole numbers if all of the log are.
    """
    known = earlier.ids[side]
    connection.execute(
        f"CREATE TABLE kept AS SELECT DISTINCT code, id FROM {side}_codes "
        f"WHERE code IN (SELECT {side} FROM events)"
    )
    is_whole = connection.execute(
        f"SELECT bool_and(regexp_full_match(id, '{WHOLE}')) FROM kept"
    ).fetchone()[0]
    key = "id::BIGINT" if is_whole else "id"
    connection.execute(
        "CREATE TABLE earlier AS SELECT unnest($ids::VARCHAR[]) AS known, "
        "generate_subscripts($ids::VARCHAR[], 1) AS number",
        {"ids": list(map(str, known))},
    )
    new = f"row_number() OVER (PARTITION BY number IS NULL ORDER BY {key}) + {len(known)}"
    connection.execute(
        f"CREATE TABLE {side}s AS SELECT code, coalesce(id, known) AS id, "
        f"coalesce(number, {new})::INTEGER AS re_id FROM kept FULL JOIN earlier ON id = known "
        f"ORDER BY re_id; DROP TABLE kept; DROP TABLE earlier; DROP TABLE {side}_codes"
    )
    key = key if not any(isinstance(i, str) for i in known) else "id"
    added = f"SELECT {key} AS id FROM {side}s WHERE re_id > {len(known)} ORDER BY re_id"
    ids = [*known, *connection.execute(added).fetchnumpy()["id"].tolist()]
    show_new(earlier, side, len(ids), count(connection, f"{side}s WHERE code IS NULL"))
    return ids


# ---------------------------------------------------------------------------- order


def sort_events(connection: DuckDBPyConnection, times: Times) -> None:
    """The table `sorted` in place of `events`: re-ids and seconds, in order of users and time."""
    connection.execute(
        f"CREATE TABLE sorted AS SELECT u.re_id AS user, i.re_id AS item, action, "
        f"{times.seconds} AS time, part FROM events JOIN users u ON events.user = u.code "
        "JOIN items i ON events.item = i.code ORDER BY u.re_id, events.time, tie, row"
    )
    connection.execute("DROP TABLE events")


def write_records(connection: DuckDBPyConnection, folder: Path) -> Events:
    """The table `sorted` as records in a file; a memory map of it."""
    counts = events_of_each(connection, "user")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    num_events, num_repeated = int(offsets[-1]), 0
    records = np.memmap(folder / ".tables" / "events", EVENT_DTYPE, "w+", shape=(num_events,))
    has_parts = connection.execute("SELECT max(part) > 0 FROM sorted").fetchone()[0]
    parts = np.zeros(num_events if has_parts else 0, np.int8)
    for start in range(0, num_events, CHUNK):
        columns = connection.execute(
            f"SELECT user, item, action, time, part FROM sorted "
            f"WHERE rowid >= {start} AND rowid < {start + CHUNK}"
        ).fetchnumpy()
        chunk = records[start : start + CHUNK]
        names = zip(EVENT_DTYPE.names, ("item", "action", "time"), strict=True)
        for name, column in names:
            chunk[name] = columns[column]
        if has_parts:
            parts[start : start + CHUNK] = columns["part"]
        same_user = columns["user"][1:] == columns["user"][:-1]
        num_repeated += int(((chunk[1:] == chunk[:-1]) & same_user).sum())
    if num_repeated:
        print(
            f"repeated: {num_repeated:,} events equal the one before them; all are kept "
            "(--drop_repeated)"
        )
    return Events(records, offsets, parts)
