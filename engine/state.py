"""A run: its parts, what is saved of it, and how it goes on from there."""

from __future__ import annotations

import filecmp
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dataset import MyDataset
from engine.training_step import TrainingStep
from files import checkpoint
from files.atomic_io import DataError, atomic_write
from model import HSTUModel
from ops.collectives import all_gather_ints, barrier, is_main_process

log = logging.getLogger("hstu")

# Of resume_*.pt; states of other formats hold other random numbers, batches or optimiser states.
STATE_FORMAT = 6


@dataclass
class Progress:
    """Where a run stands; a part of every saved state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # loader batches used of the epoch under way
    step: int = 0  # training steps
    loss_sum: float = 0.0  # over the steps of the epoch under way
    loss_steps: int = 0
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    is_finished: bool = False

    def end_epoch(
        self, metrics: Mapping[str, float], criterion: str, num_epochs: int, patience: int
    ) -> None:
        """Count an epoch: whether it is the best, and whether it is the last."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.loss_steps = 0.0, 0
        best = self.best_metrics
        if not metrics or not best:  # without validation the newest epoch is the best
            is_best = True
        elif criterion == "loss":
            is_best = metrics["loss"] < best["loss"]
        else:
            is_best = metrics["NDCG@10"] > best["NDCG@10"]
        if is_best:
            self.best_epoch, self.best_metrics = self.epoch, dict(metrics)
        is_out_of_patience = 0 < patience <= self.epoch - self.best_epoch
        self.is_finished = self.epoch >= num_epochs or is_out_of_patience


@dataclass
class Run:
    """The parts of a training."""

    model: HSTUModel
    training_step: TrainingStep
    datasets: dict[str, MyDataset]  # by split
    item_counts: torch.Tensor  # (X + 1,) int64, events of each item in training
    batch_size: int  # sequences in a training batch
    output_dir: Path
    binding: dict[str, Any]  # flags and data that a resumed run must share
    kernels: str  # of model.find_kernels
    progress: Progress = field(default_factory=Progress)

    @property
    def device(self) -> torch.device:
        return self.training_step.device


def resume(run: Run, source: str, overwrite: bool, flags: Collection[str]) -> None:
    """Put a saved state of its output folder into a run at its start.

    `source`: "auto", the newest state; "none"; or the path of a state. `overwrite`: with "none",
    whether the checkpoints in the folder may be removed. `flags`: names in `binding` that are
    flags, for messages.

    Raises:
        DataError: the state belongs to other flags, other data or another folder, or the folder
            holds a run that would be overwritten.
    """
    folder = run.output_dir
    pattern = r"model_epoch_\d+\.pt|model_best\.pt|resume_\d+\.pt"
    models = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    if source == "none":
        if models and not overwrite:
            what_to_do = "use --resume auto, an empty --output_dir, or --overwrite"
            raise DataError(f"{folder}: holds checkpoints; {what_to_do}")
        for path in models if is_main_process() else ():
            path.unlink()
        return
    if source == "auto":
        path, state = folder, checkpoint.load_newest_state(folder)
    else:
        path, state = Path(source), checkpoint.load_checkpoint(source)
        if path.resolve().parent != folder.resolve():
            what_to_do = "copy it there, with model_best.pt, and use --resume auto"
            raise DataError(f"{path}: not in --output_dir {folder}; {what_to_do}")
    if state is not None:
        restore(run, state, path, flags)
    elif models:
        found = f"{folder}: holds {models[0].name}, but no resume_*.pt to go on from"
        raise DataError(f"{found}; use another --output_dir, or --resume none --overwrite")
    steps = {step for (step,) in all_gather_ints([run.progress.step])}
    if len(steps) > 1:
        found = f"processes find states of steps {sorted(steps)}"
        raise DataError(f"{folder}: {found}; it has to be one folder that all of them see")
    # A kill may have come between an epoch's state and its models.
    if run.progress.epoch and not run.progress.batch:
        newest = folder / f"model_epoch_{run.progress.epoch}.pt"
        save_models(run, with_newest=not newest.exists())


def restore(run: Run, state: Mapping[str, Any], path: Path, flags: Collection[str]) -> None:
    if "progress" not in state:
        raise DataError(f"{path}: holds weights only; resume from a resume_*.pt file")
    then, now = state["binding"], run.binding
    if then.keys() != now.keys() or then["state format"] != now["state format"]:
        found = "of another version of this package"
        raise DataError(f"{path}: {found}; finish it with that one, or use another --output_dir")
    if changed := checkpoint.differences(then, now):
        names = [line.partition(":")[0] for line in changed]
        of_flags = [f"--{line}" for name, line in zip(names, changed, strict=True) if name in flags]
        # What is no flag differs because of the flags that do, or because of the data.
        found = f"with other settings: {'; '.join(of_flags or changed)}"
        if not of_flags and "data files" in names:
            found = "on other data"
        what_to_do = "Use the same, or another --output_dir and --log_dir"
        raise DataError(f"{path}: was trained {found}. {what_to_do}")
    if (before := state.get("kernels", run.kernels)) != run.kernels:
        log.info(
            "%s was computed with the %s kernels, and this run with %s: last bits will differ",
            path, before, run.kernels,
        )  # fmt: skip
    checkpoint.load_weights(run.model, state["weights"], path)
    run.training_step.load_state_dict(state)
    checkpoint.set_random_states(state["random"])
    run.progress = Progress(**state["progress"])
    if not run.progress.is_finished:
        log.info("resuming at epoch %d, step %d", run.progress.epoch + 1, run.progress.step)


def save_epoch(run: Run) -> None:
    """Write the state to resume from, then the epoch's models, which can be made from it."""
    save_run(run)
    save_models(run)


def save_models(run: Run, with_newest: bool = True) -> None:
    """Write model_epoch_X.pt of the epoch that has ended; make model_best.pt that of the best."""
    progress, folder = run.progress, run.output_dir
    newest, best = folder / f"model_epoch_{progress.epoch}.pt", folder / "model_best.pt"
    weights = run.model.state_dict()  # of all processes
    if is_main_process():
        if with_newest:
            weights = {name: tensor.cpu() for name, tensor in weights.items()}
            content = {"config": asdict(run.model.config), "weights": weights}
            content["kernels"] = run.kernels
            checkpoint.save_checkpoint(newest, content)
        source = folder / f"model_epoch_{progress.best_epoch}.pt"
        is_best = best.exists() and source.exists() and filecmp.cmp(source, best, shallow=False)
        if source.exists() and not is_best:
            with open(source, "rb") as old, atomic_write(best) as new:
                shutil.copyfileobj(old, new)
    barrier()  # before any process loads the best


def save_run(run: Run) -> None:
    content = {
        "config": asdict(run.model.config),
        "weights": run.model.state_dict(),
        **run.training_step.state_dict(),
        "random": checkpoint.random_states(),
        "progress": asdict(run.progress),
        "binding": run.binding,
        "kernels": run.kernels,
    }
    if is_main_process():
        checkpoint.save_state(run.output_dir, content, run.progress.step)
    barrier()


def load_best(run: Run) -> None:
    path = run.output_dir / "model_best.pt"
    checkpoint.load_weights(run.model, checkpoint.load_checkpoint(path)["weights"], path)
