"""The bytes of a data folder: written, read back, and refused when they do not fit together."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from dataset import MyDataset
from files.atomic_io import DataError
from files.data_folder import (
    SPLITS,
    Manifest,
    original_ids,
    read_indexer,
    read_item_names,
    read_manifest,
)
from files.data_writer import Column, leave_one_out, write_dataset
from files.features import load_features
from files.item_vectors import load_vectors
from files.sequences import (
    EVENT_DTYPE,
    Sequences,
    check_split,
    gather,
    open_split,
)

NUM_ITEMS, NUM_USERS, NUM_ACTIONS = 19, 8, 3


def make_events(generator: np.random.Generator, num_events: int) -> np.ndarray:
    events = np.empty(num_events, EVENT_DTYPE)
    events["item_id"] = generator.integers(1, NUM_ITEMS + 1, num_events)
    events["action_type"] = generator.integers(-1, NUM_ACTIONS, num_events)
    events["timestamp"] = generator.integers(0, 2**40, num_events)
    return events


def make_sequences(generator: np.random.Generator, lengths: list[int]) -> Sequences:
    users = generator.permutation(NUM_USERS)[: len(lengths)] + 1
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Sequences(make_events(generator, sum(lengths)), offsets, users.astype(np.int32))


def write(folder: Path, splits, **options) -> Path:
    options = {
        "item_ids": [100 + k for k in range(NUM_ITEMS)],
        "user_ids": [f"u{k}" for k in range(NUM_USERS)],
        "num_action_types": NUM_ACTIONS,
        "overwrite": True,
    } | options
    write_dataset(folder, splits, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training sequences of 4, 0, 2 and 5 events, and a test split."""
    generator = np.random.default_rng(1)
    splits = {"train": make_sequences(generator, [4, 0, 2, 5])}
    return write(tmp_path / "data", splits | {"test": make_sequences(generator, [3, 2])})


def read(folder: Path, split: str = "train") -> Sequences:
    """What opening a split gives, all checks passed."""
    events, offsets, users = open_split(folder, split)
    check_split(folder, split, offsets, users, read_manifest(folder).num_users)
    return Sequences(events, offsets, users)


def assert_equal(found: Sequences, expected: Sequences) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert_array_equal(ours, theirs)


def remove_manifest(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    return folder


# -------------------------------------------------------------------------------- write, then read


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=NUM_USERS).filter(any),
    num_test=st.integers(0, 5),
    has_manifest=st.booleans(),
)
def test_sequences_are_read_as_they_were_written(tmp_path, seed, lengths, num_test, has_manifest):
    generator = np.random.default_rng(seed)
    splits = {
        "train": make_sequences(generator, lengths),
        "test": make_sequences(generator, [3] * num_test),
    }
    folder = write(clean(tmp_path / "data"), splits)
    if not has_manifest:
        remove_manifest(folder)
    for split, sequences in splits.items():
        assert_equal(read(folder, split), sequences)
    manifest = read_manifest(folder)
    assert (manifest.num_items, manifest.num_users) == (NUM_ITEMS, NUM_USERS)
    assert manifest.targets == {"train": "next", "test": "last"}


def test_the_bytes_are_those_of_the_format(tmp_path):
    events = np.array([(7, -1, 1_700_000_000), (2, 1, 0)], EVENT_DTYPE)
    sequences = Sequences(events, np.array([0, 2]), np.array([5], np.int32))
    folder = write(tmp_path, {"train": sequences})
    assert (folder / "train_data.bin").read_bytes() == bytes.fromhex(
        "07000000 ffffffff 00f1536500000000 02000000 01000000 0000000000000000"
    )
    assert (folder / "train_offsets.bin").read_bytes() == bytes(8) + b"\2" + bytes(7)
    assert (folder / "train_users.bin").read_bytes() == b"\5\0\0\0"


def test_chunks_give_the_same_bytes_as_one_piece(tmp_path):
    generator = np.random.default_rng(2)
    chunks = [make_sequences(generator, lengths) for lengths in ([3, 1], [4], [], [2, 0, 5])]
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    whole = Sequences(
        np.concatenate([chunk.events for chunk in chunks]),
        np.concatenate([[0], lengths.cumsum()]),
        np.concatenate([chunk.user_ids for chunk in chunks]),
    )
    one, many = tmp_path / "one", tmp_path / "many"
    write(one, {"train": whole})
    write(many, {"train": iter(chunks)})
    assert sorted(os.listdir(one)) == sorted(os.listdir(many))
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (many / name).read_bytes()


def test_the_manifest_tells_counts_and_targets(tmp_path):
    sequences = make_sequences(np.random.default_rng(3), [3])
    folder = write(tmp_path, dict.fromkeys(SPLITS, sequences), targets={"test": "none"})
    targets = {"train": "next", "valid": "last", "test": "none"}
    counts = NUM_ITEMS, NUM_USERS, NUM_ACTIONS
    assert read_manifest(folder)[:4] == Manifest(*counts, targets)[:4]


@pytest.mark.parametrize("field", ["num_items", "num_users"])
def test_a_manifest_with_more_items_or_users_than_its_files_can_hold_is_refused(folder, field):
    """Tables of so many rows would take more memory than there is."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 2**31 - 1}))
    with pytest.raises(DataError, match=r"manifest\.json: .*2147483647.* cannot be"):
        read_manifest(folder)


def test_an_action_is_known_by_its_name_and_by_its_number_unless_names_are_numbers(tmp_path):
    def types(names):
        write(tmp_path, {"train": make_sequences(np.random.default_rng(1), [3])}, **names)
        return read_manifest(tmp_path).action_types()

    numbers = {"0": 0, "1": 1, "2": 2}
    assert types({}) == numbers
    assert types({"action_names": ["view", "cart", "-"]}) == numbers | {
        "view": 0,
        "cart": 1,
        "-": 2,
    }
    assert types({"action_names": ["1", "2", "3"]}) == {"1": 0, "2": 1, "3": 2}
    with pytest.raises(ValueError, match="action_names"):
        types({"action_names": ["view", "cart"]})


def test_without_a_manifest_counts_come_from_the_indexer_and_the_events(folder):
    actions = np.concatenate([read(folder, split).events["action_type"] for split in SPLITS[::2]])
    manifest = read_manifest(remove_manifest(folder))
    targets = {"train": "next", "test": "last"}
    assert manifest == Manifest(NUM_ITEMS, NUM_USERS, actions.max() + 1, targets)


@pytest.mark.parametrize("has_users", [True, False])
def test_without_manifest_and_indexer_counts_come_from_the_files(folder, has_users):
    splits = [read(folder, split) for split in ("train", "test")]
    remove_manifest(folder)
    (folder / "indexer.pkl").unlink()
    if not has_users:
        for split in ("train", "test"):
            (folder / f"{split}_users.bin").unlink()
    num_items, num_users, *_ = read_manifest(folder)
    assert num_items == max(split.events["item_id"].max() for split in splits)
    assert num_users == (max(split.user_ids.max() for split in splits) if has_users else 4)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_plain_item_ids_are_read_without_time_and_actions(tmp_path, dtype):
    ids = np.array([3, 1, 2, 9, 4], dtype)
    ids.tofile(tmp_path / "train_data.bin")
    np.array([0, 2, 5], "<i8").tofile(tmp_path / "train_offsets.bin")
    assert read_manifest(tmp_path) == Manifest(9, 2, 0, {"train": "next"})
    events, offsets, users = read(tmp_path)
    assert events.dtype == dtype and users is None
    sequences = gather(events, offsets[1:2], offsets[2:3], np.array([2]))
    assert sequences.events.tolist() == [(2, -1, 0), (9, -1, 0), (4, -1, 0)]


def test_plain_ids_beyond_int32_do_not_wrap_to_valid_ones(tmp_path):
    ids = np.array([2**32 + 3, -(2**32) + 3, 7], "<i8")
    sequences = gather(ids, np.array([0]), np.array([3]), np.array([1]))
    assert sequences.events["item_id"].tolist() == [2**31 - 1, -(2**31), 7]
    ids.tofile(tmp_path / "train_data.bin")
    np.array([0, 3], "<i8").tofile(tmp_path / "train_offsets.bin")
    with pytest.raises(DataError, match=r"largest item id is 4294967299"):
        read_manifest(tmp_path)


def test_gather_copies_the_asked_ranges_in_the_asked_order(folder):
    events, *_ = read(folder)
    starts, ends = np.array([6, 0, 4, 2]), np.array([9, 1, 4, 11])
    found = gather(events, starts, ends, np.array([4, 1, 2, 3]))
    expected = [events[a:b] for a, b in zip(starts, ends, strict=True)]
    assert_array_equal(found.events, np.concatenate(expected))
    assert found.offsets.tolist() == [0, 3, 4, 4, 13]
    assert not np.shares_memory(found.events, events)


def test_offsets_whose_differences_overflow_are_no_rising_ones(folder):
    offsets = np.array([0, 2**63 - 1, -(2**63), -1, 11], "<i8")
    with pytest.raises(DataError, match="train_offsets"):
        check_split(folder, "train", offsets, None, NUM_USERS)


FEATURES = {
    "item_features": {"colour": Column("sparse", [1] * NUM_ITEMS)},
    "user_features": {"age": Column("sparse", [2] * NUM_USERS)},
    "item_vectors": {"81": np.ones((NUM_ITEMS, 6))},
    "item_names": ["a film"] * NUM_ITEMS,
}


def files_in(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["files"]


def clean(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def names_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def test_a_conversion_that_fails_is_no_data_and_its_rest_is_removed_by_the_next(tmp_path, folder):
    sequences, data = read(folder), tmp_path / "new"

    def stop(*_):
        raise KeyboardInterrupt

    def chunks():
        yield sequences
        stop()

    write_features = pytest.MonkeyPatch()
    write_features.setattr("files.data_writer.finish_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        write(data, {"train": sequences, "test": sequences}, **FEATURES)
    write_features.undo()
    with pytest.raises(DataError, match="did not finish; write the data again"):
        read_manifest(data)
    (data / ".train_data.bin.7.tmp").touch()
    (data / "notes.txt").touch()
    with pytest.raises(KeyboardInterrupt):
        write(data, {"train": chunks()})
    write(data, {"train": sequences})
    assert names_in(data) == names_in(write(tmp_path / "fresh", {"train": sequences})) | {
        "notes.txt"
    }
    assert load_features(data, "item", NUM_ITEMS) == {}


def test_data_are_written_over_on_request_alone_and_other_files_stay(folder, tmp_path):
    splits = {split: read(folder, split) for split in ("train", "test")}
    write(folder, splits, overwrite=True, **FEATURES)
    outside = tmp_path / "precious.txt"
    outside.touch()
    edit_manifest(folder, files={"../precious.txt": {}, str(outside): {}, **files_in(folder)})
    before = names_in(folder)
    with pytest.raises(DataError, match="holds data; add --overwrite"):
        write(folder, splits, overwrite=False)
    assert names_in(folder) == before
    users_own = {"notes.txt", "creative_emb/82.pkl", "item_names_old.txt"}
    for name in users_own:
        (folder / name).touch()
    write(folder, {"train": splits["train"]}, overwrite=True)
    fresh = write(tmp_path / "fresh", {"train": splits["train"]})
    assert names_in(folder) == names_in(fresh) | users_own
    assert outside.exists()


@pytest.mark.parametrize("name", ["manifest.json", "events.csv"])
def test_a_folder_of_other_files_is_not_written_into(tmp_path, name):
    (tmp_path / name).write_text('{"name": "my app"}')
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"of another program|not empty"):
            splits = {"train": make_sequences(np.random.default_rng(1), [3])}
            write(tmp_path, splits, overwrite=overwrite)
    assert names_in(tmp_path) == {name}


def test_an_empty_split_can_be_read(tmp_path):
    events = make_events(np.random.default_rng(0), 4)
    folder = write(tmp_path, leave_one_out(events, np.array([0, 2, 4])))
    for split in ("valid", "test"):
        sequences = read(folder, split)
        assert len(sequences.events) == 0 and sequences.offsets.tolist() == [0]


# ------------------------------------------------------------------------------------ refused files


def damage(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


OFFSETS = {
    "not_at_zero": ([1, 4, 4, 6, 11], r"begins with 1, but the first offset is 0"),
    "falling": ([0, 6, 4, 6, 11], r"offset\[2\] = 4 is below offset\[1\] = 6"),
    "negative": ([0, -3, 4, 6, 11], r"offset\[1\] = -3 is below offset\[0\] = 0"),
    "none": ([], "is empty"),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_wrong_offsets_are_refused_by_name(folder, case):
    remove_manifest(folder)
    offsets, message = OFFSETS[case]
    np.array(offsets, "<i8").tofile(folder / "train_offsets.bin")
    if not offsets:
        (folder / "train_data.bin").write_bytes(b"")
    with pytest.raises(DataError, match=rf"train_offsets\.bin: .*{message}"):
        read(folder)


@pytest.mark.parametrize("last", [10, 12, 1_000, 2**62, 0, -1])
def test_offsets_that_do_not_end_at_the_datas_end_name_both_files(folder, last):
    remove_manifest(folder)
    np.array([0, 4, 4, 6, last], "<i8").tofile(folder / "train_offsets.bin")
    with pytest.raises(DataError, match=rf"train_data\.bin: 176 bytes, .*offsets\.bin .* {last} "):
        read(folder)


@pytest.mark.parametrize("dtype", [">i8", "<i4"])
def test_offsets_of_another_type_are_refused(folder, dtype):
    remove_manifest(folder)
    np.array([0, 4, 4, 6, 10, 11], dtype).tofile(folder / "train_offsets.bin")
    with pytest.raises(DataError, match=r"train_(data|offsets)\.bin"):
        read(folder)


@pytest.mark.parametrize("what", ["data", "offsets", "users"])
def test_a_file_cut_inside_a_record_is_refused_by_name(folder, what):
    remove_manifest(folder)
    damage(folder / f"train_{what}.bin", lambda data: data[:-3])
    with pytest.raises(DataError, match=rf"train_{what}\.bin: \d+ bytes"):
        read(folder)


def test_every_truncation_of_every_sequence_file_is_refused(folder):
    remove_manifest(folder)
    for what in ("data", "offsets", "users"):
        path = folder / f"train_{what}.bin"
        good = path.read_bytes()
        for size in range(len(good)):
            # 11 events in 44 or 88 bytes are plain item ids, as good as any.
            if what == "data" and size in (44, 88):
                continue
            path.write_bytes(good[:size])
            with pytest.raises(DataError, match=r"train_(data|offsets|users)\.bin"):
                read(folder)
        path.write_bytes(good)
    read(folder)


@pytest.mark.parametrize("what", ["data", "offsets"])
def test_an_absent_file_is_refused_by_name(folder, what):
    remove_manifest(folder)
    (folder / f"test_{what}.bin").unlink()
    with pytest.raises(DataError, match=rf"test_{what}\.bin: no such file"):
        open_split(folder, "test")


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ([1, 2, 3], "3 users, but 4 sequences"),
        ([1, 2, 3, 4, 5], "5 users, but 4 sequences"),
        ([1, 2, 0, 4], r"sequence 2 has user 0, not in 1\.\.8"),
        ([1, 2, 3, 9], r"sequence 3 has user 9, not in 1\.\.8"),
        ([-1, 2, 3, 4], r"sequence 0 has user -1, not in 1\.\.8"),
    ],
)
def test_users_that_do_not_fit_are_refused_by_name(folder, users, message):
    remove_manifest(folder)
    np.array(users, "<i4").tofile(folder / "train_users.bin")
    with pytest.raises(DataError, match=rf"train_users\.bin: {message}"):
        read(folder)


def test_more_sequences_than_users_need_a_users_file(tmp_path):
    sequences = make_sequences(np.random.default_rng(0), [2, 3, 4])
    folder = write(tmp_path, {"train": sequences}, user_ids=[5, 6])
    remove_manifest(folder)
    (folder / "train_users.bin").unlink()
    with pytest.raises(DataError, match=r"3 sequences, but 2 users; .*train_users\.bin"):
        read(folder)


@pytest.mark.parametrize("name", ["train_data.bin", "train_users.bin", "indexer.pkl"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0" * 16])
def test_a_size_that_is_not_the_manifests_is_refused_by_name(folder, name, change):
    size = (folder / name).stat().st_size
    damage(folder / name, change)
    found = (folder / name).stat().st_size
    with pytest.raises(DataError, match=rf"{name}: {found} bytes, .* says {size} bytes"):
        read_manifest(folder)
    (folder / name).unlink()
    if name != "train_data.bin":
        with pytest.raises(DataError, match=rf"{name}: no such file, .* says {size} bytes"):
            read_manifest(folder)


def edit_manifest(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "remove it"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"format_version": 2},
        {"format_version": "remove it"},
        {"num_items": "remove it"},
        {"num_items": "19"},
        {"num_items": 2**31},
        {"num_users": -1},
        {"num_action_types": 3.0},
        {"num_action_types": True},
        {"action_names": 3},
        {"action_names": ["view"]},
        {"action_names": ["view"] * NUM_ACTIONS},
        {"action_names": list(range(NUM_ACTIONS))},
        {"targets": ["train"]},
        {"targets": {"train": "last"}},
        {"targets": {"train": "next", "test": "next"}},
        {"targets": {"train": "next", "holdout": "last"}},
        {"targets": {"train": "next", "test": ["last"]}},
        {"files": "remove it"},
        {"files": [1]},
        {"files": {"train_data.bin": {}}},
        {"files": {"train_data.bin": 176}},
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_name(folder, fields):
    edit_manifest(folder, **fields)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format_version": 1', '"x"', "null"])
def test_a_manifest_that_is_none_is_refused_by_name(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        read_manifest(folder)


def test_random_damage_is_read_or_refused_by_name_and_nothing_else(folder, tmp_path):
    names = ["train_data.bin", "train_offsets.bin", "train_users.bin", "indexer.pkl"]
    generator = random.Random(0)
    refused = 0
    for trial in range(400):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        has_manifest = trial % 4 == 0
        name = generator.choice(["manifest.json"] if has_manifest else names)
        if not has_manifest:
            remove_manifest(copy)
        data = bytearray((copy / name).read_bytes())
        position = generator.randrange(len(data))
        if trial % 3 == 0:
            del data[position : position + generator.randrange(1, 30)]
        elif trial % 3 == 1:
            data[position] = generator.randrange(256)
        else:
            data[position:position] = generator.randbytes(8)
        (copy / name).write_bytes(data)
        try:
            num_items, num_users, *_ = read_manifest(copy)
            read(copy)
            original_ids(copy, "i", num_items)
            original_ids(copy, "u", num_users)
        except DataError as error:
            assert str(copy) in str(error)
            refused += 1
        shutil.rmtree(copy)
    assert refused > 200


# ----------------------------------------------------------------------------------- leave one out


def test_leave_one_out_holds_back_the_last_two_events_of_those_who_have_three():
    lengths = [1, 2, 3, 5]
    events = np.zeros(11, EVENT_DTYPE)
    events["item_id"] = [11, 21, 22, 31, 32, 33, 41, 42, 43, 44, 45]
    splits = leave_one_out(events, np.concatenate([[0], np.cumsum(lengths)]))
    found = {
        split: {
            int(user): part["item_id"].tolist()
            for user, part in zip(
                sequences.user_ids,
                np.split(sequences.events, sequences.offsets[1:-1]),
                strict=True,
            )
        }
        for split, sequences in splits.items()
    }
    assert found == {
        "train": {1: [11], 2: [21, 22], 3: [31], 4: [41, 42, 43]},
        "valid": {3: [31, 32], 4: [41, 42, 43, 44]},
        "test": {3: [31, 32, 33], 4: [41, 42, 43, 44, 45]},
    }


def test_leave_one_out_of_nobody_is_empty():
    splits = leave_one_out(np.empty(0, EVENT_DTYPE), np.array([0]))
    assert all(len(split.events) == len(split.user_ids) == 0 for split in splits.values())


# ------------------------------------------------------------------------------------ original ids


def write_indexer(folder: Path, items: dict, users: dict | None = None) -> Path:
    (folder / "indexer.pkl").write_bytes(pickle.dumps({"i": items, "u": users or {}, "f": {}}))
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        [30, 0, 2**63 - 1],
        ["30", "0", "9223372036854775807"],
        [30, "0", np.int64(2**63 - 1)],
    ],
)
def test_ids_that_are_all_integers_are_original(tmp_path, keys):
    write_indexer(tmp_path, dict(zip(keys, [2, 3, 1], strict=True)))
    ids = original_ids(tmp_path, "i", 3)
    assert ids.dtype == np.uint64
    assert ids[1:].tolist() == [2**63 - 1, 30, 0]


@pytest.mark.parametrize(
    "key",
    [
        *("x1", "", "-4", "1.0", " 3", "٣", "007", "9" * 19, "9" * 5000),
        *(-1, 2**63, 2.0, None, (1, 2), b"3"),
        "12",  # another id of the same value
    ],
)
def test_one_id_that_is_no_integer_of_its_own_makes_all_ids_re_ids(tmp_path, key):
    write_indexer(tmp_path, {12: 1, key: 2, 14: 3})
    assert original_ids(tmp_path, "i", 3) is None


@pytest.mark.parametrize("values", [[1, 2, 2], [0, 1, 2], [1, 2, 4], [1, 2], [1, 2, 3, 4]])
@pytest.mark.parametrize("kind", [int, float, str, lambda k: [k]])
def test_an_indexer_that_is_not_one_to_one_onto_the_re_ids_is_refused(tmp_path, values, kind):
    write_indexer(tmp_path, {f"key {k}": kind(value) for k, value in enumerate(values)})
    with pytest.raises(DataError, match=r"indexer\.pkl: the re-ids of 'i' are not 1\.\.3"):
        original_ids(tmp_path, "i", 3)


def test_users_have_original_ids_of_their_own(tmp_path):
    write_indexer(tmp_path, {"a": 1}, {55: 2, 44: 1})
    assert original_ids(tmp_path, "u", 2)[1:].tolist() == [44, 55]
    assert original_ids(tmp_path, "i", 1) is None


def test_without_an_indexer_there_are_no_original_ids(tmp_path):
    assert original_ids(tmp_path, "i", 3) is None


@pytest.mark.parametrize(
    "value", [[], {}, {"u": {}}, {"u": {}, "i": 3}, {"u": None, "i": {}}, {"u": [1], "i": {}}]
)
def test_an_indexer_of_another_shape_is_refused_by_name(tmp_path, value):
    (tmp_path / "indexer.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=r"indexer\.pkl: "):
        read_indexer(tmp_path)


def test_an_indexer_is_trusted_only_on_request_without_a_manifest_too(folder):
    remove_manifest(folder)
    (folder / "indexer.pkl").write_bytes(pickle.dumps(Counter(read_indexer(folder))))
    for read_with in (read_manifest, lambda folder: MyDataset(folder, "train")):
        with pytest.raises(DataError, match=r"indexer\.pkl: .*--trust_pickle"):
            read_with(folder)
    assert read_manifest(folder, trust=True).num_items == NUM_ITEMS
    assert MyDataset(folder, "train", trust_pickle=True).num_items == NUM_ITEMS


def test_written_ids_are_read_back(tmp_path):
    sequences = make_sequences(np.random.default_rng(0), [2, 3])
    items, users = np.arange(900, 900 + NUM_ITEMS), [f"name {k}" for k in range(NUM_USERS)]
    folder = write(tmp_path, {"train": sequences}, item_ids=items, user_ids=users)
    assert_array_equal(original_ids(folder, "i", NUM_ITEMS)[1:], items)
    assert original_ids(folder, "u", NUM_USERS) is None
    assert read_indexer(folder)["u"] == {f"name {k}": k + 1 for k in range(NUM_USERS)}


def test_an_original_id_given_twice_is_refused(tmp_path):
    sequences = make_sequences(np.random.default_rng(0), [2])
    with pytest.raises(ValueError, match="occurs twice"):
        write(tmp_path, {"train": sequences}, item_ids=[7] * NUM_ITEMS)
    assert not (tmp_path / "manifest.json").exists()


# ---------------------------------------------------------------------------------------- features


def test_features_are_read_as_they_were_written(tmp_path):
    sparse, prices = [3, None, 1, 0], [1.5, -2.0, None, 0.25]
    tags = [[1, 4], None, [], [2]]
    folder = write(
        tmp_path,
        {"train": make_sequences(np.random.default_rng(0), [2])},
        item_ids=[5, 6, 7, 8],
        item_features={
            "colour": Column("sparse", sparse),
            "tags": Column("array", tags),
            "price": Column("continual", prices),
        },
        user_features={"age": Column("sparse", list(np.arange(NUM_USERS)))},
    )
    items = load_features(folder, "item", 4)
    assert {name: (f.kind, f.size) for name, f in items.items()} == {
        "colour": ("sparse", 3),
        "tags": ("array", 4),
        "price": ("continual", 1),
    }
    assert items["colour"].values.tolist() == [0, 3, 0, 1, 0]
    assert items["price"].values.tolist() == [0, 1.5, -2.0, 0, 0.25]
    assert items["tags"].values.tolist() == [1, 4, 2]
    assert items["tags"].offsets.tolist() == [0, 0, 2, 2, 2, 3]
    users = load_features(folder, "user", NUM_USERS)
    assert users["age"].values.tolist() == [0, *range(NUM_USERS)]


def test_vectors_are_read_as_they_were_written(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    vectors[4] = np.nan
    sequences = make_sequences(np.random.default_rng(0), [2])
    folder = write(tmp_path, {"train": sequences}, item_vectors={"81": vectors})
    found = load_vectors(folder, ["81"], read_indexer(folder)["i"], NUM_ITEMS)["81"]
    assert found.present.tolist() == [False] + [k != 4 for k in range(NUM_ITEMS)]
    assert_array_equal(found.values[1:][found.present[1:]], np.delete(vectors, 4, 0))
    assert not found.values[[0, 5]].any()


ONES, VECTORS = Column("sparse", [1] * NUM_ITEMS), np.ones((NUM_ITEMS, 6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"item_features": {"81": ONES}, "item_vectors": {"81": VECTORS}},
            DataError,
            "feature 81 would be listed twice",
        ),
        (
            {"item_features": {"a": ONES}, "user_features": {"a": ONES}},
            DataError,
            "feature a would be listed twice",
        ),
        ({"item_features": {"a": ONES._replace(values=[1])}}, ValueError, "a: 1 values, not 19"),
        ({"item_vectors": {"81": VECTORS[1:]}}, ValueError, "81: 18 values, not 19"),
        (
            {"item_features": {"price": Column("continual", [1.0] * 18 + [float("nan")])}},
            ValueError,
            "price: nan for item 19; where there is no number, None",
        ),
        ({"item_names": ["one"]}, ValueError, "item_names: 1 names, not 19"),
        ({"user_ids": ["u"] * NUM_USERS}, ValueError, "an original id occurs twice"),
        (
            {"item_features": {"a": ONES._replace(meaning=["red", "red"])}},
            ValueError,
            "an original id occurs twice in the values of a",
        ),
        (
            {"item_features": {"a": Column("sparse", [2] * NUM_ITEMS, ["red"])}},
            ValueError,
            "a: 1 raw values, but a number is 2",
        ),
    ],
)
def test_what_could_not_be_read_again_is_refused_before_anything_is_written(
    folder, options, error, message
):
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    with pytest.raises(error, match=message):
        write(folder, {"train": read(folder, "test")}, **options)
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before


def test_raw_values_are_written_with_their_numbers_used_or_not(tmp_path):
    colours = Column("sparse", [2] * NUM_ITEMS, ["blue", "red", "teal"])
    tags = Column("array", [[1]] * NUM_ITEMS, range(1990, 1992))
    features = {"colour": colours, "tags": tags, "price": Column("continual", [1.0] * NUM_ITEMS)}
    splits = {"train": make_sequences(np.random.default_rng(0), [2])}
    folder = write(tmp_path, splits, item_features=features)
    numbers = {"colour": {"blue": 1, "red": 2, "teal": 3}, "tags": {1990: 1, 1991: 2}}
    assert read_indexer(folder)["f"] == numbers
    assert load_features(folder, "item", NUM_ITEMS)["colour"].size == 3


def write_names(folder: Path, names: list[str]) -> Path:
    splits = {"train": make_sequences(np.random.default_rng(0), [2])}
    return write(folder, splits, item_names=names)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\v", "\x85", "\u2028"])
def test_item_names_are_a_line_each_whatever_breaks_a_line_in_them(tmp_path, line_break):
    names = [f"film {k}" for k in range(NUM_ITEMS)]
    names[3] = f"two{line_break}lines, café"
    folder = write_names(tmp_path, names)
    lines = (folder / "item_names.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [*names[:3], "two lines, café", *names[4:]]
    assert read_item_names(folder, NUM_ITEMS) == ["", *lines]


def test_items_may_lack_a_name_even_the_last(tmp_path):
    names = [""] + [f"film {k}" for k in range(NUM_ITEMS - 2)] + [""]
    assert read_item_names(write_names(tmp_path, names), NUM_ITEMS) == ["", *names]


def test_names_of_another_editor_end_with_or_without_a_line_break(tmp_path):
    for text in ("a\nb", "a\nb\n", "a\r\nb\r\n"):
        (tmp_path / "item_names.txt").write_bytes(text.encode())
        assert read_item_names(tmp_path, 2) == ["", "a", "b"]


def test_without_a_file_of_names_all_are_empty(tmp_path):
    assert read_item_names(tmp_path, 3) == [""] * 4


def test_names_for_another_number_of_items_are_neither_written_nor_read(tmp_path):
    names = [f"film {k}" for k in range(NUM_ITEMS)]
    with pytest.raises(ValueError, match=f"item_names: {NUM_ITEMS + 1} names, not {NUM_ITEMS}"):
        write_names(tmp_path, [*names, "one too many"])
    folder = write_names(tmp_path, names)
    with pytest.raises(DataError, match=f"item_names.txt: {NUM_ITEMS} lines, but there are 2 item"):
        read_item_names(folder, 2)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "item_names.txt").write_bytes("ab\nÉmile\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"item_names.txt: byte 3 is not UTF-8"):
        read_item_names(tmp_path, 2)
