"""Features at the real size: building and reopening the caches, and the loader's events per second.

    python benchmarks/feature_speed.py

Makes 5 M items with 13 sparse features (0.8 GB of JSON), builds the caches in a process of its own
and opens them in another. Then batches of 128 users over 100,000 items with all 13 features and one
1024-wide vector, beside a plain dictionary loop over the same events, interleaved. Needs 4 GB of
disk. The last line printed is one JSON object, which is also what is written.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from record import environment, write

from dataset import BatchSampler, MyDataset, Negatives
from files.atomic_io import write_json
from files.data_writer import write_dataset
from files.features import Feature, load_features
from files.sequences import EVENT_DTYPE, Sequences
from hstu_components import FeatureTables

IDS = ["100", "101", "102", "112", "114", "115", "116", "117", "118", "119", "120", "121", "122"]
CARDINALITY, WIDTH = 5000, 1024
BUILD_ITEMS, LOADER_ITEMS, NUM_USERS, LENGTH = 5_000_000, 100_000, 10_000, 90
BATCH, ROUNDS = 128, 30


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = build_figures(Path(folder)) | loader_figures(Path(folder) / "data")
    result |= environment("cpu")
    for name, value in result.items():
        print(f"{name:40} {value}")
    write("feature_speed", result)


# ------------------------------------------------------------------------------------------- caches


def build_figures(folder: Path) -> dict[str, float]:
    write_json(folder / "feature_types.json", {"item_sparse": IDS})
    write_json(folder / "feat_statistics.json", dict.fromkeys(IDS, CARDINALITY))
    generator = np.random.default_rng(1)
    with open(folder / "item_feat_dict.json", "w") as file:
        for start in range(0, BUILD_ITEMS, 100_000):
            values = generator.integers(1, CARDINALITY + 1, (100_000, len(IDS))).tolist()
            for item, row in enumerate(values, start + 1):
                pairs = ", ".join(f'"{i}": {v}' for i, v in zip(IDS, row, strict=True))
                file.write(f'{"{" if item == 1 else ", "}"{item}": {{{pairs}}}')
        file.write("}")
    build, reopen = (in_a_process(open_features, folder) for _ in range(2))
    return {
        "json_gb": round((folder / "item_feat_dict.json").stat().st_size / 1e9, 2),
        "build_seconds": build[0],
        "build_peak_rss_gb": build[1],
        "reopen_seconds": reopen[0],
    }


def open_features(folder: Path) -> None:
    load_features(folder, "item", BUILD_ITEMS)


def in_a_process(work: Callable, *args: object) -> tuple[float, float]:
    """Seconds of the call, and its process's peak memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, *args))


def _measured(work: Callable, *args: object) -> tuple[float, float]:
    started = time.perf_counter()
    work(*args)
    seconds = round(time.perf_counter() - started, 3)
    return seconds, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


# ------------------------------------------------------------------------------------------- loader


def loader_figures(data_dir: Path) -> dict[str, float]:
    """Median events per second of a batch, ready for the model, in one process and one thread."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(2)
    dataset, tables = make_dataset(data_dir, generator)
    rows = {name: tables[name].values.tolist() for name in IDS}
    items = {item: {name: rows[name][item] for name in IDS} for item in range(1, LOADER_ITEMS + 1)}
    vectors = dataset.host_vectors["82"].values
    features, draws = FeatureTables(tables), list(BatchSampler(NUM_USERS, BATCH, 0, True))[:ROUNDS]
    ours, plain = [], []
    for draw in draws:
        events, seconds = timed(lambda d: our_batch(dataset, features, d), draw)
        ours.append(events / seconds)
        events, seconds = timed(lambda d: plain_batch(dataset, items, vectors, d), draw)
        plain.append(events / seconds)
    return {
        "loader_events_per_s": round(median(ours)),
        "dictionary_events_per_s": round(median(plain)),
        "loader_to_dictionary": round(median(o / p for o, p in zip(ours, plain, strict=True)), 1),
    }


def make_dataset(data_dir: Path, generator: np.random.Generator) -> tuple[MyDataset, dict]:
    events = np.zeros(NUM_USERS * LENGTH, EVENT_DTYPE)
    # Popularity as it is: a few items make most events.
    ranks = generator.zipf(1.2, 4 * len(events))
    events["item_id"] = ranks[ranks <= LOADER_ITEMS][: len(events)]
    offsets = np.arange(NUM_USERS + 1) * LENGTH
    users = np.arange(1, NUM_USERS + 1, dtype=np.int32)
    write_dataset(
        data_dir,
        {"train": Sequences(events, offsets, users)},
        item_ids=range(LOADER_ITEMS),
        user_ids=range(NUM_USERS),
        num_action_types=1,
    )
    shape = (LOADER_ITEMS + 1, WIDTH)
    values = np.lib.format.open_memmap(data_dir / "82.npy", "w+", np.float32, shape)
    values[:] = generator.random(shape, np.float32)
    vectors = Feature("emb", WIDTH, values, None, np.ones(len(values), bool))
    codes = generator.integers(1, CARDINALITY + 1, (len(IDS), LOADER_ITEMS + 1), np.int32)
    tables = {i: Feature("sparse", CARDINALITY, row) for i, row in zip(IDS, codes, strict=True)}
    negatives = Negatives(LOADER_ITEMS, "batch")
    return MyDataset(data_dir, "train", 101, negatives, host_vectors={"82": vectors}), tables


def timed(work: Callable, draw: object) -> tuple[int, float]:
    started = time.perf_counter()
    return work(draw), time.perf_counter() - started


def our_batch(dataset: MyDataset, features: FeatureTables, draw: object) -> int:
    batch = dataset.collate_fn(dataset.__getitems__(draw))
    for name in IDS:
        features.lookup(name, batch.distinct_ids)
    return len(batch.item_index)


def plain_batch(dataset: MyDataset, items: dict, vectors: np.ndarray, draw: object) -> int:
    """As baselines do it: a dictionary per event, then an array per feature."""
    events = dataset.__getitems__(draw).sequences.events["item_id"].tolist()
    records = [items[item] for item in events]
    for name in IDS:
        torch.from_numpy(np.array([record[name] for record in records]))
    torch.from_numpy(np.stack([vectors[item] for item in events]))
    return len(events)


if __name__ == "__main__":
    main()
