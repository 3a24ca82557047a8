"""The rows of a table in a file, CSV, JSON lines or Parquet, .gz too; and its columns as text."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from files.atomic_io import DataError

ROWS = 50_000  # read at once
MISSING = {"", "nan", "NaN", "null", "NULL", "None", "N/A", "n/a", "<NA>", r"\N"}
NOT_AVAILABLE = "NA"  # missing among ids and numbers; a text may mean Namibia
LIST_DELIMITER = "|"  # of the lists of JSON and Parquet, as text


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


def read_rows(
    path: Path, columns: Sequence[str], header: Sequence[str] | None, may_span: bool = False
) -> Iterator[Rows]:
    """A table's rows, ROWS at a time, with a progress bar.

    Args:
        columns: to read; none: all of them.
        header: names of the columns of a CSV file without a line of them.
        may_span: a quoted field of a CSV file may hold several lines, as a description does.
    """
    is_parquet = path.suffix == ".parquet"
    with reading(path):
        yield from parquet_rows(path, columns) if is_parquet else text_rows(path, header, may_span)


def check_columns(rows: Rows, columns: Sequence[str]) -> None:
    refuse_absent(
        rows.path,
        [c for c in columns if not any(c in record for record in rows.records)],
        rows.records[0],
    )


def refuse_absent(path: Path, absent: Sequence[str], found: Iterable[str]) -> None:
    if absent:
        raise DataError(
            f"{path}: no column {', '.join(absent)}; there are {', '.join(found)}. Say which it is "
            "with the flag for it: --user, --item, --time, --action, --item_key, ..."
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading `path` may raise into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; write it again as UTF-8") from error
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: {error.strerror}") from error
        what = " ".join(str(error).split())
        raise DataError(f"{path}: {what}; it is damaged or in another format") from error


def text_rows(path: Path, header: Sequence[str] | None, may_span: bool) -> Iterator[Rows]:
    is_json = path.name.removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson"))
    with open(path, "rb") as raw, progress(path, path.stat().st_size, "B") as bar:
        plain = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        file = io.TextIOWrapper(plain, "utf-8-sig", newline="")
        records = json_records(path, file) if is_json else csv_records(path, file, header, may_span)
        while chunk := list(itertools.islice(records, ROWS)):
            bar.update(raw.tell() - bar.n)
            yield Rows(path, *zip(*chunk, strict=True))


def progress(path: Path, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=path.name, unit=unit, unit_scale=True, leave=False, disable=None)


def csv_records(
    path: Path, file: TextIO, header: Sequence[str] | None, may_span: bool
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record); the first line decides what separates the fields."""
    first = file.readline()
    delimiter = max(",\t;|", key=first.count)
    lines = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
    try:
        names = header or next(lines)
        if not first or len(set(names)) < len(names):
            twice = "".join(f"; {n!r} occurs twice" for n in set(names) if names.count(n) > 1)
            raise DataError(
                f"{path}: line 1 is {first!r:.60}, expected the names of the columns{twice}"
            )
        line = lines.line_num
        for fields in lines:
            if lines.line_num > line + 1 and (delimiter == "\t" or not may_span):
                raise DataError(
                    f"{path}: line {line + 1} has a quote that is closed in line {lines.line_num} "
                    "alone, expected a row a line; double its quotes, and quote the field"
                )
            line = lines.line_num
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
        names = file.schema_arrow.names
        refuse_absent(path, [c for c in columns if c not in names], names)
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


def without_na(texts: Sequence[str]) -> Sequence[str]:
    """A column whose other values are numbers, with "" for each NA."""
    if NOT_AVAILABLE not in texts or not are_numbers({*texts} - {NOT_AVAILABLE, ""}):
        return texts
    return ["" if text == NOT_AVAILABLE else text for text in texts]


def plain_text(value: Any) -> str:
    """None ends as a word of MISSING."""
    if isinstance(value, list):
        return LIST_DELIMITER.join(plain_text(part) for part in value if part is not None)
    if isinstance(value, bytes):
        return value.decode()
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


def ranked(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """1, 2, ... for each distinct text, in order of number if all are numbers; 0 for a missing."""
    known = [text for text in texts if text]
    known.sort(key=float if are_numbers(known) else None)
    rank = {text: k for k, text in enumerate(known, 1)}
    return np.array([rank.get(text, 0) for text in texts], np.int32), known


def are_numbers(texts: Iterable[str]) -> bool:
    try:
        return all(math.isfinite(float(text)) for text in texts)
    except ValueError:
        return False


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
        moment = datetime.fromisoformat(text.removesuffix(" UTC").removesuffix("Z"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def date(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")
