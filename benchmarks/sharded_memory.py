"""What a rank's memory is as the item table is sharded over 1, 2 and 4 ranks.

    python benchmarks/sharded_memory.py

Batches, negatives and catalogue as benchmarks/catalogue_size.py makes them; all ranks run on this
machine's CPU over gloo, so times say nothing. Needs 6 GB of memory. The last line printed is one
JSON object, which is also what is written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from catalogue_size import BATCH, LENGTH, NEGATIVES, WIDTH, every_item, write_data
from reproduce import RESULTS, environment

from dataset import BatchSampler, MyDataset
from engine.flags import get_args
from files.data_folder import read_manifest
from main import prepare_run
from ops.collectives import join, leave

NUM_ITEMS, NUM_RANKS, STEPS = 2_000_000, (1, 2, 4), 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_dir = write_data(Path(folder) / "data", NUM_ITEMS)
        rows = [measure(data_dir, num_ranks) for num_ranks in NUM_RANKS]
    result = {
        "setting": f"{NUM_ITEMS:,} items, d {WIDTH}, batch {BATCH} x {LENGTH} events in all, "
        f"{NEGATIVES} + in-batch negatives; GB of the rank that has most",
        "rows": rows,
        **environment("cpu"),
    }
    (RESULTS / "sharded_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>14,}" for value in row.values()))
    print(json.dumps(result))


def measure(data_dir: Path, num_ranks: int) -> dict[str, float]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    sizes = context.Queue()
    places = [(rank, num_ranks, port) for rank in range(num_ranks)]
    processes = [context.Process(target=train, args=(data_dir, *p, sizes)) for p in places]
    for process in processes:
        process.start()
    found = [sizes.get() for _ in processes]
    for process in processes:
        process.join()
    largest = {name: round(max(one[name] for one in found) / 1e9, 3) for name in found[0]}
    return {"ranks": num_ranks} | largest


def train(
    data_dir: Path, rank: int, num_ranks: int, port: int, sizes: multiprocessing.Queue
) -> None:
    """A rank: some steps, then its sizes in bytes."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    join(is_on_cuda=False)
    shape = [f"--batch_size={BATCH}", f"--maxlen={LENGTH}", f"--hidden_units={WIDTH}"]
    args = get_args([f"--data_dir={data_dir}", "--device=cpu", "--shard_items", *shape])
    counts = every_item(data_dir)
    train_set = MyDataset(data_dir, "train", LENGTH, "mixed", NEGATIVES, counts, args.logq)
    run = prepare_run(args, read_manifest(data_dir), ({}, {}), train_set)
    draws = iter(BatchSampler(len(train_set), BATCH, args.seed, True, rank, num_ranks))
    for step in range(1, STEPS + 1):
        batch = train_set.collate_fn(train_set.__getitems__(next(draws)))
        run.updater.step([batch], epoch=1, step=step)
    table = run.model.embedding_module.item_emb.weight
    state = run.updater.optimizer.state[table]
    for value in state.values():
        value.add_(0)  # zeros that were never written to take no memory yet
    sizes.put(
        {
            "table_gb": table.nbytes,
            "state_gb": sum(value.nbytes for value in state.values()),
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
    leave()


if __name__ == "__main__":
    main()
