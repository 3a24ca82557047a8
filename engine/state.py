"""A run: its parts, what is saved of it, and how it goes on from there."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.training_step import Updater
from files.atomic_io import DataError
from files.checkpoint import (
    differences,
    load_checkpoint,
    load_newest_state,
    load_weights,
    random_states,
    read_register,
    save_checkpoint,
    save_state,
    set_random_states,
)
from model import HSTUModel
from ops.collectives import rank, tell, wait_for_all

log = logging.getLogger("hstu")

# Of resume_*.pt; another one trained with other random numbers or another optimiser's state.
STATE_FORMAT = 3


@dataclass
class Progress:
    """Where a run stands; a part of every saved state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # loader batches used of the epoch under way
    step: int = 0  # optimiser steps
    loss_sum: float = 0.0  # over the steps of the epoch under way
    loss_steps: int = 0
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    is_finished: bool = False


@dataclass
class Run:
    """The collaborators of the training loop."""

    args: argparse.Namespace
    device: torch.device
    model: HSTUModel
    updater: Updater
    binding: dict[str, Any]  # flags and data that a resumed run must share
    progress: Progress = field(default_factory=Progress)


def resume(run: Run) -> None:
    """Put the newest state of output_dir, or the one that --resume names, into the run.

    Raises:
        DataError: the state belongs to other flags or other data, or output_dir holds a run that
            would be overwritten.
    """
    args, output_dir = run.args, Path(run.args.output_dir)
    if args.resume == "none":
        clear(output_dir, args.overwrite)
        return
    is_auto = args.resume == "auto"
    state = load_newest_state(output_dir) if is_auto else load_checkpoint(args.resume)
    if state is None:
        found = {path.name for path in own_files(output_dir) if path.suffix == ".pt"}
        # A run that was killed in its first save leaves one file without an entry, never more.
        is_first_save = len(found) == 1 and "model_best.pt" not in found
        if found and not is_first_save and not read_register(output_dir):
            raise DataError(
                f"{output_dir}: holds {', '.join(sorted(found)[:3])}, but no checkpoints.json that "
                "vouches for them; copy it as well, name a state with --resume, start afresh with "
                "--resume none --overwrite, or choose another --output_dir"
            )
        return
    if "progress" not in state:
        raise DataError(f"{args.resume}: holds weights only; resume from a resume_*.pt file")
    changed = differences(state["binding"], run.binding)
    if changed:
        flags = [f"--{line}" for line in changed if line.partition(":")[0] in vars(args)]
        if not flags and "data files" in {line.partition(":")[0] for line in changed}:
            raise DataError(
                f"{output_dir if is_auto else args.resume}: was trained on other data than "
                f"{args.data_dir}; name that, or another --output_dir and --log_dir"
            )
        changed = flags or changed  # the rest follows from them
        raise DataError(
            f"{output_dir if is_auto else args.resume}: was trained with other settings: "
            + "; ".join(changed)
            + ". Use the same ones, or another --output_dir and --log_dir"
        )
    load_weights(run.model, state["weights"], output_dir if is_auto else args.resume)
    run.updater.load_state_dict(state)
    set_random_states(state["random"])
    run.progress = Progress(**state["progress"])
    if not is_auto:
        move_in(run, Path(args.resume).parent)
    if not run.progress.is_finished:
        log.info("resuming at epoch %d, step %d", run.progress.epoch + 1, run.progress.step)


def own_files(output_dir: Path) -> list[Path]:
    """What a training writes there, the register first; other people's files are none of it."""
    names = r"checkpoints\.json|metrics\.json|model_(epoch_\d+|best)\.pt|resume_\d+\.pt"
    return sorted(path for path in output_dir.iterdir() if re.fullmatch(names, path.name))


def clear(output_dir: Path, overwrite: bool) -> None:
    """Make room for a run that does not go on from what lies in its folder."""
    # The best model alone is what a kill in move_in leaves.
    found = own_files(output_dir)
    if {path.name for path in found if path.suffix == ".pt"} - {"model_best.pt"} and not overwrite:
        raise DataError(
            f"{output_dir}: holds checkpoints; go on from them with --resume auto, choose an empty "
            "--output_dir, or add --overwrite"
        )
    for old in found if rank() == 0 else ():
        old.unlink()


def move_in(run: Run, source: Path) -> None:
    """Bring a run from the folder of its state to its own: the best model so far, and the state."""
    output_dir, progress = Path(run.args.output_dir), run.progress
    if source.resolve() == output_dir.resolve():
        return
    best = None
    if progress.best_epoch:
        best = load_checkpoint(source / f"model_epoch_{progress.best_epoch}.pt")
    clear(output_dir, run.args.overwrite)
    wait_for_all()  # or another rank would find the new file
    if best and rank() == 0:
        save_checkpoint(output_dir / "model_best.pt", best, progress.step)
    save_run(run)


def restore_best(run: Run) -> None:
    """Make model_best.pt that of the state's best epoch.

    A kill between an epoch's checkpoints and its state leaves a newer one, whose epoch is trained
    again: with other ranks or on another device to other weights.
    """
    output_dir, best_epoch = Path(run.args.output_dir), run.progress.best_epoch
    source, best = output_dir / f"model_epoch_{best_epoch}.pt", output_dir / "model_best.pt"
    register = read_register(output_dir)
    if source.name not in register or not source.exists():
        return
    is_same = register.get(best.name, {}).get("sha256") == register[source.name]["sha256"]
    if not (is_same and best.exists()):
        save_checkpoint(best, load_checkpoint(source), register[source.name]["step"])


def check_same_step(run: Run) -> None:
    steps = [step for (step,) in tell([run.progress.step])]
    if len(set(steps)) > 1:
        raise DataError(
            f"{run.args.output_dir}: ranks find states of steps {steps}; it has to be one folder "
            "that all of them see"
        )


def save_epoch(run: Run) -> None:
    """Write model_epoch_X.pt, model_best.pt where it is the best, and the state to resume from."""
    progress, output_dir = run.progress, Path(run.args.output_dir)
    content = {"config": asdict(run.model.config), "weights": run.model.state_dict()}
    names = [f"model_epoch_{progress.epoch}.pt"]
    names += ["model_best.pt"] if progress.best_epoch == progress.epoch else []
    for name in names if rank() == 0 else ():
        save_checkpoint(output_dir / name, content, progress.step)
    save_run(run)


def save_run(run: Run) -> None:
    content = {
        "config": asdict(run.model.config),
        "weights": run.model.state_dict(),
        **run.updater.state_dict(),
        "random": random_states(),
        "progress": asdict(run.progress),
        "binding": run.binding,
    }
    if rank() == 0:
        save_state(run.args.output_dir, content, run.progress.step)
    wait_for_all()


def load_best(run: Run) -> None:
    path = Path(run.args.output_dir) / "model_best.pt"
    load_weights(run.model, load_checkpoint(path)["weights"], path)
