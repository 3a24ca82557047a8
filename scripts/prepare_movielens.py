"""MovieLens-1M to a data folder with leave-one-out splits.

Reads the folder as GroupLens ships it (ratings.dat, movies.dat, users.dat) or as CSV
(interactions.csv.gz, movies.csv.gz, users.csv). Equal timestamps keep the order of the file,
which decides the last item of 42 % of the users. Ratings 1..5 become action types 0..4.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from files.atomic_io import DataError, exit_code
from files.data_writer import Column, check_folder, leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE

NUM_RATINGS = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of ratings.dat or interactions.csv.gz")
    parser.add_argument("data_dir", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="the data that data_dir holds")
    args = parser.parse_args(argv)
    return exit_code(lambda: convert(Path(args.source), Path(args.data_dir), args.overwrite))


def convert(source: Path, data_dir: Path, overwrite: bool = False) -> None:
    check_folder(data_dir, overwrite)
    try:
        ratings, movies, users = read_source(source)
        raw_users, raw_items, values, times = ratings.T
        user_ids, user_index = np.unique(raw_users, return_inverse=True)
        item_ids, item_index = np.unique(raw_items, return_inverse=True)
        if not 1 <= values.min() <= values.max() <= NUM_RATINGS:
            raise ValueError(f"ratings from {values.min()} to {values.max()}")
        films = [movies[item] for item in item_ids.tolist()]
        people = [users[user] for user in user_ids.tolist()]
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source}: not MovieLens-1M as it is published ({error!r:.80}); download it again, or "
            "convert another log with scripts/prepare_table.py"
        ) from error
    order = np.lexsort((times, user_index))  # stable: equal times stay in the file's order
    events = np.empty(len(order), EVENT_DTYPE)
    events["item_id"] = item_index[order] + 1
    events["action_type"] = values[order] - 1
    events["timestamp"] = times[order]
    offsets = np.concatenate([[0], np.bincount(user_index).cumsum()])
    titles, item_features = film_features(films)
    write_dataset(
        data_dir,
        leave_one_out(events, offsets),
        item_ids=item_ids,
        user_ids=user_ids,
        num_action_types=NUM_RATINGS,
        action_names=["1 star", *(f"{number} stars" for number in range(2, NUM_RATINGS + 1))],
        item_features=item_features,
        user_features=person_features(people),
        item_names=titles,
        overwrite=overwrite,
    )
    counts = f"{len(user_ids):,} users, {len(item_ids):,} items, {len(events):,} events"
    print(f"wrote {data_dir}: {counts}")


def film_features(films: list[tuple[str, str, str]]) -> tuple[list[str], dict[str, Column]]:
    """Titles, and genres as an array feature, year as a sparse one."""
    titles, years, genres = zip(*films, strict=True)
    names = sorted({name for row in genres for name in row.split("|")})
    first, last = (int(find(years, key=int)) for find in (min, max))
    listed = [[names.index(name) + 1 for name in row.split("|")] for row in genres]
    return list(titles), {
        "genres": Column("array", listed, names),
        "year": Column("sparse", [int(year) - first + 1 for year in years], range(first, last + 1)),
    }


def person_features(people: list[tuple[str, str, str]]) -> dict[str, Column]:
    """Gender, age group and occupation as sparse features."""
    columns = {}
    for name, values in zip(
        ("gender", "age", "occupation"), zip(*people, strict=True), strict=True
    ):
        codes = sorted(set(values))
        columns[name] = Column("sparse", [codes.index(value) + 1 for value in values], codes)
    return columns


def read_source(source: Path) -> tuple[np.ndarray, dict[int, tuple], dict[int, tuple]]:
    """(n, 4) int64 user, item, rating, time; films: title, year, genres; users' demographics."""
    if (source / "ratings.dat").exists():
        ratings = np.array([row for row in read_dat(source / "ratings.dat", 4)], np.int64)
        movies = {int(i): (t, year_of(t), g) for i, t, g in read_dat(source / "movies.dat", 3)}
        people = read_dat(source / "users.dat", 5)
        return ratings, movies, {int(u): (g, a, o) for u, g, a, o, _ in people}
    if not (source / "interactions.csv.gz").exists():
        raise DataError(f"{source}: neither ratings.dat nor interactions.csv.gz is there")
    columns = ("user", "item", "rating", "timestamp")
    ratings = np.array(
        [[row[c] for c in columns] for row in read_csv(source / "interactions.csv.gz")], np.int64
    )
    movies = {
        int(row["item"]): (row["title"], row["year"], row["genres"])
        for row in read_csv(source / "movies.csv.gz")
    }
    users = {
        int(row["user"]): (row["gender"], row["age"], row["occupation"])
        for row in read_csv(source / "users.csv")
    }
    return ratings, movies, users


def year_of(title: str) -> str:
    return re.search(r"\((\d{4})\)\s*$", title).group(1)


def read_dat(path: Path, num_fields: int) -> Iterator[list[str]]:
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("::")
            if len(fields) != num_fields:
                raise DataError(
                    f"{path}: line {number} has {len(fields)} fields, expected {num_fields} "
                    "separated by '::'"
                )
            yield fields


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


if __name__ == "__main__":
    sys.exit(main())
