"""Checkpoints: verified writing and reading, the newest good state to resume from, rotation."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import random
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from files.atomic_io import DataError, atomic_write, file_entry, read_json, sha256_of, write_json

log = logging.getLogger("hstu")

REGISTER = "checkpoints.json"
KEPT_STATES = 2
_STATE_NAME = r"resume_\d+\.pt"
# What torch.load raises on damaged bytes.
_FAULTS = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError)
_FAULTS += (RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error)


def save_checkpoint(path: str | Path, content: Mapping[str, Any], step: int) -> None:
    """Write `content` durably, and enter its size, SHA-256 and step into checkpoints.json.

    Equal content gives equal bytes in any process. While a file is replaced, its entry vouches for
    the old bytes as for the new: at any instant there is a good file under the name, if there was
    one before; after a kill `settle_register` comes first. A new file's entry comes last.

    Args:
        path: a .pt file; its folder's register is updated.
        content: tensors, numbers, strings and containers of them, what weights_only=True loads.
        step: optimiser steps done; the newest checkpoint is the one with the highest.
    """
    path, sizes = Path(path), {}
    canonical = _canonical(content, sizes)
    register = read_register(path.parent)
    old = register.get(path.name)
    with atomic_write(path, sum(sizes.values())) as file:
        _save(canonical, file)
        file.flush()
        entry = file_entry(file.name) | {"step": step, "config": _hash(content.get("config"))}
        if old:
            both = entry | {"replaces": old}
            write_json(path.parent / REGISTER, register | {path.name: both})
    register[path.name] = entry
    write_json(path.parent / REGISTER, dict(sorted(register.items())))


def _save(content: Any, file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # A write that fails makes torch.save fail once more on closing, and hide the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_register(folder: str | Path) -> dict[str, Any]:
    """checkpoints.json: file name -> size, sha256, step, config; empty where there is none."""
    path = Path(folder) / REGISTER
    register = read_json(path) if path.exists() else {}
    entries = register.values() if isinstance(register, dict) else [None]
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        if type(fields.get("step")) is not int or not isinstance(fields.get("sha256"), str):
            raise DataError(f"{path}: {entry!r:.60}, expected a step and a sha256; not a register")
    return register


def settle_register(folder: str | Path) -> None:
    """After a kill in `save_checkpoint`: entries that vouch for two files, for the one there is."""
    register = read_register(folder)
    unsettled = [name for name, entry in register.items() if "replaces" in entry]
    for name in unsettled:
        path, old = Path(folder) / name, register[name].pop("replaces")
        if path.exists() and sha256_of(path) == old["sha256"]:
            register[name] = old
    if unsettled:
        write_json(Path(folder) / REGISTER, register)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, after checking its hash against checkpoints.json.

    A file that is not registered (copied from elsewhere) loads with one notice.

    Raises:
        DataError: no such file, damaged, or not one of our checkpoints.
    """
    path = Path(path)
    if not path.is_file():
        remark = ", but a folder; name a model_*.pt or resume_*.pt in it" if path.is_dir() else ""
        raise DataError(f"{path}: no such checkpoint file{remark}")
    entry = read_register(path.parent).get(path.name)
    if entry is None:
        log.warning("%s: not in %s, so its integrity is not verified", path, REGISTER)
    else:
        good = {good["sha256"] for good in (entry, entry.get("replaces", entry))}
        if (found := sha256_of(path)) not in good:
            raise DataError(
                f"{path}: SHA-256 {found[:12]}..., but {REGISTER} says {entry['sha256'][:12]}...; "
                "the file is damaged, use another checkpoint"
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        if entry and "allocate memory" in str(error):
            raise  # its hash was right
        # torch's own words advise to load it with any code that it may hold.
        reason = error if isinstance(error, OSError) else "cut short, damaged, or another file"
        raise DataError(
            f"{path}: not a readable checkpoint ({reason}); expected a model_*.pt or resume_*.pt "
            "that a training wrote"
        ) from error
    if not isinstance(content, dict) or "config" not in content:
        raise DataError(f"{path}: not a checkpoint of this package (no model config in it)")
    return content


def save_state(folder: str | Path, content: Mapping[str, Any], step: int) -> None:
    """Write resume_{step}.pt and remove all other states but the one before it."""
    save_checkpoint(Path(folder) / f"resume_{step}.pt", content, step)
    keep_newest_states(folder, step)


def keep_newest_states(folder: str | Path, step: int) -> None:
    """Remove all states but that of `step` and the one before it."""
    folder, register = Path(folder), read_register(folder)
    # Later steps belong to a run that this one has branched off from.
    kept = [name for name in _states(register) if register[name]["step"] <= step][:KEPT_STATES]
    outdated = {name for name in _states(register) if name not in kept}
    if outdated:
        write_json(
            folder / REGISTER, {name: e for name, e in register.items() if name not in outdated}
        )
    for path in folder.glob("resume_*.pt"):
        if path.name not in kept and re.fullmatch(_STATE_NAME, path.name):
            path.unlink()


def load_newest_state(folder: str | Path) -> dict[str, Any] | None:
    """The newest undamaged resume_*.pt by step, or None where there is none at all.

    A damaged one is named in a warning and the one before it is used.

    Raises:
        DataError: there are states, but all of them are damaged.
    """
    states = _states(read_register(folder))
    problems = []
    for name in states:
        try:
            return load_checkpoint(Path(folder) / name)
        except DataError as error:
            log.warning("%s", error)
            problems.append(name)
    if problems:
        raise DataError(
            f"{folder}: every saved state is damaged ({', '.join(problems)}); start afresh with "
            "--resume none --overwrite, or choose another --output_dir"
        )
    return None


def _states(register: Mapping[str, Any]) -> list[str]:
    """Names of the resumable states, newest first."""
    names = [name for name in register if re.fullmatch(_STATE_NAME, name)]
    return sorted(names, key=lambda name: register[name]["step"], reverse=True)


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
        prefixes = [p for p in ("module.", "_orig_mod.") if all(k.startswith(p) for k in weights)]
        hint = "".join(f"all names begin with {prefix!r}, take it off: " for prefix in prefixes)
        raise DataError(
            f"{path}: does not fit the model: {hint}" + "; ".join(lines[:20]) + ". A model of your "
            "own is known to the script that trained it alone: start that one"
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


def seed_random(seed: int) -> None:
    """Seed all generators in this process: their states are saved, and must not be by chance."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # takes no more bits
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all generators in this process, in types that weights_only=True loads."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def _canonical(value: Any, sizes: dict[int, int]) -> Any:
    """What equals `value`, and whose pickle depends on values alone, not on what is shared.

    `sizes`: address -> bytes of the tensors so far. A tensor is copied only where it is not on the
    CPU, or not the whole and only user of its memory: a table and its moments may fill most of it.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in sizes:
            tensor = tensor.clone()
        sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: (str(type(item[0])), item[0]))
        return {_canonical(key, sizes): _canonical(item, sizes) for key, item in items}
    if isinstance(value, list | tuple):
        return type(value)(_canonical(item, sizes) for item in value)
    if type(value) is str:
        return sys.intern(value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise TypeError(f"{type(value).__name__} would not load with weights_only=True")


def _hash(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
