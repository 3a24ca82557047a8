"""Times of a log: numbers in a unit that their size tells, or dates in a form told or found."""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from files.atomic_io import DataError
from table_database import Table, refuse, text

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
INTEGER = r"[+-]?[0-9]{1,18}"
# A log whose median time reaches the k-th limit is not in unit k: 1e11 seconds are the year 5138.
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
LIMITS = (1e11, 1e14, 1e17)
EARLY = 631_152_000  # 1990 in Unix seconds: no log of a recommender is older
# Dates in digits alone, by their number: they would pass for Unix times.
DIGIT_DATES = {
    14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M", 10: "%Y%m%d%H", 8: "%Y%m%d", 6: "%y%m%d", 4: "%m%d",
}  # fmt: skip
# Beside ISO dates, what other programs write: Twitter, Amazon's reviews, Excel, German shops.
FORMATS = (
    "%a %b %d %H:%M:%S %z %Y", "%m %d, %Y", "%b %d, %Y", "%Y%m%d_%H%M%S",
    *(f"{date}{clock}" for date in ("%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y", "%m-%d-%Y")
      for clock in (" %I:%M:%S %p", " %I:%M %p", " %H:%M:%S", " %H:%M", "")),
)  # fmt: skip
# Years have four digits: 31/12/22 would be a day of the year 31, or of the year 22.
ISO = "CASE WHEN regexp_matches(time, '^[0-9]{4}[-/]') THEN try_cast(time AS TIMESTAMPTZ) END"
HAS_YEAR = "CASE WHEN regexp_matches(time, '[0-9]{4}') THEN time END"


class Times(NamedTuple):
    """SQL expressions of an event's time."""

    value: str  # in the log's unit, of the table `log`
    seconds: str  # whole Unix seconds, of the table `events`
    kind: str  # unit or form, for people

    def show(self, connection: DuckDBPyConnection, args: argparse.Namespace) -> None:
        """Print the range, and warn of times that no log of today has."""
        now = int(time.time()) + 86_400
        first, last, early, late = connection.execute(
            f"SELECT min(time), max(time), count(*) FILTER (WHERE time < {EARLY}), "
            f"count(*) FILTER (WHERE time > {now}) FROM sorted"
        ).fetchone()
        print(f"time: {args.time} in {self.kind}, {iso(first)} to {iso(last)}")
        for number, what, example in ((early, "before 1990", first), (late, "in the future", last)):
            if number:
                print(f"warning: {number:,} events have a time {what}, such as {iso(example)}")


def iso(seconds: int) -> str:
    moment = datetime.fromtimestamp(0, timezone.utc)
    try:
        moment = datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):  # beyond the year 9999
        return f"{seconds} s"
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def read_times(connection: DuckDBPyConnection, table: Table, args: argparse.Namespace) -> Times:
    """How the table's times become seconds.

    Raises:
        DataError: a time is of another kind than the first, or far from all others; or all are
            dates in digits.
    """
    if args.time == "none":
        return Times("0", "0", "none")
    if args.time_format:
        return dates(connection, table, args, [args.time_format])
    is_number = f"regexp_full_match(time, '{NUMBER}')"
    first = connection.execute(f"SELECT {is_number} FROM log ORDER BY rowid LIMIT 1").fetchone()[0]
    if not first:
        return dates(connection, table, args, [])
    bad(connection, table, args, f"NOT {is_number}", "a number, as the first event has")
    are_whole = connection.execute(
        f"SELECT bool_and(regexp_full_match(time, '{INTEGER}')) FROM log"
    ).fetchone()[0]
    if are_whole and args.time_unit is None:
        refuse_digit_dates(connection, table, args)
    return numbers(connection, table, args, "time::BIGINT" if are_whole else "time::DOUBLE")


def bad(
    connection: DuckDBPyConnection,
    table: Table,
    args: argparse.Namespace,
    condition: str,
    expected: str,
) -> None:
    refuse(connection, table, condition, "time", args.time, expected)


def numbers(
    connection: DuckDBPyConnection, table: Table, args: argparse.Namespace, value: str
) -> Times:
    sample = f"(SELECT {value} AS time FROM log USING SAMPLE reservoir(100000 ROWS) REPEATABLE (1))"
    median = connection.execute(f"SELECT median(time) FROM {sample}").fetchone()[0]
    unit = sum(median >= limit for limit in LIMITS)
    if args.time_unit:
        unit = UNITS.index(args.time_unit)
    farthest = connection.execute(f"SELECT arg_max({value}, abs({value})) FROM log").fetchone()[0]
    if abs(farthest) / 1000**unit >= LIMITS[0]:
        raise DataError(
            f"{table.paths[0]}: {args.time} {farthest:.0f} among {UNITS[unit]}: no time of this "
            "age; correct or remove the row"
        )
    return Times(value, f"floor(events.time / {1000**unit})::BIGINT", UNITS[unit])


def refuse_digit_dates(
    connection: DuckDBPyConnection, table: Table, args: argparse.Namespace
) -> None:
    """Refuse numbers that all read as a date; --time_format or --time_unit says what they are."""
    shortest, longest, first = connection.execute(
        "SELECT min(length(time)), max(length(time)), first(time ORDER BY rowid) FROM log"
    ).fetchone()
    form = DIGIT_DATES.get(shortest)
    if shortest != longest or form is None:
        return
    is_date = f"try_strptime(time, '{form}')"
    if form.startswith("%Y"):
        is_date = f"CASE WHEN time[1:2] IN ('19', '20') THEN {is_date} END"
    if connection.execute(f"SELECT bool_and({is_date} IS NOT NULL) FROM log").fetchone()[0]:
        raise DataError(
            f"{table.paths[0]}: {args.time} is {first} and so on, a date in digits alone; say so "
            f"with --time_format {form}, or what it is with --time_unit seconds"
        )


def dates(
    connection: DuckDBPyConnection, table: Table, args: argparse.Namespace, forms: list[str]
) -> Times:
    """Dates in the form that is told, in ISO's, or in the one form that reads all of them."""
    import duckdb

    candidates = [f"try_strptime(time, {text(form)})" for form in forms] or [ISO]
    if not forms:
        head = "(SELECT time FROM log LIMIT 1000)"
        forms = ["ISO dates"]
        if not reads_all(connection, head, ISO):
            others = {f: f"try_strptime({HAS_YEAR}, {text(f)})" for f in FORMATS}
            others = {f: e for f, e in others.items() if reads_all(connection, head, e)}
            others = {f: e for f, e in others.items() if reads_all(connection, "log", e)}
            if len(others) > 1:
                raise DataError(
                    f"{table.paths[0]}: {args.time} reads as {' and as '.join(others)}; say which "
                    "with --time_format"
                )
            if others:
                forms, candidates = list(others), list(others.values())
    expected = "a number or an ISO date, all alike, or a --time_format such as '%d.%m.%Y'"
    if args.time_format:
        expected = f"a date in the form {forms[0]}"
    try:
        bad(connection, table, args, f"({candidates[0]}) IS NULL", expected)
    except duckdb.Error as error:
        raise DataError(f"--time_format {forms[0]}: {error!s:.100}") from error
    value = f"epoch_us({candidates[0]})"
    return Times(value, "floor(events.time / 1000000)::BIGINT", forms[0])


def reads_all(connection: DuckDBPyConnection, relation: str, expression: str) -> bool:
    query = f"SELECT bool_and(({expression}) IS NOT NULL) FROM {relation}"
    return bool(connection.execute(query).fetchone()[0])
