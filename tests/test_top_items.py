"""Exports for everyone: who is in them, which history counts, and the tables in the log's ids."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import recommend
from pyarrow import parquet

from dataset import load_emb
from engine.top_items import newest_histories
from files.atomic_io import file_entry, read_json, write_json
from files.data_folder import read_manifest
from files.data_writer import leave_one_out, write_dataset
from files.recommendations import TopItems, write_lines, write_table
from files.sequences import EVENT_DTYPE, Sequences
from main import main

ITEMS = ["a", "b, with a comma", "c", "04", "e", "f", "g"]
USERS = [f"user {k}" for k in range(6)]
HISTORIES = [[1, 2, 3, 4], [2], [3, 4], [4, 5, 6, 1, 2], [5, 6, 7], []]
TINY = [
    "--device=cpu",
    "--num_workers=0",
    "--hidden_units=8",
    "--attention_dim=5",
    "--linear_dim=6",
]


def events_of(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    events = np.zeros(sum(map(len, histories)), EVENT_DTYPE)
    events["item_id"], events["action_type"] = np.concatenate(histories), -1
    events["timestamp"] = 1_700_000_000 + np.arange(len(events))
    return events, np.concatenate([[0], np.cumsum([len(h) for h in histories])])


@pytest.fixture
def trained(tmp_path) -> Path:
    """Users of one and of two events, and one without any, train alone."""
    splits = leave_one_out(*events_of(HISTORIES))
    ids = {"item_ids": ITEMS, "user_ids": USERS}
    write_dataset(tmp_path / "data", splits, **ids, num_action_types=0)
    folders = [f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/o"]
    assert main([*folders, f"--log_dir={tmp_path}/l", "--num_epochs=1", *TINY]) == 0
    return tmp_path


def export(folder: Path, *flags: str) -> Path:
    folders = [f"--data_dir={folder}/data", f"--output_dir={folder}/o"]
    checkpoint = f"--state_dict_path={folder}/o/model_best.pt"
    assert main(["--inference_only", *folders, checkpoint, *TINY, "--top_k=3", *flags]) == 0
    return folder / "o" / "user_embeddings"


def rows_of(path: Path) -> list[tuple[str, int, str, float]]:
    if path.suffix == ".parquet":
        return [tuple(row.values()) for row in parquet.read_table(path).to_pylist()]
    with open(path, newline="") as file:
        return [
            (r["user"], int(r["rank"]), r["item"], float(r["score"])) for r in csv.DictReader(file)
        ]


def test_everyone_with_an_event_is_exported_and_who_is_not_is_counted(trained, capsys):
    folder = export(trained, "--export_users=all")
    assert "users: 5 of 6; left out are 1 without an event" in capsys.readouterr().out
    assert sorted((folder / "user_ids.txt").read_text().splitlines()) == USERS[:5]
    assert load_emb(folder / "embedding.fbin").shape == (5, 8)
    folder = export(trained)
    assert "users: 3 of 6; left out are 3 not in the test split" in capsys.readouterr().out
    expected = [USERS[0], USERS[3], USERS[4]]
    assert sorted((folder / "user_ids.txt").read_text().splitlines()) == expected


def test_the_table_is_the_brute_force_of_whole_histories_in_the_ids_of_the_log(trained):
    folder = export(trained, "--export_users=all", "--remove_seen")
    items = np.array(load_emb(trained / "o" / "item_embeddings" / "embedding.fbin"))
    queries = np.array(load_emb(folder / "embedding.fbin"))
    users = (folder / "user_ids.txt").read_text().splitlines()
    assert (trained / "o" / "item_embeddings" / "item_ids.txt").read_text().splitlines() == ITEMS
    found, place = rows_of(folder / "recommendations.parquet"), 0
    for user, query in zip(users, queries, strict=True):
        scores = items @ query
        scores[[item - 1 for item in HISTORIES[USERS.index(user)]]] = -np.inf
        best = [k for k in np.argsort(-scores)[:3].tolist() if scores[k] > -np.inf]
        for rank, k in enumerate(best, 1):
            assert found[place][:3] == (user, rank, ITEMS[k])
            assert found[place][3] == pytest.approx(scores[k], abs=1e-5)
            place += 1
    assert place == len(found) == 5 + 5 + 5 - 1  # of the five users one has two items left


def test_without_pyarrow_the_same_rows_are_csv_and_the_old_table_goes(trained, monkeypatch):
    folder = export(trained, "--export_users=all")
    rows = rows_of(folder / "recommendations.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    export(trained, "--export_users=all")
    monkeypatch.undo()
    assert not (folder / "recommendations.parquet").exists()
    others = rows_of(folder / "recommendations.csv")
    assert [row[:3] for row in rows] == [row[:3] for row in others]
    np.testing.assert_allclose([r[3] for r in rows], [r[3] for r in others], atol=1e-6)
    entry = read_json(folder / "manifest.json")["files"]["recommendations.csv"]
    assert entry == file_entry(folder / "recommendations.csv")


def test_users_of_both_exports_get_the_same_from_their_whole_histories(trained):
    rows = {}
    for flags in (["--whole_history"], ["--export_users=all"]):
        for row in rows_of(export(trained, *flags) / "recommendations.parquet"):
            rows.setdefault(row[:3], []).append(row[3])
    pairs = [scores for scores in rows.values() if len(scores) == 2]
    assert len(pairs) >= 8
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in pairs)


def test_recommend_knows_the_users_of_such_an_export(trained, capsys):
    flags = [f"--data_dir={trained}/data", f"--output_dir={trained}/o", f"--user={USERS[1]}"]
    export(trained)
    assert recommend.main(flags) == 1
    assert "--export_users all" in capsys.readouterr().err
    rows = rows_of(export(trained, "--export_users=all") / "recommendations.parquet")
    capsys.readouterr()
    assert recommend.main(flags) == 0
    text = capsys.readouterr().out
    assert f"user {USERS[1]}: 1 events, the last of them" in text
    assert "held out" not in text
    first = next(row for row in rows if row[0] == USERS[1])
    line = next(line.split() for line in text.splitlines() if line.startswith("  1 "))
    assert line == ["1", f"{first[3]:.4f}", first[2]]


@pytest.mark.parametrize("has_times", [True, False])
def test_of_a_users_sequences_the_newest_counts_and_without_times_the_longest(tmp_path, has_times):
    def split(histories: list[list[int]], users: list[int], start: int) -> Sequences:
        events, offsets = events_of(histories)
        events["timestamp"] = events["timestamp"] + start if has_times else 0
        return Sequences(events, offsets, np.array(users, np.int32))

    splits = {
        "train": split([[1, 2, 3], [4, 5], [6]], [1, 2, 3], 0),
        "valid": split([[1, 2, 3, 4], [7, 7]], [1, 4], 100),
        "test": split([[5, 6]], [2], 200),
    }
    ids = {"item_ids": ITEMS, "user_ids": USERS}
    write_dataset(tmp_path, splits, **ids, num_action_types=0)
    found = {}
    for dataset in newest_histories(tmp_path, read_manifest(tmp_path).targets):
        for index, user in enumerate(dataset.user_ids.tolist()):
            assert user not in found
            found[user] = dataset[index].seen.events["item_id"].tolist()
    assert found == {1: [1, 2, 3, 4], 2: [5, 6], 3: [6], 4: [7, 7]}


@pytest.mark.parametrize("block", [1, 2, 1 << 14])
def test_each_id_has_a_line(tmp_path, monkeypatch, block):
    monkeypatch.setattr("files.recommendations.BLOCK_USERS", block)
    with open(tmp_path / "ids.txt", "wb") as file:
        write_lines(file, np.array(["Ann", "two\nlines", "é", "4", "5"], object))
    assert (tmp_path / "ids.txt").read_text() == "Ann\ntwo lines\né\n4\n5\n"


@pytest.mark.parametrize(("time", "newest"), [(200, [5, 6]), (100, [1, 2, 3, 4])])
def test_a_short_newest_sequence_counts_before_a_long_old_one(tmp_path, time, newest):
    def split(history: list[int], time: int) -> Sequences:
        events, offsets = events_of([history])
        events["timestamp"] = time
        return Sequences(events, offsets, np.array([1], np.int32))

    splits = {"train": split([1, 2, 3, 4], 100), "test": split([5, 6], time)}
    ids = {"item_ids": ITEMS, "user_ids": USERS}
    write_dataset(tmp_path, splits, **ids, num_action_types=0)
    (dataset,) = (d for d in newest_histories(tmp_path, read_manifest(tmp_path).targets) if len(d))
    assert dataset[0].seen.events["item_id"].tolist() == newest


@pytest.mark.parametrize("block", [1, 2, 1 << 14])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_numbers_stay_numbers_and_items_that_are_not_left_have_no_row(
    tmp_path, monkeypatch, suffix, block
):
    monkeypatch.setattr("files.recommendations.BLOCK_USERS", block)
    rows, scores = np.array([[1, 0], [0, -1], [-1, -1]]), np.array([[0.5, 0.25], [1, 0], [0, 0]])
    top = TopItems(np.array([7, 8, 9]), np.array([10, 20]), rows, scores.astype(np.float32))
    path = tmp_path / f"table{suffix}"
    with open(path, "wb") as file:
        write_table(file, suffix, top)
        assert not file.closed
    number = int if suffix == ".parquet" else str
    expected = [(7, 1, 20, 0.5), (7, 2, 10, 0.25), (8, 1, 10, 1.0)]
    assert rows_of(path) == [(number(u), r, number(i), s) for u, r, i, s in expected]


def test_no_users_at_all_make_a_table_of_its_header(tmp_path):
    nobody = TopItems(np.empty(0, object), np.array([1]), np.empty((0, 2), int), np.empty((0, 2)))
    with open(tmp_path / "table.csv", "wb") as file:
        write_table(file, ".csv", nobody)
    assert (tmp_path / "table.csv").read_text() == "user,rank,item,score\n"


def test_data_without_a_test_split_is_exported_to_everyone(trained):
    manifest = read_json(trained / "data" / "manifest.json")
    del manifest["targets"]["test"]
    write_json(trained / "data" / "manifest.json", manifest)
    assert not (export(trained) / "recommendations.parquet").exists()
    folder = export(trained, "--export_users=all")
    assert sorted((folder / "user_ids.txt").read_text().splitlines()) == USERS[:5]


def test_for_a_training_the_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--export_users=all"])
    assert "are for --inference_only" in capsys.readouterr().err
