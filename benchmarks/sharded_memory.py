"""What a process's memory is as the item table is sharded over 1, 2 and 4 processes.

    python benchmarks/sharded_memory.py

synthetic_catalogue.py says which events and negatives. All processes run on this machine's CPU over
gloo, so times say nothing. Needs 6 GB of memory. The last line printed is one JSON object, which is
also what is written.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import torch
from record import environment, write
from synthetic_catalogue import BATCH, LENGTH, NEGATIVES, WIDTH, open_run, sizes_gb, write_data

from dataset import BatchSampler
from ops.collectives import join, leave

NUM_ITEMS, WORLD_SIZES, STEPS = 2_000_000, (1, 2, 4), 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_dir = write_data(Path(folder) / "data", NUM_ITEMS, STEPS)
        rows = [measure(data_dir, world_size) for world_size in WORLD_SIZES]
    result = {
        "setting": f"{NUM_ITEMS:,} items, d {WIDTH}, batch {BATCH} x {LENGTH} events in all, "
        f"{NEGATIVES} + in-batch negatives; GB of the process that has most",
        "rows": rows,
        **environment("cpu"),
    }
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>14,}" for value in row.values()))
    write("sharded_memory", result)


def measure(data_dir: Path, world_size: int) -> dict[str, float]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    places = [(rank, world_size, port) for rank in range(world_size)]
    processes = [context.Process(target=train, args=(data_dir, *p, queue)) for p in places]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    largest = {name: round(max(one[name] for one in found), 3) for name in found[0]}
    return {"processes": world_size} | largest


def train(
    data_dir: Path, rank: int, world_size: int, port: int, found: multiprocessing.Queue
) -> None:
    """A process of them: some steps, then its sizes."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    join(is_on_cuda=False)
    run = open_run(data_dir, "--shard_items")
    train_set = run.datasets["train"]
    draws = iter(BatchSampler(len(train_set), BATCH, 42, True, rank, world_size))
    for step in range(1, STEPS + 1):
        batch = train_set.collate_fn(train_set.__getitems__(next(draws)))
        run.training_step([batch], epoch=1, step=step)
    found.put(sizes_gb(run))
    leave()


if __name__ == "__main__":
    main()
