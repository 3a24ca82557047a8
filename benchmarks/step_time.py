"""Time of a training step on MovieLens-1M beside two peers, and beside the floor of its products.

    python scripts/prepare_movielens.py ../shared/data/ml-1m data/ml-1m
    python benchmarks/step_time.py --data_dir data/ml-1m --peers_python PEERS/bin/python

peers.py says what to install for the peers; without --peers_python they are left out. All
take turns of five steps, of which the first does not count (its caches are cold), so that a slow
minute of the machine meets all alike. Two threads.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from statistics import median

import torch
from peers import PEERS, Peer
from record import environment, write_by_cpu
from step import LOSSES, SHAPES, Ours, product_rates

from engine.setup import keep_freed_memory

TURN, WARMUP_TURNS = 5, 2


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


if __name__ == "__main__":
    main()
