"""The export as a stream: what it writes does not depend on how it is cut, and fails cleanly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, write_candidates
from test_model import make_model

import model as model_module
from dataset import MyDataset, load_emb
from engine.export import candidates_of, embed
from engine.setup import make_loader
from engine.top_items import Catalogue, recommend
from files.atomic_io import DataError, file_entry
from files.embeddings import publish
from files.item_vectors import load_vectors

ROOT = Path(__file__).resolve().parent.parent
SMALL_FILES = ("feature_types", "feat_statistics", "feature_default_value")
IDS = np.arange(100, 123, dtype=np.uint64)
SHAPE = (23, 10)
ORIGIN = {"item_ids": "original"}


def catalogue() -> Catalogue:
    item_ids = torch.arange(1, 24)
    return Catalogue(item_ids, None, item_ids, IDS, "original")


def publish_matrix(folder: Path, matrix: np.ndarray, size: int = 4, ids: np.ndarray = IDS) -> None:
    chunks = (matrix[start : start + size] for start in range(0, len(matrix), size))
    publish(folder, matrix.shape, chunks, {"id.u64bin": ids}, ORIGIN)


def random_matrix(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_the_stream_writes_what_the_model_says_of_every_item(tiny, tmp_path):
    model = make_model(tiny)
    publish(tmp_path, SHAPE, embed(model, catalogue()), {"id.u64bin": IDS}, ORIGIN)
    expected = model.item_embeddings(torch.arange(1, 24)).numpy()
    np.testing.assert_array_equal(load_emb(tmp_path / "embedding.fbin"), expected)
    np.testing.assert_array_equal(load_emb(tmp_path / "id.u64bin")[:, 0], IDS)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 22, 23, 24])
def test_the_size_of_the_models_chunks_changes_no_embedding(tiny, tmp_path, monkeypatch, size):
    model = make_model(tiny)
    expected = model.item_embeddings(torch.arange(1, 24))
    monkeypatch.setattr(model_module, "CHUNK_ITEMS", size)
    chunks = list(embed(model, catalogue()))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    # Products of matrices of other heights may round otherwise.
    np.testing.assert_allclose(np.concatenate(chunks), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 22, 23])
def test_how_rows_are_cut_changes_no_byte(tmp_path, size):
    matrix = random_matrix()
    publish_matrix(tmp_path / "whole", matrix, len(matrix))
    publish_matrix(tmp_path / "cut", matrix, size)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_manifest_says_size_and_hash_of_what_lies_there(tmp_path):
    publish_matrix(tmp_path, random_matrix())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["n"], manifest["d"], manifest["item_ids"]) == (*SHAPE, "original")
    assert list(manifest["files"]) == ["embedding.fbin", "id.u64bin"]
    for name, entry in manifest["files"].items():
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert entry == {"size": (tmp_path / name).stat().st_size, "sha256": digest}
        assert entry == file_entry(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_late_row_that_is_not_finite_leaves_the_export_before_and_is_named(tmp_path, value):
    publish_matrix(tmp_path, random_matrix())
    before = contents(tmp_path)
    matrix = random_matrix(1)
    matrix[21, 3] = value
    with pytest.raises(DataError, match="row 21 is not finite"):
        publish_matrix(tmp_path, matrix)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", range(4))  # two files, each made durable and then closed
def test_a_disk_that_fills_at_any_write_leaves_no_mixed_export(tmp_path, monkeypatch, call):
    """Before anything is renamed the old export stays whole; after that it has no manifest."""
    publish_matrix(tmp_path, random_matrix())
    before, calls = contents(tmp_path), []

    def fsync(_):
        calls.append(None)
        if len(calls) > call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        publish_matrix(tmp_path, random_matrix(1), ids=IDS + np.uint64(50))
    after = contents(tmp_path)
    assert not [name for name in after if name.endswith(".tmp")]
    assert after == before if call < 2 else "manifest.json" not in after


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_that_fails_during_an_export_leaves_the_old_export(tmp_path, error):
    publish_matrix(tmp_path, random_matrix())
    before = contents(tmp_path)

    def failing():
        yield random_matrix(1)[:5]
        raise error

    with pytest.raises(error):
        publish(tmp_path, SHAPE, failing(), {"id.u64bin": IDS}, ORIGIN)
    assert contents(tmp_path) == before


def test_the_old_manifest_is_gone_before_a_file_is_replaced(tmp_path, monkeypatch):
    publish_matrix(tmp_path, random_matrix())
    replace, seen = os.replace, []

    def note(source, target):
        seen.append((Path(target).name, (tmp_path / "manifest.json").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    publish_matrix(tmp_path, random_matrix(1))
    assert sorted(seen[:2]) == [("embedding.fbin", False), ("id.u64bin", False)]
    assert seen[2:] == [("manifest.json", False)]


def test_zero_rows_of_several_chunks_are_one_warning(tmp_path, caplog):
    matrix = random_matrix()
    matrix[[2, 5, 6, 20]] = 0
    matrix[7, 0] = 0
    with caplog.at_level(logging.WARNING, "hstu"):
        publish_matrix(tmp_path, matrix)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 4 vectors are zero, so that no query finds them, the first: 102, 105, 106"
    ]


def test_an_export_has_at_most_two_chunks_in_memory(tmp_path):
    made, num_alive = [], []

    def chunks():
        for row in random_matrix():
            chunk = row[None].copy()
            made.append(weakref.ref(chunk))
            num_alive.append(sum(chunk() is not None for chunk in made))
            yield chunk

    publish(tmp_path, SHAPE, chunks(), {"id.u64bin": IDS}, ORIGIN)
    assert len(made) == 23 and max(num_alive) <= 2


def test_fewer_rows_than_the_header_says_are_no_export(tmp_path):
    with pytest.raises(AssertionError, match="22 rows, but the header says 23"):
        publish(tmp_path, SHAPE, [random_matrix()[:22]], {"id.u64bin": IDS}, ORIGIN)
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------- candidates


def candidates_in(folder: Path, data: Path, model, mm_emb_device: str = "model") -> Catalogue:
    return candidates_of(folder, data, model, mm_emb_device, trust_pickle=False)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("item_ids", np.array([2, 24], "<i4"), r"ids from 2 to 24, not in 0\.\.23"),
        ("item_ids", np.array([-1, 2], "<i4"), r"ids from -1 to 2, not in 0\.\.23"),
        ("item_ids", np.array([2], "<i4"), r"of different or no length, \[2, 1, 2\]"),
        ("retrieval_ids", np.array([7, 7], "<u8"), "an id occurs twice"),
    ],
)
def test_ids_of_candidates_that_cannot_be_are_refused(tiny, tmp_path, name, ids, message):
    write_candidates(tmp_path / "new", tiny, [2, 0], [1003, 5])
    ids.tofile(tmp_path / "new" / f"{name}.bin")
    with pytest.raises(DataError, match=message):
        candidates_in(tmp_path / "new", tiny, make_model(tiny))


def test_candidates_of_another_folder_are_a_warning(tiny, tmp_path, caplog):
    model = make_model(tiny)
    write_candidates(tmp_path / "own", tiny, [2, 0], [1003, 1000])
    candidates_in(tmp_path / "own", tiny, model)
    assert "of another data folder" not in caplog.text
    write_candidates(tmp_path / "other", tiny, [2, 3], [1003, 1000])
    candidates_in(tmp_path / "other", tiny, model)
    found = "1 of 2 original ids differ, the first: candidate 2 is item 3, there 1006, here 1000"
    assert found in caplog.text


@pytest.mark.parametrize("mm_emb_device", ["model", "loader"])
@pytest.mark.parametrize("is_own", [False, True])
def test_candidates_of_one_original_id_share_its_vector(tiny, tmp_path, mm_emb_device, is_own):
    model, folder = make_model(tiny), tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0, 0, 3, 0], [1003, 5, 1003, 1006, 5])
    vectors = {1003: [1.0] * 6, 1006: [2.0] * 6}
    place = (folder if is_own else tiny) / "creative_emb"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "81.pkl").write_bytes(pickle.dumps(vectors))
    found = candidates_in(folder, tiny, model, mm_emb_device)
    values, present = found.tables.lookup("81", found.table_rows)
    assert present.tolist() == [True, False, True, True, False]
    assert values[:, 0].tolist() == [1, 0, 1, 2, 0]


@torch.no_grad()
def test_of_an_item_that_is_two_candidates_both_are_seen(tiny, tmp_path):
    write_candidates(tmp_path / "twice", tiny, [2, 7, 0, 7, 0], [1, 2, 3, 4, 5])
    model = make_model(tiny)
    found = candidates_in(tmp_path / "twice", tiny, model)
    batch = next(iter(make_loader(MyDataset(tiny, "test", 7), 3, 0, torch.device("cpu"), 0)))
    batch = batch._replace(
        seen_ids=torch.tensor([7, 5, 2, 5, 7]), seen_offsets=torch.tensor([0, 2, 4, 5])
    )
    items = torch.from_numpy(np.concatenate(list(embed(model, found))))
    (best,) = recommend(model, [batch], items, found.item_ids, 5, removes_seen=True)
    assert [set(top.tolist()) - {-1} for top in best.rows] == [{0, 2, 4}, {1, 2, 3, 4}, {0, 2, 4}]


@pytest.mark.parametrize("item_ids", [[7, 0, 3], range(NUM_ITEMS, 0, -1)])
def test_candidates_take_their_rows_of_the_datas_dense_table(tiny, tmp_path, item_ids):
    item_ids, table = list(item_ids), np.load(tiny / "creative_emb" / "emb_81_6.npy")
    write_candidates(tmp_path / "some", tiny, item_ids, [5] * len(item_ids))
    found = candidates_in(tmp_path / "some", tiny, make_model(tiny))
    values, present = found.tables.lookup("81", found.table_rows)
    np.testing.assert_array_equal(present, ~np.isnan(table[item_ids, 0]))
    np.testing.assert_array_equal(values, np.nan_to_num(table[item_ids]))


def test_candidates_of_one_original_id_keep_their_own_rows_of_a_dense_table(tiny, tmp_path):
    folder = tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0, 3], [5, 5, 5])
    table = np.arange(24).reshape(4, 6).astype(np.float32)
    (folder / "creative_emb").mkdir()
    np.save(folder / "creative_emb" / "81.npy", table)
    found = candidates_in(folder, tiny, make_model(tiny))
    np.testing.assert_array_equal(found.tables.lookup("81", found.table_rows)[0], table[1:])


def test_the_datas_vectors_stay_parsed_whatever_candidates_have(tiny, tmp_path):
    """Their tables have other rows: one must not push the other out of the cache."""
    model, folder = make_model(tiny), tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0, 3], [1003, 5, 1006])
    (tiny / "creative_emb" / "emb_81_6.npy").unlink()
    vectors = {1003: [1.0] * 6, 1006: [2.0] * 6}
    (tiny / "creative_emb" / "81.pkl").write_bytes(pickle.dumps(vectors))
    load_vectors(tiny, ["81"], {1003: 2, 1006: 3}, NUM_ITEMS)
    of_data = written(tiny)
    candidates_in(folder, tiny, model)
    of_both = written(tiny)
    assert of_data and of_data.items() < of_both.items()
    load_vectors(tiny, ["81"], {1003: 2, 1006: 3}, NUM_ITEMS)
    candidates_in(folder, tiny, model)
    assert written(tiny) == of_both


def written(data_dir: Path) -> dict[str, int]:
    """The vectors' files in the cache, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (data_dir / ".cache").glob("*-81-*")}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("100", lambda spec: spec["feat_statistics"].update({"100": 99})),
        ("tags", lambda spec: spec["feature_types"].update(item_sparse=["100", "tags"])),
        ("81", None),
    ],
)
def test_candidates_with_other_features_than_the_model_are_refused(tiny, tmp_path, name, spoil):
    folder = tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0, 3], [5, 6, 7])
    if spoil is None:
        (folder / "creative_emb").mkdir()
        np.save(folder / "creative_emb" / "81.npy", np.ones((4, 9), np.float32))
    else:
        spec = {n: json.loads((folder / f"{n}.json").read_text()) for n in SMALL_FILES}
        spoil(spec)
        if name == "tags":
            spec["feature_types"]["item_array"].remove("tags")
            records = json.loads((folder / "item_feat_dict.json").read_text())
            for record in records.values():
                record.pop("tags", None)
            (folder / "item_feat_dict.json").write_text(json.dumps(records))
            spec["feature_default_value"]["tags"] = 0
        for n, content in spec.items():
            (folder / f"{n}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"other features than the model's: {name}: "):
        candidates_in(folder, tiny, make_model(tiny))


def test_candidates_need_not_have_all_values_of_a_feature(tiny, tmp_path):
    folder = tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0, 3], [5, 6, 7])
    records = json.loads((folder / "item_feat_dict.json").read_text())
    for record in records.values():
        record["100"] = 2
    (folder / "item_feat_dict.json").write_text(json.dumps(records))
    statistics = json.loads((folder / "feat_statistics.json").read_text())
    assert statistics["100"] > 2
    (folder / "feat_statistics.json").write_text(json.dumps(statistics | {"100": 2}))
    found = candidates_in(folder, tiny, make_model(tiny))
    assert found.tables.lookup("100", found.table_rows)[0].tolist() == [2, 2, 2]


def test_a_retrieval_id_that_topk_could_not_say_is_refused(tiny, tmp_path):
    folder = tmp_path / "candidates"
    write_candidates(folder, tiny, [2, 0], [5, 6])
    np.array([1, 2**63], "<u8").tofile(folder / "retrieval_ids.bin")
    with pytest.raises(
        DataError, match=r"retrieval_ids\.bin: an id occurs twice, or is 2\^63 or more"
    ):
        candidates_in(folder, tiny, make_model(tiny))
