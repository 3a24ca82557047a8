"""What this package does on your GPU: its tests, times, launches, memory, errors, equal bits.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --ml_1m ../shared/data/ml-1m

Meant to take ten minutes, with nothing but the package installed (and pytest, for the tests).
--ml_1m, a folder with MovieLens-1M as it was published, adds two whole trainings. The attention is
that of --kernels auto. Writes benchmarks/results/gpu_CARD.json: please send it.

The limit of a step is the larger of two times: that of its products, at the rate of one large
product, and that of `step.least_bytes`, at the rate of a copy. In fp32, Triton's kernels compute
on tensor cores, as the large product does not: their share of that limit may exceed 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from device_time import device_rates, measure
from record import RESULTS, ROOT, environment, write
from reproduce import prepare, train
from step import LOSSES, Ours, hstu_flop, least_bytes
from synthetic_catalogue import KNOWN_ITEMS, write_sequences
from torch import nn

from engine.kernels import choose_kernels, largest_error, why_not_triton
from engine.training_step import autocast
from files.atomic_io import DataError
from model import find_kernels
from simplified_hstu import HSTU

LOSS = LOSSES["InfoNCE, 1,024 shared"]
PRECISIONS = ("fp32", "bf16")
Case = tuple[int, int, str]  # a training step of 128 users: maxlen, width, more flags
TRAININGS = {
    "N 200, d 50, 2 blocks": (200, 50, ""),
    "N 200, d 50, 2 blocks, bf16": (200, 50, "--precision bf16"),
    "N 200, d 50, 2 blocks, --compile": (200, 50, "--compile"),
    "N 101, d 64, 2 blocks": (101, 64, ""),
    "N 200, d 50, 8 blocks": (200, 50, "--num_blocks 8"),
}


class Shape(NamedTuple):
    """Blocks over full histories, without items and loss; fields as in HSTUConfig."""

    users: int
    num_blocks: int
    maxlen: int
    hidden_units: int  # 1: the attention alone, with a projection that costs next to nothing
    num_heads: int
    attention_dim: int
    linear_dim: int
    position_bias: bool = True
    time_bias: str = "request"


SHAPES = {
    "N 1,024, d 512, 8 heads, 8 blocks": Shape(64, 8, 1024, 512, 8, 64, 64),
    "N 8,192, d 64, 2 blocks": Shape(8, 2, 8192, 64, 1, 64, 64),
    # As NVIDIA publishes for its HSTU kernels.
    "attention, N 256": Shape(128, 1, 256, 1, 4, 64, 64),
    "attention, N 256, no biases": Shape(128, 1, 256, 1, 4, 64, 64, False, "off"),
    "attention, N 1,024": Shape(128, 1, 1024, 1, 4, 64, 64),
    "attention, N 1,024, no biases": Shape(128, 1, 1024, 1, 4, 64, 64, False, "off"),
}


class Work(NamedTuple):
    """A step, and what it does at least."""

    step: Callable[[], object]
    flop: float
    num_bytes: float
    num_events: float
    kernels: str
    check: Callable[[], dict[str, object]]  # of what it computes


def run_gpu_tests() -> dict[str, object]:
    if importlib.util.find_spec("pytest") is None:
        return {"not run": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "says": done.stdout.splitlines()[-1:], "failed": failed}


def report(
    name: str, precision: str, make: Callable[[torch.device], Work], rates: Mapping[str, float],
    device: torch.device,
) -> dict[str, object]:  # fmt: skip
    """A row of results: what `measure` says, and how far from the limit that is."""
    row: dict[str, object] = {"name": name, "precision": precision}
    try:
        work = make(device)
        row |= {"kernels": work.kernels} | measure(work.step, device) | work.check()
    except Exception as error:  # memory, a compiler, a driver: the other rows are still worth it
        row["failed"] = f"{type(error).__name__}: {error}"
    else:
        limits = {"products": work.flop / rates[precision], "bytes": work.num_bytes / rates["copy"]}
        row |= {f"limit_ms_of_{kind}": limit * 1e3 for kind, limit in limits.items()}
        row["share_of_limit"] = max(limits.values()) * 1e3 / row["ms"]
        row["tokens_per_s"] = work.num_events / row["ms"] * 1e3
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    print(row, flush=True)
    return row


def training(data_dir: Path, case: Case, device: torch.device) -> Work:
    """A whole training step."""
    maxlen, width, flags = case
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(str(data_dir), maxlen, width, f"{LOSS} {flags}", folder, str(device))
    model, precision = ours.run.model, ours.run.training_step.options.precision
    num_events = sum(len(batch.item_index) for batch in ours.batches) / len(ours.batches)
    num_bytes = least_bytes(model.config, num_events, model, precision)
    flop = sum(ours.useful_flop().values())
    check = partial(equal_bits, data_dir, case, device)
    return Work(ours.step, flop, num_bytes, num_events, ours.run.kernels, check)


def blocks(shape: Shape, precision: str, device: torch.device) -> Work:
    """Forward and backward pass."""
    kernels = choose_kernels("auto", device, shape, precision)
    torch.manual_seed(1)
    sizes = shape._asdict()
    users, has_position_bias = sizes.pop("users"), sizes.pop("position_bias")
    options = {"dropout_rate": 0.0, "attention": find_kernels(kernels).attention}
    hstu = HSTU(**sizes, has_position_bias=has_position_bias, **options).to(device)
    if shape.hidden_units == 1:
        hstu.blocks[0].layer_norm = nn.Identity()  # of one number would be 0
        hstu.blocks[0].merge = lambda x, gated: gated
    offsets = torch.arange(users + 1) * shape.maxlen
    times = torch.arange(int(offsets[-1]), device=device) * 60
    x = torch.randn(len(times), shape.hidden_units, device=device, requires_grad=True)

    def step() -> None:
        with autocast(device, precision):
            y = hstu(x, offsets, times, times + 60)
        torch.autograd.grad(y, [x, *hstu.parameters()], torch.ones_like(y), allow_unused=True)

    flop = sum(hstu_flop(shape, offsets.diff()).values())
    num_bytes = least_bytes(shape, len(x), hstu, precision)
    error = partial(largest_error, options["attention"], device, shape, precision)
    return Work(step, flop, num_bytes, len(x), kernels, lambda: {"error_from_float64": error()})


def equal_bits(data_dir: Path, case: Case, device: torch.device) -> dict[str, object]:
    """Whether two trainings of eight steps end with the same weights."""
    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            ours = Ours(str(data_dir), *case[:2], f"{LOSS} {case[2]}", folder, str(device))
        for _ in range(8):
            ours.step()
        found.append(list(ours.run.model.parameters()))
    return {"equal_bits": all(torch.equal(*pair) for pair in zip(*found, strict=True))}


def measure_all(
    data_dir: Path, trainings: Mapping[str, Case], shapes: Mapping[str, Shape],
    rates: Mapping[str, float], device: torch.device,
) -> list[dict[str, object]]:  # fmt: skip
    rows = []
    for name, case in trainings.items():
        precision = "bf16" if "bf16" in case[2] else "fp32"
        rows.append(report(name, precision, partial(training, data_dir, case), rates, device))
    for name, shape in shapes.items():
        for precision in PRECISIONS:
            rows.append(report(name, precision, partial(blocks, shape, precision), rates, device))
    return rows


def movielens(source: str, work_dir: Path, device: torch.device) -> list[dict[str, object]]:
    """Whole trainings, beside what three seeds gave on a CPU."""
    rows = []
    for name in ("ml-1m-small", "ml-1m-large"):
        recorded = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}_seed?.json"))]
        goal = min(result["valid"]["NDCG@10"] for result in recorded)
        try:
            found = train(name, source, work_dir, 1, str(device))
        except subprocess.CalledProcessError as error:
            rows.append({"name": name, "failed": f"exit code {error.returncode}"})
            continue
        row = {"name": name, "minutes": found["curve"][-1]["seconds"] / 60}
        row["minutes_to_recorded"] = minutes_to(goal, found["curve"])
        row |= {split: found[split]["NDCG@10"] for split in ("valid", "test")}
        row |= {f"recorded_{s}": [r[s]["NDCG@10"] for r in recorded] for s in ("valid", "test")}
        rows.append(row)
    return rows


def minutes_to(goal: float, curve: list[dict[str, float]]) -> float | None:
    """Until validation first had this NDCG@10."""
    return next((row["seconds"] / 60 for row in curve if row["NDCG@10"] >= goal), None)


def write_like_movielens(data_dir: Path) -> Path:
    """Sequences about as long as its: half of them up to 96 events, 165 in the mean."""
    lengths = np.random.default_rng(1).lognormal(np.log(96), 1.04, 1600)
    return write_sequences(data_dir, KNOWN_ITEMS, lengths.clip(20, 2314).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ml_1m", metavar="DIR", help="folder for scripts/prepare_movielens.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; see torch.version.cuda and nvidia-smi")
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    result = environment(card) | {
        "capability": torch.cuda.get_device_capability(device),
        "gpu_tests": run_gpu_tests(),
    }
    name = "gpu_" + re.sub(r"\W+", "-", card).lower()
    try:
        result["why_not_triton"] = why_not_triton(device, SHAPES["N 8,192, d 64, 2 blocks"], "fp32")
    except DataError as error:  # CUDA does not work any more in this process
        write(name, result | {"why_not_triton": str(error)})
        return
    print(result["why_not_triton"], result["gpu_tests"], flush=True)
    result["rates"] = rates = device_rates(device)
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        if args.ml_1m:
            data_dir = prepare("ml-1m", args.ml_1m, work_dir)
        else:
            data_dir = write_like_movielens(work_dir)
        result["rows"] = measure_all(data_dir, TRAININGS, SHAPES, rates, device)
        if args.ml_1m:
            result["movielens"] = movielens(args.ml_1m, work_dir, device)
    write(name, result)


if __name__ == "__main__":
    main()
