"""Shared data: a tiny folder with every feature type, and batches made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import MyDataset, Negatives, Request
from files.checkpoint import load_checkpoint
from files.data_folder import read_manifest
from files.data_writer import Column, leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

NUM_ITEMS, NUM_USERS, NUM_ACTIONS, VECTOR_WIDTH = 23, 11, 3, 6


def write_tiny(
    data_dir: Path, seed: int = 0, has_vectors: bool = True, **more_item_features: Column
) -> Path:
    """11 users with 4 to 9 events over 23 items, with every kind of feature on both sides."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 10, NUM_USERS)
    events = np.empty(lengths.sum(), EVENT_DTYPE)
    events["item_id"] = rng.integers(1, NUM_ITEMS + 1, len(events))
    events["action_type"] = rng.integers(-1, NUM_ACTIONS, len(events))
    events["timestamp"] = 1_700_000_000 + rng.integers(0, 10_000, len(events)).cumsum()
    vectors = rng.normal(size=(NUM_ITEMS, VECTOR_WIDTH))
    vectors[::4] = np.nan
    write_dataset(
        data_dir,
        leave_one_out(events, np.concatenate([[0], lengths.cumsum()])),
        item_ids=[1000 + 3 * k for k in range(NUM_ITEMS)],
        user_ids=[f"user-{k}" for k in range(NUM_USERS)],
        num_action_types=NUM_ACTIONS,
        item_features={
            "100": Column("sparse", rng.integers(1, 5, NUM_ITEMS).tolist()),
            "tags": Column("array", [rng.integers(1, 7, k % 3).tolist() for k in range(NUM_ITEMS)]),
            "price": Column("continual", rng.normal(50, 20, NUM_ITEMS).tolist()),
            **more_item_features,
        },
        user_features={
            "103": Column("sparse", rng.integers(1, 4, NUM_USERS).tolist()),
            "106": Column("array", [rng.integers(1, 6, 2).tolist() for _ in range(NUM_USERS)]),
            "age": Column("continual", rng.normal(40, 9, NUM_USERS).tolist()),
        },
        item_vectors={"81": vectors} if has_vectors else None,
        item_names=[f"item {k}" for k in range(1, NUM_ITEMS + 1)],
    )
    return data_dir


def write_candidates(folder: Path, data: Path, item_ids: list[int], originals: list[int]) -> None:
    """Candidates with the features of items 1, 2, ... and without vectors of their own."""
    folder.mkdir()
    columns = {
        "retrieval_ids": np.arange(len(item_ids), dtype="<u8"),
        "item_ids": np.array(item_ids, "<i4"),
        "original_ids": np.array(originals, "<u8"),
    }
    for name, column in columns.items():
        column.tofile(folder / f"{name}.bin")
    for name in ("feature_types", "feat_statistics", "feature_default_value", "item_feat_dict"):
        shutil.copy(data / f"{name}.json", folder)
    records = json.loads((data / "item_feat_dict.json").read_text())
    kept = {row: records[row] for row in map(str, range(1, len(item_ids) + 1))}
    (folder / "item_feat_dict.json").write_text(json.dumps(kept))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny`, for tests that only read it."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "data")


def open_dataset(
    data_dir: Path,
    split: str,
    maxlen: int = 101,
    negatives: str = "all",
    num_negatives: int = 0,
    *,
    target_counts: np.ndarray | None = None,
    has_logq: bool = False,
    only_trained: bool = False,
    request_time: int | None = None,
    request_action: int = -1,
    **options,
) -> MyDataset:
    num_items = read_manifest(data_dir).num_items
    of = Negatives(num_items, negatives, num_negatives, target_counts, has_logq, only_trained)
    request = Request(request_time, request_action)
    return MyDataset(data_dir, split, maxlen, of, request=request, **options)


def count_items(data_dir: Path, split: str = "train") -> np.ndarray:
    return open_dataset(data_dir, split).sequences.count_items()


def are_equal(one: object, other: object) -> bool:
    """Of what checkpoints hold: equal numbers, and equal tensors to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def are_equal_checkpoints(one: Path, other: Path) -> bool:
    return are_equal(load_checkpoint(one), load_checkpoint(other))
