"""What the numbers of a data folder stand for: ids, values of features, action types."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from files.atomic_io import DataError, atomic_write
from files.data_folder import Manifest, check_re_ids, read_indexer
from files.safe_pickle import load_pickle


class Vocabulary(NamedTuple):
    """Lists in the order of the numbers that stand for their elements."""

    item_ids: list[Any]  # of re-id 1, 2, ...; where there is no indexer.pkl, the re-ids
    feature_values: dict[str, list[Any]]  # feature id -> raw values of 1, 2, ..., where known
    action_names: list[str] | None  # of action type 0, 1, ...; None: not known


def read_vocabulary(data_dir: str | Path, manifest: Manifest, *, trust: bool = False) -> Vocabulary:
    """The vocabulary of a data folder; `trust` as of load_pickle.

    Raises:
        DataError: the indexer.pkl is not one to one onto the re-ids.
    """
    path = Path(data_dir) / "indexer.pkl"
    if not path.exists():
        return Vocabulary(list(range(1, manifest.num_items + 1)), {}, manifest.action_names)
    indexer = read_indexer(data_dir, trust=trust)
    check_re_ids(path, "i", indexer["i"], manifest.num_items)
    values = {str(i): numbers for i, numbers in indexer.get("f", {}).items() if is_dense(numbers)}
    values = {i: in_order(numbers) for i, numbers in values.items()}
    return Vocabulary(in_order(indexer["i"]), values, manifest.action_names)


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Write a vocabulary.pkl: {"i": item ids, "f": {feature id: raw values}, "actions": names}."""
    item_ids, feature_values, action_names = vocabulary
    with atomic_write(path) as file:
        content = {"i": item_ids, "f": feature_values, "actions": action_names}
        pickle.dump(content, file, protocol=4)


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a vocabulary.pkl.

    Raises:
        DataError: the file is damaged, or another one.
    """
    content = load_pickle(path)
    if not isinstance(content, dict) or content.keys() != {"i", "f", "actions"}:
        raise DataError(f"{path}: no vocabulary of a training; name the folder of a training")
    return Vocabulary(content["i"], content["f"], content["actions"])


def is_dense(numbers: Mapping[Any, int]) -> bool:
    """Whether each of 1, 2, ... is the number of one value; in TencentGR's files it need not be."""
    return sorted(numbers.values()) == list(range(1, len(numbers) + 1))


def in_order(numbers: Mapping[Any, int]) -> list[Any]:
    return sorted(numbers, key=numbers.__getitem__)
