"""Muon for the blocks' matrices, AdamW for the rest; of a large table a batch's rows alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.collectives import all_reduce
from ops.rows import merge_rows

MUON_MOMENTUM = 0.95
# Coefficients of the polynomial that takes singular values to about 1, and its iterations (Jordan).
NEWTON_SCHULZ, NUM_ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of an update at learning rate 1, AdamW's usual one (Moonlight, arXiv 2502.16982).
MUON_RMS = 0.2


class RowAdamW(torch.optim.AdamW):
    """torch.optim.AdamW; of a table with a sparse gradient only the rows in the gradient change.

    The updates that a row's momentum would have made in the steps without it are made up for in the
    next step that has it, at that step's learning rate and bias correction; its moments decay for
    all of them. Where each step has every row, this is AdamW. (In torch.optim.SparseAdam moments do
    not decay, and rare rows learn more slowly: docs/log.md compares.)

    A table's state: step; exp_avg and exp_avg_sq like the table; and last_step, a float32 per row,
    the last step that had it.
    """

    def __init__(self, params: Iterable, **options: Any):
        """As torch.optim.AdamW; beta1 is below sqrt(beta2)."""
        super().__init__(params, fused=True, **options)
        # Else GradScaler would let the fused kernel decide on skipping a step, and skip no table's.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self) -> None:
        """One update, after which sparse gradients are None.

        Raises:
            ValueError: weight decay for a table with a sparse gradient.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    _step_rows(parameter, parameter.grad, self.state[parameter], group)
                    parameter.grad = None  # or torch's step would refuse it
        super().step()


def _step_rows(
    table: nn.Parameter, grad: Tensor, state: MutableMapping[str, Tensor], group: dict[str, Any]
) -> None:
    if group["weight_decay"]:
        found = f"weight_decay {group['weight_decay']} for a table with a sparse gradient"
        raise ValueError(f"{found}: put tables into a group with weight_decay 0")
    if not state:
        state["step"] = table.new_zeros(())
        state["last_step"] = table.new_zeros(len(table))
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
    grad = merge_rows(grad)
    rows, g = grad.indices()[0], grad.values()  # (R,), (R, D)
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step = state["step"]
    missed = (step - 1 - state["last_step"].index_select(0, rows))[:, None]  # (R, 1) steps
    m, v = (state[name].index_select(0, rows) for name in ("exp_avg", "exp_avg_sq"))  # (R, D)
    # Adam's m / c1 / (sqrt(v / c2) + eps) is m / (sqrt(v) + eps sqrt(c2)) times sqrt(c2) / c1.
    root_c2, c1 = (1 - beta2**step).sqrt(), 1 - beta1**step
    eps = group["eps"] * root_c2
    # m / sqrt(v) shrinks by this ratio a step: the missed updates are a geometric series.
    ratio = beta1 / math.sqrt(beta2)
    update = m / v.sqrt().add_(eps) * (ratio * (1 - ratio**missed) / (1 - ratio))  # (R, D)
    m.mul_(beta1**missed).lerp_(g, 1 - beta1)
    v.mul_(beta2 ** (missed + 1)).addcmul_(g, g, value=1 - beta2)
    update.addcdiv_(m, v.sqrt().add_(eps)).mul_(root_c2 / c1)
    # Not index_add_, whose atomic additions have no order, nor index_fill_, which waits for `step`.
    update = table.index_select(0, rows).add_(update, alpha=-group["lr"])
    table.index_copy_(0, rows, update)
    state["last_step"].index_copy_(0, rows, step.expand(len(rows)))
    state["exp_avg"].index_copy_(0, rows, m)
    state["exp_avg_sq"].index_copy_(0, rows, v)


class MuonAdamW(RowAdamW):
    """RowAdamW; parameter groups with muon=True, of matrices, are updated by Muon (Jordan 2024).

    A matrix's update is its gradient's Nesterov momentum with all singular values made about equal.
    Learning rate and weight decay mean what they mean for AdamW.

    A matrix's state: momentum, like the matrix; and a step that nothing counts.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One update, after which the gradients of the matrices are None."""
        for group in self.param_groups:
            matrices = [m for m in group["params"] if m.grad is not None]
            if group.get("muon") and matrices:
                self._step_matrices(matrices, group)
        super().step()

    def _step_matrices(self, matrices: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                # Always 0, but torch.optim.AdamW looks for a step when it loads a state.
                self.state[matrix]["step"] = matrix.new_zeros(())
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        grads = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - MUON_MOMENTUM)
        updates = muon_updates(torch._foreach_lerp(grads, momenta, MUON_MOMENTUM))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, updates, alpha=-group["lr"])
        for matrix in matrices:
            matrix.grad = None  # so that AdamW passes over it


def muon_updates(momenta: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of (a, b) matrices, with AdamW's usual root mean square.

    Matrices of one shape share their products; on a GPU all do, padded with zeros, which stay so.
    """
    by_shape = defaultdict(list)
    for k, momentum in enumerate(momenta):
        by_shape[momentum.shape].append(k)
    # (n, a, b), a <= b
    stacks = [
        torch.stack([momenta[k].mT if shape[0] > shape[1] else momenta[k] for k in places])
        for shape, places in by_shape.items()
    ]
    if momenta[0].device.type == "cpu":
        results = map(orthogonal, stacks)
    else:
        longest = (max(x.shape[k] for x in stacks) for k in (1, 2))
        padded = stacks[0].new_zeros(len(momenta), *longest)
        parts = padded.split([len(x) for x in stacks])
        for part, x in zip(parts, stacks, strict=True):
            part[:, : x.shape[1], : x.shape[2]] = x
        results = orthogonal(padded).split([len(x) for x in stacks])
    updates = list(momenta)
    for (shape, places), result in zip(by_shape.items(), results, strict=True):
        result = result[:, : min(shape), : max(shape)]
        # Contiguous, or foreach takes them one by one.
        scaled = result.new_empty(len(places), *shape)
        torch.mul(
            result.mT if shape[0] > shape[1] else result,
            MUON_RMS * math.sqrt(max(shape)),
            out=scaled,
        )
        for k, update in zip(places, scaled, strict=True):
            updates[k] = update
    return updates


def orthogonal(x: Tensor) -> Tensor:
    """(n, a, b) matrices with the same singular vectors and singular values of about 1.

    (.68 to 1.14 for those above a hundredth of the norm; smaller ones remain smaller.)
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # a x + (b G + c G^2) x with G = x x^T is (rest + c / k^2 (k G + rest)^2) x: no sums but those
    # of products with one multiple of the identity.
    rest = a - b**2 / (4 * c)
    k = rest * 2 * c / b
    shifted = x.new_zeros(2, NUM_ITERATIONS, len(x), x.shape[1], x.shape[1])
    shifted.diagonal(dim1=-2, dim2=-1).fill_(rest)
    for gram, polynomial in zip(*shifted, strict=True):
        gram.baddbmm_(x, x.mT, alpha=k)
        x = polynomial.baddbmm_(gram, gram, alpha=c / k**2) @ x
    return x


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, shards: Collection[nn.Parameter] = ()
) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, for sparse gradients and sharded tables too; the norm.

    Sparse gradients get merged by row. `limit`: of the norm; 0 leaves gradients as they are.
    `shards`: those of `parameters` of which other processes have other rows; all rows count.
    """
    values, shard_values, shards = [], [], set(shards)
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            parameter.grad = merge_rows(grad)
            grad = parameter.grad.values()
        (shard_values if parameter in shards else values).append(grad)
    norm = _total_norm(values)
    if shards:
        square = _total_norm(shard_values).square()
        all_reduce([square])
        norm = (norm.square() + square).sqrt()
    if limit and (values or shard_values):
        # A tensor on the CPU: limit / norm would be two launches on a GPU.
        factor = (torch.tensor(limit) / norm).clamp_(max=1.0)
        torch._foreach_mul_(values + shard_values, factor)
    return norm


def _total_norm(values: Sequence[Tensor]) -> Tensor:
    """Of all numbers in them together; 0 of none. The copy costs less than a norm of each."""
    flat = [value.flatten() for value in values] or [torch.zeros(1)]
    return torch.linalg.vector_norm(torch.cat(flat))
