"""Tables of items and of users to features: a role per column, and vectors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from files.atomic_io import DataError
from files.data_writer import Column
from table_source import (
    LIST_DELIMITER,
    Rows,
    Texts,
    are_numbers,
    check_columns,
    ranked,
    read_rows,
    reading,
    texts_of,
    without_na,
)

DELIMITERS = LIST_DELIMITER + ";, "  # of lists
ROLES = ("sparse", "array", "continual", "drop")
SKEWED = 30  # a positive number whose largest is this many medians becomes log(1 + x)


def read_table(
    path: Path | None, key: str | None, event_column: str, ids: list
) -> dict[str, Texts]:
    """The columns of a table but its key, a row for each of the ids; an id's last row counts."""
    if path is None:
        return {}
    place = {str(i): k for k, i in enumerate(ids)}
    records: list[dict[str, Any]] = [{}] * len(ids)
    num_rows = 0
    for rows in read_rows(path, (), None, may_span=True):
        first = rows.records[0]
        key = key or (event_column if event_column in first else next(iter(first), ""))
        if not key:  # an index that pandas has written
            raise DataError(f"{path}: its first column has no name; say where ids are with --*_key")
        check_columns(rows, [key])
        num_rows += len(rows.records)
        for text, record in zip(texts_of(rows, key), rows.records, strict=True):
            if text in place:
                records[place[text]] = record
    found = sum(map(bool, records))
    if not found:
        raise DataError(
            f"{path}: column {key} holds no id of the events; name the one that does "
            "with --item_key or --user_key"
        )
    print(
        f"{path.name}: {found:,} of {len(ids):,} ids are in column {key}; dropped "
        f"{num_rows - found:,} rows, of no event or with a later row of the same id"
    )
    names, rows = dict.fromkeys(itertools.chain(*records)), Rows(path, (), records)
    return {name: Texts(without_na(texts_of(rows, name))) for name in names if name != key}


def names_of(table: dict[str, Texts], name: str) -> list[str]:
    if name not in table:
        raise DataError(f"--item_names: no column {name}; there are {', '.join(table) or 'none'}")
    texts = table[name].texts
    return [texts[code] for code in table[name].codes]


def make_features(
    tables: dict[str, dict[str, Texts]], roles: dict[str, list[str]]
) -> dict[str, dict[str, Column]]:
    """A feature per column that is worth one; what became of each column is shown."""
    names = [name for table in tables.values() for name in table]
    for pattern in itertools.chain(*roles.values()):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(
                f"no column is called {pattern}; there are {', '.join(names) or 'none'}"
            )
    features: dict[str, dict[str, Column]] = {}
    for side, table in tables.items():
        features[side], kept = {}, {}
        for name, column in table.items():
            asked = [r for r in ROLES if any(fnmatchcase(name, p) for p in roles[r])]
            if len(by_name := [r for r in ROLES if name in roles[r]]) > 1:
                raise DataError(f"column {name}: named by both --{by_name[0]} and --{by_name[1]}")
            content = column.codes.tobytes()
            role, detail = (asked[0], "as asked") if asked else guess(column, kept.get(content))
            if role != "drop":
                kept[content] = name
                feature_id = name
                while any(feature_id in taken for taken in features.values()):
                    feature_id = f"user_{feature_id}"
                features[side][feature_id], detail = BUILDERS[role](name, column)
            print(f"  {side}  {name:24} {role:10} {detail}")
    return features


def guess(column: Texts, twin: str | None) -> tuple[str, str]:
    """The role of a column, and the reason to drop it; `twin` has a value for each of its own."""
    known = [text for text in column.texts if text]
    num_known = int((~missing(column)).sum())
    if len(column.texts) < 2:
        return "drop", "constant"
    if are_numbers(known) and not all(float(text).is_integer() for text in known):
        return "continual", ""
    delimiter = delimiter_of(known)
    if delimiter == "," and all(re.fullmatch(r"-?\d+(,\d+)?", text) for text in known):
        return "drop", "numbers with decimal commas, or lists (--array)? write points for numbers"
    role = "array" if delimiter else "sparse"
    if role == "sparse" and len(known) > num_known / 2:
        return "drop", f"{len(known):,} different values in {num_known:,} rows"
    return ("drop", f"a copy of {twin}") if twin else (role, "")


def missing(column: Texts) -> np.ndarray:
    """(n,) bool."""
    return np.array([not text for text in column.texts], bool)[column.codes]


def delimiter_of(texts: Sequence[str]) -> str | None:
    """What separates lists: it leaves no more pieces than texts; a blank, only whole numbers."""
    for delimiter in DELIMITERS:
        pieces = {piece for text in texts for piece in pieces_of(text, delimiter)}
        is_list = len(pieces) <= len(texts) and any(delimiter in text for text in texts)
        if is_list and (delimiter != " " or all(map(str.isdecimal, pieces))):
            return delimiter
    return None


def pieces_of(text: str, delimiter: str) -> list[str]:
    return [piece.strip() for piece in text.split(delimiter) if piece.strip()]


def sparse_column(_: str, column: Texts) -> tuple[Column, str]:
    ranks, known = ranked(column.texts)
    detail = f"{len(known):,} values, {1 - missing(column).mean():.1%} known"
    return Column("sparse", ranks[column.codes].tolist(), known), detail


def array_column(_: str, column: Texts) -> tuple[Column, str]:
    texts = column.texts
    used = [d for d in DELIMITERS if any(d in text for text in texts)]
    delimiter = delimiter_of(texts) or (used or DELIMITERS)[0]
    lists = [pieces_of(text, delimiter) for text in texts]
    pieces = list(dict.fromkeys(itertools.chain(*lists)))
    ranks, known = ranked(pieces)
    rank = dict(zip(pieces, ranks.tolist(), strict=True))
    values = [[rank[piece] for piece in lists[code]] for code in column.codes]
    mean = sum(map(len, values)) / len(values)
    detail = f"{len(pieces):,} values, {mean:.1f} per row, by {delimiter!r}"
    return Column("array", values, known), detail


def continual_column(name: str, column: Texts) -> tuple[Column, str]:
    """Numbers; a missing one is the median, and skewed ones become log(1 + x)."""
    bad = [text for text in column.texts if text and not are_numbers([text])]
    if bad or not any(column.texts):
        raise DataError(f"column {name}: {bad[:1]} is no number; choose another role for it")
    is_missing = missing(column)
    values = np.array([float(text or 0) for text in column.texts])[column.codes]
    median = np.median(values[~is_missing])
    values[is_missing] = median
    detail = f"{values.min():.4g} to {values.max():.4g}, median {median:.4g}"
    if is_missing.any():
        detail += f", {is_missing.sum():,} missing read as that"
    transformation = "x"
    if values.min() >= 0 and values.max() > SKEWED * median:
        values, transformation = np.log1p(values), "log(1 + x)"
        detail = f"{transformation}, x {detail}"
    return Column("continual", values.tolist(), [transformation]), detail


BUILDERS = {"sparse": sparse_column, "array": array_column, "continual": continual_column}


def read_vectors(path: Path, item_ids: list) -> np.ndarray:
    """(X, W) float32, NaN for items without a vector."""
    with reading(path):
        ids, vectors = parquet_vectors(path) if path.suffix == ".parquet" else npz_vectors(path)
    row_of = {str(i): row for row, i in enumerate(ids)}
    rows = np.array([row_of.get(str(i), -1) for i in item_ids])
    found = np.flatnonzero(rows >= 0)
    if not len(found):
        raise DataError(f"{path}: none of its {len(ids):,} ids is an item of the events")
    table = np.full((len(rows), vectors.shape[1]), np.nan, np.float32)
    table[found] = vectors[rows[found]]
    bad = found[~np.isfinite(table[found]).all(1)]
    if len(bad):
        raise DataError(f"{path}: the vector of {item_ids[bad[0]]} is not finite; correct it")
    print(f"{path.name}: {len(found):,} of {len(rows):,} items have a vector of {table.shape[1]}")
    return table


def npz_vectors(path: Path) -> tuple[list, np.ndarray]:
    """The rows of the file's one float matrix, and their ids: its one array of that length."""
    try:
        with open(path, "rb") as file:
            content = np.load(file)
            arrays = {"": content} if isinstance(content, np.ndarray) else dict(content.items())
    except ValueError as error:  # numpy's words advise to trust it
        raise DataError(
            f"{path}: no .npz or .parquet, or one with Python objects; save ids of text as text: "
            "ids.astype(str)"
        ) from error
    matrices = [a for a in arrays.values() if a.ndim == 2 and a.dtype.kind == "f"]
    ids = [a for a in arrays.values() if a.ndim == 1 and [len(a)] == [len(m) for m in matrices]]
    if len(ids) != 1:
        found = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items())
        raise DataError(f"{path}: {found}; expected ids [n] and float vectors [n, width]")
    return ids[0].tolist(), matrices[0]


def parquet_vectors(path: Path) -> tuple[list, np.ndarray]:
    records = [record for rows in read_rows(path, (), None) for record in rows.records]
    if not records:
        raise DataError(f"{path}: no rows in it")
    is_list = {name: isinstance(value, list) for name, value in records[0].items()}
    if sorted(is_list.values()) != [False, True]:
        raise DataError(f"{path}: {list(is_list)}, expected a column of ids and one of vectors")
    id_column, column = sorted(is_list, key=is_list.get)
    return [r[id_column] for r in records], np.array([r[column] for r in records], np.float32)
