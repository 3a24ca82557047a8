"""What a person sees of a training: TensorBoard curves, the progress bar, the log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

log = logging.getLogger("hstu")

# TensorBoard's "custom scalars" page: what belongs together in one chart.
LAYOUT = {
    "Learning": {
        "loss": ["Multiline", ["Loss/train_epoch", "Loss/valid"]],
        "ranking": ["Multiline", ["Metrics/HR@10", "Metrics/NDCG@10", "Metrics/MRR"]],
        "learning rate": ["Multiline", ["Train/lr"]],
        "gradient norm": ["Multiline", ["Train/grad_norm"]],
    },
    "Speed": {
        "events per second": ["Multiline", ["Train/tokens_per_s"]],
        "wait for data, ms": ["Multiline", ["Train/data_wait_ms"]],
    },
}


class RunLog:
    """The log of one run; the x axis of every curve is the optimiser step.

    Args:
        log_dir: TensorBoard's folder; what a killed run logged from `first_step` on is dropped.
        first_step: the first step that this process takes, from 1.
        total_steps, num_epochs: of the whole run.
        log_every: steps between two entries.
    """

    def __init__(
        self, log_dir: str, first_step: int, total_steps: int, num_epochs: int, log_every: int
    ):
        self.total_steps, self.num_epochs, self.log_every = total_steps, num_epochs, log_every
        self.writer = SummaryWriter(log_dir, purge_step=first_step)
        self._start_interval()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def start(self, flags: Mapping[str, Any]) -> None:
        """The resolved flags as a table, and the page of charts."""
        self.writer.add_custom_scalars(LAYOUT)
        rows = [f"| {name} | {value} |" for name, value in sorted(flags.items())]
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))

    def watch(
        self, groups: Iterable[Sequence[Any]], epoch: int, first_batch: int, num_batches: int
    ) -> Iterator[Sequence[Any]]:
        """The epoch's groups of batches, with a progress bar, and the wait for each measured."""
        self._start_interval()
        groups = iter(groups)
        with tqdm(
            desc=f"epoch {epoch}/{self.num_epochs}",
            total=num_batches,
            initial=first_batch,
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None,  # off where there is no terminal: log lines serve there
        ) as self._bar:
            while True:
                asked = time.perf_counter()
                group = next(groups, None)
                if group is None:
                    return
                self._wait += time.perf_counter() - asked
                yield group
                self._bar.update(len(group))

    def step(
        self, epoch: int, step: int, batches: Sequence[Any], values: Mapping[str, Any]
    ) -> None:
        """Count a step; every `log_every` steps write `values` (tag -> number) and the rates."""
        self._steps += 1
        self._users += sum(len(batch.user_ids) for batch in batches)
        self._events += sum(len(batch.item_index) for batch in batches)
        if step % self.log_every:
            return
        values = {tag: float(value) for tag, value in values.items()}  # waits for a GPU
        seconds = time.perf_counter() - self._started
        rates = {
            "Train/users_per_s": self._users / seconds,
            "Train/tokens_per_s": self._events / seconds,
            "Train/data_wait_ms": 1000 * self._wait / self._steps,
        }
        if torch.cuda.is_available():
            rates["Train/gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._write(values | rates, step)
        text = (
            f"loss {values['Loss/train']:.4f}, {rates['Train/users_per_s']:.0f} users/s, "
            f"data wait {rates['Train/data_wait_ms']:.1f} ms"
        )
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:
            log.info("epoch %d step %d/%d: %s", epoch, step, self.total_steps, text)
        self._start_interval()

    def epoch(
        self,
        epoch: int,
        step: int,
        train_loss: float,
        metrics: Mapping[str, float],
        is_best: bool,
        seconds: float,
    ) -> None:
        """The epoch's curves and its one line; `metrics` is empty without validation."""
        values = {f"Metrics/{name}": value for name, value in metrics.items() if name != "loss"}
        if metrics:
            values["Loss/valid"] = metrics["loss"]
        self._write(values | {"Loss/train_epoch": train_loss}, step)
        self.writer.flush()
        valid = (
            f"valid loss {metrics['loss']:.4f}, {summary(metrics)}" if metrics else "no validation"
        )
        best = ", best so far" if metrics and is_best else ""
        log.info(
            "epoch %d/%d: train loss %.4f, %s%s, %.1f s",
            epoch, self.num_epochs, train_loss, valid, best, seconds,
        )  # fmt: skip

    def flush(self) -> None:
        """What was logged so far is in the file, and survives a kill."""
        self.writer.flush()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def _start_interval(self) -> None:
        self._users = self._events = self._steps = 0
        self._wait = 0.0
        self._started = time.perf_counter()


def summary(metrics: Mapping[str, float]) -> str:
    return f"HR@10 {metrics['HR@10']:.4f}, NDCG@10 {metrics['NDCG@10']:.4f}"
