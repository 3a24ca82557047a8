"""Batches against an obvious slow version; negatives; samplers and workers; embedding files."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import are_equal, count_items, open_dataset
from numpy.testing import assert_array_equal
from torch.utils.data import DataLoader

from dataset import (
    Batch,
    BatchSampler,
    Draw,
    MyDataset,
    load_emb,
    save_emb,
)
from files.atomic_io import DataError
from files.data_writer import write_dataset
from files.embeddings import emb_pieces
from files.features import Feature
from files.sequences import EVENT_DTYPE, Sequences, open_split, order_of_rows
from ops.infonce import index_rows

NUM_ITEMS, NUM_USERS, NUM_ACTIONS, MAXLEN = 23, 11, 3, 4
LENGTHS = [3, 9, 2, 5, 6, 2, 4]
USERS = [4, 2, 11, 7, 1, 9, 5]
REQUEST_TIME = 2_000_000_000
SEED = (42, 1, 3)


def counts_of(dataset: MyDataset) -> np.ndarray:
    return dataset.sequences.count_items()


def make_events(num_events: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    events = np.empty(num_events, EVENT_DTYPE)
    events["item_id"] = generator.integers(1, NUM_ITEMS + 1, num_events)
    events["action_type"] = generator.integers(-1, NUM_ACTIONS, num_events)
    events["timestamp"] = 1_700_000_000 + generator.integers(1, 1000, num_events).cumsum()
    return events


def write(folder: Path, lengths=LENGTHS, users=USERS, events=None, targets=None) -> Path:
    """The same sequences as train, valid and test."""
    events = make_events(sum(lengths)) if events is None else events
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sequences = Sequences(events, offsets, np.array(users[: len(lengths)], np.int32))
    write_dataset(
        folder,
        dict.fromkeys(("train", "valid", "test"), sequences),
        item_ids=range(NUM_ITEMS),
        user_ids=range(NUM_USERS),
        num_action_types=NUM_ACTIONS,
        targets=targets,
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"), targets={"test": "none"})


def histories(lengths=LENGTHS, events=None) -> list[list[tuple[int, int, int]]]:
    """(item, action, time) of each sequence's events."""
    events = make_events(sum(lengths)) if events is None else events
    return [part.tolist() for part in np.split(events, np.cumsum(lengths)[:-1])]


def make_batch(dataset: MyDataset, indices, seed=SEED) -> Batch:
    return dataset.collate_fn(dataset.__getitems__(Draw(np.asarray(indices), seed)))


def split_by_sequence(batch: Batch, values: torch.Tensor) -> list[list[int]]:
    return [part.tolist() for part in values.tensor_split(batch.offsets[1:-1])]


def decoded(batch: Batch) -> dict[str, list[list[int]]]:
    """Every field per sequence, with item ids in place of rows; 0 where there is no target."""
    targets = batch.distinct_ids[batch.target_index].masked_fill(batch.target_index < 0, 0)
    fields = {
        "items": batch.distinct_ids[batch.item_index],
        "targets": targets,
        "actions": batch.action_types,
        "times": batch.timestamps,
        "target_actions": batch.target_action_types,
        "target_times": batch.target_timestamps,
    }
    return {name: split_by_sequence(batch, values) for name, values in fields.items()}


def slow_batch(
    indices, split: str, maxlen: int = MAXLEN, request_time=None, request_action: int = -1
) -> dict[str, list]:
    """What `decoded` must give, event by event."""
    sequences = []
    for index in indices:
        events = histories()[index]
        if split == "test":  # whose target is "none" in `folder`
            seen = events[-maxlen:]
            time = seen[-1][2] if request_time is None else request_time
            last = (0, request_action, time)
            nexts = [*seen[1:], last]
        else:
            kept = events[-maxlen - 1 :]
            seen, nexts = kept[:-1], kept[1:]
        has_target = [split == "train" or k == len(seen) - 1 for k in range(len(seen))]
        sequences.append(
            {
                "items": [item for item, _, _ in seen],
                "targets": [
                    item if has else 0 for (item, _, _), has in zip(nexts, has_target, strict=True)
                ],
                "actions": [action for _, action, _ in seen],
                "times": [time for _, _, time in seen],
                "target_actions": [action for _, action, _ in nexts],
                "target_times": [time for _, _, time in nexts],
            }
        )
    sequences.sort(key=lambda sequence: -len(sequence["items"]))
    return {name: [sequence[name] for sequence in sequences] for name in sequences[0]}


def negative_ids(batch: Batch) -> set[int]:
    ids = batch.distinct_ids[batch.negative_index].tolist()
    assert len(ids) == len(set(ids))
    return set(ids)


def target_ids(batch: Batch) -> set[int]:
    return set(batch.distinct_ids[batch.target_index[batch.target_index >= 0]].tolist())


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
@pytest.mark.parametrize("maxlen", [1, MAXLEN, 100])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_batch_equals_the_slow_version(folder, split, maxlen, negatives):
    dataset = open_dataset(folder, split, maxlen, negatives, num_negatives=5)
    for indices in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4], [5]):
        assert decoded(make_batch(dataset, indices)) == slow_batch(indices, split, maxlen)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_batch_fields_have_the_stated_shapes_and_types(folder, split):
    batch = make_batch(open_dataset(folder, split, MAXLEN, "mixed", 5), [1, 3, 0])
    T, B = int(batch.offsets[-1]), 3
    ints = {
        "distinct_ids": len(batch.distinct_ids), "item_index": T, "target_index": T,
        "negative_index": len(batch.negative_index), "action_types": T, "timestamps": T,
        "target_action_types": T, "target_timestamps": T, "offsets": B + 1, "user_ids": B,
    }  # fmt: skip
    for name, size in ints.items():
        value = getattr(batch, name)
        assert (value.dtype, value.shape) == (torch.int64, (size,)), name
    assert (batch.distinct_ids.diff() > 0).all()
    if split == "train":
        assert batch.seen_ids is None and batch.seen_offsets is None
    else:
        assert batch.seen_ids.dtype == batch.seen_offsets.dtype == torch.int64


def test_sequences_come_by_falling_length_with_their_users(folder):
    batch = make_batch(open_dataset(folder, "train", maxlen=5), range(7))
    assert batch.offsets.diff().tolist() == [5, 5, 4, 3, 2, 1, 1]
    # Of equal length, in the order asked for: 9 and 6 events are both 5 seen ones.
    assert batch.user_ids.tolist() == [2, 1, 7, 5, 4, 11, 9]


def test_without_a_users_file_sequence_k_is_user_k_plus_one(folder, tmp_path):
    for name in ("train_data.bin", "train_offsets.bin"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    batch = make_batch(open_dataset(tmp_path, "train", maxlen=5), [0, 1, 3])
    assert batch.user_ids.tolist() == [2, 4, 1]


@pytest.mark.parametrize("maxlen", [1, 2, 5])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_newest_events_are_kept_and_the_newest_is_never_dropped(folder, split, maxlen):
    dataset = open_dataset(folder, split, maxlen)
    for index, events in enumerate(histories()):
        fields = decoded(make_batch(dataset, [index]))
        assert len(fields["items"][0]) <= maxlen
        newest = "times" if split == "test" else "target_times"
        assert fields[newest][0][-1] == events[-1][2]


@pytest.mark.parametrize("time", [REQUEST_TIME, 0])
def test_an_unknown_target_has_the_request_time(folder, time):
    dataset = open_dataset(folder, "test", MAXLEN, request_time=time)
    batch = make_batch(dataset, [1, 3])
    assert decoded(batch) == slow_batch([1, 3], "test", request_time=time)
    assert batch.target_timestamps[batch.offsets[1:] - 1].tolist() == [time, time]


def test_an_unknown_target_has_the_request_action(folder):
    dataset = open_dataset(folder, "test", MAXLEN, request_action=1)
    batch = make_batch(dataset, [1, 3])
    assert decoded(batch) == slow_batch([1, 3], "test", request_action=1)
    with pytest.raises(
        DataError, match=f"--request_action {NUM_ACTIONS}: the data has {NUM_ACTIONS} act"
    ):
        open_dataset(folder, "test", MAXLEN, request_action=NUM_ACTIONS)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_request_does_not_touch_known_targets(folder, split):
    dataset = open_dataset(folder, split, MAXLEN, request_time=REQUEST_TIME, request_action=1)
    assert decoded(make_batch(dataset, [1, 3])) == slow_batch([1, 3], split)


@pytest.mark.parametrize("negatives", ["all", "batch"])
def test_target_ids_are_the_last_events(folder, negatives):
    batch = make_batch(open_dataset(folder, "valid", MAXLEN, negatives), [0, 1, 3])
    assert batch.target_ids().tolist() == [histories()[index][-1][0] for index in (1, 3, 0)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_seen_items_are_the_whole_history_without_the_target(folder, split):
    batch = make_batch(open_dataset(folder, split, maxlen=2), [0, 1, 4])
    bounds = batch.seen_offsets.tolist()
    parts = [batch.seen_ids[a:b].tolist() for a, b in pairwise(bounds)]
    stop = -1 if split == "valid" else None
    # In the order asked for: cut to maxlen, all have two events.
    expected = [[item for item, _, _ in histories()[index][:stop]] for index in (0, 1, 4)]
    assert parts == expected
    assert bounds[-1] == len(batch.seen_ids)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_plain_item_ids_have_no_time_and_no_actions(tmp_path, dtype):
    np.array([3, 1, 2, 9, 4], dtype).tofile(tmp_path / "train_data.bin")
    np.array([0, 2, 5], "<i8").tofile(tmp_path / "train_offsets.bin")
    dataset = open_dataset(tmp_path, "train", MAXLEN)
    assert not dataset.sequences.has_times and dataset.num_action_types == 0
    batch = make_batch(dataset, [0, 1])
    fields = decoded(batch)
    assert (fields["items"], fields["targets"]) == ([[2, 9], [3]], [[9, 4], [1]])
    assert set(batch.action_types.tolist()) == {-1}
    assert set(batch.timestamps.tolist()) == {0}


def assert_equal_batches(left: Batch, right: Batch) -> None:
    for name, a, b in zip(Batch._fields, left, right, strict=True):
        assert are_equal(a, b), name


def test_moving_a_batch_leaves_its_offsets_on_the_cpu(folder):
    batch = make_batch(open_dataset(folder, "train"), [0, 1])
    moved = batch.to("meta")
    tensors = {k: v for k, v in moved._asdict().items() if isinstance(v, torch.Tensor)}
    places = {name: tensor.device.type for name, tensor in tensors.items()}
    assert places.pop("offsets") == places.pop("num_targets") == "cpu"
    assert set(places.values()) == {"meta"}
    assert {tensor.device.type for pair in moved.orders.values() for tensor in pair} == {"meta"}


def test_a_pinned_batch_is_the_same_and_lies_in_one_piece_for_each_type(folder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batch = make_batch(open_dataset(folder, "train", 5, "mixed", 3), range(7))
    pinned = batch.pin_memory()
    assert_equal_batches(pinned, batch)
    places = {t.dtype: set() for t in (pinned.item_index, pinned.orders["loss"][2])}
    pinned._map(lambda t: places[t.dtype].add(t.untyped_storage().data_ptr()))
    assert [len(found) for found in places.values()] == [1, 1]
    begins = []
    pinned._map(lambda t: begins.append(t.storage_offset()))
    assert not any(begin % 16 for begin in begins)  # else Triton compiles its kernels again
    moved = pinned.to("meta")
    assert_equal_batches(moved._map(lambda t: t.shape), batch._map(lambda t: t.shape))
    assert pinned.to("cpu") is pinned


def test_each_event_has_its_place_in_its_sequence(folder):
    batch = make_batch(open_dataset(folder, "train", maxlen=5), range(7))
    lengths = batch.offsets.diff().tolist()
    assert batch.positions.tolist() == [place for n in lengths for place in range(n)]
    assert batch.sequence_index.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert torch.equal(batch.device_offsets, batch.offsets)


@pytest.mark.parametrize("negatives", ["all", "mixed"])
def test_orders_have_the_places_of_each_row_in_rising_order(folder, negatives):
    """By row, as a loop over the rows finds them."""
    batch = make_batch(open_dataset(folder, "train", 5, negatives, 3), range(7))
    sizes = {"items": len(batch.distinct_ids), "positions": 5, "sequences": 7}
    indices = {"items": batch.item_index, "positions": batch.positions}
    indices["sequences"] = batch.sequence_index
    indices["loss"], *_ = batch.orders["loss"]
    sizes["loss"] = sizes["items"]
    assert batch.orders.keys() == sizes.keys()
    for name, (*_, places, bounds) in batch.orders.items():
        expected = [(indices[name] == row).nonzero()[:, 0].tolist() for row in range(sizes[name])]
        found = [part.tolist() for part in places.tensor_split(bounds[1:-1])]
        assert found == expected and bounds[-1] == len(places)
    assert make_batch(open_dataset(folder, "valid"), [0, 1]).orders == {}


@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
def test_what_the_loss_takes_is_what_it_would_work_out_itself(folder, negatives):
    batch = make_batch(open_dataset(folder, "train", 5, negatives, 3), range(7))
    indices = batch.target_index, batch.negative_index, len(batch.distinct_ids)
    expected = index_rows(*indices)[:3]
    assert are_equal(batch.orders["loss"][:3], expected)


# ------------------------------------------------------------------------------------- short, empty


def test_sequences_too_short_are_skipped_with_one_warning(tmp_path, caplog):
    lengths = [2, 0, 3, 1, 4]
    folder = write(tmp_path, lengths, targets={"test": "none"})
    caplog.set_level(logging.WARNING, logger="hstu")
    dataset = open_dataset(folder, "train", maxlen=5)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "train: 2 of 5 sequences have fewer than 2 events and are skipped, the first: 1, 3"
    ]
    assert len(dataset) == 3
    batch = make_batch(dataset, [0, 1, 2])
    assert batch.user_ids.tolist() == [USERS[4], USERS[2], USERS[0]]
    expected = [[event[0] for event in histories(lengths)[k][:-1]] for k in (4, 2, 0)]
    assert decoded(batch)["items"] == expected
    assert len(caplog.records) == 1
    # A single event is enough where no target is needed.
    assert len(open_dataset(folder, "test")) == 4


@pytest.mark.parametrize("maxlen", [1, 2, MAXLEN, 100])
@pytest.mark.parametrize("lengths", [LENGTHS, [2, 1, 9, 5, 0]])
def test_windows_predict_every_event_but_the_first_once(tmp_path, lengths, maxlen):
    folder = write(tmp_path, lengths)
    dataset = open_dataset(folder, "train", maxlen, has_windows=True)
    found = []
    for index in range(len(dataset)):
        batch = make_batch(dataset, [index])
        assert batch.offsets[1] <= maxlen
        found += [(batch.user_ids.item(), time) for time in batch.target_timestamps.tolist()]
    expected = [
        (user, time)
        for user, events in zip(USERS, histories(lengths), strict=False)
        for _, _, time in events[1:]
    ]
    assert sorted(found) == sorted(expected)


def test_the_first_window_is_the_newest_and_valid_and_test_have_no_other(folder):
    newest = open_dataset(folder, "train", MAXLEN)
    windows = open_dataset(folder, "train", MAXLEN, has_windows=True)
    first_of_each = [0, 1, 3, 4, 5, 7, 8]  # 9 and 6 events are cut in two
    one, other = make_batch(newest, range(7)), make_batch(windows, first_of_each)
    assert decoded(one) == decoded(other)
    assert len(windows) == 9
    for split in ("valid", "test"):
        assert len(open_dataset(folder, split, MAXLEN, has_windows=True)) == 7


def test_a_users_sequences_are_found_where_short_ones_are_skipped(tmp_path):
    lengths, users = [2, 0, 3, 1, 4, 2], [3, 5, 2, 7, 3, 1]
    dataset = open_dataset(write(tmp_path, lengths, users), "valid", maxlen=5)
    found = {user: dataset.indices_of(user).tolist() for user in range(1, 9)}
    assert found == {1: [3], 2: [1], 3: [0, 2]} | {user: [] for user in (4, 5, 6, 7, 8)}
    assert [dataset[k].sequences.user_ids.tolist() for k in found[3]] == [[3], [3]]
    (tmp_path / "valid_users.bin").unlink()
    (tmp_path / "manifest.json").unlink()  # which knows of the file
    dataset = open_dataset(tmp_path, "valid", maxlen=5)
    assert [dataset.indices_of(user).tolist() for user in (1, 2, 3, 6)] == [[0], [], [1], [3]]


def test_no_warning_where_all_sequences_are_long_enough(folder, caplog):
    open_dataset(folder, "train")
    assert caplog.records == []


@pytest.mark.parametrize("lengths", [[1, 1, 0], [0], []])
def test_training_without_anything_to_predict_is_refused_by_name(tmp_path, lengths):
    folder = write(tmp_path, lengths)
    with pytest.raises(DataError, match=r"train_data\.bin: no sequence has two events"):
        open_dataset(folder, "train")
    assert len(open_dataset(folder, "valid")) == 0


def test_types_of_which_no_event_can_be_predicted_are_refused_and_other_splits_stay(folder):
    with pytest.raises(
        DataError, match=r"train_data\.bin: no event to predict of --target_actions"
    ):
        open_dataset(folder, "train", target_actions=[NUM_ACTIONS])
    valid = open_dataset(folder, "valid", target_actions=[NUM_ACTIONS])
    assert decoded(make_batch(valid, [0, 1])) == slow_batch([0, 1], "valid", valid.maxlen)


def test_a_split_that_is_not_there_is_refused_by_name(tmp_path):
    np.array([3, 1], "<i4").tofile(tmp_path / "train_data.bin")
    np.array([0, 2], "<i8").tofile(tmp_path / "train_offsets.bin")
    with pytest.raises(DataError, match="no valid split there, only train"):
        open_dataset(tmp_path, "valid")


@pytest.mark.parametrize(("negatives", "count"), [("uniform", 0), ("mixed", 0), ("Uniform", 5)])
def test_negatives_that_would_leave_no_loss_are_refused(folder, negatives, count):
    with pytest.raises(ValueError, match=negatives):
        open_dataset(folder, "train", negatives=negatives, num_negatives=count)


# ------------------------------------------------------------------------------------ bad records


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("item_id", 0, "item id 0 is not in 1..23 (0 is padding"),
        ("item_id", -5, "item id -5 is not in 1..23"),
        ("item_id", NUM_ITEMS + 1, "item id 24 is not in 1..23"),
        ("item_id", 2**31 - 1, "item id 2147483647 is not in 1..23"),
        ("action_type", -2, "action type -2 is not in -1..2"),
        ("action_type", NUM_ACTIONS, "action type 3 is not in -1..2"),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("event", [6, 8])  # of sequence 1, which has 9
def test_a_bad_record_is_refused_by_file_sequence_and_event(
    tmp_path, split, event, field, value, message
):
    events = make_events(sum(LENGTHS))
    events[field][LENGTHS[0] + event] = value
    dataset = open_dataset(write(tmp_path, events=events), split, MAXLEN)
    make_batch(dataset, [0, 2, 3])
    place = rf"{split}_data\.bin: sequence 1 event {event}: "
    with pytest.raises(DataError, match=place + re.escape(message)):
        make_batch(dataset, [0, 1, 3])
    with pytest.raises(DataError, match=place):
        dataset[1]


@pytest.mark.parametrize("value", [0, NUM_ITEMS + 1])
def test_a_bad_record_before_maxlen_is_refused_where_the_whole_history_is_used(tmp_path, value):
    events = make_events(sum(LENGTHS))
    events["item_id"][LENGTHS[0] + 1] = value
    folder = write(tmp_path, events=events)
    make_batch(open_dataset(folder, "train", MAXLEN), [1])
    with pytest.raises(DataError, match=rf"valid_data\.bin: sequence 1 event 1: item id {value} "):
        make_batch(open_dataset(folder, "valid", MAXLEN), [0, 1])


def test_a_bad_record_is_named_by_its_place_in_the_file_when_others_are_skipped(tmp_path):
    lengths = [1, 3, 0, 4]
    events = make_events(sum(lengths))
    events["item_id"][1 + 3 + 2] = 99
    dataset = open_dataset(write(tmp_path, lengths, events=events), "train", MAXLEN)
    with pytest.raises(DataError, match="sequence 3 event 2: item id 99"):
        make_batch(dataset, [0, 1])


def test_a_plain_id_beyond_int32_is_refused(tmp_path):
    np.array([3, 2**32 + 1], "<i8").tofile(tmp_path / "train_data.bin")
    np.array([0, 2], "<i8").tofile(tmp_path / "train_offsets.bin")
    (tmp_path / "indexer.pkl").write_bytes(pickle.dumps({"i": dict(a=1, b=2, c=3), "u": {"x": 1}}))
    with pytest.raises(DataError, match=r"train_data\.bin: sequence 0 event 1: item id"):
        make_batch(open_dataset(tmp_path, "train"), [0])


def test_items_are_counted_over_the_whole_file(folder):
    expected = np.bincount(make_events(sum(LENGTHS))["item_id"], minlength=NUM_ITEMS + 1)
    assert_array_equal(counts_of(open_dataset(folder, "train", maxlen=1)), expected)


@pytest.mark.parametrize("value", [0, -1, NUM_ITEMS + 1])
def test_counting_names_a_bad_event(tmp_path, value):
    events = make_events(sum(LENGTHS))
    events["item_id"][13] = value
    dataset = open_dataset(write(tmp_path, events=events), "train")
    place = r"train_data\.bin: sequence 2 event 1: "
    with pytest.raises(DataError, match=rf"{place}item id {value} is not in 1\.\.23"):
        counts_of(dataset)


@pytest.mark.parametrize("size", [1, 4, 31])
def test_counting_by_blocks_is_counting_the_whole(folder, tmp_path, monkeypatch, size):
    monkeypatch.setattr("files.sequences.BLOCK", size)
    expected = np.bincount(make_events(sum(LENGTHS))["item_id"], minlength=NUM_ITEMS + 1)
    assert_array_equal(count_items(folder), expected)
    events = make_events(sum(LENGTHS))
    events["item_id"][[13, 20]] = NUM_ITEMS + 1
    with pytest.raises(DataError, match=r"train_data\.bin: sequence 2 event 1: item id 24 "):
        count_items(write(tmp_path, events=events))


# -------------------------------------------------------------------------------------- negatives


def test_all_items_are_negatives_without_a_list(folder):
    batch = make_batch(open_dataset(folder, "train", MAXLEN, "all"), [0, 1])
    assert batch.negative_index is None and batch.negative_log_q is None
    assert batch.distinct_ids.tolist() == list(range(1, NUM_ITEMS + 1))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_batch_negatives_are_the_targets(folder, split):
    batch = make_batch(open_dataset(folder, split, MAXLEN, "batch"), [0, 1, 4])
    assert negative_ids(batch) == target_ids(batch)
    items = set(batch.distinct_ids[batch.item_index].tolist())
    assert set(batch.distinct_ids.tolist()) == items | target_ids(batch)


def test_without_targets_there_are_no_batch_negatives(folder):
    batch = make_batch(open_dataset(folder, "test", MAXLEN, "batch"), [0, 1])
    assert negative_ids(batch) == set()
    assert (batch.target_index == -1).all()


def test_uniform_negatives_depend_on_the_seed_alone(folder):
    dataset = open_dataset(folder, "train", MAXLEN, "uniform", 5)
    first = negative_ids(make_batch(dataset, [0, 1, 4]))
    assert len(first) == 5
    assert negative_ids(make_batch(dataset, [6, 3])) == first
    assert negative_ids(make_batch(open_dataset(folder, "valid", 2, "uniform", 5), [2])) == first
    for other in ((43, 1, 3), (42, 2, 3), (42, 1, 4)):
        assert negative_ids(make_batch(dataset, [0, 1, 4], other)) != first


def test_uniform_negatives_are_uniform(folder):
    dataset = open_dataset(folder, "train", 1, "uniform", 5)
    counts, draws = np.zeros(NUM_ITEMS + 1), 1500
    for batch_number in range(draws):
        counts[list(negative_ids(make_batch(dataset, [2], (0, 0, batch_number))))] += 1
    share = 5 / NUM_ITEMS
    # Binomial counts: 5 standard deviations, 23 times, are passed once in 75,000 seeds.
    tolerance = 5 * np.sqrt(draws * share * (1 - share))
    assert abs(counts[1:] - draws * share).max() < tolerance


def test_mixed_negatives_are_the_targets_and_the_uniform_ones(folder):
    indices = [0, 1, 4]
    mixed = make_batch(open_dataset(folder, "train", MAXLEN, "mixed", 5), indices)
    uniform = make_batch(open_dataset(folder, "train", MAXLEN, "uniform", 5), indices)
    assert negative_ids(mixed) == target_ids(mixed) | negative_ids(uniform)


def test_more_negatives_than_items_are_all_items(folder):
    batch = make_batch(open_dataset(folder, "train", MAXLEN, "uniform", NUM_ITEMS + 9), [0, 1])
    assert negative_ids(batch) == set(range(1, NUM_ITEMS + 1))


# ------------------------------------------------------------------------------------------- logQ

POPULARITY = np.array([900, 700, 500, 400, 300, 300, 200, 200, 150, 120, 100, 80, 50])


@pytest.fixture(scope="module")
def popular(tmp_path_factory) -> Path:
    """4,000 sequences of two events; first and second events both follow POPULARITY exactly."""
    pool = np.repeat(np.arange(1, len(POPULARITY) + 1), POPULARITY)
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(pool), generator.permutation(pool)], 1).ravel()
    folder = tmp_path_factory.mktemp("popular")
    ids.astype("<i4").tofile(folder / "train_data.bin")
    np.arange(0, len(ids) + 1, 2, dtype="<i8").tofile(folder / "train_offsets.bin")
    return folder


def inclusion(dataset: MyDataset, num_batches: int, is_weighted: bool) -> np.ndarray:
    """(num_batches, X): an item's weight among the negatives, over M / X, 0 where it is not one."""
    generator = np.random.default_rng(1)
    weights = np.zeros((num_batches, dataset.num_items + 1))
    for number in range(num_batches):
        indices = generator.integers(0, len(dataset), 6)
        batch = make_batch(dataset, indices, (7, 0, number))
        ids = batch.distinct_ids[batch.negative_index].numpy()
        weight = np.exp(-batch.negative_log_q.numpy()) if is_weighted else 1.0
        weights[number, ids] = weight * dataset.num_items / len(ids)
    return weights[:, 1:]


@pytest.mark.parametrize(("negatives", "num_negatives"), [("batch", 0), ("mixed", 3)])
def test_log_q_makes_negatives_of_the_batch_as_good_as_uniform_ones(
    popular, negatives, num_negatives
):
    options = {"target_counts": count_items(popular), "has_logq": True}
    dataset = open_dataset(popular, "train", MAXLEN, negatives, num_negatives, **options)
    weights = inclusion(dataset, 3000, is_weighted=True)
    # A uniform negative counts 1 on average. Monte Carlo: 5 standard errors, passed for one of 13
    # items once in 130,000 seeds. The + 1 that smooths the counts: less than 1 %.
    tolerance = 5 * weights.std(0) / np.sqrt(len(weights)) + 0.01
    assert (abs(weights.mean(0) - 1) < tolerance).all()
    assert tolerance.max() < 0.5
    plain = inclusion(dataset, 300, is_weighted=False).mean(0)
    assert plain[0] > 1.5 and plain[-1] < 0.8


def test_log_q_is_a_function_of_frequency_and_batch(popular):
    options = {"target_counts": count_items(popular), "has_logq": True}
    dataset = open_dataset(popular, "train", MAXLEN, "batch", **options)
    batch = make_batch(dataset, range(6))
    ids = batch.distinct_ids[batch.negative_index].tolist()
    total = 2 * POPULARITY.sum() + len(POPULARITY)
    for item, log_q in zip(ids, batch.negative_log_q.tolist(), strict=True):
        is_there = 1 - (1 - (2 * POPULARITY[item - 1] + 1) / total) ** 6
        # float32 holds 7 digits
        assert log_q == pytest.approx(np.log(is_there * len(POPULARITY) / len(ids)), rel=1e-6)


def test_uniform_negatives_need_no_correction(popular):
    options = {"target_counts": count_items(popular), "has_logq": True}
    dataset = open_dataset(popular, "train", MAXLEN, "uniform", 4, **options)
    assert make_batch(dataset, [0, 1, 2]).negative_log_q is None


def test_without_counts_there_is_no_correction(popular):
    assert make_batch(open_dataset(popular, "train", negatives="batch"), [0]).negative_log_q is None


# ----------------------------------------------------------------------------- samplers and workers


def make_loader(dataset: MyDataset, sampler: BatchSampler, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn, num_workers=num_workers
    )


@pytest.mark.parametrize("negatives", ["all", "batch", "mixed"])
def test_any_number_of_workers_gives_the_same_batches(folder, negatives):
    options = {"target_counts": count_items(folder), "has_logq": True}
    dataset = open_dataset(folder, "train", MAXLEN, negatives, 5, **options)
    sampler = BatchSampler(len(dataset), 2, seed=5, is_shuffled=True)
    sampler.epoch = 3
    runs = [list(make_loader(dataset, sampler, workers)) for workers in (0, 1, 2)]
    for run in runs[1:]:
        for left, right in zip(runs[0], run, strict=True):
            assert_equal_batches(left, right)
    assert len(runs[0]) == 4


def write_plain(folder: Path, dtype: str) -> Path:
    """The sequences of LENGTHS as plain item ids."""
    make_events(sum(LENGTHS))["item_id"].astype(dtype).tofile(folder / "train_data.bin")
    np.cumsum([0, *LENGTHS]).astype("<i8").tofile(folder / "train_offsets.bin")
    return folder


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_a_worker_reads_plain_ids_as_they_are(tmp_path, dtype):
    dataset = open_dataset(write_plain(tmp_path, dtype), "train", MAXLEN)
    sampler = BatchSampler(len(dataset), 3, seed=5, is_shuffled=True)
    here, there = (list(make_loader(dataset, sampler, workers)) for workers in (0, 1))
    for left, right in zip(here, there, strict=True):
        assert_equal_batches(left, right)


def vectors_in(path: Path, order: str = "C") -> Feature:
    """A mapped (X + 1, 6) table of host vectors."""
    shape = (NUM_ITEMS + 1, 6)
    table = np.lib.format.open_memmap(path, "w+", np.float32, shape, order == "F")
    table[:] = np.random.default_rng(0).random(shape, np.float32)
    table.flush()
    return Feature("emb", 6, np.load(path, mmap_mode="r"), None, np.arange(NUM_ITEMS + 1) % 3 > 0)


@pytest.mark.parametrize("kind", ["file", "Fortran order", "file that is gone", "part", "memory"])
def test_a_worker_brings_the_host_vectors_of_the_items(folder, tmp_path, kind):
    vectors = vectors_in(tmp_path / "81.npy", kind[0])
    expected = np.array(vectors.values)
    if kind == "file that is gone":
        (tmp_path / "81.npy").unlink()
    if kind == "memory":
        vectors = vectors._replace(values=expected)
    if kind == "part":
        wider = np.vstack([expected[:2], expected])
        np.save(tmp_path / "82.npy", wider)
        vectors = vectors._replace(values=np.load(tmp_path / "82.npy", mmap_mode="r")[2:])
    dataset = open_dataset(folder, "train", MAXLEN, "batch", host_vectors={"81": vectors})
    sampler = BatchSampler(len(dataset), 3, seed=5, is_shuffled=True)
    for batch in chain(*(make_loader(dataset, sampler, workers) for workers in (0, 1))):
        values, present = batch.item_vectors["81"]
        assert_array_equal(values, expected[batch.distinct_ids])
        assert_array_equal(present, vectors.present[batch.distinct_ids])


def test_a_dataset_that_was_unpickled_collates_before_it_reads(folder, tmp_path):
    vectors = vectors_in(tmp_path / "81.npy")
    dataset = open_dataset(folder, "train", MAXLEN, "batch", host_vectors={"81": vectors})
    fetched = dataset[0]
    other = pickle.loads(pickle.dumps(dataset))
    values = [each.collate_fn(fetched).item_vectors["81"][0] for each in (other, dataset)]
    assert_array_equal(*values)


def test_the_counts_are_summed_once_however_many_batches(popular):
    options = {"target_counts": count_items(popular), "has_logq": True}
    dataset = open_dataset(popular, "train", MAXLEN, "batch", **options)
    first = make_batch(dataset, range(6))
    dataset.negatives.target_counts = dataset.negatives.target_counts.view(NoSum)
    assert_equal_batches(make_batch(dataset, range(6)), first)


class NoSum(np.ndarray):
    def sum(self, *args, **kwargs):
        raise AssertionError("ten million counts are too many to sum in every batch")


def test_a_pickled_dataset_takes_no_maps_along(folder):
    dataset = open_dataset(folder, "train", MAXLEN, "mixed", 5)
    before = make_batch(dataset, [0, 1, 4])
    text = pickle.dumps(dataset)
    assert b"memmap" not in text and len(text) < 1000
    assert_equal_batches(make_batch(pickle.loads(text), [0, 1, 4]), before)
    assert_equal_batches(make_batch(dataset, [0, 1, 4]), before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_four_workers_read_thirty_thousand_sequences_without_one_wrong(tmp_path):
    num_users, num_items = 30_011, 997
    generator = np.random.default_rng(0)
    users = generator.permutation(num_users) + 1
    lengths = 2 + users % 6  # content is a function of the user
    offsets = np.concatenate([[0], lengths.cumsum()])
    owner = np.repeat(users, lengths)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    events = np.empty(len(owner), EVENT_DTYPE)
    events["item_id"] = 1 + (owner * 31 + place * 7) % num_items
    events["action_type"] = (owner + place) % 3
    events["timestamp"] = owner * 100 + place
    events.tofile(tmp_path / "train_data.bin")
    offsets.astype("<i8").tofile(tmp_path / "train_offsets.bin")
    users.astype("<i4").tofile(tmp_path / "train_users.bin")
    dataset = open_dataset(tmp_path, "train", maxlen=4, negatives="mixed", num_negatives=50)
    sampler = BatchSampler(len(dataset), 256, seed=1, is_shuffled=True)
    found, wrong = [], 0
    for batch in make_loader(dataset, sampler, 4):
        owner = batch.user_ids.repeat_interleave(batch.offsets.diff())
        place = torch.arange(len(owner)) - batch.offsets[:-1].repeat_interleave(
            batch.offsets.diff()
        )
        place += (1 + owner % 6 - 4).clamp(min=0)  # events cut off at the start
        wrong += (batch.offsets.diff() != (1 + batch.user_ids % 6).clamp(max=4)).sum()
        wrong += (batch.timestamps != owner * 100 + place).sum()
        wrong += (batch.target_timestamps != owner * 100 + place + 1).sum()
        wrong += (batch.action_types != (owner + place) % 3).sum()
        for index, at in ((batch.item_index, place), (batch.target_index, place + 1)):
            wrong += (batch.distinct_ids[index] != 1 + (owner * 31 + at * 7) % num_items).sum()
        found.append(batch.user_ids)
    assert wrong == 0
    assert_array_equal(torch.cat(found).sort().values, np.arange(1, num_users + 1))


def orders(sampler: BatchSampler) -> list[list[int]]:
    return [draw.indices.tolist() for draw in sampler]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler(17, 5, seed, is_shuffled=True)
        sampler.epoch = epoch
        return orders(sampler)

    first = order(3, 0)
    assert [len(batch) for batch in first] == [5, 5, 5, 2]
    assert sorted(chain.from_iterable(first)) == list(range(17))
    np.random.seed(1), torch.manual_seed(1)
    assert order(3, 0) == first
    assert len({str(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("first_batch", range(5))
def test_resuming_at_a_batch_gives_exactly_the_tail(first_batch):
    sampler = BatchSampler(17, 5, 3, is_shuffled=True)
    sampler.epoch = 2
    whole = [(draw.indices.tolist(), draw.seed) for draw in sampler]
    sampler.first_batch = first_batch
    tail = [(draw.indices.tolist(), draw.seed) for draw in sampler]
    assert tail == whole[first_batch:]
    assert len(sampler) == len(tail)


def test_every_batch_has_a_seed_of_its_own():
    sampler = BatchSampler(17, 5, 3, is_shuffled=True)
    sampler.epoch = 6
    assert [draw.seed for draw in sampler] == [(3, 6, 1), (3, 6, 2), (3, 6, 3), (3, 6, 4)]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert orders(BatchSampler(7, 3, 0, is_shuffled=False)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_no_sequences_are_no_batches():
    sampler = BatchSampler(0, 3, 0, is_shuffled=True)
    assert orders(sampler) == [] and len(sampler) == 0


# -------------------------------------------------------------------------------- embedding files


def read_matrix(path: Path, dtype: str) -> np.ndarray:
    """As big-ann-benchmarks reads .fbin: n and d, the exact size, row-major data."""
    n, d = np.fromfile(path, dtype="uint32", count=2)
    assert path.stat().st_size == 8 + int(n) * int(d) * np.dtype(dtype).itemsize
    return np.memmap(path, dtype=dtype, mode="r", offset=8, shape=(n, d))


def test_the_bytes_of_an_fbin_are_a_header_and_rows(tmp_path):
    save_emb(np.array([[1.0, -2.5, 0.0], [3.25, 4.0, -0.5]]), tmp_path / "embedding.fbin")
    expected = struct.pack("<II", 2, 3) + struct.pack("<6f", 1.0, -2.5, 0.0, 3.25, 4.0, -0.5)
    assert (tmp_path / "embedding.fbin").read_bytes() == expected


def test_the_bytes_of_a_u64bin_are_a_header_and_ids(tmp_path):
    save_emb(np.array([5, -1, 2**63 - 1]), tmp_path / "id.u64bin")
    expected = struct.pack("<II", 3, 1) + struct.pack("<3Q", 5, 2**64 - 1, 2**63 - 1)
    assert (tmp_path / "id.u64bin").read_bytes() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_are_read_as_they_were_saved(tmp_path, dtype, order):
    matrix = np.random.default_rng(0).normal(size=(7, 3)).astype(dtype, order=order)
    save_emb(matrix, tmp_path / "embedding.fbin")
    found = load_emb(tmp_path / "embedding.fbin")
    assert found.dtype == np.float32
    assert_array_equal(found, matrix.astype(np.float32))
    assert_array_equal(read_matrix(tmp_path / "embedding.fbin", "float32"), found)


def test_torch_takes_vectors_as_they_lie_there_and_cannot_change_them(tmp_path, recwarn):
    path = tmp_path / "embedding.fbin"
    save_emb(np.ones((7, 3)), path)
    torch.from_numpy(load_emb(path)).zero_()
    assert not recwarn.list and (load_emb(path) == 1).all()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64])
def test_ids_are_read_as_they_were_saved(tmp_path, dtype):
    ids = np.arange(12).reshape(4, 3).astype(dtype)
    save_emb(ids, tmp_path / "topk.u64bin")
    assert_array_equal(load_emb(tmp_path / "topk.u64bin"), ids)
    assert_array_equal(read_matrix(tmp_path / "topk.u64bin", "uint64"), ids)


def test_a_missing_neighbour_is_minus_one_again(tmp_path):
    save_emb(np.array([[3, -1], [-1, -1]]), tmp_path / "topk.u64bin")
    found = load_emb(tmp_path / "topk.u64bin")
    assert found.dtype == np.int64 and found.tolist() == [[3, -1], [-1, -1]]


@pytest.mark.parametrize(("name", "shape"), [("e.fbin", (0, 5)), ("k.u64bin", (0, 4))])
def test_no_rows_are_a_header_alone(tmp_path, name, shape):
    save_emb(np.zeros(shape), tmp_path / name)
    assert (tmp_path / name).read_bytes() == struct.pack("<II", *shape)
    assert load_emb(tmp_path / name).shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_row_that_is_not_finite_in_float32_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "embedding.fbin"
    matrix = np.ones((6, 3))
    save_emb(matrix, path)
    before = path.read_bytes()
    matrix[4, 1] = value
    with pytest.raises(DataError, match=r"embedding\.fbin: row 4 is not finite"):
        save_emb(matrix, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_a_matrix_in_chunks_is_the_same_file(tmp_path, size):
    matrix = np.random.default_rng(0).normal(size=(6, 3))
    save_emb(matrix, tmp_path / "embedding.fbin")
    chunks = [matrix[start : start + size] for start in range(0, 6, size)]
    pieces = emb_pieces(tmp_path / "embedding.fbin", matrix.shape, chunks)
    assert b"".join(pieces) == (tmp_path / "embedding.fbin").read_bytes()
    matrix[4, 1] = np.nan
    with pytest.raises(DataError, match=r"embedding\.fbin: row 4 is not finite"):
        list(emb_pieces(tmp_path / "embedding.fbin", matrix.shape, chunks))


@pytest.mark.parametrize(
    ("name", "shape"), [("e.bin", (2, 2)), ("e.npy", (2, 2)), ("e.fbin", (2, 3, 4)), ("e.fbin", ())]
)
def test_what_the_formats_cannot_hold_is_refused(tmp_path, name, shape):
    with pytest.raises(ValueError, match=name):
        save_emb(np.ones(shape), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["embedding.fbin", "id.u64bin"])
def test_every_truncation_of_an_embedding_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    save_emb(np.arange(10).reshape(5, 2), path)
    good = path.read_bytes()
    for content in [*(good[:size] for size in range(len(good))), good + b"\0", b"\xff" * 48]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: {len(content)} bytes, but"):
            load_emb(path)


@pytest.mark.parametrize("types", [None, [1], [0, 2]])
@pytest.mark.parametrize("maxlen", [None, 1, 2, 3, 9])
def test_an_item_is_trained_on_where_events_before_it_are_its_query(
    folder, monkeypatch, maxlen, types
):
    """And where its event is of one of the types that are to be predicted."""
    monkeypatch.setattr("files.sequences.BLOCK", 16)
    events, offsets, _ = open_split(folder, "train")
    expected = np.zeros(NUM_ITEMS + 1, np.int64)
    for start, end in itertools.pairwise(offsets.tolist()):
        for event in range(start + 1, end):
            is_wanted = types is None or events["action_type"][event] in types
            if is_wanted and (maxlen is None or event >= end - maxlen):
                expected[events["item_id"][event]] += 1
    sequences = open_dataset(folder, "train").sequences
    found = sequences.count_targets(sequences.count_items(), maxlen, types)
    assert_array_equal(found, expected)
    options = {"has_windows": maxlen is None, "target_actions": types}
    dataset = open_dataset(folder, "train", maxlen or 3, "all", **options)
    targets = np.zeros_like(expected)
    for index in range(len(dataset)):
        batch = make_batch(dataset, [index])
        assert batch.num_targets == (batch.target_index >= 0).sum() > 0
        rows = batch.target_index[batch.target_index >= 0]
        np.add.at(targets, batch.distinct_ids[rows].numpy(), 1)
    assert_array_equal(targets, expected)


@pytest.mark.parametrize("negatives", ["all", "uniform", "mixed"])
def test_an_item_that_is_never_trained_on_is_no_negative(tiny, negatives):
    counts = np.ones(24, np.int64)
    counts[[0, 4, 17]] = 0
    dataset = open_dataset(tiny, "train", 1, negatives, 23, target_counts=counts, only_trained=True)
    batch = dataset.collate_fn(dataset.__getitems__([0]))  # one event, so one target
    ids = set(batch.distinct_ids[batch.negative_index].tolist())
    targets = set(batch.distinct_ids[batch.target_index].tolist())
    assert ids == (set(range(1, 24)) - {4, 17}) | (targets if negatives == "mixed" else set())


@pytest.mark.parametrize("block", [16, 48, 1 << 20])
def test_the_share_of_repeats_is_that_of_every_sequence(folder, monkeypatch, block):
    monkeypatch.setattr("files.sequences.BLOCK", block)
    for split in ("train", "valid", "test"):
        events, offsets, _ = open_split(folder, split)
        rows = [events["item_id"][a:b].tolist() for a, b in pairwise(offsets)]
        rows = [row for row in rows if len(row) > 1]
        expected = sum(row[-1] in row[:-1] for row in rows) / len(rows)
        assert open_dataset(folder, split).sequences.repeat_share() == expected


@pytest.mark.parametrize("num_rows", [1 << 16, (1 << 16) + 1, 200_000])
def test_the_order_of_rows_is_right_for_small_tables_and_large_ones(num_rows):
    index = np.random.default_rng(0).integers(num_rows, size=5000)
    index[:3] = num_rows - 1, 0, num_rows - 1
    places, bounds = order_of_rows(index, num_rows)
    assert_array_equal(places, np.argsort(index, kind="stable"))
    assert_array_equal(bounds, np.searchsorted(index[places], np.arange(num_rows + 1)))
