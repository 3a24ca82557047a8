"""What a person sees of a run: TensorBoard curves, progress bar, log lines."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from engine.state import Progress
from ops.collectives import is_main_process, world_size

log = logging.getLogger("hstu")

# The charts of TensorBoard's "custom scalars" page. A name stands for all tags that begin with it.
LAYOUT = {
    "Learning": {
        "loss": ["Multiline", ["Loss/train", "Loss/valid"]],
        "ranking": ["Multiline", ["Metrics/HR@10", "Metrics/NDCG@10", "Metrics/MRR"]],
        "learning rate": ["Multiline", ["Train/lr"]],
        "gradient norm": ["Multiline", ["Train/grad_norm"]],
    },
    "Speed": {
        "users per second": ["Multiline", ["Train/users_per_s"]],
        "events per second": ["Multiline", ["Train/tokens_per_s"]],
        "wait for data, ms": ["Multiline", ["Train/data_wait_ms"]],
    },
}
# What runs are compared by on the HPARAMS page.
RESULTS = ("Metrics/HR@10", "Metrics/NDCG@10", "Loss/valid")
COSINE_BINS = torch.linspace(-1, 1, 81).tolist()


class RunLog:
    """The log of one run, by the main process; the x axis of every curve is the training step.

    Where the log folder is full, read-only or gone, the log ends with one warning, and training
    goes on. `log_dir`: TensorBoard's folder; what a killed run logged from `first_step` on is
    dropped. `first_step`: the first one that this process takes, from 1. `total_steps`,
    `num_epochs`: of the whole run. `log_every`: steps between two entries.
    """

    def __init__(
        self, log_dir: str, first_step: int, total_steps: int, num_epochs: int, log_every: int
    ):
        self.log_dir, self.first_step, self.total_steps = log_dir, first_step, total_steps
        self.num_epochs, self.log_every = num_epochs, log_every
        self._writer: SummaryWriter | None = None
        self._began = time.perf_counter()
        self.start_interval()

    def __enter__(self) -> RunLog:
        self._excepthook, threading.excepthook = threading.excepthook, self._hide_from_stderr
        if is_main_process():
            if self.first_step == 1 and any(Path(self.log_dir).glob("events.out.*")):
                found = "holds curves from before, which TensorBoard will hide"
                log.warning("%s: %s; give each run its own --log_dir", self.log_dir, found)
            with self._end_on_failure():
                self._writer = SummaryWriter(self.log_dir, purge_step=self.first_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._record(_add_summaries, hparams({}, {})[2:])
        self._record(SummaryWriter.close)
        threading.excepthook = self._excepthook

    def start(self, flags: Mapping[str, Any], settings: Collection[str]) -> None:
        """The page of charts, and the flags as a table; `settings` are those to compare runs by."""
        texts = {name: str(v).encode(errors="replace").decode() for name, v in flags.items()}
        rows = [f"| {name} | {text} |" for name, text in sorted(texts.items())]
        # A bool would be shown as 1.0000.
        numbers = {name: v for name, v in flags.items() if type(v) in (int, float)}
        values = {name: (texts | numbers)[name] for name in sorted(settings)}
        self._record(SummaryWriter.add_custom_scalars, LAYOUT)
        table = "\n".join(["| flag | value |", "|---|---|", *rows])
        self._record(SummaryWriter.add_text, "flags", table)
        # Not add_hparams: it would make a run of its own, in a folder within this one.
        self._record(_add_summaries, hparams(values, dict.fromkeys(RESULTS))[:2])

    def step(
        self, epoch: int, step: int, batches: Sequence[Any], values: Mapping[str, Any], bar: tqdm
    ) -> None:
        """Count a step; every `log_every` steps write `values` (tag -> number) and the rates."""
        self._steps += 1
        # Processes have equal numbers of users, or one less.
        self._users += world_size() * sum(len(batch.user_ids) for batch in batches)
        self._events += sum(int(batch.num_targets) for batch in batches)
        if step % self.log_every:
            return
        values = {tag: float(value) for tag, value in values.items()}  # waits for a GPU
        seconds = time.perf_counter() - self._started
        rates = {
            "Train/users_per_s": self._users / seconds,
            "Train/tokens_per_s": self._events / seconds,
            "Train/data_wait_ms": 1000 * self.wait_seconds / self._steps,
        }
        if torch.cuda.is_available():
            rates["Train/gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._add_scalars(values | rates, step)
        users, wait = rates["Train/users_per_s"], rates["Train/data_wait_ms"]
        text = f"loss {values['Loss/train']:.4f}, {self._time_left(step)}, {users:.0f} users/s"
        text += f", data wait {wait:.1f} ms"
        bar.set_postfix_str(text, refresh=False)
        if bar.disable:
            log.info("epoch %d step %d/%d: %s", epoch, step, self.total_steps, text)
        self.start_interval()

    def epoch(
        self, progress: Progress, train_loss: float, metrics: Mapping[str, float], seconds: float
    ) -> None:
        """The curves and the line of the epoch that has ended; no `metrics`: no validation."""
        values = {f"Metrics/{name}": value for name, value in metrics.items() if name != "loss"}
        text = "no validation"
        if metrics:
            values["Loss/valid"] = metrics["loss"]
            best = ", best so far" * (progress.best_epoch == progress.epoch)
            text = f"valid loss {metrics['loss']:.4f}, {summary(metrics)}{best}"
        self._add_scalars(values | {"Loss/train_epoch": train_loss}, progress.step)
        self.flush()
        name = f"epoch {progress.epoch}/{self.num_epochs}"
        log.info("%s: train loss %.4f, %s, %.1f s", name, train_loss, text, seconds)

    def similarities(self, step: int, target_cosines: Tensor, other_cosines: Tensor) -> None:
        """Histograms of the cosines of queries with their targets and with other items, (S,)."""
        for tag, values in (("pos_sim", target_cosines), ("neg_sim", other_cosines)):
            arguments = f"InfoNCE/{tag}", values.clamp(-1, 1), step, COSINE_BINS
            self._record(SummaryWriter.add_histogram, *arguments)

    def items(self, step: int, embeddings: Tensor, labels: Mapping[str, Sequence[Any]]) -> None:
        """Item embeddings (n, D) for TensorBoard's projector; `labels`: column -> n values."""
        columns = ([" ".join(str(cell).split()) for cell in cells] for cells in labels.values())
        rows = list(map(list, zip(*columns, strict=True)))
        arguments = embeddings, rows, None, step, "items", list(labels)
        self._record(SummaryWriter.add_embedding, *arguments)

    def flush(self) -> None:
        """Write everything so far; to be called before a state that goes on from here."""
        self._record(SummaryWriter.flush)

    def _add_scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._record(SummaryWriter.add_scalar, tag, value, step)

    def _record(self, write: Callable[..., Any], *arguments: Any) -> None:
        if self._writer is not None:
            with self._end_on_failure():
                write(self._writer, *arguments)

    @contextmanager
    def _end_on_failure(self) -> Iterator[None]:
        """End the log where its folder fails; what TensorBoard's thread meets is raised here."""
        try:
            yield
        except (OSError, UnicodeEncodeError) as error:  # the latter: TensorBoard wants a text
            path = getattr(error, "filename", None) or self.log_dir
            reason = getattr(error, "strerror", None) or error
            log.warning("%s: %s; training goes on, but no more is logged there", path, reason)
            self._writer = None

    def _hide_from_stderr(self, failure: threading.ExceptHookArgs) -> None:
        """`_end_on_failure` says what ended TensorBoard's thread; other threads say it as ever."""
        module = type(failure.thread).__module__
        if not (module.startswith("tensorboard.") and isinstance(failure.exc_value, OSError)):
            self._excepthook(failure)

    def _time_left(self, step: int) -> str:
        """Until the last epoch's end, at the pace since this process began, with validations."""
        pace = (time.perf_counter() - self._began) / (step + 1 - self.first_step)
        return f"{duration(pace * (self.total_steps - step))} left"

    def start_interval(self) -> None:
        """Measure rates from now on."""
        self._users = self._events = self._steps = 0
        self.wait_seconds = 0.0  # for the loader; the training loop adds to it
        self._started = time.perf_counter()


def _add_summaries(writer: SummaryWriter, summaries: Iterable[Any]) -> None:
    for each in summaries:
        writer.file_writer.add_summary(each)


def summary(metrics: Mapping[str, float]) -> str:
    return f"HR@10 {metrics['HR@10']:.4f}, NDCG@10 {metrics['NDCG@10']:.4f}"


def progress_bar(batches: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """One that leaves no trace; off with TQDM_DISABLE, without a terminal, in other processes."""
    is_off = bool(os.environ.get("TQDM_DISABLE")) or not is_main_process() or None
    options |= {"leave": False, "dynamic_ncols": True, "smoothing": 0.1, "disable": is_off}
    return tqdm(batches, unit="batch", **options)


def duration(seconds: float) -> str:
    """As 45 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
