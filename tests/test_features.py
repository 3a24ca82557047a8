from __future__ import annotations

import logging
import random

import numpy as np
import pytest
from feature_files import RECORDS, STATISTICS, load_one, rows, write, write_items

from files import features, json_stream
from files.atomic_io import DataError
from files.features import PARSERS, Feature, load_features

# ---- tables


def test_each_kind_becomes_a_table_with_a_padding_row(tmp_path):
    found = load_features(write_items(tmp_path), "item", 5)
    assert list(found) == ["100", "112", "106", "price"]
    assert found["100"][:2] == ("sparse", 6)
    assert found["100"].values.tolist() == [0, 1, 0, 6, 0, 0]
    assert found["112"].values.tolist() == [0, 0, 0, 30, 0, 0]
    assert found["106"][:2] == ("array", 14)
    assert rows(found["106"]) == [[], [], [], [14, 1, 2], [5], []]
    assert found["price"][:2] == ("continual", 1)
    assert found["price"].values.tolist() == [0, -2, 0, 1.5, 0, 0]
    dtypes = [found[i].values.dtype for i in found]
    assert dtypes == [np.int32, np.int32, np.int32, np.float32]
    assert found["106"].offsets.dtype == np.int64


def test_missing_and_null_values_take_the_default_but_padding_stays_zero(tmp_path):
    defaults = {"100": 2, "106": [3, 4], "price": 0.5}
    found = load_features(write_items(tmp_path, feature_default_value=defaults), "item", 5)
    assert found["100"].values.tolist() == [0, 1, 2, 6, 2, 2]
    assert rows(found["106"]) == [[], [], [3, 4], [14, 1, 2], [5], [3, 4]]
    assert found["price"].values.tolist() == [0, -2, 0.5, 1.5, 0.5, 0.5]


def test_user_features_are_read_from_their_own_file(tmp_path):
    write_items(tmp_path, user_feat_dict={"2": {"103": 86}})
    assert load_features(tmp_path, "user", 2)["103"].values.tolist() == [0, 0, 86]


def test_without_feature_files_there_are_no_features(tmp_path):
    assert load_features(tmp_path, "item", 5) == {}
    assert load_features(tmp_path, "user", 5) == {}


def test_a_missing_user_file_turns_user_features_off_unless_they_were_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hstu")
    write_items(tmp_path)
    assert load_features(tmp_path, "user", 5) == {}
    assert "user_feat_dict.json: missing" in caplog.text
    with pytest.raises(DataError, match=r"user_feat_dict\.json: missing"):
        load_features(tmp_path, "user", 5, ["103"])


def test_only_wanted_features_are_returned_and_only_they_need_statistics(tmp_path):
    write_items(tmp_path, statistics={"100": 6, "103": 86})
    assert list(load_features(tmp_path, "item", 5, ["100"])) == ["100"]
    assert load_features(tmp_path, "item", 5, "none") == {}


def test_a_wanted_feature_that_does_not_exist_is_refused_with_the_list_of_those_that_do(tmp_path):
    write_items(tmp_path)
    with pytest.raises(
        DataError, match=r"feature_types\.json: no feature 999 of items; there are 100"
    ):
        load_features(tmp_path, "item", 5, ["100", "999"])
    with pytest.raises(
        DataError, match=r"feature_types\.json: no feature 100 of users; there are 103"
    ):
        load_features(tmp_path, "user", 5, ["100"])


def test_a_side_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="side is 'items', expected 'item' or 'user'"):
        load_features(tmp_path, "items", 5)


def test_an_empty_object_gives_default_rows(tmp_path):
    found = load_features(write_items(tmp_path, " { } "), "item", 2)
    assert found["100"].values.tolist() == [0, 0, 0]
    assert rows(found["106"]) == [[], [], []]


def test_a_key_that_occurs_twice_counts_once_with_its_last_record(tmp_path):
    records = '{"1": {"100": 1, "106": [1, 2]}, "2": {"106": [9]}, "1": {"100": 3, "106": [3]}}'
    found = load_features(write_items(tmp_path, records), "item", 2)
    assert found["100"].values.tolist() == [0, 3, 0]
    assert rows(found["106"]) == [[], [3], [9]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"types": {"item_odd": ["1"]}}, r"feature_types\.json: unknown kind 'item_odd'"),
        ({"types": {"thing_sparse": ["1"]}}, r"feature_types\.json: unknown kind 'thing_sparse'"),
        ({"types": {"item_sparse": "100"}}, r"feature_types\.json: item_sparse is '100'"),
        ({"types": [1]}, r"feature_types\.json: \[1\], expected an object"),
        (
            {"types": {"item_sparse": ["5"], "user_array": ["5"]}},
            r"feature_types\.json: feature 5 is listed twice",
        ),
        ({"statistics": {}}, r"feat_statistics\.json: .*100 \('missing'\), 112 .*, 106"),
        ({"statistics": STATISTICS | {"112": 2.5}}, r"feat_statistics\.json: .*112 \(2\.5\)"),
        ({"statistics": STATISTICS | {"112": -1}}, r"feat_statistics\.json: .*112 \(-1\)"),
        ({"statistics": '{"100": Infinity}'}, r"feat_statistics\.json: no card.* 100 \(inf\)"),
        ({"feature_default_value": {"100": 7}}, r"feature_default_value\.json: feature 100 = 7"),
        ({"feature_default_value": {"100": 2**63}}, r"default_value\.json: feature 100 = 922337"),
        (
            {"feature_default_value": '{"price": 1e999}'},
            r"default_value\.json: feature price = inf: .*not finite",
        ),
        (
            {"feature_default_value": {"price": 1e99}},
            r"default_value\.json: feature price = 1e\+99: .*float32",
        ),
        ({"records": {"6": {}}}, r"item_feat_dict\.json: key '6', expected a re-id in 1\.\.5"),
        ({"records": {"0": {}}}, r"item_feat_dict\.json: key '0'"),
        ({"records": {"1_0": {}}}, r"item_feat_dict\.json: key '1_0'"),
        ({"records": {"2": [1]}}, r"item_feat_dict\.json: item 2 = \[1\], expected an object"),
    ],
)
def test_a_bad_feature_file_is_refused_by_name(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_features(write_items(tmp_path, **files), "item", 5)


def test_records_without_feature_types_are_refused(tmp_path):
    write(tmp_path, item_feat_dict=RECORDS)
    with pytest.raises(DataError, match=r"feature_types\.json: missing"):
        load_features(tmp_path, "item", 5)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("sparse", "7", r"item 2, feature x = 7: outside 0\.\.6, the cardinality"),
        ("sparse", "-1", r"= -1: outside"),
        ("sparse", "1.0", r"= 1\.0: not a whole number"),
        ("sparse", "true", r"= True: not a whole number"),
        ("sparse", "NaN", r"= nan: not a whole number"),
        ("sparse", "[1]", r"= \[1\]: not a whole number"),
        ("sparse", str(2**70), r"feature x = 11805"),
        ("array", "[1, 7]", r"= \[1, 7\]: outside"),
        ("array", "[1, NaN]", r"not a whole number"),
        ("array", "[null]", r"not a whole number"),
        ("array", '{"a": 1}', r"not a whole number"),
        ("continual", '"3"', r"feature x = '3': not a number"),
        ("continual", "9" * 400, r"feature x = 9999"),
    ],
)
def test_a_bad_value_is_refused_with_file_item_and_feature(tmp_path, kind, value, message):
    with pytest.raises(DataError, match=r"item_feat_dict\.json: [\s\S]*" + message):
        load_one(tmp_path, kind, value)


def test_the_first_bad_value_is_named(tmp_path):
    records = {str(i): {"x": 9 if i > 3 else 5} for i in range(1, 26)}
    write_items(tmp_path, records, {"item_sparse": ["x"]}, {"x": 6})
    with pytest.raises(DataError, match=r"item 4, feature x = 9: outside 0\.\.6"):
        load_features(tmp_path, "item", 25)


def test_text_values_read_as_unknown_and_are_counted_once(tmp_path, caplog):
    caplog.set_level("WARNING", "hstu")
    records = {str(i): {"x": "cold", "y": ["cold", 2]} for i in (1, 2, 3)}
    write_items(tmp_path, records, {"item_sparse": ["x"], "item_array": ["y"]}, {"x": 6, "y": 6})
    found = load_features(tmp_path, "item", 3)
    assert found["x"].values.tolist() == [0, 0, 0, 0]
    assert rows(found["y"]) == [[], [0, 2], [0, 2], [0, 2]]
    assert [r.getMessage().count("3 text values") for r in caplog.records] == [1, 1]


def test_a_single_value_in_a_list_feature_is_a_list_of_one_and_counted(tmp_path, caplog):
    assert rows(load_one(tmp_path, "array", "4")) == [[], [], [4], []]
    assert "feature x: 1 single values" in caplog.text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", "1e300"])
def test_a_number_that_is_not_finite_takes_the_default_and_is_counted(tmp_path, caplog, value):
    feature = load_one(tmp_path, "continual", value, feature_default_value={"x": 2.5})
    assert feature.values.tolist() == [0, 2.5, 2.5, 2.5]
    assert "feature x: 1 values not finite" in caplog.text


def test_a_scan_in_many_blocks_equals_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", 101)
    monkeypatch.setattr(features, "_RECORDS", 7)
    draw = random.Random(0)
    records = {}
    for i in draw.sample(range(1, 101), 80):
        record = {
            "100": draw.randint(0, 6),
            "106": [draw.randint(0, 14) for _ in range(draw.randint(0, 4))],
            "price": draw.random(),
        }
        records[str(i)] = {k: v for k, v in record.items() if draw.random() < 0.7}
    found = load_features(write_items(tmp_path, records), "item", 100)
    table = [records.get(str(i), {}) for i in range(101)]
    assert found["100"].values.tolist() == [r.get("100", 0) for r in table]
    assert rows(found["106"]) == [r.get("106", []) for r in table]
    assert found["price"].values.tolist() == [np.float32(r.get("price", 0)) for r in table]


# ---- custom kinds


def test_a_custom_kind_is_one_parser_and_one_list_in_feature_types(tmp_path, monkeypatch):
    def parse_hour(column):
        if any(not 0 <= value < 24 for value in column.values):
            raise ValueError("not an hour")
        angles = np.array(column.values, np.float32) * (np.pi / 12)
        return Feature("hour", column.size, np.stack([np.sin(angles), np.cos(angles)], 1))

    monkeypatch.setitem(PARSERS, "hour", parse_hour)
    write_items(tmp_path, {"2": {"h": 6}}, {"item_hour": ["h"]}, {"h": 2})
    found = load_features(tmp_path, "item", 2)["h"]
    assert found[:2] == ("hour", 2)
    np.testing.assert_allclose(found.values, [[0, 0], [0, 1], [1, 0]], atol=1e-6)
    write(tmp_path, item_feat_dict={"2": {"h": 25}})
    with pytest.raises(DataError, match=r"item_feat_dict\.json: item 2, feature h = 25: not an h"):
        load_features(tmp_path, "item", 2)


def test_a_changed_parser_counts_at_once(tmp_path, monkeypatch):
    assert load_one(tmp_path, "sparse", "2").values.tolist() == [0, 0, 2, 0]
    plain = PARSERS["sparse"]
    halve = lambda column: plain(column._replace(values=[v // 2 for v in column.values]))  # noqa: E731
    monkeypatch.setitem(PARSERS, "sparse", halve)
    assert load_features(tmp_path, "item", 3)["x"].values.tolist() == [0, 0, 1, 0]
