"""Properties over random data folders: what is written is read, and damage is never a surprise."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import count_items, open_dataset, write_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inspect_data import find_problems
from torch.utils.data import DataLoader

from dataset import BatchSampler, MyDataset
from files.atomic_io import DataError
from files.data_folder import check_re_ids, original_ids, read_indexer, read_manifest
from files.data_writer import Column, write_dataset
from files.features import load_features
from files.item_vectors import find_vectors, load_vectors
from files.sequences import EVENT_DTYPE, Sequences

pytestmark = pytest.mark.slow

SECONDS = 2.0  # of CPU time, the longest that opening a damaged folder may take


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """Durability is not tested here, and costs most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


# --------------------------------------------------------------------------------- write, then read


MISSING = st.none()
VALUES = {
    "sparse": st.integers(0, 9) | MISSING,
    "array": st.lists(st.integers(1, 9), max_size=4) | MISSING,
    "continual": st.floats(-(2.0**20), 2.0**20, width=32) | MISSING,
}
EVENTS = st.lists(
    st.tuples(st.integers(1, 7), st.integers(-1, 2), st.integers(0, 2**40)), max_size=6
)


def columns(num_rows: int) -> st.SearchStrategy[dict[str, Column]]:
    column = st.sampled_from(list(VALUES)).flatmap(
        lambda kind: st.lists(VALUES[kind], min_size=num_rows, max_size=num_rows).map(
            lambda values: Column(kind, values)
        )
    )
    names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=4)
    return st.dictionaries(names, column, max_size=3)


def as_sequences(histories: list[list[tuple]]) -> Sequences:
    lengths = [len(history) for history in histories]
    events = np.array([event for history in histories for event in history], EVENT_DTYPE)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Sequences(events, offsets, np.arange(1, len(histories) + 1, dtype=np.int32))


def clean(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@settings(max_examples=60, deadline=None)
@given(
    histories=st.lists(EVENTS, min_size=1, max_size=5).filter(
        lambda histories: any(len(history) > 1 for history in histories)
    ),
    item_features=columns(7),
)
def test_random_data_are_read_as_they_were_written(folder, histories, item_features):
    data = clean(folder / "written")
    splits = {"train": as_sequences(histories), "test": as_sequences(histories)}
    ids = {"item_ids": range(40, 47), "user_ids": [f"é{k}" for k in range(len(histories))]}
    write_dataset(data, splits, num_action_types=3, item_features=item_features, **ids)

    dataset = MyDataset(data, "train", maxlen=10)
    kept = [history for history in histories if len(history) > 1]
    assert [dataset[k].sequences.events.tolist() for k in range(len(dataset))] == kept
    seen = MyDataset(data, "test", maxlen=1)
    assert [seen[k].seen.events.tolist() for k in range(len(seen))] == [h[:-1] for h in kept]
    found = load_features(data, "item", 7)
    assert list(found) == list(in_file_order(item_features))
    for name, column in item_features.items():
        assert rows_of(found[name]) == expected_rows(column)


def in_file_order(item_features: dict[str, Column]) -> list[str]:
    """feature_types.json groups the features by kind, in the order in which kinds come up."""
    kinds = list(dict.fromkeys(column.kind for column in item_features.values()))
    return sorted(item_features, key=lambda name: kinds.index(item_features[name].kind))


def rows_of(feature: Any) -> list:
    if feature.offsets is None:
        return feature.values.tolist()
    return [part.tolist() for part in np.split(feature.values, feature.offsets[1:-1])]


def expected_rows(column: Column) -> list:
    """Row 0 is padding, and what is missing takes the default."""
    empty = [] if column.kind == "array" else 0
    return [empty, *(empty if value is None else value for value in column.values)]


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(2, 6), min_size=4, max_size=9),
    batch_size=st.integers(1, 4),
)
def test_any_number_of_workers_reads_the_same(folder, seed, lengths, batch_size):
    rng = np.random.default_rng(seed)
    histories = [
        [(int(rng.integers(1, 8)), int(rng.integers(-1, 3)), k) for k in range(n)] for n in lengths
    ]
    data, ids = clean(folder / "workers"), {"item_ids": range(7), "user_ids": range(len(lengths))}
    write_dataset(data, {"train": as_sequences(histories)}, num_action_types=3, **ids)
    dataset = open_dataset(data, "train", 4, "mixed", 2)
    sampler = BatchSampler(len(dataset), batch_size, seed, is_shuffled=True)
    options = {"batch_sampler": sampler, "collate_fn": dataset.collate_fn}
    results = [
        [facts(batch) for batch in DataLoader(dataset, num_workers=workers, **options)]
        for workers in (0, 1, 2)
    ]
    assert results[0] == results[1] == results[2]
    users = [user for batch in results[0] for user in batch["user_ids"][1]]
    assert sorted(users) == list(range(1, len(lengths) + 1))


def facts(values: Any) -> Any:
    """Arrays and tensors in tuples and dictionaries as values that compare, NaN included."""
    if hasattr(values, "_asdict"):
        values = values._asdict()
    if isinstance(values, dict):
        return {name: facts(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return [facts(value) for value in values]
    if hasattr(values, "dtype"):
        array = np.asarray(values)
        return str(array.dtype), np.nan_to_num(array, nan=-7).ravel().tolist(), array.shape
    return values


# ------------------------------------------------------------------------------- one mutation each


@pytest.fixture(scope="module")
def good(folder) -> Path:
    """A data folder with every kind of file, its caches built."""
    data = write_tiny(folder / "good")
    vectors = {1000 + 3 * k: np.full(5, k, np.float32) for k in range(0, 23, 2)}
    (data / "creative_emb" / "82.pkl").write_bytes(pickle.dumps(vectors))
    read_all(data)
    return data


@pytest.fixture(scope="module")
def expected(good) -> Any:
    return read_all(good)


def read_all(data: Path) -> dict[str, Any]:
    """All that a training and an export read of a folder."""
    manifest = read_manifest(data)
    result: dict[str, Any] = {"manifest": manifest}
    result["counts"] = facts(count_items(data))
    for split in manifest.targets:
        dataset = MyDataset(data, split, maxlen=5)
        if len(dataset):
            batch = dataset.collate_fn(dataset.__getitems__(np.arange(len(dataset))))
            result[split] = facts(batch)
    tables = load_features(data, "item", manifest.num_items)
    tables |= load_features(data, "user", manifest.num_users)
    if names := list(find_vectors(data)):
        item_ids = read_indexer(data)["i"]
        check_re_ids(data / "indexer.pkl", "i", item_ids, manifest.num_items)
        tables |= load_vectors(data, names, item_ids, manifest.num_items)
    result |= {f"feature {name}": facts(feature) for name, feature in tables.items()}
    for side, count in (("i", manifest.num_items), ("u", manifest.num_users)):
        result[f"ids {side}"] = facts(original_ids(data, side, count))
    return result


def files_of(data: Path) -> list[str]:
    return sorted(
        path.relative_to(data).as_posix()
        for path in data.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    )


ODD_VALUES = (
    None, True, -1, 0, 2**31 - 1, 2**40, 2**70, 1.5, 1e300, float("nan"), "", "x", "\ud800",
    [], [1], [[]], {}, {"a": 1},
)  # fmt: skip


def mutate_value(draw: Callable, value: Any) -> Any:
    """Drop a key, or put another value, somewhere in a tree of dicts and lists."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or not draw(st.integers(0, 2)):
            break
        value = inner
    if draw(st.booleans()):
        del value[key]
    else:
        value[key] = draw(st.sampled_from(ODD_VALUES))


def mutate(draw: Callable, path: Path) -> None:
    """One random fault in one file."""
    raw = bytearray(path.read_bytes())
    kinds = ["truncate", "flip", "insert", "delete"]
    kinds += {".bin": ["swap"], ".json": ["value"], ".pkl": ["value"]}.get(path.suffix, [])
    kind = draw(st.sampled_from(kinds))
    at = draw(st.integers(0, len(raw) - 1))
    if kind == "delete":
        path.unlink()
        return
    if kind == "value":
        is_json = path.suffix == ".json"
        tree = json.loads(raw) if is_json else pickle.loads(raw)
        mutate_value(draw, tree)
        raw = json.dumps(tree).encode() if is_json else pickle.dumps(tree, protocol=4)
    elif kind == "truncate":
        raw = raw[:at]
    elif kind == "flip":
        raw[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "insert":
        raw[at:at] = draw(st.binary(min_size=1, max_size=20))
    elif kind == "swap":
        width = draw(st.sampled_from([4, 8]))
        raw = np.frombuffer(raw[: len(raw) // width * width], f"<i{width}").byteswap().tobytes()
    path.unlink()  # the folder is made of links
    path.write_bytes(raw)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data(), has_manifest=st.booleans(), has_indexer=st.booleans())
def test_one_mutation_gives_an_equal_result_or_an_error_that_names_the_file(
    good, expected, folder, data, has_manifest, has_indexer
):
    copy = clean(folder / "mutated")
    shutil.copytree(good, copy, copy_function=os.link)
    hashed = json.loads((copy / "manifest.json").read_text())["files"] if has_manifest else ()
    if not has_manifest:
        (copy / "manifest.json").unlink()
        if not has_indexer:  # then there can be no vectors, which go by its ids
            (copy / "indexer.pkl").unlink()
            shutil.rmtree(copy / "creative_emb")
    name = data.draw(st.sampled_from(files_of(copy)), label="file")
    mutate(data.draw, copy / name)
    started = time.process_time()
    try:
        found = read_all(copy)
    except DataError as error:
        assert Path(name).name in str(error) or name not in hashed, error
        assert str(copy) in str(error)
    else:
        # A legal value in the place of another is seen by those alone who compare the hashes.
        if found != expected and name in hashed:
            assert any(name in problem for problem in find_problems(copy))
    assert time.process_time() - started < SECONDS
