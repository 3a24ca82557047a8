"""The table of items or of users: a row for each id of the events, and its columns as text."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from files.atomic_io import DataError
from table_database import check_columns, reading
from table_database import text as literal
from table_source import Form, open_table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

LIST_END = "\x1f"  # after each value of a list, as text
WHOLE = r"-?[0-9]+(\.0*)?"  # numbers, also as floats are written
NOT_AVAILABLE = "NA"  # missing among ids and numbers; a text may mean Namibia


class Texts:
    """A column of text: row k holds texts[codes[k]]; codes count up in order of appearance."""

    def __init__(self, values: Iterable[str]):
        code_of: dict[str, int] = {}
        self.codes = np.array([code_of.setdefault(v, len(code_of)) for v in values], np.int32)
        self.texts = list(code_of)

    def mapped(self, texts: Sequence[str]) -> Texts:
        """The column with other texts in the place of its own, which may be equal now."""
        return Texts([texts[code] for code in self.codes])


class SideTable(NamedTuple):
    """The table of items or of users in the database, a row per re-id; its columns are features."""

    connection: DuckDBPyConnection
    side: str
    columns: dict[str, str]  # name of a column -> its name in the database
    doubts: dict[str, str]  # column -> why it is dropped if no flag asks for it

    def texts(self, name: str) -> Texts:
        """The column of all ids in their order; a missing value is empty."""
        rows = self.connection.execute(
            f"SELECT coalesce({self.columns[name]}, '') AS value FROM {self.side}_table "
            "ORDER BY re_id"
        ).fetchnumpy()
        column = Texts(rows["value"].tolist())
        return column.mapped(plain_lists(without_na(column.texts)))


def plain_lists(texts: Sequence[str]) -> Sequence[str]:
    """Lists as Python or JSON writes them, each value with LIST_END; other columns as they are.

    Of a column at least half of whose values are lists, the others are lists of one.
    """
    known = [text for text in texts if text]
    num_lists = sum(text[0] == "[" and text[-1] == "]" for text in known)
    if not num_lists or num_lists < len(known) / 2:
        return texts
    return ["".join(part + LIST_END for part in parts_of(text)) for text in texts]


def shown(text: str) -> str:
    """A text of a column of lists, for people, and for a feature whose values are whole lists."""
    return text.removesuffix(LIST_END).replace(LIST_END, "|")


def parts_of(text: str) -> list[str]:
    """The values of a list that is written as JSON, as Python, or as numpy prints it."""
    if not text or text[0] != "[" or text[-1] != "]":
        return [text] if text else []
    for parse in (json.loads, ast.literal_eval):
        try:
            return [str(part) for part in flat(parse(text)) if part is not None]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return [part.strip("\"',") for part in text[1:-1].split()]


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values of a list, and of those in it."""
    for value in values:
        yield from flat(value) if isinstance(value, list | tuple) else [value]


def without_na(texts: Sequence[str]) -> Sequence[str]:
    """A column whose other values are numbers, with "" for each NA."""
    if NOT_AVAILABLE not in texts or not are_numbers({*texts} - {NOT_AVAILABLE, ""}):
        return texts
    return ["" if text == NOT_AVAILABLE else text for text in texts]


def ranked(texts: Sequence[str], earlier: Sequence[Any] = ()) -> tuple[np.ndarray, list]:
    """1, 2, ... for each distinct text, in order of number if all are numbers; 0 for a missing.

    The texts of `earlier` come first, in their order, whether there are any of them or not. 5.0 is
    5 where all are whole numbers, since a missing value makes pandas write floats; True is true.
    """
    plain = plain_form({*texts, *map(str, earlier)} - {""})
    rank = {plain(str(value)): k for k, value in enumerate(earlier, 1)}
    written: dict[str, str] = {}  # of each new value, as it was first
    for text in texts:
        if text and plain(text) not in rank:
            written.setdefault(plain(text), text)
    new = sorted(written.values(), key=float if are_numbers(written) else None)
    rank |= {plain(text): k for k, text in enumerate(new, len(earlier) + 1)}
    return np.array([rank.get(plain(text), 0) for text in texts], np.int32), [*earlier, *new]


def plain_form(texts: Iterable[str]) -> Callable[[str], str]:
    """What makes the texts of a column, of several files perhaps, the same that mean the same."""
    if all(re.fullmatch(WHOLE, text) for text in texts):
        return lambda text: text.partition(".")[0]
    if all(text.lower() in ("true", "false") for text in texts):
        return str.lower
    return str


def are_numbers(texts: Iterable[str]) -> bool:
    try:
        return all(math.isfinite(float(text)) for text in texts)
    except ValueError:
        return False


def read_table(
    connection: DuckDBPyConnection,
    side: str,
    path: Path,
    form: Form,
    key: str | None,
    log: Sequence[Path],
    used: Sequence[str],
) -> SideTable:
    """The table of items or users; of several rows with one id the last counts.

    Args:
        side: "item" or "user": the ids are those of the table `items` or `users`.
        key: its column of ids; None: the one named as in the events, or the first.
        log: the files of the events.
        used: columns that the events use, the one of the ids of this side first.
    """
    table = open_table(connection, [path], Path(connection_folder(connection)), form)
    # An index that pandas has written is a first column without a name.
    if not table.columns or (key is None and next(iter(table.columns)) == ""):
        raise DataError(f"{path}: its first column has no name; say where ids are with --*_key")
    named = {name: f"c{k}" for k, name in enumerate(table.columns)}
    values = ", ".join(f"known({e}) AS {named[n]}" for n, e in table.columns.items())
    with reading(path, table):
        connection.execute(f"CREATE TABLE {side}_rows AS SELECT {values} FROM {table.relation}")
    check_columns(table, [key] if key else [])
    key = key_of(connection, side, path, named, key, used[0])
    value = f"regexp_replace({named[key]}, '\\.0*$', '')"
    is_whole = connection.execute(
        f"SELECT bool_and(regexp_full_match({named[key]}, '[0-9]+(\\.0*)?')) FROM {side}_rows"
    ).fetchone()[0]
    value = value if is_whole else named[key]
    connection.execute(
        f"CREATE TABLE {side}_table AS SELECT re_id, r.* FROM {side}s LEFT JOIN (SELECT * FROM "
        f"{side}_rows WHERE rowid IN (SELECT max(rowid) FROM {side}_rows GROUP BY {value})) r "
        f"ON {side}s.id = {value} ORDER BY re_id"
    )
    doubts = dict.fromkeys(used, "a column of the events")
    show_found(connection, side, path, named[key], value, key)
    doubts |= several_values(
        connection,
        side,
        path,
        named,
        key,
        value,
        is_log=any(path.exists() and other.exists() and path.samefile(other) for other in log),
    )
    connection.execute(f"DROP TABLE {side}_rows")
    columns = {name: column for name, column in named.items() if name != key}
    return SideTable(connection, side, columns, doubts)


def connection_folder(connection: DuckDBPyConnection) -> Path:
    """The folder that is written, above that of the database."""
    setting = connection.execute("SELECT current_setting('temp_directory')").fetchone()[0]
    return Path(setting).parent


def key_of(
    connection: DuckDBPyConnection,
    side: str,
    path: Path,
    named: dict[str, str],
    key: str | None,
    event_column: str,
) -> str:
    """The column of ids; if it is merely the first, no other column may hold more of them."""
    is_told = key is not None or event_column in named
    key = key or (event_column if event_column in named else next(iter(named)))
    ids = f"(SELECT id FROM {side}s)"
    held = {
        name: connection.execute(
            f"SELECT count(DISTINCT {column}) FROM {side}_rows WHERE {column} IN {ids}"
        ).fetchone()[0]
        for name, column in named.items()
        if not is_told or name == key
    }
    best = max(held, key=held.get)
    for name in named:  # names that are ids: the first row was taken for a line of names
        if name and connection.execute(f"SELECT {literal(name)} IN {ids}").fetchone()[0]:
            raise DataError(
                f"{path}: line 1 is {','.join(named)!r:.60}, which holds the id {name}; name the "
                f"columns with --{side}_header"
            )
    if held[best] > held[key]:
        raise DataError(
            f"{path}: column {key} holds {held[key]:,} ids of the events, column {best} "
            f"{held[best]:,}; say which it is with --{side}_key"
        )
    return key


def show_found(
    connection: DuckDBPyConnection, side: str, path: Path, column: str, value: str, key: str
) -> None:
    """How many ids have a row; refuse none, and warn of ids that differ in their form alone."""
    found, total = connection.execute(
        f"SELECT count({column}), count(*) FROM {side}_table"
    ).fetchone()
    num_rows = connection.execute(f"SELECT count(*) FROM {side}_rows").fetchone()[0]
    bare = "regexp_replace({}, '^b?[\"'']?0*(.+?)(\\.0*)?[\"'']?$', '\\1')"
    number, one, other = connection.execute(
        f"SELECT count(*), min(a), arg_min(b, a) FROM (SELECT {value} AS a, id AS b FROM "
        f"{side}_rows JOIN {side}s ON {bare.format(column)} = {bare.format('id')} "
        f"WHERE {value} <> id AND {value} NOT IN (SELECT id FROM {side}s))"
    ).fetchone()
    form = f"{number:,} of its ids have another form than those of the events, such as {one!r} "
    form += f"and {other!r}"
    if not found:
        here, there = (
            ", ".join(map(str, row))
            for row in (
                connection.execute(f"SELECT list({c})[1:3] FROM (FROM {t} LIMIT 3)").fetchone()[0]
                or []
                for c, t in ((column, f"{side}_rows"), ("id", f"{side}s"))
            )
        )
        raise DataError(
            f"{path}: column {key} holds no id of the events; it has {here}, the events have "
            f"{there}: "
            + (
                "the same in another form? write them alike"
                if number
                else "name the column that does with --item_key or --user_key"
            )
        )
    if number:
        print(f"warning: {path.name}: {form}; they are not taken for the same")
    print(
        f"{path.name}: {found:,} of {total:,} ids are in column {key}; dropped "
        f"{num_rows - found:,} rows, of no event or with a later row of the same id"
    )


def several_values(
    connection: DuckDBPyConnection,
    side: str,
    path: Path,
    named: dict[str, str],
    key: str,
    value: str,
    is_log: bool,
) -> dict[str, str]:
    """Warn of columns that differ among the rows of an id; of the log itself they are dropped."""
    twice = f"SELECT {value} FROM {side}_rows GROUP BY {value} HAVING count(*) > 1"
    repeated = f"{side}_rows WHERE {value} IN ({twice})"
    if not connection.execute(f"SELECT count(*) FROM {repeated}").fetchone()[0]:
        return {}
    doubts = {}
    for name, column in named.items():
        number = connection.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM {repeated} GROUP BY {value} "
            f"HAVING min({column}) <> max({column}) OR count({column}) NOT IN (0, count(*)))"
        ).fetchone()[0]
        what = f"{number:,} {side}s have several values"
        if number and is_log:
            doubts[name] = f"{what} in the log: one of them would be that of the held-out event"
        elif number and name != key:
            print(f"warning: {path.name}: {name}: {what}, the last row counts")
    return doubts


def names_of(table: SideTable, name: str) -> list[str]:
    if name not in table.columns:
        known = ", ".join(table.columns) or "none"
        raise DataError(f"--item_names: no column {name}; there are {known}")
    column = table.texts(name)
    return [shown(column.texts[code]) for code in column.codes]
