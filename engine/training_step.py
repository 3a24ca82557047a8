"""One training step: gradients of one or several batches, learning rate, check for NaN."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.optimizer import MuonAdamW, clip_gradients
from files.atomic_io import DataError
from hstu_components import give_sparse_gradients
from model import HSTUModel
from ops.collectives import all_reduce, all_reduce_rows, rank, world_size
from ops.sharded_table import ShardedEmbedding, gather_table, own_rows
from simplified_hstu import RelativeAttentionBias

ADAM_BETAS = (0.9, 0.98)  # the reference's
# Factor on --lr for rab's scalars. AdamW moves a weight by about its rate a step at most: enough
# for embeddings of 0.02, not for scalars that end at 4 or 5 (docs/log.md).
BIAS_RATE = 10
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
IF_NOT_FINITE = "Lower --lr or raise --infonce_temp, and check the features for huge values"


@dataclass(frozen=True)
class Optimization:
    """How weights are trained; docs/flags.md says what each means."""

    lr: float
    weight_decay: float
    muon: bool
    warmup_steps: int
    total_steps: int  # of the whole run, which the learning rate follows
    clip_grad: float
    precision: str
    seed: int  # of the dropout, where there are several processes


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


class TrainingStep:
    """A model, already on its device, and what trains it.

    Each of several processes computes the gradients of its share of a batch; their sum is that of
    the whole batch, and all processes change their weights alike. (torch's DistributedDataParallel
    takes the mean, and wants every process to have a share.)

    `has_all_rows`: batches hold every item; else only a batch's rows of large tables are trained.
    """

    def __init__(self, model: HSTUModel, options: Optimization, has_all_rows: bool):
        self.model, self.options = model, options
        self.device = next(model.parameters()).device
        if not has_all_rows:
            give_sparse_gradients(model)
        self.optimizer = make_optimizer(model, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        # Whether loss and gradients were finite so far; on the device, so no step waits for it.
        self._is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._newest: tuple[Tensor, Tensor] | None = None  # loss and norm of the gradient
        shards = [m for m in model.modules() if isinstance(m, ShardedEmbedding)]
        self.shards = {m.weight: m.num_rows for m in shards}  # gradients come summed over processes
        self._tables = [m.weight for m in model.modules() if getattr(m, "sparse", False)]

    def __call__(self, batches: Sequence[Any], epoch: int, step: int) -> dict[str, Tensor | float]:
        """Train on one or several dataset.Batch (of all processes) as if they were one.

        Only the negatives stay apart: each batch has its own. The host waits for a GPU only for an
        fp16 scaler, and where several processes sum sparse gradients. `batches`: on the CPU.
        `epoch`, `step`: which this is, from 1. Returns TensorBoard tags and values.

        Raises:
            DataError: on the CPU, loss or gradient are not finite; the weights are those of the
                step before. On a GPU `check_finite` says so.
        """
        if world_size() > 1:  # dropout differs between processes, and follows from the step alone
            seeds = np.random.SeedSequence((self.options.seed, step, rank()))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        total = max(1, sum(int(batch.num_targets) for batch in batches))
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            count = int((batch.target_index >= 0).sum())
            with autocast(self.device, self.options.precision):
                part = self.model(batch.to(self.device)) * (count / total)
            self.scaler.scale(part).backward()
            loss += part.detach()
            del part  # or its graph would live beside the next one
        if world_size() > 1:
            self._sum_over_processes(loss)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.model.parameters(), self.options.clip_grad, self.shards)
        # A gradient that overflows in fp16 is no fault: the scaler skips that step.
        self._is_finite &= torch.isfinite(loss if self.scaler.is_enabled() else loss + grad_norm)
        self._newest = loss, grad_norm
        if self.device.type == "cpu":
            self.check_finite(epoch, step)
        lr = learning_rate(step - 1, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"Loss/train": loss, "Train/grad_norm": grad_norm, "Train/lr": lr}

    def _sum_over_processes(self, loss: Tensor) -> None:
        """Loss and gradients of this process's share to those of the whole batch, in place."""
        for table in self._tables:
            table.grad = all_reduce_rows(table.grad.coalesce())
        apart = {*self._tables, *self.shards}
        others = [p for p in self.model.parameters() if p.requires_grad and p not in apart]
        for parameter in others:
            if parameter.grad is None:  # an empty share does not reach the blocks
                parameter.grad = torch.zeros_like(parameter)
        all_reduce([loss, *(parameter.grad for parameter in others)])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model; the main process has sharded tables whole."""
        optimizer = self._convert_shards(self.optimizer.state_dict(), gather_table)
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self._convert_shards(state["optimizer"], lambda table, _: own_rows(table).clone())
        self.optimizer.load_state_dict(own)
        self.scaler.load_state_dict(state["scaler"])

    def _convert_shards(self, state: Mapping[str, Any], convert: Callable) -> dict[str, Any]:
        """An optimiser's state with `convert(values, number of rows)` for its sharded tables."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        by_place = dict(state["state"])
        for place, parameter in enumerate(parameters):
            if parameter in self.shards and place in by_place:
                by_place[place] = {
                    name: convert(values, self.shards[parameter]) if values.dim() else values
                    for name, values in by_place[place].items()
                }
        return {**state, "state": by_place}

    def check_finite(self, epoch: int, step: int) -> None:
        """Raise DataError if any loss or gradient so far was not finite; waits for a GPU."""
        # A scale below 1: steps overflow in fp16 whatever the scale.
        if self._is_finite and self.scaler.get_scale() >= 1:
            return
        loss, grad_norm = (value.item() for value in self._newest)
        place = "" if self.device.type == "cpu" else " or shortly before"
        names = [n for n, weight in self.model.named_parameters() if not weight.isfinite().all()]
        weights = f", weights not finite: {', '.join(names[:5])}" * bool(names)
        raise DataError(
            f"epoch {epoch} step {step}{place}: loss {loss}, gradient norm {grad_norm}{weights}; "
            f"nothing of it was saved. {IF_NOT_FINITE}"
        )


def make_optimizer(model: HSTUModel, options: Optimization) -> MuonAdamW:
    """Weight decay for matrices only: on a table it would shrink items that never occur."""
    kinds = torch.nn.Embedding | torch.nn.EmbeddingBag
    tables = {module.weight for module in model.modules() if isinstance(module, kinds)}
    modules = [m for m in model.modules() if isinstance(m, RelativeAttentionBias)]
    biases = {parameter for module in modules for parameter in module.parameters()}
    blocks = set(model.hstu.parameters())
    groups: dict[tuple[float, bool, int], list] = defaultdict(list)
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and parameter not in tables
        has_muon = options.muon and is_matrix and parameter in blocks
        rate = BIAS_RATE if parameter in biases else 1
        groups[options.weight_decay * is_matrix, has_muon, rate].append(parameter)
    param_groups = [
        {"params": p, "weight_decay": decay, "muon": has_muon, "rate": rate}
        for (decay, has_muon, rate), p in groups.items()
    ]
    return MuonAdamW(param_groups, lr=options.lr, betas=ADAM_BETAS)


def learning_rate(step: int, options: Optimization) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to zero after the last; `step` from 0."""
    lr, warmup = options.lr, options.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, options.total_steps - warmup)
    return lr * 0.5 * (1.0 + math.cos(math.pi * done))
