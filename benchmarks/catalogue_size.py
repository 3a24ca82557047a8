"""What a training step costs as the catalogue grows: 10 thousand, 1 million, 10 million items.

    python benchmarks/catalogue_size.py

synthetic_catalogue.py says which events and negatives. Each size trains in a process of its own, so
that it has a peak memory of its own; steps are interleaved. Needs 10 GB of memory. The last line
printed is one JSON object, which is written beside those of other CPUs.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from record import environment, write_by_cpu
from synthetic_catalogue import BATCH, LENGTH, NEGATIVES, WIDTH, open_run, sizes_gb, write_data

from dataset import BatchSampler, MyDataset
from engine.state import Run

SIZES = (10_000, 1_000_000, 10_000_000)
WARM_UP, ROUNDS = 5, 40


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        count = WARM_UP + ROUNDS
        rows = measure([write_data(Path(folder) / str(size), size, count) for size in SIZES])
    result = {
        "setting": f"batch {BATCH} x {LENGTH} events, d {WIDTH}, {NEGATIVES} + in-batch negatives",
        "rows": rows,
        "step_ratio": round(max(r["step_ms"] for r in rows) / min(r["step_ms"] for r in rows), 3),
        **environment("cpu"),
    }
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>14,}" for value in row.values()))
    write_by_cpu("catalogue_size", result)


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
    run = open_run(data_dir)
    train_set = run.datasets["train"]
    draws = iter(BatchSampler(len(train_set), BATCH, 42, is_shuffled=True))
    for _ in range(WARM_UP):
        timed_step(run, train_set, next(draws))
    sizes_gb(run)  # the optimiser's state is whole from now on
    pipe.send(True)
    while pipe.recv():
        pipe.send(timed_step(run, train_set, next(draws)))
    found = sizes_gb(run)
    found["rest_gb"] = found["peak_rss_gb"] - found["state_gb"] - found["table_gb"]
    pipe.send({"items": train_set.num_items} | {k: round(v, 3) for k, v in found.items()})


def timed_step(run: Run, train_set: MyDataset, draw: object) -> tuple[float, float]:
    """Seconds of making a batch, and of a step on it."""
    started = time.perf_counter()
    batch = train_set.collate_fn(train_set.__getitems__(draw))
    made = time.perf_counter()
    run.training_step([batch], epoch=1, step=1)
    return made - started, time.perf_counter() - made


if __name__ == "__main__":
    main()
