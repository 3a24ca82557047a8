"""The database in which a converter reads tables: DuckDB, in files below the folder it writes."""

from __future__ import annotations

import lzma
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from files.atomic_io import DataError
from history_source import MISSING

if TYPE_CHECKING:
    import duckdb

MEMORY = "2GB"  # of DuckDB; beyond, it sorts and joins in files
# What is not in the wheel is not fetched: a converter reads files and nothing else.
NO_DOWNLOADS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
BLANKS = r"E' \t\r\n'"


class Table(NamedTuple):
    """A table as SQL reads it."""

    paths: list[Path]
    relation: str  # after FROM; has the column `filename` if there are several files
    columns: dict[str, str]  # name -> SQL expression of its text
    texts: list[str]  # expressions of the fields of a line of text, to look for line breaks in

    @property
    def name(self) -> str:
        return self.paths[0].name if len(self.paths) == 1 else f"{len(self.paths)} files"


@contextmanager
def database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database below `folder`, removed in the end; so is the folder, if it was made for it.

    Raises:
        DataError: DuckDB is not installed, or cannot go on, for example as the disk is full.
    """
    try:
        import duckdb
    except ImportError as error:
        raise DataError(
            f"{folder}: tables are read with DuckDB; pip install -r requirements-data.txt"
        ) from error
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / ".tables"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        with duckdb.connect(str(temporary / "tables.duckdb"), config=NO_DOWNLOADS) as connection:
            connection.execute(f"SET temp_directory = {text(temporary)}")
            connection.execute(f"SET memory_limit = '{MEMORY}'; SET TimeZone = 'UTC'")
            if sys.stdout.isatty():
                connection.execute("SET enable_progress_bar = true; SET progress_bar_time = 2000")
            words = ", ".join(map(text, MISSING))
            connection.execute(f"CREATE TEMP MACRO trimmed(x) AS trim(x, {BLANKS})")
            # What begins and ends with a digit needs no look at the words: half the reading time.
            connection.execute(
                "CREATE TEMP MACRO known(x) AS CASE "
                "WHEN x BETWEEN '0' AND ':' AND x[-1] BETWEEN '0' AND '9' THEN x "
                f"WHEN trimmed(x) IN ({words}) THEN NULL ELSE trimmed(x) END"
            )
            yield connection
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        raise DataError(f"{folder}: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def text(value: Any) -> str:
    """A literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def path_text(path: Path) -> str:
    """A literal of SQL that DuckDB reads as this one file, whatever brackets its name has."""
    return text(re.sub(r"[*?\[]", r"[\g<0>]", str(path)))


def name_of(column: str) -> str:
    """A name of SQL."""
    return '"' + column.replace('"', '""') + '"'


def first_line(error: Exception) -> str:
    return re.sub(r"^[A-Za-z ]*Error: ", "", str(error).split("\n")[0])


@contextmanager
def reading(path: Path, table: Table | None = None) -> Iterator[None]:
    """Turns what reading `path` may raise into a DataError of one line."""
    import duckdb

    try:
        yield
    except DataError:
        raise
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        raise DataError(complaint(str(error), path, table)) from error
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        what = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: {what}; it is damaged or in another form") from error


def complaint(message: str, path: Path, table: Table | None) -> str:
    """DuckDB's words on a bad line in ours."""
    if named := re.search(r"^  file = (.*)$", message, re.MULTILINE):
        path = named_path(named[1], table, path)
    if named := re.search(r'in file "(.*)", at byte \d+ in line (\d+): (.*)', message):
        # It counts from 2.
        path, line = named_path(named[1], table, path), int(named[2]) - 1
        return f"{path}: line {line}: {named[3].rstrip('. ')}; expected a JSON object"
    if not (line := re.search(r"CSV Error on Line: (\d+)", message)):
        return f"{path}: {first_line(Exception(message))}; it is damaged or in another form"
    place = f"{path}: line {line[1]}"
    if fields := re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message):
        names = ", ".join(table.columns) if table else "..."
        return f"{place} has {fields[2]} fields, expected {fields[1]} ({names:.100})"
    if "nterminated quote" in message or "quote" in message.split("\n")[2:3]:
        return f"{place} has a quote that is not closed; correct its quotes, or --quote none"
    if "nicode" in message or "utf-8" in message:
        return f"{place} is not UTF-8; write the file again as UTF-8"
    return f"{place}: {' '.join(message.splitlines()[2:3])}; correct it"


def named_path(found: str, table: Table | None, path: Path) -> Path:
    """The path that DuckDB names; a file that was unpacked first has the name of its archive."""
    return path if ".tables" in Path(found).parts else Path(found)


def check_columns(table: Table, columns: Sequence[str]) -> None:
    if absent := [column for column in columns if column not in table.columns]:
        raise DataError(
            f"{table.paths[0]}: no column {', '.join(absent)}; there are "
            f"{', '.join(table.columns) or 'none':.300}. Say which it is with the flag for it: "
            "--user, --item, --time, --action, --item_key, ...; what separates them, --delimiter; "
            "their names, --header; or that rows hold several events, --events_in COLUMN or "
            "--format sequences"
        )


def count(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {relation}").fetchone()[0]


def events_of_each(
    connection: duckdb.DuckDBPyConnection, side: str, condition: str = "true"
) -> np.ndarray:
    """(n,) int64, how many events each user or item has of which `condition` holds."""
    found = connection.execute(
        f"SELECT {side} AS re_id, count(*) FILTER (WHERE {condition}) AS n FROM sorted GROUP BY ALL"
    ).fetchnumpy()
    counts = np.zeros(count(connection, f"{side}s"), np.int64)
    counts[found["re_id"] - 1] = found["n"]
    return counts


def place(
    connection: duckdb.DuckDBPyConnection, table: Table, condition: str, column: str = "NULL"
) -> tuple:
    """The path and number from 1 of the first event of which `condition` holds; and a value."""
    row, value = connection.execute(
        f"SELECT rowid, {column} FROM log WHERE {condition} ORDER BY rowid LIMIT 1"
    ).fetchone()
    path, number = table.paths[0], row + 1
    if len(table.paths) > 1:
        own = f"place = (SELECT place FROM log WHERE rowid = {row})"
        name, number = connection.execute(
            f"SELECT max(place), count(*) FROM log WHERE {own} AND rowid <= {row}"
        ).fetchone()
        path = next((p for p in table.paths if str(p) == name), Path(Path(name).name))
    return (path, number) if column == "NULL" else (path, number, value)


def refuse(
    connection: duckdb.DuckDBPyConnection,
    table: Table,
    condition: str,
    name: str,
    column: str,
    expected: str,
) -> None:
    """Raise a DataError if `condition` holds for an event, with its value of a column."""
    if count(connection, f"log WHERE {condition}"):
        path, number, value = place(connection, table, condition, name)
        found = "" if value is None else value
        raise DataError(f"{path}: event {number}: {column} is {found!r:.60}, expected {expected}")
