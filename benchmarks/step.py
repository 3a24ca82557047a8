"""A training step of this package, to be timed, and the rate of its matrix products alone."""

from __future__ import annotations

import collections
import time

import torch
from settings import IDS_AND_TIMES

from engine.flags import get_args
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

    def __init__(self, data_dir: str, maxlen: int, width: int, flags: str, folder: str):
        widths = f"--hidden_units {width} --attention_dim {width} --linear_dim {width}"
        folders = f"--data_dir {data_dir} --output_dir {folder}/o --log_dir {folder}/l"
        args = get_args(
            f"{folders} --device cpu {PLAIN} --maxlen {maxlen} {widths} {flags}".split()
        )
        self.run = prepare_run(args)
        self.run.model.train()
        loader = make_loader(
            self.run.datasets["train"], args.batch_size, args.seed, self.run.device, 0, True
        )
        self.batches = list(loader)[:-1]  # without the last one, which is smaller
        self.count = 0

    def step(self) -> float:
        """Milliseconds."""
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        start = time.perf_counter()
        self.run.training_step([batch], epoch=1, step=1)
        return (time.perf_counter() - start) * 1e3

    def useful_flop(self) -> dict[str, float]:
        """Of a step's matrix products, mean over the batches; nothing of padding or the future."""
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
            # Twice as much in the backward pass: one product for each operand.
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
