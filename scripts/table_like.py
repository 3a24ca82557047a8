"""An earlier data folder whose numbers of ids, action types and feature values a new one keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic_io import DataError, read_json
from files.data_folder import Manifest, digest_of_ids, read_indexer, read_manifest
from files.features import Feature, load_features
from files.vocabulary import Vocabulary, in_order, read_vocabulary

TRANSFORMATIONS = ("x", "log(1 + x)")  # of numbers


class Known(NamedTuple):
    """What the numbers of an earlier feature stand for."""

    role: str  # "sparse" | "array" | "continual"
    values: list[Any]  # sparse, array: the raw values of 1, 2, ...; continual: the transformation
    missing: float = 0.0  # continual: what stands for a missing number, transformed


class Earlier(NamedTuple):
    """What an earlier folder knows; nothing, where none is named."""

    folder: Path | None
    ids: dict[str, list[Any]]  # "user", "item" -> original ids of re-id 1, 2, ...
    action_names: list[str]  # of type 0, 1, ...
    features: dict[str, dict[str, Known]]  # "item", "user" -> feature id -> Known


NOTHING = Earlier(None, {"user": [], "item": []}, [], {"item": {}, "user": {}})


def read_earlier(folder: Path | None) -> Earlier:
    """The numbers of an earlier folder.

    Raises:
        DataError: the folder does not say what its numbers stand for.
    """
    if folder is None:
        return NOTHING
    manifest = read_manifest(folder)
    if not (folder / "indexer.pkl").exists():
        raise refusal(folder, "it has no indexer.pkl with the original ids")
    if manifest.num_action_types and manifest.action_names is None:
        raise refusal(folder, "the names of its action types are not recorded")
    vocabulary = read_vocabulary(folder, manifest)
    ids = {"item": vocabulary.item_ids, "user": in_order(read_indexer(folder)["u"])}
    for side, known in ids.items():
        if len(set(map(str, known))) < len(known):
            raise refusal(folder, f"two ids of its {side}s are the same as text")
    counts = {"item": manifest.num_items, "user": manifest.num_users}
    features = {
        side: {
            i: known_feature(folder, manifest, vocabulary, i, feature)
            for i, feature in load_features(folder, side, counts[side]).items()
        }
        for side in counts
    }
    return Earlier(folder, ids, manifest.action_names or [], features)


def refusal(folder: Path, found: str) -> DataError:
    return DataError(f"{folder}: {found}, which --like needs; convert its log again")


def known_feature(
    folder: Path, manifest: Manifest, vocabulary: Vocabulary, feature_id: str, feature: Feature
) -> Known:
    if feature.kind == "continual":
        digest = (manifest.feature_digests or {}).get(feature_id)
        for transformation in TRANSFORMATIONS:
            if digest_of_ids([transformation]) == digest:
                path = folder / "feature_default_value.json"
                missing = read_json(path).get(feature_id, 0) if path.exists() else 0
                if type(missing) is int:  # not recorded, as in older folders: the median
                    missing = float(np.median(feature.values[1:]))
                return Known("continual", [transformation], missing)
    elif feature_id in vocabulary.feature_values:
        return Known(feature.kind, vocabulary.feature_values[feature_id])
    raise refusal(folder, f"what the numbers of feature {feature_id} stand for is not recorded")


def show_new(earlier: Earlier, side: str, total: int, num_absent: int) -> None:
    """A line that counts what is new in the log, and what of the earlier folder is not in it."""
    known = len(earlier.ids[side])
    if earlier.folder is not None:
        print(
            f"{side}s: {total - known:,} new, {known - num_absent:,} known from {earlier.folder}, "
            f"{num_absent:,} that only {earlier.folder} has"
        )
