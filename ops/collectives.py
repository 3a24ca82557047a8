"""Several processes that train one model: what they tell each other, sum and wait for.

A rank is one of them, as torchrun starts them. In a process of its own the one rank is 0; what
says so works there too and costs nothing, what sums or gathers is not called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Longest wait for another rank: it may be parsing features, or writing a large state. One that has
# died is noticed at once, as its connections close.
TIMEOUT = timedelta(minutes=30)


class LostRankError(RuntimeError):
    """Another rank has ended, or does not answer."""


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def join(is_on_cuda: bool) -> None:
    """Meet the other ranks, as RANK, LOCAL_RANK and WORLD_SIZE of the environment say.

    Raises:
        LostRankError: they do not come, or this machine has fewer CUDA devices than ranks.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        return
    needed = ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * is_on_cuda]
    if missing := [name for name in needed if name not in os.environ]:
        raise LostRankError(
            f"RANK is set in the environment, but not {', '.join(missing)}; start with torchrun, "
            "or unset RANK"
        )
    if is_on_cuda:
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise LostRankError(f"{count} CUDA devices here, so --nproc_per_node {count} at most")
        torch.cuda.set_device(local_rank)
    with meeting():
        # gloo beside nccl: what the host must know would otherwise have to wait for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_on_cuda else "gloo", timeout=TIMEOUT)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other rank has asked this: one says why a run ends, the rest end with it."""
    if not dist.is_initialized():
        return True
    with suppress(RuntimeError):  # rank 0 may keep the store, and be gone
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    return True


@contextmanager
def meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {os.environ.get('RANK')}: another rank has ended or does not answer; the same "
            f"command goes on from the last saved state ({str(error).splitlines()[0]:.150})"
        ) from error


def tell(values: Sequence[int]) -> list[list[int]]:
    """What each rank tells, in order of rank; all of them tell as many numbers."""
    if num_ranks() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.int64)
    told = [torch.empty_like(own) for _ in range(num_ranks())]
    with meeting():
        dist.all_gather(told, own)
    return [part.tolist() for part in told]


def wait_for_all() -> None:
    tell([0])


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The others enter the block when rank 0 has left it: they find the files that it makes."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each rank, n its own -> all of them, in order of rank."""
    if num_ranks() == 1:
        return rows
    return _gather_rows(rows, [count for (count,) in tell([len(rows)])])


def _gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    with meeting():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place; on all of them to the same bits.

    In one message: there are many small ones.
    """
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with meeting():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def sum_row_gradients(grad: Tensor, counts: Sequence[int]) -> Tensor:
    """Sum a table's sparse gradient over the ranks, equal rows into one.

    The ids are gathered, 8 bytes a row; the gradients of their union are then summed as they lie.

    Args:
        grad: coalesced, (X + 1, D).
        counts: rows in it on each rank.
    """
    own = grad.indices()[0]
    rows = _gather_rows(own, counts).unique()  # rising
    total = grad.values().new_zeros(len(rows), *grad.values().shape[1:])
    total[torch.searchsorted(rows, own)] = grad.values()
    sum_over_ranks([total])
    return sparse_rows(rows, total, len(grad), is_coalesced=True)


def sparse_rows(rows: Tensor, values: Tensor, num_rows: int, is_coalesced: bool = False) -> Tensor:
    """(num_rows, D) with `values`, (n, D), in `rows`, (n,), as gradients of tables are sparse."""
    shape = num_rows, values.shape[1]
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=is_coalesced,
        check_invariants=False,  # without a word on them torch warns that there are none
    )  # fmt: skip
