"""Vectors of items in a .npz or .parquet file, found by the ids of the log, a part at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from files.atomic_io import DataError
from table_database import count, name_of, path_text, reading
from table_source import kind_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS = 20_000  # vectors in memory at once

Parts = Iterator[tuple[list, np.ndarray]]  # (n,) ids and (n, W) float vectors


def read_vectors(
    connection: DuckDBPyConnection, path: Path, item_ids: list, folder: Path
) -> np.ndarray:
    """(X, W) float32, mapped from a file in `folder`; NaN for items without a vector.

    Of several vectors of one id the last counts.

    Raises:
        DataError: the file is none of vectors, one of them is not finite, or none is of an item.
    """
    row_of = {str(original): row for row, original in enumerate(item_ids)}
    examples, table, num_ids, is_present = [], None, 0, np.zeros(len(item_ids), bool)
    with reading(path):
        is_parquet = kind_of(path) == "parquet"
        for ids, vectors in parquet_parts(connection, path) if is_parquet else npz_parts(path):
            if table is None:
                shape = len(item_ids), vectors.shape[1]
                table = np.memmap(folder / "vectors", np.float32, "w+", shape=shape)
                table[:] = np.nan
            examples, num_ids = examples or ids[:3], num_ids + len(ids)
            rows = np.array([row_of.get(plain_id(i), -1) for i in ids])
            known = np.flatnonzero(rows >= 0)
            bad = known[~np.isfinite(vectors[known]).all(1)]
            if len(bad):
                raise DataError(f"{path}: the vector of {ids[bad[0]]} is not finite; correct it")
            table[rows[known]] = vectors[known]
            is_present[rows[known]] = True
    if not is_present.any():
        here, there = (", ".join(map(repr, some[:3])) for some in (examples, item_ids))
        raise DataError(
            f"{path}: none of its {num_ids:,} ids is an item of the events; it has {here}, the "
            f"events have {there}"
        )
    counts = f"{is_present.sum():,} of {len(item_ids):,} items"
    print(f"{path.name}: {counts} have a vector of {table.shape[1]}")
    return table


def plain_id(value: object) -> str:
    """The text of an id: b"7" and 7.0 are 7."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def npz_parts(path: Path) -> Parts:
    """The rows of the file's one float matrix, and their ids: its one array of that length."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: neither .npz nor .parquet; save it with numpy.savez")
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for name in archive.namelist():
            with archive.open(name) as file:
                headers[name.removesuffix(".npy")] = read_header(file)
        if any(dtype.hasobject for _, _, dtype in headers.values()):
            raise DataError(
                f"{path}: Python objects in it; save ids of text as text: ids.astype(str)"
            )
        matrices = {n for n, (s, _, d) in headers.items() if len(s) == 2 and d.kind == "f"}
        lengths = [headers[name][0][:1] for name in matrices]
        ids = [name for name, (shape, *_) in headers.items() if [shape] == lengths]
        if len(ids) != 1:
            found = ", ".join(f"{name} {d}{list(s)}" for name, (s, _, d) in headers.items())
            raise DataError(f"{path}: {found}; expected ids [n] and float vectors [n, width]")
        with archive.open(f"{ids[0]}.npy") as file:
            all_ids = np.lib.format.read_array(file).tolist()
        with archive.open(f"{matrices.pop()}.npy") as file:
            for part in matrix_parts(file):
                yield all_ids[: len(part)], part
                del all_ids[: len(part)]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of the array that follows."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def matrix_parts(file: IO[bytes]) -> Iterator[np.ndarray]:
    """The rows of a matrix in the .npy format."""
    (num_rows, width), has_columns_first, dtype = read_header(file)
    if has_columns_first:  # rows are not together, so all of it is read
        values = np.frombuffer(file.read(), dtype).reshape(width, num_rows).T
        yield from (values[start : start + ROWS] for start in range(0, num_rows, ROWS))
        return
    for start in range(0, num_rows, ROWS):
        some = min(ROWS, num_rows - start)
        content = file.read(some * width * dtype.itemsize)
        yield np.frombuffer(content, dtype).reshape(some, width)


def parquet_parts(connection: DuckDBPyConnection, path: Path) -> Parts:
    relation = f"read_parquet([{path_text(path)}])"
    total = count(connection, relation)
    if not total:
        raise DataError(f"{path}: no rows in it")
    kinds = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    is_list = {name: kind.endswith("]") for name, kind, *_ in kinds}
    if sorted(is_list.values()) != [False, True]:
        raise DataError(f"{path}: {list(is_list)}, expected a column of ids and one of vectors")
    vector, original = (name_of(f(is_list, key=is_list.get)) for f in (max, min))
    connection.execute(
        f"CREATE TABLE vectors AS SELECT {original} AS id, {vector}::FLOAT[] AS x FROM {relation}"
    )
    short, width = connection.execute(
        "SELECT min(coalesce(len(x), 0)), max(len(x)) FROM vectors"
    ).fetchone()
    if short != width:
        raise DataError(f"{path}: vectors of {short} and of {width} numbers, expected one width")
    for start in range(0, total, ROWS):
        columns = connection.execute(
            f"SELECT id, unnest(x) AS x FROM vectors WHERE rowid BETWEEN {start} "
            f"AND {start + ROWS - 1}"
        ).fetchnumpy()
        yield columns["id"][::width].tolist(), np.ma.filled(columns["x"], np.nan).reshape(-1, width)
    connection.execute("DROP TABLE vectors")
