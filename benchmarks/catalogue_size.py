"""What a training step costs as the catalogue grows: 10 thousand, 1 million, 10 million items.

    python benchmarks/catalogue_size.py

The same events, 10,000 items of them spread over the ids of each catalogue, with mixed negatives:
1,024 uniform ones and those of the batch. Each size trains in a process of its own, so that it has
a peak memory of its own; steps are interleaved. Needs 10 GB of memory. The last line printed is one
JSON object, which is written beside those of other CPUs.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from reproduce import environment, write_by_cpu

from dataset import BatchSampler, MyDataset, count_items
from engine.flags import get_args
from files.atomic_io import write_json
from files.data_folder import EVENT_DTYPE, FORMAT_VERSION, read_manifest
from main import Run, prepare_run

SIZES = (10_000, 1_000_000, 10_000_000)
KNOWN_ITEMS, LENGTH, BATCH, WIDTH, NEGATIVES = 10_000, 101, 128, 64, 1024
WARM_UP, ROUNDS = 5, 40


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = measure([write_data(Path(folder) / str(size), size) for size in SIZES])
    result = {
        "setting": f"batch {BATCH} x {LENGTH} events, d {WIDTH}, {NEGATIVES} + in-batch negatives",
        "rows": rows,
        "step_ratio": round(max(r["step_ms"] for r in rows) / min(r["step_ms"] for r in rows), 3),
        **environment("cpu"),
    }
    write_by_cpu("catalogue_size", result)
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>14,}" for value in row.values()))
    print(json.dumps(result))


def write_data(data_dir: Path, num_items: int) -> Path:
    """Sequences for all steps; popularity as it is: a few items make most events."""
    generator = np.random.default_rng(1)
    count = BATCH * (WARM_UP + ROUNDS)
    events = np.zeros((count, LENGTH + 1), EVENT_DTYPE)
    ranks = generator.zipf(1.2, 4 * events.size)
    ranks = ranks[ranks <= KNOWN_ITEMS][: events.size].reshape(events.shape)
    events["item_id"] = ranks * (num_items // KNOWN_ITEMS)
    events["timestamp"] = 1_700_000_000 + generator.integers(1, 90_000, events.shape).cumsum(1)
    data_dir.mkdir()
    events.tofile(data_dir / "train_data.bin")
    (np.arange(count + 1) * (LENGTH + 1)).tofile(data_dir / "train_offsets.bin")
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_items": num_items,
        "num_users": count,
        "num_action_types": 1,
        "targets": {"train": "next"},
        "files": {p.name: {"size": p.stat().st_size, "sha256": ""} for p in data_dir.glob("*.bin")},
    }
    write_json(data_dir / "manifest.json", manifest)
    return data_dir


def measure(folders: list[Path]) -> list[dict[str, float]]:
    """A row per folder."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for folder in folders:
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(context.Process(target=serve, args=(folder, theirs)))
        processes[-1].start()
        theirs.close()
        ours.recv()  # one after the other, or they would warm up together
    times = [[] for _ in pipes]
    for _ in range(ROUNDS):
        for pipe, column in zip(pipes, times, strict=True):
            pipe.send(True)
            column.append(pipe.recv())
    rows = []
    for pipe, process, column in zip(pipes, processes, times, strict=True):
        pipe.send(False)
        batch_ms, step_ms = (round(1e3 * median(part), 1) for part in zip(*column, strict=True))
        rows.append(pipe.recv() | {"batch_ms": batch_ms, "step_ms": step_ms})
        process.join()
    return rows


def serve(data_dir: Path, pipe: Connection) -> None:
    """One step for each True; sizes in GB for a False."""
    manifest = read_manifest(data_dir)
    shape = [f"--batch_size={BATCH}", f"--maxlen={LENGTH}", f"--hidden_units={WIDTH}"]
    args = get_args([f"--data_dir={data_dir}", "--device=cpu", *shape])
    train_set = MyDataset(
        data_dir, "train", LENGTH, "mixed", NEGATIVES, every_item(data_dir), args.logq
    )
    run = prepare_run(args, manifest, ({}, {}), train_set)
    draws = iter(BatchSampler(len(train_set), BATCH, args.seed, is_shuffled=True))
    for _ in range(WARM_UP):
        timed_step(run, train_set, next(draws))
    table = run.model.embedding_module.item_emb.weight
    state = run.updater.optimizer.state[table]
    for value in state.values():
        value.add_(0)  # zeros that were never written to take no memory yet
    pipe.send(True)
    while pipe.recv():
        pipe.send(timed_step(run, train_set, next(draws)))
    state_gb = sum(value.nbytes for value in state.values()) / 1e9
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sizes = {"table_gb": table.nbytes / 1e9, "state_gb": state_gb, "peak_rss_gb": peak_gb}
    sizes["rest_gb"] = peak_gb - state_gb - sizes["table_gb"]
    pipe.send({"items": manifest.num_items} | {k: round(v, 3) for k, v in sizes.items()})


def every_item(data_dir: Path) -> np.ndarray:
    """Counts with which every item of the catalogue can be a negative."""
    counts = count_items(data_dir, "train", read_manifest(data_dir).num_items)
    counts[1:] += 1
    return counts


def timed_step(run: Run, train_set: MyDataset, draw: object) -> tuple[float, float]:
    """Seconds of making a batch, and of a step on it."""
    started = time.perf_counter()
    batch = train_set.collate_fn(train_set.__getitems__(draw))
    made = time.perf_counter()
    run.updater.step([batch], epoch=1, step=1)
    return made - started, time.perf_counter() - made


if __name__ == "__main__":
    main()
