"""A GPU's training step on torch's meta device: shapes, types and devices, but no numbers.

What needs a number on the host raises there, as do tensors of two devices; on a GPU the former
would wait. Forms are chosen as on any device that is not the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.training_setup
from engine.flags import get_args
from engine.state import Run
from engine.training_setup import prepare_run


class Autocast:
    """torch.autocast, which knows no meta device: of the operations here, linear layers cast."""

    dtype: torch.dtype | None = None

    def __init__(self, _: str, dtype: torch.dtype | None = None, enabled: bool = True):
        self.inside = dtype if enabled else None

    def __enter__(self) -> None:
        self.outside, Autocast.dtype = Autocast.dtype, self.inside

    def __exit__(self, *_: object) -> None:
        Autocast.dtype = self.outside


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, plain=F.linear):
    arguments = [x, weight] if bias is None else [x, weight, bias]
    return plain(*(a if Autocast.dtype is None else a.to(Autocast.dtype) for a in arguments))


def patch_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training run on the meta device."""
    monkeypatch.setattr(engine.training_setup, "pick_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: Autocast.dtype is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: Autocast.dtype)
    monkeypatch.setattr(F, "linear", linear)
    # torch.optim hides the modules that have the check; from 2.7 on AdamW has that of Adam.
    for name in ("adam", "adamw"):
        module = importlib.import_module(f"torch.optim.{name}")
        check = "_device_dtype_check_for_fused"
        monkeypatch.setattr(module, check, lambda _: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # The scaler of fp16 reads a number in each step: the one wait that there is.
    no_scaler = torch.amp.GradScaler("cpu", enabled=False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: no_scaler)


def prepare(data_dir: Path, *flags: str) -> Run:
    sizes = ["--maxlen=6", "--hidden_units=8", "--attention_dim=5", "--linear_dim=6"]
    run = prepare_run(parse(data_dir, *sizes, *flags))
    run.model.train()
    return run


def parse(data_dir: Path, *flags: str) -> argparse.Namespace:
    return get_args([f"--data_dir={data_dir}", "--num_workers=0", "--num_negatives=8", *flags])


def make_batch(run: Run, split: str = "train", size: int = 5) -> Any:
    dataset = run.datasets[split]
    return dataset.collate_fn(dataset.__getitems__(range(size))).pin_memory()


class Operations(TorchDispatchMode):
    """Counts operations on the meta device that launch something on a GPU, by part of the step.

    Foreach operations count once: on a GPU they are one launch, or a few for very many tensors.
    """

    NO_LAUNCH = re.compile(
        r"aten\.(\w*empty\w*|detach|alias|_unsafe_view|_sparse_coo\w*|_coalesced_)\."
    )

    def __init__(self):
        super().__init__()
        self.parts: dict[str, Counter[str]] = defaultdict(Counter)
        self.part = "rest"

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str) -> None:
        """Let `owner.name` count as `part`."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            outside, self.part = self.part, part
            result = function(*args, **kwargs)
            self.part = outside
            return result

        is_static = isinstance(vars(owner).get(name), staticmethod)
        monkeypatch.setattr(owner, name, staticmethod(watched) if is_static else watched)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        is_on_device = any(tensor.device.type == "meta" for tensor in tensors)
        if is_on_device and not function.is_view and not self.NO_LAUNCH.match(str(function)):
            is_ordered = torch.are_deterministic_algorithms_enabled()
            self.parts[self.part]["ordered " * is_ordered + str(function)] += 1
        return result

    def total(self, *parts: str) -> int:
        return sum(self.parts[part].total() for part in parts)
