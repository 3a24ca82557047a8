"""The inspector: its screen says what is there, its full check finds what is wrong."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import inspect_data
import numpy as np
import prepare_synthetic
import pytest
from conftest import NUM_ACTIONS, NUM_ITEMS, NUM_USERS, write_candidates, write_tiny

from files.atomic_io import file_entry, read_json, write_json
from files.data_folder import SPLITS
from files.data_writer import write_dataset
from files.sequences import EVENT_DTYPE, Sequences, item_ids_of, open_split

EVENT = EVENT_DTYPE.itemsize


def screen(capsys, data_dir: Path, *flags: str) -> str:
    assert inspect_data.main([str(data_dir), *flags]) == 0
    return capsys.readouterr().out


def problems(capsys, data_dir: Path) -> list[str]:
    """What the full check finds."""
    assert inspect_data.main([str(data_dir), "--check", "full"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def rewrite(data_dir: Path, split: str, event: int, field: str, value: int) -> None:
    """Set a field of an event, and hash the file again as whoever wrote it so would have."""
    path = data_dir / f"{split}_data.bin"
    events = np.fromfile(path, EVENT_DTYPE)
    events[field][event] = value
    events.tofile(path)
    manifest = read_json(data_dir / "manifest.json")
    manifest["files"][path.name] = file_entry(path)
    write_json(data_dir / "manifest.json", manifest)


# -------------------------------------------------------------------------------------- the screen


def test_the_screen_shows_counts_lengths_and_times_of_each_split(tiny, capsys):
    lines = screen(capsys, tiny).splitlines()
    assert lines[0] == f"{tiny}: 11 users, 23 items, 3 action types"
    for split in SPLITS:
        events, offsets, _ = open_split(tiny, split)
        lengths = np.diff(offsets)
        shape = [f"{np.median(lengths):g},", f"{lengths.mean():.1f},", str(lengths.max())]
        row = next(line for line in lines if line.startswith(split)).split()
        target = "next" if split == "train" else "last"
        assert row[:7] == [split, target, str(NUM_USERS), str(len(events)), *shape]
        first = str(np.datetime64(int(events["timestamp"].min()), "s"))
        last = str(np.datetime64(int(events["timestamp"].max()), "s"))
        assert row[7:] == [*first.split("T"), *last.split("T")]


def test_the_screen_counts_what_training_never_sees(tiny, capsys):
    ids = {split: item_ids_of(open_split(tiny, split)[0]) for split in SPLITS}
    never = set(range(1, NUM_ITEMS + 1)) - set(ids["train"].tolist())
    cold = {s: ids[s][open_split(tiny, s)[1][1:] - 1] for s in ("valid", "test")}
    shares = [f"{np.isin(cold[s], list(never)).mean():.2%} of the {s} targets" for s in cold]
    assert never
    assert f"never in train: {len(never)} items, {', '.join(shares)}" in screen(capsys, tiny)


def test_the_screen_shows_the_mix_of_actions(tiny, capsys):
    actions = open_split(tiny, "train")[0]["action_type"]
    names = ["unknown", *map(str, range(NUM_ACTIONS))]
    shares = [f"{n} {(actions == k - 1).mean():.1%}" for k, n in enumerate(names)]
    assert f"actions in train: {', '.join(shares)}" in screen(capsys, tiny)


def test_the_screen_shows_coverage_and_cardinality_of_every_feature(tiny, capsys):
    rows = [line.split() for line in screen(capsys, tiny).splitlines()]
    shown = {tuple(row[:3]): row[3:] for row in rows if len(row) > 4}
    assert shown["item", "100", "sparse"][:3] == ["100.0%", "4", "values"]
    assert shown["item", "tags", "array"][0] == f"{sum(k % 3 > 0 for k in range(23)) / 23:.1%}"
    assert shown["item", "81", "emb"] == [f"{17 / 23:.1%}", "vectors", "of", "width", "6"]
    assert {"103", "106", "age"} == {
        name for side, name, _ in shown if side == "user" and ":" not in name
    }


def test_the_screen_shows_the_first_sequences_in_plain_words(tmp_path, capsys):
    steps = [0, 0, 30, 7200, 86_400 * 3]
    events = np.empty(5, EVENT_DTYPE)
    events["item_id"], events["action_type"] = [1, 2, 1, 2, 2], [0, -1, 1, 0, 0]
    events["timestamp"] = 1_700_000_000 + np.cumsum(steps)
    sequences = Sequences(events, np.array([0, 5]), np.array([1]))
    common = {"item_ids": ["x", "y"], "user_ids": ["ann"], "num_action_types": 2}
    write_dataset(tmp_path / "a", {"train": sequences}, **common)
    assert (
        "user ann: 2023-11-14 22:13:20 item x (action 0), then item y, 30 seconds later item x "
        "(action 1), 2 hours later item y (action 0), ... 5 events"
    ) in screen(capsys, tmp_path / "a")
    write_dataset(tmp_path / "b", {"train": sequences}, **common, item_names=["a pear", "a fig"])
    assert "22:13:20 item 'a pear' (action 0), then item 'a fig'," in screen(capsys, tmp_path / "b")
    write_dataset(tmp_path / "c", {"train": sequences}, **common, action_names=["see", "buy"])
    text = screen(capsys, tmp_path / "c")
    assert "actions in train: unknown 20.0%, 0 = see 60.0%, 1 = buy 20.0%\n" in text
    assert "22:13:20 item x (see), then item y, 30 seconds later item x (buy)," in text


def test_synthetic_data_has_cold_test_targets_and_all_features(tmp_path, capsys):
    report = prepare_synthetic.write(tmp_path / "data", 300, 200, seed=3)
    text = screen(capsys, tmp_path / "data", "--check", "full")
    assert f"0.00% of the valid targets, {report['cold']:.2%} of the test targets" in text
    assert "300 users, 200 items, 3 action types" in text
    for name in ("item aisle", "item tags", "item price", "item 81", "user region", "user age"):
        assert f"\n{name} " in text
    assert text.endswith("verified every file and every record: no problem\n")


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_data, "find_problems", interrupt)
    assert inspect_data.main([str(tmp_path), "--check", "full"]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_a_folder_of_plain_ids_without_a_manifest_can_be_inspected(tmp_path, capsys):
    np.array([3, 1, 2], "<i4").tofile(tmp_path / "train_data.bin")
    np.array([0, 3], "<i8").tofile(tmp_path / "train_offsets.bin")
    text = screen(capsys, tmp_path, "--check", "full")
    assert "1 users, 3 items, 0 action types" in text
    assert "no times" in text and "user 1: item 3, item 1, item 2" in text


# --------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize(
    "name",
    ["test_data.bin", "valid_users.bin", "indexer.pkl", "item_feat_dict.json", "item_names.txt",
     "creative_emb/emb_81_6.npy"],
)  # fmt: skip
def test_the_full_check_finds_a_flipped_bit(tiny, capsys, name):
    content = bytearray((tiny / name).read_bytes())
    content[-3] ^= 1
    (tiny / name).write_bytes(content)
    found = problems(capsys, tiny)
    assert f"error: {tiny / name}: not the SHA-256 of manifest.json; write the data again" in found


@pytest.mark.parametrize(
    ("place", "field", "value", "message"),
    [
        (2, "item_id", 0, "item id 0, expected 1..23"),
        (0, "item_id", 24, "item id 24, expected 1..23"),
        (0, "action_type", 3, "action type 3, expected -1..2"),
        (2, "action_type", -2, "action type -2, expected -1..2"),
    ],
)
def test_the_full_check_names_sequence_and_event_of_a_bad_record(
    tiny, capsys, monkeypatch, place, field, value, message
):
    monkeypatch.setattr(inspect_data, "BLOCK", 7)
    offsets = open_split(tiny, "valid")[1]
    rewrite(tiny, "valid", int(offsets[4]) + place, field, value)
    assert problems(capsys, tiny) == [
        f"error: {tiny / 'valid_data.bin'}: sequence 4 event {place}: {message}"
    ]


@pytest.mark.parametrize("block", [1, 5, 1 << 22])
def test_falling_times_are_a_counted_warning(tiny, capsys, monkeypatch, block):
    monkeypatch.setattr(inspect_data, "BLOCK", block)
    offsets = open_split(tiny, "train")[1]
    for k in (0, 2):  # an old first event falls below nothing; an old last one does
        rewrite(tiny, "train", int(offsets[k]), "timestamp", 5)
        rewrite(tiny, "train", int(offsets[k + 1]) - 1, "timestamp", 4)
    assert inspect_data.main([str(tiny), "--check", "full"]) == 0
    path = tiny / "train_data.bin"
    assert capsys.readouterr().err == (f"warning: {path}: 2 events are older than the one before\n")


def test_at_most_twenty_problems_are_shown(tmp_path, capsys):
    data_dir = write_tiny(tmp_path / "data")
    for event in range(22):
        rewrite(data_dir, "train", event, "item_id", 99)
    found = problems(capsys, data_dir)
    assert len(found) == 21
    assert found[-1] == "error: and more"


def test_problems_of_different_files_are_collected(tiny, capsys):
    rewrite(tiny, "train", 3, "item_id", 99)
    rewrite(tiny, "test", 3, "action_type", 99)
    (tiny / "feat_statistics.json").write_text('{"100": 1, "tags": 6, "103": 3, "106": 5}')
    np.array([1, 2], "<i8").tofile(tiny / "valid_offsets.bin")
    manifest = read_json(tiny / "manifest.json")
    for name in ("feat_statistics.json", "valid_offsets.bin"):
        manifest["files"][name] = file_entry(tiny / name)
    write_json(tiny / "manifest.json", manifest)
    text = "\n".join(problems(capsys, tiny))
    for message in ("train_data.bin: sequence", "test_data.bin: sequence", "valid_data.bin: ",
                    "item_feat_dict.json: ", "outside 0..1"):  # fmt: skip
        assert message in text


def test_the_full_check_reads_candidates_too(tiny, capsys):
    folder = tiny / "candidates"
    folder.mkdir()  # as a conversion without candidates leaves that of one with them
    assert inspect_data.main([str(tiny), "--check", "full"]) == 0
    folder.rmdir()
    write_candidates(folder, tiny, [2, 0], [1003, 5])
    assert inspect_data.main([str(tiny), "--check", "full"]) == 0
    records = json.loads((folder / "item_feat_dict.json").read_text())
    records["2"]["100"] = 10_000
    (folder / "item_feat_dict.json").write_text(json.dumps(records))
    assert inspect_data.main([str(tiny), "--check", "full"]) != 0
    assert "item 2, feature 100 = 10000: outside 0.." in capsys.readouterr().err
    (folder / "item_ids.bin").write_bytes(b"")
    assert inspect_data.main([str(tiny), "--check", "full"]) != 0


def test_a_file_of_another_size_is_one_line_even_without_the_check(tiny, capsys):
    (tiny / "train_data.bin").write_bytes(b"short")
    assert inspect_data.main([str(tiny)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tiny / 'train_data.bin'}: 5 bytes, but manifest.json says")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--check", "full"]])
def test_a_pickle_is_trusted_only_on_request(tiny, capsys, flags):
    indexer = pickle.loads((tiny / "indexer.pkl").read_bytes())
    vectors = {item: [1.0, 2.0] for item in indexer["i"]}
    (tiny / "indexer.pkl").write_bytes(pickle.dumps(Counter(indexer)))
    (tiny / "creative_emb" / "82.pkl").write_bytes(pickle.dumps(Counter(vectors)))
    (tiny / "manifest.json").unlink()
    assert inspect_data.main([str(tiny), *flags]) == 1
    assert "indexer.pkl: refuses to load" in capsys.readouterr().err
    assert "item 82 " in screen(capsys, tiny, *flags, "--trust_pickle")


@pytest.mark.parametrize("flags", [[], ["--check", "full"]])
@pytest.mark.parametrize("re_id", [250, -3])
def test_a_re_id_beyond_the_items_is_named(tiny, capsys, flags, re_id):
    indexer = pickle.loads((tiny / "indexer.pkl").read_bytes())
    vectors = {item: [1.0, 2.0] for item in indexer["i"]}
    (tiny / "creative_emb" / "82.pkl").write_bytes(pickle.dumps(vectors))
    indexer["i"][1000] = re_id
    size = (tiny / "indexer.pkl").stat().st_size
    (tiny / "indexer.pkl").write_bytes(pickle.dumps(indexer, 4).ljust(size, b"."))
    manifest = json.loads((tiny / "manifest.json").read_text())
    manifest["files"]["indexer.pkl"] = file_entry(tiny / "indexer.pkl")
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    assert inspect_data.main([str(tiny), *flags]) == 1
    assert f"1000 is {re_id}" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_one_line(tiny, capsys, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", str(tiny / "train_data.bin"))

    monkeypatch.setattr(np, "memmap", deny)
    assert inspect_data.main([str(tiny)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "train_data.bin" in error and error.count("\n") == 1


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert inspect_data.main([str(tmp_path)]) == 1
    assert f"error: {tmp_path}: no train_data.bin there" in capsys.readouterr().err
