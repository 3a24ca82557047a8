"""Several processes that train one model: what they gather, sum and wait for.

torchrun starts them; `rank` numbers them from 0, the main process. In a single process, rank is 0,
gathering and waiting cost nothing, and nothing that sums is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Longest wait for another process, which may be parsing features or writing a large state. One that
# has died is noticed at once, as its connections close.
TIMEOUT = timedelta(minutes=30)

torch.sparse.check_sparse_tensor_invariants.disable()  # else torch 2.11 warns that they are off


class LostProcessError(RuntimeError):
    """Another process has ended, or does not answer."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


def join(is_on_cuda: bool) -> None:
    """Connect to the other processes, as RANK, LOCAL_RANK and WORLD_SIZE of the environment say.

    Raises:
        LostProcessError: they do not come, or this machine has fewer CUDA devices than processes.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        return
    needed = ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * is_on_cuda]
    if missing := ", ".join(name for name in needed if name not in os.environ):
        found = f"RANK is set in the environment, but not {missing}"
        raise LostProcessError(f"{found}; start with torchrun, or unset RANK")
    if is_on_cuda:
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise LostProcessError(f"{count} CUDA devices here: --nproc_per_node {count} at most")
        torch.cuda.set_device(local_rank)
    with waiting_for_others():
        # gloo beside nccl: what the host must know would otherwise have to wait for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_on_cuda else "gloo", timeout=TIMEOUT)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process has asked this: one says why a run ends, the rest end with it."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the main process may keep the store, and be gone
            return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    return True


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Turns what a collective raises into LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"process {os.environ.get('RANK')}: another process has ended or does not answer; the "
            f"same command goes on from the last saved state ({str(error).splitlines()[0]:.150})"
        ) from error


def all_gather_ints(values: Sequence[int]) -> list[list[int]]:
    """The numbers of each process, in order of rank; each has the same count of them."""
    if world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.int64)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    with waiting_for_others():
        dist.all_gather(gathered, own)
    return [part.tolist() for part in gathered]


def all_gather_objects(value: Any) -> list[Any]:
    """The value of each process, in order of rank; of any kind that pickles."""
    values = [value] * world_size()
    if world_size() > 1:
        with waiting_for_others():
            dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather_ints([0])


@contextmanager
def main_process_first() -> Iterator[None]:
    """The others enter the block when the main process has left it, and find the files it made."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each process, n its own -> all of them, in order of rank."""
    if world_size() == 1:
        return rows
    counts = [count for (count,) in all_gather_ints([len(rows)])]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    with waiting_for_others():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the processes, in place; on all of them to the same bits.

    In one message: there are many small ones.
    """
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with waiting_for_others():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def all_reduce_rows(grad: Tensor) -> Tensor:
    """Sum a table's coalesced sparse gradient, (X + 1, D), over the processes, equal rows into one.

    The ids are gathered, 8 bytes a row; then the dense gradients of their union are summed.
    """
    own = grad.indices()[0]
    rows = all_gather_rows(own).unique()  # rising
    total = grad.values().new_zeros(len(rows), *grad.values().shape[1:])
    total[torch.searchsorted(rows, own)] = grad.values()
    all_reduce([total])
    return sparse_rows(rows, total, len(grad), is_coalesced=True)


def sparse_rows(rows: Tensor, values: Tensor, num_rows: int, is_coalesced: bool = False) -> Tensor:
    """(num_rows, D) with `values`, (n, D), in `rows`, (n,), as gradients of tables are sparse."""
    size = num_rows, values.shape[1]
    return torch.sparse_coo_tensor(rows[None], values, size, is_coalesced=is_coalesced)
