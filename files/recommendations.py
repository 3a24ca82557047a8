"""Top items as a table that opens anywhere, in the ids of the log: Parquet or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from files.atomic_io import DataError

COLUMNS = ("user", "rank", "item", "score")
BLOCK_USERS = 1 << 14  # whose rows are made at once


class TopItems(NamedTuple):
    """The best items of S users, of a catalogue of n."""

    user_ids: np.ndarray  # (S,) as the log has them: int64, or text (object)
    item_ids: np.ndarray  # (n,) the same of the catalogue
    rows: np.ndarray  # (S, k) int of the catalogue, best first; -1: none left
    scores: np.ndarray  # (S, k) float32 cosines


def table_suffix() -> str:
    """Of a Parquet file where its library is installed, else of a CSV file."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return ".csv"
    return ".parquet"


def write_table(file: IO[bytes], suffix: str, top: TopItems) -> None:
    """Write a row per user and item: user, rank from 1, item, score.

    Raises:
        DataError: Parquet is asked for, and its library is not installed.
    """
    (write_parquet if suffix == ".parquet" else write_csv)(file, top)


def write_csv(file: IO[bytes], top: TopItems) -> None:
    text = io.TextIOWrapper(file, "utf-8", errors="surrogatepass", newline="", write_through=True)
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for *ids, scores in blocks(top):
        texts = [f"{score:.6f}" for score in scores.tolist()]
        table.writerows(zip(*(column.tolist() for column in ids), texts, strict=True))
    text.detach()  # else the file would be closed with it


def write_parquet(file: IO[bytes], top: TopItems) -> None:
    try:
        from pyarrow import Table, parquet
    except ImportError as error:
        raise DataError(
            f"{file.name}: writing Parquet needs pyarrow; pip install pyarrow, or name a .csv file"
        ) from error
    writer = None
    for block in blocks(top):
        table = Table.from_arrays([_arrow(column) for column in block], names=COLUMNS)
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


def blocks(top: TopItems) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The columns of some users' rows, (r,) each; at least one block."""
    for start in range(0, max(1, len(top.rows)), BLOCK_USERS):
        part = slice(start, start + BLOCK_USERS)
        users, places = np.nonzero(top.rows[part] >= 0)
        items = top.item_ids[top.rows[part][users, places]]
        ranks, scores = (places + 1).astype(np.int32), top.scores[part][users, places]
        yield top.user_ids[part][users], ranks, items, scores


def _arrow(column: np.ndarray) -> Iterable:
    from pyarrow import array, string

    return array(column, string() if column.dtype == object else None)


def write_lines(file: IO[bytes], ids: np.ndarray) -> None:
    """A line per id, in UTF-8; a line break in one becomes a blank."""
    for start in range(0, len(ids), BLOCK_USERS):
        texts = (" ".join(str(i).splitlines()) for i in ids[start : start + BLOCK_USERS].tolist())
        file.write("".join(f"{text}\n" for text in texts).encode(errors="surrogatepass"))
