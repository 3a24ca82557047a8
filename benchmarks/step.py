"""A training step of this package, to be timed, and the rate of its matrix products alone."""

from __future__ import annotations

import collections
import time
from typing import Any

import record  # noqa: F401 (puts the package on the path)
import torch
from settings import IDS_AND_TIMES

from engine.flags import get_args
from engine.kernels import DTYPES
from engine.setup import make_loader
from engine.training_setup import prepare_run

# As the peers, which train on a user's newest events alone.
PLAIN = f"{IDS_AND_TIMES} --no-windows --num_workers 0"
SHAPES = {"N 200, d 50": (200, 50), "N 101, d 64": (101, 64)}  # maxlen, width; two blocks
LOSSES = {
    "InfoNCE, 1,024 shared": "--negatives uniform --num_negatives 1024",
    "InfoNCE, all items": "--negatives all",
    "InfoNCE, 1,024 shared, bf16": "--negatives uniform --num_negatives 1024 --precision bf16",
}


class Ours:
    """This package's step, over the batches of one epoch made in advance."""

    def __init__(
        self, data_dir: str, maxlen: int, width: int, flags: str, folder: str, device: str = "cpu"
    ):
        widths = f"--hidden_units {width} --attention_dim {width} --linear_dim {width}"
        folders = f"--data_dir {data_dir} --output_dir {folder}/o --log_dir {folder}/l"
        args = get_args(
            f"{folders} --device {device} {PLAIN} --maxlen {maxlen} {widths} {flags}".split()
        )
        self.run = prepare_run(args)
        self.run.model.train()
        loader = make_loader(
            self.run.datasets["train"], args.batch_size, args.seed, self.run.device, 0, True
        )
        self.batches = list(loader)[:-1]  # without the last one, which is smaller
        self.count = 0

    def step(self) -> float:
        """Milliseconds; on a GPU, until the host is done."""
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        start = time.perf_counter()
        self.run.training_step([batch], epoch=1, step=1)
        return (time.perf_counter() - start) * 1e3

    def useful_flop(self) -> dict[str, float]:
        """Of a step's matrix products, mean over the batches; nothing of padding or the future."""
        config = self.run.model.config
        total: collections.Counter[str] = collections.Counter()
        for batch in self.batches:
            lengths, index = batch.offsets.diff(), batch.negative_index
            M = len(batch.distinct_ids) if index is None else len(index)
            flop = hstu_flop(config, lengths)
            flop["loss"] = 3 * 2 * int(lengths.sum()) * M * config.hidden_units
            total.update({kind: count / len(self.batches) for kind, count in flop.items()})
        return total


def hstu_flop(config: Any, lengths: torch.Tensor) -> dict[str, float]:
    """Of the blocks' products, forward and backward pass; nothing of padding or the future."""
    T, num_pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    D, dqk, dv = config.hidden_units, config.attention_dim, config.linear_dim
    # Twice as much in the backward pass: one product for each operand.
    scale = 3 * 2 * config.num_blocks * config.num_heads
    # U, V, Q, K and the output.
    linear = scale * T * D * (3 * dv + 2 * dqk)
    return {"linear": linear, "attention": scale * num_pairs * (dqk + dv)}


def least_bytes(config: Any, num_events: float, model: torch.nn.Module, precision: str) -> float:
    """That a step cannot do without: of each block the events in and out, U, V, Q, K and gated.

    Each is once written and once read, and twice that in the backward pass; weights, their
    gradients and the optimiser's state take nine passes over float32.
    """
    H, dqk, dv = config.num_heads, config.attention_dim, config.linear_dim
    columns = 2 * config.hidden_units + H * (2 * dqk + 2 * dv) + H * dv
    by_event = 3 * 2 * config.num_blocks * columns * DTYPES[precision].itemsize
    return num_events * by_event + 9 * 4 * sum(p.numel() for p in model.parameters())


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
