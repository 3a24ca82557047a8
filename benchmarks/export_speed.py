"""Exporting a catalogue: items per second, memory, and the durable write beside a plain one.

    python benchmarks/export_speed.py

Publishes 5 M items that have ids only, and 500,000 with 13 sparse features and one 1024-wide vector
in a memory map (5 M would need 20 GB), width 64, each in a process of its own. Then writes the
bytes of 5 M vectors as an export does, but unhashed, and with `tofile` (whole, and in parts) and
`fsync`, interleaved. Weights are random. Needs 4 GB of disk and 4 GB of memory. The last line
printed is one JSON object, which is written beside those of other CPUs.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from record import environment, write_by_cpu

from engine.export import Catalogue, embed
from files.atomic_io import atomic_write
from files.embeddings import emb_pieces, load_emb, publish
from files.features import Feature
from hstu_components import encoder_arguments
from model import CHUNK_ITEMS, HSTUConfig, HSTUModel

ID_ITEMS, FEATURE_ITEMS, WIDTH, VECTOR = 5_000_000, 500_000, 64, 1024
VOCABULARIES = np.geomspace(1_000, 500_000, 13).astype(int)
BATCH, TOP_K, ROUNDS = 128, 10, 6
MISSING = 0.1  # share of the items without a vector


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {"ids_only": in_a_process(ids_only, folder)}
        result["features"] = in_a_process(with_features, folder)
        result["write"] = in_a_process(write_figures, folder)
    result |= environment("cpu")
    for title, figures in result.items():
        for name, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
            print(f"{title:10} {name:32} {value}")
    write_by_cpu("export_speed", result)


def in_a_process(work: Callable, *args: object) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


# ------------------------------------------------------------------------------------- whole export


def ids_only(folder: Path) -> dict[str, float]:
    return export_figures(folder, make_model(ID_ITEMS, {}))


def with_features(folder: Path) -> dict[str, float]:
    generator, shape = np.random.default_rng(1), (FEATURE_ITEMS + 1, VECTOR)
    values = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
    for start in range(0, len(values), CHUNK_ITEMS):
        part = values[start : start + CHUNK_ITEMS]
        part[:] = generator.random(part.shape, np.float32)
    values.flush()
    del values
    present = generator.random(FEATURE_ITEMS + 1) >= MISSING
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    features = {"82": Feature("emb", VECTOR, vectors, None, present)}
    for number, size in enumerate(VOCABULARIES.tolist(), 100):
        codes = generator.integers(1, size + 1, FEATURE_ITEMS + 1, np.int32)
        features[str(number)] = Feature("sparse", size, codes)
    return export_figures(folder, make_model(FEATURE_ITEMS, features))


def make_model(num_items: int, features: dict[str, Feature]) -> HSTUModel:
    config = HSTUConfig(
        num_items=num_items,
        num_action_types=0,
        num_target_action_types=0,
        item_features={name: encoder_arguments(feature) for name, feature in features.items()},
        user_features={},
        maxlen=50,
        hidden_units=WIDTH,
        num_blocks=1,
        num_heads=1,
        attention_dim=16,
        linear_dim=16,
        dropout_rate=0.0,
        time_bias="off",
        position_bias=False,
        infonce_temp=0.05,
    )
    torch.manual_seed(2)
    return HSTUModel(config, features, {}, on_host=[i for i in features if i == "82"]).eval()


@torch.no_grad()
def export_figures(folder: Path, model: HSTUModel) -> dict[str, float]:
    """Seconds and memory of embedding, of publishing, and of ranking a batch on what it wrote."""
    n = model.config.num_items
    item_ids = torch.arange(1, n + 1)
    ids = np.arange(1, n + 1, dtype=np.uint64)
    catalogue = Catalogue(item_ids, None, item_ids, ids, "re-id")
    export, shape = folder / "item_embeddings", (n, WIDTH)
    arrays, origin = {"id.u64bin": ids}, {"item_ids": "re-id"}
    embed_seconds, publish_seconds, peaks = [], [], []
    for _ in range(3):
        rows = embed(model, catalogue)
        seconds, peak = measured(lambda r: publish(export, shape, r, arrays, origin), rows)
        publish_seconds.append(seconds)
        peaks.append(peak)
        embed_seconds.append(timed(lambda: [None for _ in embed(model, catalogue)]))
    queries = torch.nn.functional.normalize(torch.randn(BATCH, WIDTH))
    items = torch.from_numpy(load_emb(export / "embedding.fbin"))
    rank_seconds, rank_peak = measured(lambda: model.kernels.top_k(queries, items, TOP_K))
    return {
        "items": n,
        "embed_items_per_s": round(n / median(embed_seconds)),
        "publish_items_per_s": round(n / median(publish_seconds)),
        "publish_seconds": round(median(publish_seconds), 2),
        "publish_peak_mb": max(peaks),
        "rank_128_queries_seconds": round(rank_seconds, 2),
        "rank_peak_mb": rank_peak,
        "matrix_mb": round(n * WIDTH * 4 / 1e6),
    }


def measured(work: Callable, *args: object) -> tuple[float, int]:
    """Seconds of the call, and the MB by which anonymous memory exceeded its start at the peak.

    Pages of files are not counted: the system takes them back when it needs them.
    """
    peak = start = anonymous_kb()
    is_done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_done.wait(0.005):
            peak = max(peak, anonymous_kb())

    sampler = threading.Thread(target=sample)
    sampler.start()
    seconds = timed(work, *args)
    is_done.set()
    sampler.join()
    return seconds, round((peak - start) / 1e3)


def anonymous_kb(process: int | str = "self") -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def timed(work: Callable, *args: object) -> float:
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


# -------------------------------------------------------------------------------------------- write


def write_figures(folder: Path) -> dict[str, float]:
    matrix = np.random.default_rng(3).random((ID_ITEMS, WIDTH), np.float32)
    works = [write_durably, write_whole, write_parts]
    seconds, hashing = {work.__name__: [] for work in works}, []
    path = folder / "written.fbin"
    for turn in range(ROUNDS):
        for work in works[turn % 3 :] + works[: turn % 3]:
            path.unlink(missing_ok=True)
            os.sync()  # or the one pays for what the other left
            hashing.append(timed(hash_pieces, path, matrix))
            seconds[work.__name__].append(timed(work, path, matrix))
    durable, *plain = (np.array(values) for values in seconds.values())
    return {
        "bytes": matrix.nbytes,
        "durable_seconds": round(median(durable), 3),
        "tofile_seconds": round(median(plain[0]), 3),
        "tofile_in_parts_seconds": round(median(plain[1]), 3),
        "durable_to_tofile": round(median(durable / plain[0]), 2),
        "durable_to_tofile_in_parts": round(median(durable / plain[1]), 2),
        "hashing_seconds": round(median(hashing), 3),
    }


def pieces(path: Path, matrix: np.ndarray) -> Iterator[bytes | memoryview]:
    starts = range(0, len(matrix), CHUNK_ITEMS)
    return emb_pieces(path, matrix.shape, (matrix[s : s + CHUNK_ITEMS] for s in starts))


def write_durably(path: Path, matrix: np.ndarray) -> None:
    """As an export does, without the hash: rows checked, a temporary, a rename, two fsyncs."""
    with atomic_write(path) as file:
        file.writelines(pieces(path, matrix))


def write_whole(path: Path, matrix: np.ndarray) -> None:
    write_plainly(path, [matrix])


def write_parts(path: Path, matrix: np.ndarray) -> None:
    """The stricter measure: one `tofile` of all takes four times as long here as one per MB."""
    write_plainly(path, (matrix[s : s + CHUNK_ITEMS] for s in range(0, len(matrix), CHUNK_ITEMS)))


def write_plainly(path: Path, arrays: Iterable[np.ndarray]) -> None:
    with open(path, "wb") as file:
        for array in arrays:
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def hash_pieces(path: Path, matrix: np.ndarray) -> None:
    digest = hashlib.sha256()
    for piece in pieces(path, matrix):
        digest.update(piece)


if __name__ == "__main__":
    main()
