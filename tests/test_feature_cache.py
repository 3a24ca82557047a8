from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from feature_files import (
    STATISTICS,
    load_81,
    rows,
    write,
    write_items,
    write_vectors,
)

from files import features
from files.features import load_features


@pytest.fixture
def scans(monkeypatch):
    """The feature ids of every scan of a feature file."""
    seen = []
    scan = features._scan
    monkeypatch.setattr(features, "_scan", lambda *a: seen.append(list(a[1])) or scan(*a))
    return seen


def test_a_second_load_reads_the_cache_and_gives_the_same(tmp_path, scans):
    first = load_features(write_items(tmp_path), "item", 5)
    second = load_features(tmp_path, "item", 5)
    assert scans == [["100", "112", "106", "price"]]
    for i in first:
        assert isinstance(second[i].values, np.memmap)
        assert first[i][:2] == second[i][:2]
        assert first[i].values.tolist() == second[i].values.tolist()


def test_only_features_not_yet_cached_are_read(tmp_path, scans):
    write_items(tmp_path)
    load_features(tmp_path, "item", 5, ["112"])
    load_features(tmp_path, "item", 5, ["100", "112"])
    assert scans == [["112"], ["100"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("feat_statistics", {"100": 7}),
        ("feature_default_value", {"100": 1}),
        ("feature_types", {"item_array": ["100"]}),
    ],
)
def test_a_changed_companion_file_rebuilds(tmp_path, scans, name, content):
    write_items(tmp_path, {"1": {"100": 3}}, {"item_sparse": ["100"]}, {"100": 6})
    load_features(tmp_path, "item", 2)
    write(tmp_path, **{name: content})
    load_features(tmp_path, "item", 2)
    assert len(scans) == 2


def test_another_number_of_rows_rebuilds(tmp_path):
    write_items(tmp_path)
    load_features(tmp_path, "item", 5)
    assert len(load_features(tmp_path, "item", 7)["100"].values) == 8


def test_changed_vectors_rebuild(tmp_path):
    write_vectors(tmp_path, "emb_81_1/part-0", {"a7": [1]})
    load_81(tmp_path)
    write_vectors(tmp_path, "emb_81_1/part-1", {"b": [2]})
    assert load_81(tmp_path).present.sum() == 2


@pytest.mark.parametrize("new", ['{"1": {"100": 2}}', '{"1": {"100": 22}}'])
def test_a_source_of_another_size_or_time_is_read_again_and_its_old_columns_go(tmp_path, new):
    write_items(tmp_path, '{"1": {"100": 1}}', statistics=STATISTICS | {"100": 30})
    assert load_features(tmp_path, "item", 1, ["100"])["100"].values[1] == 1
    (tmp_path / "item_feat_dict.json").write_text(new)
    found = load_features(tmp_path, "item", 1, ["100"])["100"]
    assert found.values[1] == json.loads(new)["1"]["100"]
    assert len(list((tmp_path / ".cache").iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "header", "open"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    expected = rows(load_features(write_items(tmp_path), "item", 5)["106"])
    (array,) = (tmp_path / ".cache").glob("item-106-*.values.npy")
    raw = array.read_bytes()
    if damage == "remove":
        array.unlink()
    else:
        damaged = {
            "truncate": raw[:-2],
            "empty": b"",
            "header": raw.replace(b"}", b"]"),
            "open": raw.replace(b"}", b" "),
        }
        array.write_bytes(damaged[damage])
    assert rows(load_features(tmp_path, "item", 5)["106"]) == expected
    assert array.read_bytes() == raw


def test_what_a_killed_builder_left_is_swept_by_the_next(tmp_path):
    cache = write_items(tmp_path) / ".cache"
    cache.mkdir()
    (cache / ".item-100.values.npy.9999999.tmp").touch()
    load_features(tmp_path, "item", 5)
    assert not list(cache.glob("*.tmp")) + list(cache.glob(".*.tmp"))


def test_a_folder_that_cannot_be_written_still_loads_with_one_notice(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hstu")
    write_items(tmp_path)
    write_vectors(tmp_path, "81.pkl")
    (tmp_path / ".cache").touch()  # a file in the way: chmod does not stop root
    found = load_features(tmp_path, "item", 5)
    assert found["100"].values.tolist() == [0, 1, 0, 6, 0, 0]
    assert sum("built again in every run" in message for message in caplog.messages) == 1
    assert load_81(tmp_path).values[1].tolist() == [1, 2, 3]


def test_a_table_survives_being_rebuilt_by_another_process(tmp_path):
    old = load_features(write_items(tmp_path), "item", 5)["100"]
    write(tmp_path, item_feat_dict={"1": {"100": 5}})
    new = load_features(tmp_path, "item", 5)["100"]
    assert old.values.tolist() == [0, 1, 0, 6, 0, 0]
    assert new.values.tolist() == [0, 5, 0, 0, 0, 0]


def test_features_with_odd_names_are_cached_inside_the_cache_folder(tmp_path):
    name = "../a/b c"
    write_items(tmp_path, {"1": {name: 2}}, {"item_sparse": [name]}, {name: 2})
    for _ in range(2):
        assert load_features(tmp_path, "item", 1)[name].values.tolist() == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".cache"]


def test_features_with_long_names_are_cached_each_on_its_own(tmp_path, scans):
    names = ["商品的详细分类" * 12 + end for end in "甲乙"]
    records = {"1": dict(zip(names, (2, 5), strict=True))}
    write_items(tmp_path, records, {"item_sparse": names}, dict.fromkeys(names, 9))
    for _ in range(2):
        found = load_features(tmp_path, "item", 1)
        assert [found[name].values.tolist() for name in names] == [[0, 2], [0, 5]]
    assert len(scans) == 1
