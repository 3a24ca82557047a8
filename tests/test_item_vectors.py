from __future__ import annotations

import json
import logging
import pickle
import sys
from collections import Counter
from pathlib import Path

import inspect_data
import numpy as np
import pytest
from feature_files import ITEM_IDS, VECTORS, load_81, write, write_vectors

from engine.setup import read_features
from files.atomic_io import DataError, read_json
from files.data_folder import read_manifest
from files.features import load_features
from files.item_vectors import find_vectors, load_vectors

SAMPLE = Path(__file__).parent.parent.parent / "shared" / "data" / "tencentgr-sample"
needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="the TencentGR sample in ../shared is not here (no licence to copy)"
)


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


def test_a_missing_part_is_a_warning_and_a_compressed_one_an_error(tmp_path, caplog):
    write_vectors(tmp_path, "emb_81_2/part-00000", {"a7": [1, 2]})
    folder = tmp_path / "creative_emb" / "emb_81_2"
    load_81(tmp_path)
    assert "is a file missing" not in caplog.text
    write_vectors(tmp_path, "emb_81_2/part-00002", {"b": [3, 4]})
    load_81(tmp_path)
    assert f"{folder}: no part-00001; is a file missing?" in caplog.text
    (folder / "part-00001.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"part-00001.gz: compressed; unpack it"):
        load_81(tmp_path)


def test_a_dense_table_is_by_row_with_nan_where_there_is_no_vector(tmp_path):
    table = np.full((6, 2), np.nan)
    table[2], table[5] = (1, 2), (0, 0)
    write_vectors(tmp_path, "emb_81_2.npy", table)
    found = load_81(tmp_path)
    assert found.values.tolist() == [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [0, 0]]
    assert found.present.tolist() == [False, False, True, False, False, True]


def test_a_dense_table_needs_no_original_ids(tmp_path):
    write_vectors(tmp_path, "emb_81_2.npy", np.ones((6, 2)))
    write_vectors(tmp_path, "82.pkl")
    alone = load_vectors(tmp_path, ["81"], {}, 5)["81"]
    (built,) = (tmp_path / ".cache").glob("emb-81-*.values.npy")
    beside = load_vectors(tmp_path, ["81", "82"], ITEM_IDS, 5)["81"]
    assert alone.values.tolist() == beside.values.tolist() == [[0, 0]] + [[1, 1]] * 5
    assert list((tmp_path / ".cache").glob("emb-81-*.values.npy")) == [built]


@pytest.mark.parametrize("is_dense", [True, False])
def test_only_vectors_by_original_id_need_an_indexer(tmp_path, is_dense):
    write_vectors(tmp_path, "81.npy", np.ones((6, 2)))
    if not is_dense:
        write_vectors(tmp_path, "82.pkl")
    np.array([3, 1, 5], "<i4").tofile(tmp_path / "train_data.bin")
    np.array([0, 3], "<i8").tofile(tmp_path / "train_offsets.bin")
    wanted = ["81"] if is_dense else ["81", "82"]
    arguments = tmp_path, read_manifest(tmp_path), ["all"], ["all"], wanted, False
    if is_dense:
        items, _ = read_features(*arguments)
        assert list(items) == ["81"]
        assert inspect_data.main([str(tmp_path), "--check", "full"]) == 0
        return
    with pytest.raises(DataError, match=r"indexer\.pkl: cannot be read"):
        read_features(*arguments)
    assert inspect_data.main([str(tmp_path)]) == 1


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
        (np.full((6, 2), np.nan), r"81\.npy: every vector in it is missing"),
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


def test_ids_with_leading_zeros_are_texts_of_their_own(tmp_path):
    write_vectors(tmp_path, "81.pkl", {"0123": [1.0, 2.0], "45": [3.0, 4.0]})
    found = load_vectors(tmp_path, ["81"], {123: 1, 45: 2, "0123x": 3}, 3)["81"]
    assert found.present.tolist() == [False, False, True, False]
