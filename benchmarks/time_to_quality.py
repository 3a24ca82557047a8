"""Quality by seconds of training on MovieLens-1M, beside two peers: same data, shape, evaluator.

    python scripts/prepare_movielens.py ../shared/data/ml-1m data/ml-1m
    python benchmarks/time_to_quality.py --data_dir data/ml-1m --peers_python PEERS/bin/python

Seconds count loading and training; evaluation is left out for all. Peers keep the learning rate
that their examples have and train for --peer_seconds. Two threads. With --picture alone it draws
what was measured before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peers import PEERS, Peer
from record import RESULTS, environment, write
from settings import IDS_AND_TIMES, SMALL

from engine.evaluation import evaluate
from engine.flags import get_args
from engine.setup import keep_freed_memory, make_loader
from engine.training_setup import eval_loader, prepare_run

FLAGS = (
    f"{IDS_AND_TIMES} {SMALL} --no-windows --infonce_temp 0.05 --lr 0.003 --batch_size 16 "
    "--num_epochs 10 --num_workers 1 --device cpu"
)


def train_ours(data_dir: str, folder: str) -> tuple[list[dict], dict[str, float]]:
    """The curve, and the last epoch's test metrics."""
    folders = f"--data_dir {data_dir} --output_dir {folder}/o --log_dir {folder}/l"
    args = get_args(f"{folders} {FLAGS} --seed 1".split())
    run = prepare_run(args)
    run.model.train()
    loader = make_loader(
        run.datasets["train"], args.batch_size, args.seed, run.device, args.num_workers, True
    )
    valid_loader = eval_loader(args, run, "valid")
    curve, seconds, step = [], 0.0, 0
    for epoch in range(args.num_epochs):
        loader.batch_sampler.epoch, start = epoch, time.perf_counter()
        for batch in loader:
            step += 1
            run.training_step([batch], epoch + 1, step)
        seconds += time.perf_counter() - start
        found = evaluate(run.model, valid_loader).metrics()
        curve.append(point("ours", seconds, found["HR@10"], found["NDCG@10"]))
    found = evaluate(run.model, eval_loader(args, run, "test")).metrics()
    return curve, {name: round(found[name], 4) for name in ("HR@10", "NDCG@10")}


def train_peer(
    name: str, data_dir: str, python: str, most: float
) -> tuple[list[dict], dict[str, float]]:
    """As train_ours, for so many seconds."""
    peer = Peer(python, name, data_dir, 200, 50)
    curve, seconds = [], 0.0
    while seconds < most:
        seconds += peer.ask("epoch")[0]
        curve.append(point(name, seconds, *peer.ask("valid")))
    hit_rate, gain = peer.ask("test")
    peer.close()
    return curve, {"HR@10": round(hit_rate, 4), "NDCG@10": round(gain, 4)}


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(2)
    keep_freed_memory()  # as main does
    with tempfile.TemporaryDirectory() as folder:
        found = {"ours": train_ours(args.data_dir, folder)}
    for name in PEERS if args.peers_python else ():
        found[name] = train_peer(name, args.data_dir, args.peers_python, args.peer_seconds)
    result = {"flags": FLAGS, "peers": PEERS}
    result |= {name: {"valid": curve, "test": test} for name, (curve, test) in found.items()}
    write("time_to_quality", result | environment("cpu"))


def draw(result: dict, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("ours", *PEERS):
        curve = result[name]["valid"]
        axes.plot([p["seconds"] for p in curve], [p["NDCG@10"] for p in curve], "o-", label=name)
    axes.set(xlabel="seconds of training, 2 CPU cores", ylabel="validation NDCG@10")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def point(name: str, seconds: float, hit_rate: float, gain: float) -> dict[str, float]:
    print(f"{name} {seconds:.0f} s valid HR@10 {hit_rate:.4f} NDCG@10 {gain:.4f}", flush=True)
    return {"seconds": round(seconds, 1), "HR@10": round(hit_rate, 4), "NDCG@10": round(gain, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="MovieLens-1M, converted")
    parser.add_argument("--peers_python", help="python of the peers' environment")
    parser.add_argument("--peer_seconds", type=float, default=240)
    parser.add_argument("--picture", type=Path, help="PNG to draw; needs matplotlib")
    args = parser.parse_args()
    if args.data_dir:
        measure(args)
    if args.picture:
        draw(json.loads((RESULTS / "time_to_quality.json").read_text()), args.picture)


if __name__ == "__main__":
    main()
