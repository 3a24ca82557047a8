"""A table in files of any common form, read by DuckDB (pip install -r requirements-data.txt).

CSV with any delimiter, JSON lines or arrays, Parquet; compressed; one file, several, or a folder.
Every column is read as text, so that what a value means is decided in one place.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from files.atomic_io import DataError
from table_database import Table, check_columns, name_of, path_text, reading, text

if TYPE_CHECKING:
    import duckdb

DELIMITERS = ("\t", "\x01", "::", ";", "|", ",", " ")
csv.field_size_limit(1 << 30)  # else a line with a long list is no line of any delimiter
OBJECT = '"one of --events_in"'  # a name of SQL that no column has
HEAD = 30  # lines that decide what separates the fields
JSON_SAMPLE = 50_000  # objects whose keys are the columns of a log
# First bytes, what the file is, and the advice with which it is refused; None: it is read.
SIGNATURES = (
    (b"\x1f\x8b", "gzip", None),
    (b"\x28\xb5\x2f\xfd", "zstd", None),
    (b"BZh", "bz2", None),
    (b"\xfd7zXZ", "xz", None),
    (b"PK\x03\x04", "zip", None),
    (b"PAR1", "parquet", None),
    (b"\xff\xfe", "utf-16", None),
    (b"\xfe\xff", "utf-16", None),
    (b"ARROW1", "an Arrow or Feather file", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"\x80", "a pickle", "write it as CSV or Parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV UTF-8"),
    (b"SQLite format 3", "a SQLite database", "export the table as CSV"),
    (b"\x89HDF", "an HDF5 file", "write it as CSV or Parquet"),
)
OPENERS = {"bz2": bz2.open, "xz": lzma.open, "gzip": gzip.open}


class Form(NamedTuple):
    """How the files of a table are written, where a person says it."""

    header: Sequence[str] | None = None  # names of the columns of files without a line of them
    delimiter: str | None = None  # between fields; " ": any run of blanks
    quote: str = '"'  # "": quotes are characters as any other
    is_sequences: bool = False  # a line is a user and then the items
    events_in: str | None = None  # column with a list of objects, an event each
    list_delimiter: str | None = None  # between the events of a row that has several


# ---------------------------------------------------------------------------- files of a table


def files_of(place: Path) -> list[Path]:
    """A file; or the parts in a folder, or what a pattern finds, in the order of their names."""
    if place.is_dir():
        found = sorted(path for path in place.rglob("*") if path.is_file())
        parts = [p for p in found if not any(q[0] in "._" for q in p.relative_to(place).parts)]
        if not parts:
            raise DataError(f"{place}: a folder without files; expected a table's parts in it")
        return parts
    if not place.exists() and (found := sorted(glob.glob(str(place), recursive=True))):
        return [part for path in found for part in files_of(Path(path))]
    if not place.exists():
        raise DataError(f"{place}: No such file or directory")
    return [place]


def kind_of(path: Path) -> str:
    """What the first bytes say: "gzip", ..., "parquet", or "text"."""
    with open(path, "rb") as file:
        start = file.read(16)
    for signature, kind, advice in SIGNATURES:
        if start.startswith(signature):
            if advice:
                raise DataError(f"{path}: {kind}; {advice}")
            return kind
    return "text"


def unpacked(path: Path, kind: str, folder: Path) -> tuple[Path, str]:
    """The file that DuckDB reads, and its kind: an archive that it does not know is unpacked."""
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
            if "[Content_Types].xml" in names or path.suffix.lower() in (".xlsx", ".ods"):
                raise DataError(f"{path}: an Excel file; save it as CSV UTF-8")
            if len(names) != 1:
                raise DataError(f"{path}: a zip of {len(names)} files, expected one; unpack it")
            with archive.open(names[0]) as source:
                return copied(source, folder, names[0])
    if kind in OPENERS and (kind != "gzip" or hides_damage()):
        with OPENERS[kind](path) as source:
            return copied(source, folder, path.stem)
    return path, kind


def hides_damage() -> bool:
    """Whether this DuckDB reads a gzip file that is cut off as if it ended there."""
    import duckdb

    return duckdb.__version__.startswith("1.")


def copied(source: Any, folder: Path, name: str) -> tuple[Path, str]:
    path = folder / ".tables" / f"{len(list((folder / '.tables').iterdir()))}-{Path(name).name}"
    with open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return path, kind_of(path)


class Source(NamedTuple):
    """Files of one form."""

    files: list[Path]
    kind: str  # as of `kind_of`
    are_several: bool  # rows get the column `filename`

    @property
    def sql(self) -> str:
        """What a reader of DuckDB takes: the list of the files, and how to read them."""
        compression = f", compression = '{self.kind}'" if self.kind in ("gzip", "zstd") else ""
        filename = ", filename = true" if self.are_several else ""
        return f"[{', '.join(map(path_text, self.files))}]{compression}{filename}"

    @property
    def encoding(self) -> str:
        """What a reader of text takes besides."""
        return ", encoding = 'utf-16'" if self.kind == "utf-16" else ""


def open_table(
    connection: duckdb.DuckDBPyConnection, places: Sequence[Path], folder: Path, form: Form
) -> Table:
    """The table in these files, which have one form; archives are unpacked below `folder`."""
    paths = [path for place in places for path in files_of(place)]
    with reading(paths[0]):
        read = [unpacked(path, kind_of(path), folder) for path in paths]
        kinds = sorted({kind for _, kind in read})
        if len(kinds) > 1:
            raise DataError(f"{paths[0]}: and {len(paths) - 1} more are {' and '.join(kinds)}")
        source = Source([path for path, _ in read], kinds[0], len(paths) > 1)
        if source.kind == "parquet":
            table = parquet_table(connection, source)
        elif is_json(source.files[0], source.kind):
            table = json_table(connection, source)
        else:
            table = text_table(connection, source, form)
    return with_events(connection, table._replace(paths=paths), form)


def is_json(path: Path, kind: str) -> bool:
    names = {suffix.lower() for suffix in path.suffixes}
    if names & {".json", ".jsonl", ".ndjson"}:
        return True
    return not names & {".csv", ".tsv", ".dat"} and start_of(path, kind)[:1] in (b"{", b"[")


def start_of(path: Path, kind: str) -> bytes:
    """The first characters that are no blanks; of a .zst file none, since its name tells enough."""
    if kind == "zstd":
        return b""
    with (gzip.open if kind == "gzip" else open)(path, "rb") as file:
        return file.read(1000).removeprefix(b"\xef\xbb\xbf").strip()


def parquet_table(connection: duckdb.DuckDBPyConnection, source: Source) -> Table:
    relation = f"read_parquet({source.sql}, union_by_name = true)"
    rows = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    types = {
        name: kind for name, kind, *_ in rows if not (source.are_several and name == "filename")
    }
    columns = {}
    for column, kind in types.items():
        if kind.startswith("STRUCT") and not kind.endswith("[]"):
            fields = connection.execute(
                f"DESCRIBE SELECT unnest({name_of(column)}) FROM {relation}"
            ).fetchall()
            for field, inner, *_ in fields:
                value = f"{name_of(column)}.{name_of(field)}"
                columns[f"{column}.{field}"] = as_text(value, inner)
        else:
            columns[column] = as_text(name_of(column), kind)
    return Table(source.files, relation, columns, [])


def as_text(value: str, kind: str) -> str:
    """The text of an expression of a DuckDB type; a list as a JSON list."""
    if kind == "BLOB":
        return f"decode({value})"
    if kind.endswith("]"):
        return f"to_json({value})::VARCHAR"
    return f"({value})::VARCHAR"


def json_table(connection: duckdb.DuckDBPyConnection, source: Source) -> Table:
    """JSON lines, or one array of objects. The keys of the first many objects are the columns."""
    files = source.files
    shape = "array" if start_of(files[0], source.kind)[:1] == b"[" else "newline_delimited"
    relation = (
        f"read_json({source.sql}, format = '{shape}', records = false, "
        "columns = {json: 'JSON'}, maximum_object_size = 67108864)"
    )
    bad = connection.execute(
        f"SELECT json::VARCHAR FROM {relation} WHERE json_type(json) <> 'OBJECT' LIMIT 1"
    ).fetchone()
    if bad:
        raise DataError(f"{files[0]}: holds {bad[0]!r:.60}, expected JSON objects alone")
    keys = connection.execute(
        "SELECT key FROM (SELECT unnest(keys) AS key, unnest(range(len(keys))) AS place, row FROM "
        "(SELECT json_keys(json) AS keys, row_number() OVER () AS row FROM "
        f"(SELECT json FROM {relation} LIMIT {JSON_SAMPLE}))) "
        "GROUP BY key ORDER BY min(row), arg_min(place, row)"
    ).fetchall()
    columns = {key: f"json ->> {text(pointer(key))}" for (key,) in keys}
    return Table(files, relation, columns, [])


def pointer(key: str) -> str:
    return "/" + key.replace("~", "~0").replace("/", "~1")


# ---------------------------------------------------------------------------- lines of text


def text_table(connection: duckdb.DuckDBPyConnection, source: Source, form: Form) -> Table:
    """Lines of text, whose fields have no type yet; the first lines say what separates them."""
    files, lines = source.files, line_reader(source)
    if form.is_sequences:
        row = f"(SELECT *, regexp_split_to_array(trimmed(line), '[ \t,]+') AS row FROM {lines})"
        items = "to_json(row[2:])::VARCHAR"
        return Table(files, row, {"user": "row[1]", "item": items}, [])
    heads = []
    for file in files:
        head = f"SELECT line FROM {line_reader(source._replace(files=[file]))} LIMIT {HEAD}"
        heads.append([line for (line,) in connection.execute(head).fetchall() if line])
    skip = bool(heads[0]) and re.fullmatch(r"sep=.", heads[0][0].strip()) is not None
    delimiter = form.delimiter or (heads[0][0].strip()[4] if skip else None)
    head = heads[0][skip:]
    delimiter = delimiter or delimiter_of(head, form)
    names = list(form.header or names_in(head, delimiter, form))
    check_names(files, heads, skip, names, delimiter, form)
    if delimiter == " ":
        if form.header is None:
            lines = f"(SELECT * FROM {line_reader(source, has_header=True)})"
        fields = f"(SELECT *, regexp_split_to_array(trimmed(line), '[ \t]+') AS row FROM {lines})"
        wanted = f"error('a line without {len(names)} fields by blanks: ' || line)"
        relation = (
            f"(SELECT * EXCLUDE (row), CASE WHEN len(row) = {len(names)} THEN row ELSE {wanted} "
            f"END AS row FROM {fields})"
        )
        return Table(files, relation, {n: f"row[{k}]" for k, n in enumerate(names, 1)}, [])
    quote = text(form.quote)
    fields = ", ".join(f"c{k}: 'VARCHAR'" for k in range(len(names)))
    relation = (
        f"read_csv({source.sql}, auto_detect = false, header = {form.header is None}, "
        f"skip = {int(skip)}, delim = {text(delimiter)}, quote = {quote}, escape = {quote}, "
        f"strict_mode = true, columns = {{{fields}}}{source.encoding})"
    )
    columns = {name: f"c{k}" for k, name in enumerate(names)}
    return Table(files, relation, columns, list(columns.values()) if form.quote else [])


def line_reader(source: Source, has_header: bool = False) -> str:
    """A relation of one column, the whole line: no text has the character that separates."""
    return (
        f"read_csv({source.sql}, auto_detect = false, header = {has_header}, delim = E'\\x1e', "
        f"quote = '', escape = '', columns = {{line: 'VARCHAR'}}{source.encoding})"
    )


def fields_in(lines: Sequence[str], delimiter: str, form: Form) -> list[list[str]]:
    if delimiter == " ":
        return [line.split() for line in lines]
    if len(delimiter) > 1 or not form.quote:
        return [line.split(delimiter) for line in lines]
    text = io.StringIO("\n".join(lines))
    return list(csv.reader(text, delimiter=delimiter, quotechar=form.quote))


def delimiter_of(lines: Sequence[str], form: Form) -> str:
    """What splits every line into as many fields as the first has; of several, the most fields."""
    if not lines:
        return ","
    counts = {}
    for delimiter in DELIMITERS:
        sizes = [len(fields) for fields in fields_in(lines, delimiter, form)]
        sizes = sizes[:-1] if len(lines) == HEAD and len(sizes) > 1 else sizes  # may go on
        has_names = form.header is None or sizes[0] == len(form.header)
        if sizes and sizes[0] > 1 and len(set(sizes)) == 1 and has_names:
            counts[delimiter] = sizes[0]
    for delimiter in DELIMITERS[:3]:  # they hardly occur in texts
        if delimiter in counts:
            return delimiter
    if len(counts) > 1:
        counts.pop(" ", None)
    return max(counts, key=counts.get) if counts else max(",\t;|", key=lines[0].count)


def names_in(lines: Sequence[str], delimiter: str, form: Form) -> list[str]:
    return [name.strip() for name in fields_in(lines[:1], delimiter, form)[0]] if lines else []


def check_names(
    files: list[Path], heads: list, skip: bool, names: list[str], delimiter: str, form: Form
) -> None:
    """That each file has the same first line, and names that are all different."""
    if not heads[0] or len(set(names)) < len(names):
        twice = "".join(f"; {n!r} occurs twice" for n in set(names) if names.count(n) > 1)
        first = heads[0][0] if heads[0] else ""
        raise DataError(
            f"{files[0]}: line 1 is {first!r:.60}, expected the names of the columns{twice}"
        )
    for file, head in zip(files, heads, strict=True):
        other = names_in(head[skip:], delimiter, form)
        if form.header is None and other != names:
            raise DataError(
                f"{file}: its columns are {', '.join(other)}, expected {', '.join(names)} as in "
                f"{files[0]}"
            )


# ---------------------------------------------------------------------------- events in a list


def with_events(connection: duckdb.DuckDBPyConnection, table: Table, form: Form) -> Table:
    """The table with a row for each object in the list of the column --events_in."""
    column = form.events_in
    if column is None:
        return table
    check_columns(table, [column])
    objects = f"""unnest(from_json({table.columns[column]}, '["JSON"]'))"""
    outer = ", ".join(f"{e} AS {name_of(n)}" for n, e in table.columns.items() if n != column)
    outer += ", filename" if len(table.paths) > 1 else ""
    relation = f"(SELECT {outer or 'NULL AS none'}, {objects} AS {OBJECT} FROM {table.relation})"
    with reading(table.paths[0], table):
        keys = connection.execute(
            f"SELECT DISTINCT unnest(json_keys({OBJECT})) FROM (FROM {relation} LIMIT 999)"
        ).fetchall()
    columns = {name: name_of(name) for name in table.columns if name != column}
    columns |= {key: f"{OBJECT} ->> {text(pointer(key))}" for (key,) in sorted(keys)}
    return table._replace(relation=relation, columns=columns, texts=[])
