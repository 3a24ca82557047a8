"""The rows of a short file of events, CSV or JSON lines, with the standard library alone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from files.atomic_io import DataError

MISSING = ("", "nan", "NaN", "null", "NULL", "None", "N/A", "n/a", "<NA>", r"\N")


class Row(NamedTuple):
    line: int  # where it ends in the file, from 1
    record: dict[str, Any]  # column -> value


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file with a line of names, or of JSON lines (.json, .jsonl, .ndjson)."""
    is_json = path.name.endswith((".json", ".jsonl", ".ndjson"))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list((json_rows if is_json else csv_rows)(path, file))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: {error}; expected CSV or JSON lines in UTF-8, not compressed"
        ) from error


def csv_rows(path: Path, file: TextIO) -> Iterator[Row]:
    """The first line decides what separates the fields."""
    first = file.readline()
    file.seek(0)
    delimiter = max(",\t;|", key=first.count)
    lines = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        names = next(lines, [])
        if not names or len(set(names)) < len(names):
            raise DataError(f"{path}: line 1 is {first!r:.60}, expected the names of the columns")
        for fields in lines:
            if len(fields) == len(names):
                yield Row(lines.line_num, dict(zip(names, fields, strict=True)))
            elif fields:
                raise DataError(
                    f"{path}: line {lines.line_num} has {len(fields)} fields, expected "
                    f"{len(names)} ({', '.join(names)}) separated by {delimiter!r}"
                )
    except csv.Error as error:
        raise DataError(f"{path}: line {lines.line_num}: {error}; correct its quotes") from error


def json_rows(path: Path, file: TextIO) -> Iterator[Row]:
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {line}: {error}; expected a JSON object") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}: line {line} is {text!r:.60}, expected a JSON object")
            yield Row(line, record)


def parsed(
    path: Path, rows: list[Row], column: str, parse: Callable[[str], Any], expected: str
) -> list:
    """The column's values; `parse` gets "" for a missing one, and ValueError refuses the line."""
    values = []
    for line, record in rows:
        text = str(record.get(column)).strip()
        text = "" if text in MISSING else text
        try:
            values.append(parse(text))
        except ValueError as error:
            raise DataError(
                f"{path}: line {line}: {column} is {text!r:.60}, expected {expected}"
            ) from error
    return values


def time_of(text: str) -> float:
    """A number as it is, or the Unix seconds of an ISO date or time, in UTC unless it says so.

    Raises:
        ValueError: it is neither, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.removesuffix(" UTC").removesuffix("Z"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def date(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")
