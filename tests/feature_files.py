"""Feature files as the tests of their readers write them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np

from files.features import Feature, load_features
from files.item_vectors import load_vectors

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
