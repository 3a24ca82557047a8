"""Checkpoints: written whole, checked when read; the newest good state to resume from."""

from __future__ import annotations

import errno
import logging
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files.atomic_io import DataError, atomic_write

log = logging.getLogger("hstu")

KEPT_STATES = 2
# What reading a damaged zip raises, and torch.load of a zip that is no checkpoint.
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError)
_ZIP_FAULTS += (ValueError, RuntimeError, OSError)  # a wrong name, encryption, place in the file
_LOAD_FAULTS = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, AttributeError)


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` durably; the file that was there stays until it is whole.

    Args:
        path: a .pt file.
        content: tensors, numbers, strings and containers of them, what weights_only=True loads.
    """
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # A write that fails makes torch.save fail once more on closing, and hide the reason.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    A .pt file is a zip whose entries carry CRC-32, which torch does not look at: they are compared
    first, so that a damaged file is refused instead of loaded.

    Raises:
        DataError: no such file, damaged, or not one of our checkpoints.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint file")
    expected = "expected a model_*.pt or resume_*.pt that a training wrote; use another one"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _ZIP_FAULTS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = str(path)  # the disk's fault: the file may be sound
            raise
        raise DataError(
            f"{path}: truncated, damaged, or another file ({error}); {expected}"
        ) from error
    if damaged:
        raise DataError(f"{path}: damaged, its part {damaged} has another checksum; {expected}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_FAULTS as error:
        if "allocate memory" in str(error):
            raise
        # torch's own message advises to run whatever code the file holds.
        raise DataError(f"{path}: holds something else than tensors; {expected}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise DataError(f"{path}: no model config in it; {expected}")
    return content


def save_state(folder: str | Path, content: Mapping[str, Any], step: int) -> None:
    """Write resume_{step}.pt and remove all other states but the one before it."""
    folder = Path(folder)
    save_checkpoint(folder / f"resume_{step}.pt", content)
    found = states(folder)
    # Later steps belong to a run that this one has branched off from.
    kept = [path for path in found if _step_of(path) <= step][:KEPT_STATES]
    for path in set(found).difference(kept):
        path.unlink()


def load_newest_state(folder: str | Path) -> dict[str, Any] | None:
    """The newest undamaged resume_*.pt by step, or None where there is none at all.

    A damaged one is named in a warning and the one before it is used.

    Raises:
        DataError: there are states, but all of them are damaged.
    """
    problems = []
    for path in states(folder):
        try:
            return load_checkpoint(path)
        except DataError as error:
            log.warning("%s", error)
            problems.append(path.name)
    if problems:
        raise DataError(
            f"{folder}: every saved state is damaged ({', '.join(problems)}); start afresh with "
            "--resume none --overwrite, or choose another --output_dir"
        )
    return None


def states(folder: str | Path) -> list[Path]:
    """The states in a folder, newest first."""
    found = [p for p in Path(folder).glob("resume_*.pt") if re.fullmatch(r"resume_\d+", p.stem)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(state: Path) -> int:
    return int(state.stem.partition("_")[2])


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        DataError: names or shapes differ; the message lists them.
    """
    expected = model.state_dict()
    lines = [
        f"{name}: checkpoint {_shape(weights.get(name))}, model {_shape(expected.get(name))}"
        for name in sorted(expected.keys() | weights.keys())
        if _shape(weights.get(name)) != _shape(expected.get(name))
    ]
    if lines:
        raise DataError(
            f"{path}: does not fit the model: " + "; ".join(lines[:20]) + ". A model of your own "
            "is known to the script that trained it alone: start that one"
        )
    model.load_state_dict(weights)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line per setting that is not the same in both; of nested ones that of the innermost."""
    lines = []
    for name in sorted(saved.keys() | current.keys()):
        pair = saved.get(name), current.get(name)
        if pair[0] == pair[1]:
            continue
        if all(isinstance(value, Mapping) for value in pair):
            lines += [f"{name}.{line}" for line in differences(*pair)]
        else:
            lines.append(f"{name}: {pair[0]!r} then, {pair[1]!r} now")
    return lines


def random_states() -> dict[str, Any]:
    """The states of torch's generators, which dropout draws from; nothing draws from others."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # the run's device
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"][0])
