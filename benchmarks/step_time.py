"""Time of a training step on MovieLens-1M beside two peers, and beside the floor of its products.

    python scripts/prepare_movielens.py ../shared/data/ml-1m data/ml-1m
    python benchmarks/step_time.py --data_dir data/ml-1m --peers_python PEERS/bin/python

peers.py says what to install for the peers; without --peers_python they are left out. All
take turns of five steps, of which the first does not count (its caches are cold), so that a slow
minute of the machine meets all alike. Two threads.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import PEERS, Peer  # noqa: E402
from reproduce import IDS_AND_TIMES, environment, write_by_cpu  # noqa: E402

import main as program  # noqa: E402
from dataset import BatchSampler  # noqa: E402
from engine.flags import get_args  # noqa: E402
from engine.setup import keep_freed_memory, make_loader, read_features  # noqa: E402
from files.data_folder import read_manifest  # noqa: E402

# As the peers, which train on a user's newest events alone.
PLAIN = f"{IDS_AND_TIMES} --no-windows --num_workers 0"
TURN, WARMUP_TURNS = 5, 2
SHAPES = {"N 200, d 50": (200, 50), "N 101, d 64": (101, 64)}  # maxlen, width; two blocks
LOSSES = {
    "InfoNCE, 1,024 shared": "--negatives uniform --num_negatives 1024",
    "InfoNCE, all items": "--negatives all",
    "InfoNCE, 1,024 shared, bf16": "--negatives uniform --num_negatives 1024 --precision bf16",
}


class Ours:
    """This package's step, over the batches of one epoch made in advance."""

    def __init__(self, data_dir: str, maxlen: int, width: int, flags: str, folder: str):
        widths = f"--hidden_units {width} --attention_dim {width} --linear_dim {width}"
        folders = f"--data_dir {data_dir} --output_dir {folder}/o --log_dir {folder}/l"
        args = get_args(
            f"{folders} --device cpu {PLAIN} --maxlen {maxlen} {widths} {flags}".split()
        )
        manifest = read_manifest(data_dir)
        features = read_features(args, manifest)
        train_set = program.open_datasets(args, manifest, {})["train"]
        self.run = program.prepare_run(args, manifest, features, train_set)
        self.run.model.train()
        sampler = BatchSampler(len(train_set), args.batch_size, args.seed, is_shuffled=True)
        loader = make_loader(train_set, sampler, self.run.device, 0)
        self.batches = list(loader)[: len(sampler) - 1]  # without the last one, which is smaller
        self.count = 0

    def step(self) -> float:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        start = time.perf_counter()
        self.run.updater.step([batch], epoch=1, step=1)
        return (time.perf_counter() - start) * 1e3

    def useful_flop(self) -> dict[str, float]:
        """Of a step's matrix products, mean over the batches; nothing of gaps or the future."""
        config = self.run.model.config
        D, H, dqk, dv = (
            config.hidden_units, config.num_heads, config.attention_dim, config.linear_dim
        )  # fmt: skip
        total: collections.Counter[str] = collections.Counter()
        for batch in self.batches:
            lengths = batch.offsets.diff()
            T, cells = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
            index = batch.negative_index
            M = len(batch.distinct_ids) if index is None else len(index)
            # Twice as much on the way back: one product for each operand.
            scale = 3 * 2 / len(self.batches)
            # U, V, Q, K and the output.
            total["linear"] += scale * config.num_blocks * T * D * H * (3 * dv + 2 * dqk)
            total["attention"] += scale * config.num_blocks * cells * H * (dqk + dv)
            total["loss"] += scale * T * M * D
        return total


def product_rates(maxlen: int, width: int) -> dict[str, float]:
    """FLOP per second of float32 products: a large one, and those of a step's own shapes."""
    pairs = {
        "large": (torch.randn(2048, 2048), torch.randn(2048, 2048)),
        "linear": (torch.randn(4096, width), torch.randn(width, 4 * width)),
        "attention": (torch.randn(32, maxlen // 2, width), torch.randn(32, width, maxlen)),
        "loss": (torch.randn(2048, width), torch.randn(width, 1024)),
    }
    rates = {}
    for name, (a, b) in pairs.items():
        a @ b  # its memory is there from now on
        start = time.perf_counter()
        product = a @ b
        rates[name] = 2 * product.numel() * a.shape[-1] / (time.perf_counter() - start)
    return rates


def measure(args: argparse.Namespace, shape: str, folder: str) -> list[dict[str, object]]:
    maxlen, width = SHAPES[shape]
    ours = {
        name: Ours(args.data_dir, maxlen, width, flags, f"{folder}/{maxlen}-{number}")
        for number, (name, flags) in enumerate(LOSSES.items())
    }
    peers = {
        name: Peer(args.peers_python, name, args.data_dir, maxlen, width)
        for name in (PEERS if args.peers_python else ())
    }
    times: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    rates = []
    for _ in range(WARMUP_TURNS + args.turns):
        for name, model in (ours | peers).items():
            times[name] += [model.step() for _ in range(TURN)][1:]
        rates += [product_rates(maxlen, width) for _ in range(TURN)][1:]
    for peer in peers.values():
        peer.close()
    rates = rates[WARMUP_TURNS * (TURN - 1) :]
    rate = {name: median(turn[name] for turn in rates) for name in rates[0]}
    rows = []
    for name in times:
        row = {"shape": shape, "model": "ours" if name in ours else name}
        row["loss"] = name if name in ours else PEERS[name]
        row["ms"] = median(times[name][WARMUP_TURNS * (TURN - 1) :])
        row["fastest_ms"] = min(times[name][WARMUP_TURNS * (TURN - 1) :])
        if name in ours:
            flop = ours[name].useful_flop()
            row["floor_ms"] = sum(flop.values()) / rate["large"] * 1e3
            row["times_floor"] = row["ms"] / row["floor_ms"]
            row["own_shapes_floor_ms"] = sum(flop[kind] / rate[kind] for kind in flop) * 1e3
            row["times_own_shapes_floor"] = row["ms"] / row["own_shapes_floor_ms"]
        rows.append(row | {f"{kind}_gflop_per_s": r / 1e9 for kind, r in rate.items()})
    fastest = min((row["ms"] for row in rows if row["model"] != "ours"), default=None)
    for row in rows:
        if fastest and row["model"] == "ours":
            row["times_faster_than_fastest_peer"] = fastest / row["ms"]
    return [{k: round(v, 2) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--peers_python", help="python of the peers' environment")
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()  # as main does
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for shape in SHAPES for row in measure(args, shape, folder)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {
        "rows": rows,
        "steps": args.turns * (TURN - 1),
        "peak_rss_gb_all_ours": round(peak, 2),
    }
    result |= environment("cpu")
    write_by_cpu("step_time", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
