"""Where a training step's time goes: each named part's own milliseconds, parts within it left out.

    python benchmarks/step_profile.py --data_dir data/ml-1m

MovieLens-1M, N 200, d 50, two blocks, 1,024 shared negatives and all items; two threads. Writes
benchmarks/results/step_profile.json; results/profile.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from record import environment, write_by_cpu
from step import LOSSES, Ours

from engine import training_step
from engine.setup import keep_freed_memory
from engine.state import Run
from ops import attention, infonce


class Clock:
    """Own time of nested parts."""

    def __init__(self):
        self.seconds: collections.Counter = collections.Counter()
        self.stack: list[float] = []

    @contextlib.contextmanager
    def part(self, name: str):
        self.stack.append(0.0)
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] += spent - self.stack.pop()
        if self.stack:
            self.stack[-1] += spent

    def watch(self, owner: object, attribute: str, name: str) -> None:
        """Let `owner.attribute` count as part `name` whenever it is called."""
        timed = self.timed(getattr(owner, attribute), name)
        is_static = isinstance(vars(owner).get(attribute), staticmethod)
        setattr(owner, attribute, staticmethod(timed) if is_static else timed)

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped


def watch_code(clock: Clock) -> None:
    function = attention._GatedAttention
    clock.watch(function, "forward", "attention forward pass: projection, SiLU, norm, gate")
    clock.watch(function, "backward", "attention backward pass: projection, SiLU, norm, gate")
    clock.watch(attention, "_weights", "attention: scores with biases, SiLU")
    clock.watch(attention, "_attention_grads", "attention backward pass: products, SiLU")
    clock.watch(attention, "_add_bias_grads", "attention backward pass: sums for the biases")
    clock.watch(infonce._InfoNCE, "forward", "loss with its gradients")
    clock.watch(torch.Tensor, "backward", "backward pass of all other parts")
    clock.watch(training_step, "clip_gradients", "clip")


def watch_run(clock: Clock, run: Run) -> None:
    model = run.model
    prepare = clock.timed(model.hstu.attention.prepare, "attention: groups and time buckets")
    model.hstu.attention = model.hstu.attention._replace(prepare=prepare)
    clock.watch(model, "_rows", "item tower")
    clock.watch(model.input_preprocessor, "forward", "input: positions, dropout")
    clock.watch(model.output_postprocessor, "forward", "normalise queries and items")
    for block in model.hstu.blocks:
        clock.watch(block, "merge", "blocks: dropout, output, residual")
        clock.watch(block.layer_norm, "forward", "blocks: layer norm")
    clock.watch(run.training_step.optimizer, "step", "optimiser")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()  # as main does
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            name: Ours(args.data_dir, 200, 50, LOSSES[name], folder) for name in list(LOSSES)[:2]
        }
    unwatched = {name: [] for name in cases}
    for _ in range(args.steps):
        for name, ours in cases.items():
            unwatched[name].append(ours.step())
    clock = Clock()
    watch_code(clock)
    for name, ours in cases.items():
        watch_run(clock, ours.run)
        clock.seconds.clear()
        step = sum(ours.step() for _ in range(args.steps)) / args.steps
        parts = {part: s * 1e3 / args.steps for part, s in clock.seconds.most_common()}
        result[name] = {
            "ms": round(median(unwatched[name][5:]), 1),
            "watched_mean_ms": round(step, 1),
            "named_share": round(sum(parts.values()) / step, 3),
            "parts_ms": {part: round(ms, 2) for part, ms in parts.items()},
        }
        print(f"{name}: {result[name]['ms']} ms, watched {step:.1f} ms")
        for part, ms in parts.items():
            print(f"  {ms:7.2f} ms  {ms / step:6.1%}  {part}")
    result |= environment("cpu")
    write_by_cpu("step_profile", result)


if __name__ == "__main__":
    main()
