"""One training step: gradients of one or several batches, learning rate, check for NaN."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

ADAM_BETAS = (0.9, 0.98)  # the reference's
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_NAMED = 5  # weights, items or users that are not finite
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
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class TrainingStep:
    """A model and what trains it.

    Of several processes each computes the gradients of its share of a batch; their sum is that of
    the whole batch, and all update their weights alike. (torch's DistributedDataParallel takes the
    mean, and wants every process to have a share.)

    Args:
        model: on its device.
        options: how it is trained.
        has_all_rows: batches hold every item; else large tables are trained by a batch's rows.
    """

    def __init__(self, model: HSTUModel, options: Optimization, has_all_rows: bool):
        self.model, self.options = model, options
        self.device = next(model.parameters()).device
        if not has_all_rows:
            give_sparse_gradients(model)
        self.optimizer = make_optimizer(model, options)
        is_fp16 = options.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        # Whether loss and gradients were finite so far; on the device, so no step waits for it.
        self._is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._newest: tuple[Sequence[Any], Tensor, Tensor] | None = None
        shards = [m for m in model.modules() if isinstance(m, ShardedEmbedding)]
        self.shards = {m.weight: m.num_rows for m in shards}  # gradients come summed over processes
        self._tables = [m.weight for m in model.modules() if getattr(m, "sparse", False)]

    def __call__(self, batches: Sequence[Any], epoch: int, step: int) -> dict[str, Tensor | float]:
        """Train on one or several dataset.Batch (of all processes) as if they were one.

        Only the negatives stay apart: each batch has its own. The host waits for a GPU where there
        are an fp16 scaler, sparse gradients or list features.

        Args:
            batches: on the CPU.
            epoch, step: which this is, from 1.

        Returns:
            TensorBoard tags and values.

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
        self._newest = batches, loss, grad_norm
        if self.device.type == "cpu":
            self.check_finite(epoch, step)
        lr = learning_rate(step - 1, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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
        optimizer = self.optimizer.state_dict()
        for place, num_rows in self._places_of_shards():
            if place in optimizer["state"]:
                optimizer["state"][place] = {
                    name: gather_table(value, num_rows) if value.dim() else value
                    for name, value in optimizer["state"][place].items()
                }
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = dict(state["optimizer"]["state"])
        for place, _ in self._places_of_shards():
            if place in values:
                values[place] = {
                    name: own_rows(value).clone() if value.dim() else value
                    for name, value in values[place].items()
                }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": values})
        self.scaler.load_state_dict(state["scaler"])

    def _places_of_shards(self) -> list[tuple[int, int]]:
        """Index of each sharded table in the optimiser's state, and its rows on all processes."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [(k, self.shards[p]) for k, p in enumerate(parameters) if p in self.shards]

    def check_finite(self, epoch: int, step: int) -> None:
        """Raise DataError if any loss or gradient so far was not finite; waits for a GPU."""
        # A scale below 1: steps overflow in fp16 whatever the scale.
        if self._is_finite and self.scaler.get_scale() >= 1:
            return
        _, loss, grad_norm = self._newest
        place = "" if self.device.type == "cpu" else " or shortly before"
        raise DataError(
            f"epoch {epoch} step {step}{place}: loss {loss.item()}, gradient norm "
            f"{grad_norm.item()}{self._culprits()}; nothing of it was saved. {IF_NOT_FINITE}"
        )

    @torch.no_grad()
    def _culprits(self) -> str:
        """Which weights are not finite, else which items and users of the newest batches."""
        names = [n for n, weight in self.model.named_parameters() if not weight.isfinite().all()]
        if names:
            return f", weights not finite: {_some(names)}"
        items, users = set(), set()
        for batch in self._newest[0]:
            batch = batch.to(self.device)
            rows = self.model.item_tower(batch.distinct_ids, vectors=batch.item_vectors)
            items |= set(batch.distinct_ids[~rows.isfinite().all(1)].tolist())
            is_bad = ~self.model.encode(batch, rows).isfinite().all(1).cpu()
            owners = torch.arange(len(batch.user_ids)).repeat_interleave(batch.offsets.diff())
            users |= set(batch.user_ids.cpu()[owners[is_bad]].tolist())
        lists = {"item re-ids": sorted(items), "user re-ids": sorted(users)}
        return "".join(f", {name} not finite: {_some(ids)}" for name, ids in lists.items() if ids)


def make_optimizer(model: HSTUModel, options: Optimization) -> MuonAdamW:
    """Weight decay for matrices only: on a table it would shrink items that never occur."""
    kinds = torch.nn.Embedding | torch.nn.EmbeddingBag
    tables = {module.weight for module in model.modules() if isinstance(module, kinds)}
    blocks = set(model.hstu.parameters())
    groups: dict[tuple[bool, bool], list] = defaultdict(list)
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and parameter not in tables
        groups[is_matrix, options.muon and is_matrix and parameter in blocks].append(parameter)
    return MuonAdamW(
        [
            {"params": p, "weight_decay": options.weight_decay * is_matrix, "muon": has_muon}
            for (is_matrix, has_muon), p in groups.items()
        ],
        lr=options.lr,
        betas=ADAM_BETAS,
    )


def learning_rate(step: int, options: Optimization) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to zero after the last; `step` from 0."""
    lr, warmup = options.lr, options.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, options.total_steps - warmup)
    return lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _some(values: Sequence[Any]) -> str:
    more = f" and {len(values) - MOST_NAMED} more" if len(values) > MOST_NAMED else ""
    return ", ".join(map(str, values[:MOST_NAMED])) + more
