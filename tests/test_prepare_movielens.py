"""MovieLens in both spellings: order of ties, splits, features, and the real files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import prepare_movielens
import pytest

from files.data_folder import original_ids
from files.features import load_features
from files.sequences import open_split

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "ml-1m"

# User 7 rated three films in one second; films 30 and 10 in that order in the file.
RATINGS = [
    (7, 20, 5, 900), (7, 30, 3, 1000), (7, 10, 4, 1000), (7, 40, 1, 1000), (3, 10, 2, 500),
    (3, 20, 1, 400), (7, 50, 2, 800),
]  # fmt: skip
FILMS = {
    10: ("Alpha (1950)", "1950", "Drama"),
    20: ("Beta (1960)", "1960", "Action|Drama"),
    30: ("Gamma (1970)", "1970", "Comedy"),
    40: ("Delta: Part II (1980)", "1980", "Action|Comedy|Drama"),
    50: ("Émile (1990)", "1990", "Drama"),
    60: ("Never rated (1999)", "1999", "Western"),
}
USERS = {3: ("F", "25", "4"), 7: ("M", "18", "0")}


def write_dat(folder: Path) -> None:
    files = {
        "ratings.dat": RATINGS,
        "movies.dat": [(i, title, genres) for i, (title, _, genres) in FILMS.items()],
        "users.dat": [(u, *who, "00000") for u, who in USERS.items()],
    }
    for name, rows in files.items():
        text = "".join("::".join(map(str, row)) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="latin-1")


def write_csv(folder: Path) -> None:
    for name, header, rows in (
        ("interactions.csv.gz", "user,item,rating,timestamp", RATINGS),
        ("movies.csv.gz", "item,title,year,genres", [(i, *film) for i, film in FILMS.items()]),
        ("users.csv", "user,gender,age,occupation", [(u, *who) for u, who in USERS.items()]),
    ):
        text = "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
        opener = gzip.open if name.endswith("gz") else open
        with opener(folder / name, "wt", encoding="utf-8") as file:
            file.write(text)


@pytest.fixture(params=[write_dat, write_csv], ids=["dat", "csv"])
def converted(request, tmp_path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    request.param(source)
    assert prepare_movielens.main([str(source), str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def history(data: Path, split: str, sequence: int) -> list[tuple[int, int, int]]:
    """(original item id, rating, time) of a sequence."""
    events, offsets, _ = open_split(data, split)
    items = original_ids(data, "i", 5)
    part = events[offsets[sequence] : offsets[sequence + 1]]
    return [
        (int(items[e["item_id"]]), int(e["action_type"]) + 1, int(e["timestamp"])) for e in part
    ]


def test_equal_times_keep_the_order_of_the_file(converted):
    expected = [(50, 2, 800), (20, 5, 900), (30, 3, 1000), (10, 4, 1000), (40, 1, 1000)]
    assert history(converted, "test", 0) == expected
    assert history(converted, "valid", 0) == expected[:-1]
    assert history(converted, "train", 1) == expected[:-2]


def test_a_user_with_two_ratings_only_trains(converted):
    assert history(converted, "train", 0) == [(20, 1, 400), (10, 2, 500)]
    assert len(open_split(converted, "test")[1]) == 2


def test_genres_year_and_demographics_are_features(converted):
    items, users = load_features(converted, "item", 5), load_features(converted, "user", 2)
    genres = items["genres"]  # Action, Comedy, Drama: a film that nobody rated brings no genre
    lists = np.split(genres.values, genres.offsets[1:-1])
    assert [values.tolist() for values in lists] == [
        [], [3], [1, 3], [2], [1, 2, 3], [3],
    ]  # fmt: skip
    assert items["year"].values.tolist() == [0, 1, 11, 21, 31, 41]
    assert {name: users[name].values.tolist() for name in users} == {
        "gender": [0, 1, 2], "age": [0, 2, 1], "occupation": [0, 2, 1],
    }  # fmt: skip
    names = (converted / "item_names.txt").read_text().splitlines()
    assert names[1:4] == ["Beta (1960)", "Gamma (1970)", "Delta: Part II (1980)"]


def test_a_broken_line_is_named(tmp_path, capsys):
    write_dat(tmp_path)
    with open(tmp_path / "ratings.dat", "a") as file:
        file.write("7::20::5\n")
    assert prepare_movielens.main([str(tmp_path), str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert "ratings.dat: line 8 has 3 fields, expected 4" in error
    assert prepare_movielens.main([str(tmp_path / "data"), str(tmp_path / "out")]) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ratings.dat", "7::20::3.5::900"), ("ratings.dat", "7::20::9::900"),
        ("ratings.dat", "7::99::3::900"), ("ratings.dat", "99::20::3::900"),
        ("movies.dat", "70::No year::Drama"),
    ],
)  # fmt: skip
def test_what_movielens_1m_does_not_have_is_one_line(tmp_path, capsys, name, line):
    write_dat(tmp_path)
    with open(tmp_path / name, "a") as file:
        file.write(line + "\n")
    assert prepare_movielens.main([str(tmp_path), str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert_one_line(error, tmp_path)
    assert "not MovieLens-1M as it is published" in error


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_download_is_one_line(tmp_path, capsys, damage):
    write_csv(tmp_path)
    path = tmp_path / "interactions.csv.gz"
    text, content = gzip.decompress(path.read_bytes()), bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(gzip.compress(text.rstrip().rpartition(b",")[0]))
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert prepare_movielens.main([str(tmp_path), str(tmp_path / "data")]) == 1
    assert_one_line(capsys.readouterr().err, tmp_path)


def test_a_missing_file_and_a_file_in_the_way_are_one_line(tmp_path, capsys):
    source, taken = tmp_path / "source", tmp_path / "taken"
    source.mkdir()
    taken.touch()
    write_dat(source)
    assert prepare_movielens.main([str(source), str(taken)]) == 1
    assert_one_line(capsys.readouterr().err, taken)
    (source / "movies.dat").unlink()
    assert prepare_movielens.main([str(source), str(tmp_path / "data")]) == 1
    assert_one_line(capsys.readouterr().err, source / "movies.dat")


def assert_one_line(error: str, path: Path) -> None:
    assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


@pytest.mark.skipif(not SHARED.exists(), reason=f"no MovieLens-1M in {SHARED}")
def test_the_real_files_have_the_published_counts(tmp_path):
    assert prepare_movielens.main([str(SHARED), str(tmp_path)]) == 0
    events, offsets, _ = open_split(tmp_path, "test")
    assert (len(offsets) - 1, len(events), events["item_id"].max()) == (6040, 1_000_209, 3706)
    assert np.diff(offsets).max() == 2314
    for split, fewer in (("valid", 1), ("train", 2)):
        assert (np.diff(offsets) - np.diff(open_split(tmp_path, split)[1]) == fewer).all()
