from __future__ import annotations

import json
import logging
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import features
from atomic_io import DataError, read_json
from features import PARSERS, Feature, find_vectors, load_features, load_vectors

SAMPLE = Path(__file__).parent.parent.parent / "shared" / "data" / "tencentgr-sample"
needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="the TencentGR sample in ../shared is not here (no licence to copy)"
)

TYPES = {
    "item_sparse": ["100", "112"],
    "item_array": ["106"],
    "item_continual": ["price"],
    "item_emb": ["81"],
    "user_sparse": ["103"],
}
STATISTICS = {"100": 6, "112": 30, "106": 14, "103": 86}
RECORDS = {
    "3": {"100": 6, "112": 30, "106": [14, 1, 2], "price": 1.5},
    "1": {"100": 1, "106": [], "price": -2, "unlisted": "x"},
    "4": {"100": None, "106": [5]},
}
ITEM_IDS = {"a7": 1, "123": 2, 456: 3, 20002650278: 4, "b": 5}
VECTORS = {"a7": [1.0, 2.0, 3.0], 123: [4.0, 5.0, 6.0], "456": [7.0, 8.0, 9.0], "other": [0.0] * 3}


def write(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def write_items(folder: Path, records=RECORDS, types=TYPES, statistics=STATISTICS, **files) -> Path:
    return write(
        folder,
        item_feat_dict=records,
        feature_types=types,
        feat_statistics=statistics,
        **files,
    )


def load_one(folder: Path, kind: str, value, size: int = 6, num_rows: int = 3, **files) -> Feature:
    """The only feature of a folder where item 2 has `value`, a JSON text."""
    records = f'{{"2": {{"x": {value}}}}}'
    write_items(folder, records, {f"item_{kind}": ["x"]}, {"x": size}, **files)
    return load_features(folder, "item", num_rows)["x"]


def rows(feature: Feature) -> list[list[int]]:
    return [part.tolist() for part in np.split(feature.values, feature.offsets[1:-1])]


def write_vectors(folder: Path, spelling: str, vectors=None) -> None:
    """`vectors` id -> list in one of the documented spellings, given as the path to write."""
    vectors = VECTORS if vectors is None else vectors
    path = folder / "creative_emb" / spelling
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(vectors))
    elif path.suffix == ".npy":
        np.save(path, vectors)
    else:
        lines = [json.dumps({"anonymous_cid": i, "emb": list(v)}) for i, v in vectors.items()]
        path.write_text("\n".join(lines) + "\n")


def load_81(folder: Path) -> Feature:
    return load_vectors(folder, ["81"], ITEM_IDS, 5)["81"]


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
    assert list(load_features(tmp_path, "item", 5, ["100", "103"])) == ["100"]
    assert load_features(tmp_path, "item", 5, "none") == {}


def test_a_wanted_feature_that_does_not_exist_is_refused_with_the_list_of_those_that_do(tmp_path):
    write_items(tmp_path)
    with pytest.raises(DataError, match=r"feature_types\.json: no feature 999.*100, 112, 106"):
        load_features(tmp_path, "item", 5, ["100", "999"])


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
        ({"statistics": '{"100": 1, "100": 2}'}, r"feat_statistics\.json: key '100' occurs twice"),
        ({"feature_default_value": {"100": 7}}, r"feature_default_value\.json: feature 100 = 7"),
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


def test_up_to_twenty_bad_values_are_listed(tmp_path):
    records = {str(i): {"x": 9} for i in range(1, 26)}
    write_items(tmp_path, records, {"item_sparse": ["x"]}, {"x": 6})
    with pytest.raises(DataError, match=r"item 20, [\s\S]*and 5 more") as error:
        load_features(tmp_path, "item", 25)
    assert "item 21," not in str(error.value)


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


# ---- the streaming reader


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"1": {"100": 1}',
        '{"1": {"100": 1},}',
        '{"1" {}}',
        '{1: {"100": 1}}',
        '{"1": {}} x',
        '{"1": {}}{',
        '{"1": {"100": "abc',
        '{"1": {"100": ' + "9" * 5000 + "}}",
        "[" * 100_000,
        '{"1": ' + "[" * 100_000,
    ],
)
def test_broken_json_is_refused_by_name(tmp_path, text):
    with pytest.raises(DataError, match=r"item_feat_dict\.json"):
        load_features(write_items(tmp_path, text), "item", 5)


@pytest.mark.parametrize("raw", [b'{"1": {"100": "\xff"}}', '{"1": {}}'.encode("utf-16")])
def test_text_that_is_not_utf8_is_refused_by_name(tmp_path, raw):
    (write_items(tmp_path) / "item_feat_dict.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"item_feat_dict\.json"):
        load_features(tmp_path, "item", 5)


def test_a_folder_in_place_of_a_file_is_refused_by_name(tmp_path):
    (write_items(tmp_path) / "item_feat_dict.json").unlink()
    (tmp_path / "item_feat_dict.json").mkdir()
    with pytest.raises(DataError, match=r"item_feat_dict\.json: cannot be read"):
        load_features(tmp_path, "item", 5)


def test_a_byte_order_mark_is_accepted(tmp_path):
    (write_items(tmp_path) / "item_feat_dict.json").write_bytes(b'\xef\xbb\xbf{"1": {"100": 4}}')
    assert load_features(tmp_path, "item", 1)["100"].values.tolist() == [0, 4]


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    value=st.dictionaries(st.text(max_size=5), NESTED, max_size=6),
    block=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3, "\t"]),
    separators=st.sampled_from([(",", ":"), (" ,\n", "  :\r\n\t"), (", ", ": ")]),
)
def test_streaming_yields_what_json_load_does(
    tmp_path_factory, value, block, ascii_only, indent, separators
):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, separators=separators)
    path.write_text(f" \n{text}\t", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_TEXT_BLOCK", block + 3)  # the head `\s*{\s*}` is read at once
        found = list(features._records(path))
    assert found == list(json.loads(text).items())


def test_a_scan_in_many_blocks_equals_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_TEXT_BLOCK", 101)
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


# ---- vectors


@pytest.mark.parametrize(
    "spelling",
    ["81.pkl", "emb_81_3.pkl", "emb_81_3/part-00000", "emb_81_3/a.json", "emb_81_3/a.jsonl"],
)
def test_listed_vectors_land_in_the_rows_of_their_items(tmp_path, spelling, caplog):
    caplog.set_level(logging.INFO, "hstu")
    write_vectors(tmp_path, spelling)
    for _ in range(2):  # built, then from the cache
        found = load_81(tmp_path)
        assert found[:2] == ("emb", 3)
        assert found.values.dtype == np.float32
        assert found.values.tolist() == [[0] * 3, [1, 2, 3], [4, 5, 6], [7, 8, 9], [0] * 3, [0] * 3]
        assert found.present.tolist() == [False, True, True, True, False, False]
        coverage = "creative_emb/81: 60.0 % of 5 items have a vector, width 3"
        assert coverage in caplog.messages
        caplog.clear()


def test_the_parts_of_a_folder_are_joined_and_other_files_passed_over(tmp_path):
    write_vectors(tmp_path, "emb_81_2/part-00000", {"a7": [1, 2]})
    write_vectors(tmp_path, "emb_81_2/part-00001", {"b": [3, 4]})
    for name in ("_SUCCESS", ".part-00000.crc", "notes.txt"):
        (tmp_path / "creative_emb" / "emb_81_2" / name).write_text("x")
    assert load_81(tmp_path).values.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [0, 0], [3, 4]]


def test_a_dense_table_is_by_row_with_nan_where_there_is_no_vector(tmp_path):
    table = np.full((6, 2), np.nan)
    table[2], table[5] = (1, 2), (0, 0)
    write_vectors(tmp_path, "emb_81_2.npy", table)
    found = load_81(tmp_path)
    assert found.values.tolist() == [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [0, 0]]
    assert found.present.tolist() == [False, False, True, False, False, True]


def test_parquet_files_hold_vectors_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "creative_emb" / "emb_81_3_parquet"
    folder.mkdir(parents=True)
    ids = [str(i) for i in VECTORS]
    table = pa.table({"emb": list(VECTORS.values()), "anonymous_cid": ids})
    parquet.write_table(table, folder / "part-0.parquet")
    assert load_81(tmp_path).values[1:4].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    parquet.write_table(pa.table({"emb": [[1.0]]}), folder / "part-0.parquet")
    with pytest.raises(DataError, match=r"part-0\.parquet: no column anonymous_cid"):
        load_81(tmp_path)
    (folder / "part-0.parquet").write_bytes(b"PAR1 but not much more")
    with pytest.raises(DataError, match=r"part-0\.parquet"):
        load_81(tmp_path)


def test_parquet_without_pyarrow_is_refused_with_the_remedy(tmp_path, monkeypatch):
    write_vectors(tmp_path, "emb_81_3/part-0.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"part-0\.parquet: .*pip install pyarrow"):
        load_81(tmp_path)


@pytest.mark.parametrize("convert", [list, tuple, np.float16, np.float64, np.int64])
def test_vectors_may_be_lists_or_arrays_of_any_number_type(tmp_path, convert):
    vectors = {
        i: convert(v) if convert in (list, tuple) else np.array(v, convert)
        for i, v in VECTORS.items()
    }
    write_vectors(tmp_path, "81.pkl", vectors)
    assert load_81(tmp_path).values[2].tolist() == [4, 5, 6]


def test_vector_sources_are_found_in_all_spellings(tmp_path):
    folder = tmp_path / "creative_emb"
    for name in ("emb_82_1024", "emb_83_3584_parquet", "other"):
        (folder / name).mkdir(parents=True)
    for name in ("81.pkl", "emb_84_32.pkl", "emb_85_4.npy", "title.npy", "README.md", "emb_86_1"):
        (folder / name).touch()
    found = {i: path.name for i, path in find_vectors(tmp_path).items()}
    assert found == {
        "81": "81.pkl",
        "82": "emb_82_1024",
        "83": "emb_83_3584_parquet",
        "84": "emb_84_32.pkl",
        "85": "emb_85_4.npy",
        "title": "title.npy",
    }
    assert find_vectors(tmp_path / "creative_emb") == {}
    (folder / "emb_81_32.pkl").touch()
    with pytest.raises(DataError, match=r"emb_81_32\.pkl: feature 81 has 81\.pkl too"):
        find_vectors(tmp_path)


def test_absent_vectors_are_refused_with_the_list_of_those_found(tmp_path):
    write_vectors(tmp_path, "82.pkl")
    with pytest.raises(DataError, match=r"creative_emb: no vectors for 81; there are 82"):
        load_81(tmp_path)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"a7": [1.0, 2.0], "b": [1.0]}, r"81\.pkl: id 'b' has width 1, expected 2"),
        ({"a7": 5.0}, r"81\.pkl: id 'a7' has width none"),
        ({"a7": []}, r"81\.pkl: id 'a7' has width 0"),
        ({"a7": [[1.0], [1.0, 2.0]]}, r"81\.pkl: id 'a7': .* expected a list of numbers"),
        ({"a7": ["x"]}, r"81\.pkl: id 'a7'"),
        ({"a7": None}, r"81\.pkl: id 'a7'"),
        ({"a7": [1.0, float("nan")]}, r"81\.pkl: id 'a7': NaN or Infinity"),
        ({"a7": [1e300]}, r"81\.pkl: id 'a7': NaN or Infinity"),
        ({(1, 2): [1.0]}, r"81\.pkl: id \(1, 2\), expected text or a number"),
        ({"x": [1.0], 99: [2.0]}, r"81\.pkl: none of its ids"),
        ({}, r"81\.pkl: none of its ids"),
        ([[1.0]], r"81\.pkl: a list, expected a dict"),
    ],
)
def test_bad_pickled_vectors_are_refused_with_file_and_id(tmp_path, vectors, message):
    write_vectors(tmp_path, "81.pkl", vectors)
    with pytest.raises(DataError, match=message):
        load_81(tmp_path)
    assert not list((tmp_path / ".cache").glob("*.npy"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"anonymous_cid": "a7"}', r"part-00000: line 2: KeyError 'emb'"),
        ('{"anonymous_cid": "a7", "emb": [1.0', r"part-00000: line 2: JSONDecodeError"),
        ("[1]", r"part-00000: line 2: TypeError"),
        ('{"anonymous_cid": ["a7"], "emb": [1.0]}', r"part-00000: id \['a7'\], expected text"),
        ('{"anonymous_cid": "a7", "emb": [NaN]}', r"part-00000: id 'a7': NaN"),
        ("[" * 100_000, r"part-00000"),
    ],
)
def test_a_bad_line_of_vectors_is_refused_with_file_and_line(tmp_path, line, message):
    write_vectors(tmp_path, "emb_81_1/part-00000", {})
    path = tmp_path / "creative_emb" / "emb_81_1" / "part-00000"
    path.write_text('{"anonymous_cid": "b", "emb": [1.0]}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_81(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((5, 2)), r"81\.npy: float64 \(5, 2\), expected float \(6, width\)"),
        (np.zeros((6, 2), np.int64), r"81\.npy: int64"),
        (np.zeros(6), r"81\.npy: float64 \(6,\)"),
        (np.full((6, 2), np.nan), r"81\.npy: none of its"),
        (np.array([[1, 2]] * 5 + [[np.nan, 1]]), r"81\.npy: id 5: NaN"),
        (np.array([None] * 6), r"81\.npy"),
    ],
)
def test_a_bad_dense_table_is_refused_by_name(tmp_path, table, message):
    write_vectors(tmp_path, "81.npy", table)
    with pytest.raises(DataError, match=message):
        load_81(tmp_path)


def test_an_empty_vector_folder_is_refused(tmp_path):
    (tmp_path / "creative_emb" / "emb_81_3").mkdir(parents=True)
    with pytest.raises(DataError, match="emb_81_3: empty"):
        load_81(tmp_path)


def test_a_pickle_that_runs_code_is_refused_unless_trusted(tmp_path):
    write_vectors(tmp_path, "81.pkl", Counter({"a7": [1.0]}))
    with pytest.raises(DataError, match=r"81\.pkl"):
        load_81(tmp_path)
    found = load_vectors(tmp_path, ["81"], ITEM_IDS, 5, trust_pickle=True)["81"]
    assert found.values[1].tolist() == [1]


def test_low_coverage_is_a_warning(tmp_path, caplog):
    caplog.set_level("WARNING", "hstu")
    write_vectors(tmp_path, "81.pkl", {"a7": [1.0]})
    load_81(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "20.0 % of 5 items" in caplog.text


def test_other_item_ids_rebuild_the_table(tmp_path):
    write_vectors(tmp_path, "81.pkl")
    load_81(tmp_path)
    assert load_vectors(tmp_path, ["81"], {"a7": 2}, 2)["81"].values[2].tolist() == [1, 2, 3]


# ---- caches


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


@pytest.mark.parametrize("new", ['{"1": {"100": 2}}', '{"1": {"100": 22}}'])
def test_new_content_rebuilds_even_if_its_mtime_is_set_back(tmp_path, new):
    path = write_items(tmp_path, '{"1": {"100": 1}}', statistics=STATISTICS | {"100": 30})
    path = path / "item_feat_dict.json"
    old = path.stat()
    assert load_features(tmp_path, "item", 1, ["100"])["100"].values[1] == 1
    path.write_text(new)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    found = load_features(tmp_path, "item", 1, ["100"])["100"]
    assert found.values[1] == json.loads(new)["1"]["100"]


def test_the_same_content_at_another_time_keeps_the_cache_and_is_hashed_once(
    tmp_path, scans, monkeypatch
):
    write_items(tmp_path)
    load_features(tmp_path, "item", 5)
    os.utime(tmp_path / "item_feat_dict.json", ns=(1, 1))
    hashed = []
    sha256_of = features.sha256_of
    monkeypatch.setattr(features, "sha256_of", lambda p: hashed.append(p) or sha256_of(p))
    load_features(tmp_path, "item", 5)
    load_features(tmp_path, "item", 5)
    assert len(scans) == 1
    assert len(hashed) == 1


def test_changed_vectors_rebuild(tmp_path):
    write_vectors(tmp_path, "emb_81_1/part-0", {"a7": [1]})
    load_81(tmp_path)
    write_vectors(tmp_path, "emb_81_1/part-1", {"b": [2]})
    assert load_81(tmp_path).present.sum() == 2


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "remove", "extend", "header", "key", "memo"]
)
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    expected = rows(load_features(write_items(tmp_path), "item", 5)["106"])
    cache = tmp_path / ".cache"
    array = cache / "item-106.values.npy"
    raw = array.read_bytes()
    if damage == "remove":
        array.unlink()
    elif damage == "key":
        (cache / "item-106.json").write_text("[]")
    elif damage == "memo":
        (cache / "sources.json").write_text('{"item_')
    else:
        damaged = {
            "truncate": raw[:-2],
            "empty": b"",
            "extend": raw + b"x",
            "header": raw.replace(b"}", b"]"),
        }
        array.write_bytes(damaged[damage])
    assert rows(load_features(tmp_path, "item", 5)["106"]) == expected
    assert array.read_bytes() == raw


def test_a_cache_array_without_its_key_file_does_not_count(tmp_path, scans):
    load_features(write_items(tmp_path), "item", 5)
    (tmp_path / ".cache" / "item-106.json").unlink()
    load_features(tmp_path, "item", 5)
    assert scans[1:] == [["106"]]


def test_what_a_killed_builder_left_is_swept_by_the_next(tmp_path):
    cache = write_items(tmp_path) / ".cache"
    cache.mkdir()
    (cache / ".item-100.values.npy.1.tmp").touch()
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


def test_processes_that_start_together_build_once_and_agree(tmp_path):
    records = {str(i): {"100": i % 7, "106": [i % 15] * (i % 3)} for i in range(1, 3001)}
    write_items(tmp_path, records)
    program = (
        "import sys, logging; logging.basicConfig(level=logging.INFO)\n"
        "from features import load_features\n"
        "found = load_features(sys.argv[1], 'item', 3000)\n"
        "print([int(f.values.sum()) for f in found.values()])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(features.__file__).parent
    started = [
        subprocess.Popen(
            command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs, logs = zip(*(process.communicate() for process in started), strict=True)
    assert len(set(outputs)) == 1 and outputs[0].startswith("[")
    assert "".join(logs).count("reading 4 features") == 1


def test_features_with_odd_names_are_cached_inside_the_cache_folder(tmp_path):
    name = "../a/b c"
    write_items(tmp_path, {"1": {name: 2}}, {"item_sparse": [name]}, {name: 2})
    for _ in range(2):
        assert load_features(tmp_path, "item", 1)[name].values.tolist() == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".cache"]


# ---- real data


@needs_sample
def test_the_real_sample_loads(tmp_path):
    records = read_json(SAMPLE / "item_feat_dict.json")
    with open(SAMPLE / "indexer.pkl", "rb") as file:
        indexer = pickle.load(file)
    (tmp_path / "creative_emb").symlink_to(SAMPLE / "creative_emb")
    (tmp_path / "item_feat_dict.json").symlink_to(SAMPLE / "item_feat_dict.json")
    ids = sorted({i for record in records.values() for i in record} - {"111"})
    sizes = {i: len(indexer["f"][i]) for i in ids}
    write(tmp_path, feature_types={"item_sparse": ids}, feat_statistics=sizes)
    num_items = len(indexer["i"])
    found = load_features(tmp_path, "item", num_items)
    assert len(found) == 13
    for i in ids:
        expected = np.zeros(num_items + 1, np.int32)
        for key, record in records.items():
            expected[int(key)] = record.get(i, 0)
        assert np.array_equal(found[i].values, expected)
    vectors = load_vectors(tmp_path, ["81"], indexer["i"], num_items)["81"]
    assert vectors.size == 32
    assert vectors.present.sum() == 479
    lines = (SAMPLE / "creative_emb" / "emb_81_32" / "part-00000").read_text().splitlines()
    last = json.loads(lines[-1])
    row = indexer["i"][last["anonymous_cid"]]
    assert vectors.values[row].tolist() == np.float32(last["emb"]).tolist()
