"""Several processes that train one model: what they tell each other, sum and wait for.

A rank is one of them, as torchrun starts them. In a process of its own the one rank is 0; what
says so works there too and costs nothing, what sums or gathers is not called.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Longest wait for another rank: it may be parsing features, or writing a large state. One that has
# died is noticed at once, as its connections close.
TIMEOUT = timedelta(minutes=30)
# Rows of a sharded table that one message carries, or that are drawn at once: 16 MB of 64 numbers.
CHUNK_ROWS = 1 << 16
# Queries whose targets stand behind a rank's items at once: each leaves out the others' ones.
SHARDED_QUERIES = 256


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
    with _meeting():
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
def _meeting() -> Iterator[None]:
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
    with _meeting():
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
    with _meeting():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place; on all of them to the same bits.

    In one message: there are many small ones.
    """
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _meeting():
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
    return _sparse_rows(rows, total, len(grad), is_coalesced=True)


def _sparse_rows(rows: Tensor, values: Tensor, num_rows: int, is_coalesced: bool = False) -> Tensor:
    """(num_rows, D) with `values`, (n, D), in `rows`, (n,), as gradients of tables are sparse."""
    shape = num_rows, values.shape[1]
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=is_coalesced,
        check_invariants=False,  # without a word on them torch warns that there are none
    )  # fmt: skip


# -------------------------------------------------------------------------------- sharded tables


class ShardedEmbedding(nn.Embedding):
    """A table of which each of K ranks holds every K-th row: id i is row i // K of rank i % K.

    Popular items often have neighbouring ids, so ranks get about as many lookups. All ranks ask for
    the same ids at the same time, each for the vectors of all; gradients are summed over the ranks
    and come as sparse ones of a rank's own rows. Id 0 is padding and zero.

    A state dict holds the whole table, on rank 0; loading takes one from it on every rank.
    """

    def __init__(self, num_rows: int, width: int):
        """As nn.Embedding(num_rows, width, padding_idx=0), and from the same random numbers."""
        self.num_rows = num_rows
        super().__init__(len(range(rank(), num_rows, num_ranks())), width)

    def reset_parameters(self) -> None:
        self.draw(nn.init.normal_)

    @torch.no_grad()
    def draw(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill the rows with what `fill` would write into the whole table, without ever having it.

        `fill` draws from the global generator. Of chunks that are long, and 16 rows or a multiple,
        torch draws what it draws for a whole.
        """
        starts = range(0, max(1, self.num_rows - CHUNK_ROWS), CHUNK_ROWS)
        for start, end in itertools.pairwise([*starts, self.num_rows]):
            chunk = self.weight.new_empty(end - start, self.embedding_dim)
            fill(chunk)
            part = chunk[(rank() - start) % num_ranks() :: num_ranks()]
            first = -(-(start - rank()) // num_ranks())
            self.weight[first : first + len(part)] = part
        if rank() == 0:
            self.weight[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """(n,) int64 in 0..num_rows - 1, the same on all ranks -> (n, D)."""
        return _Lookup.apply(self.weight, ids)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = gather_table(self.weight.detach(), self.num_rows)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *_: Any) -> None:
        self.weight.copy_(own_rows(state_dict[prefix + "weight"]))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        places = ((ids % num_ranks() == rank()) & (ids > 0)).nonzero()[:, 0]
        rows = ids[places] // num_ranks()
        ctx.save_for_backward(places, rows)
        ctx.num_rows = len(weight)
        vectors = weight.new_zeros(len(ids), weight.shape[1])
        vectors[places] = weight[rows]
        sum_over_ranks([vectors])  # of one vector and zeros: to the bit what the owner has
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        places, rows = ctx.saved_tensors
        grad = grad.clone()
        sum_over_ranks([grad])
        return _sparse_rows(rows, grad[places], ctx.num_rows), None


def own_rows(table: Tensor) -> Tensor:
    """A view of the rows of a whole table that are this rank's."""
    return table[rank() :: num_ranks()]


def gather_table(shard: Tensor, num_rows: int) -> Tensor:
    """The whole table that ranks hold `own_rows` of, on the CPU of rank 0; elsewhere its shape.

    Chunk by chunk: a device never holds more than a chunk of it.
    """
    shape = num_rows, *shard.shape[1:]
    table = torch.empty(shape, dtype=shard.dtype, device="cpu" if rank() == 0 else "meta")
    longest = -(-num_rows // num_ranks())
    for start in range(0, longest, CHUNK_ROWS):
        chunk = shard.new_zeros(min(CHUNK_ROWS, longest - start), *shard.shape[1:])
        part = shard[start : start + CHUNK_ROWS]
        chunk[: len(part)] = part
        chunks = [torch.empty_like(chunk) for _ in range(num_ranks())] if rank() == 0 else None
        with _meeting():
            dist.gather(chunk, chunks)
        for owner, rows in enumerate(chunks or ()):
            own = table[owner :: num_ranks()][start : start + CHUNK_ROWS]
            own.copy_(rows[: len(own)])
    return table


def keep_own_items(chunks: Iterable[Tensor]) -> Tensor:
    """Of the rows of items 1, 2, ... in order, (c, D) at a time, those that `own_rows` keeps."""
    kept, first = [], 1
    for chunk in chunks:
        kept.append(chunk[(rank() - first) % num_ranks() :: num_ranks()].clone())
        first += len(chunk)
    return torch.cat(kept)


def ranks_over_shards(
    target_ranks: Callable[..., Tensor],
    items: Tensor,
    queries: Tensor,
    target_ids: Tensor,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As DotProductSimilarity.target_ranks, (B,), where each rank has some of the items.

    All queries go to all ranks. Each counts its own items that are above a query's target, which is
    put behind them; the counts add up.

    Args:
        target_ranks: that function.
        items: of this rank, from `keep_own_items`.
        queries: (B, D) of this rank; B may differ, or be 0.
        target_ids: (B,) int64.
        targets: (B, D), the targets' rows of the catalogue.
        seen: item ids (V,) and offsets (B + 1,), or None.
    """
    counts = [count for (count,) in tell([len(queries)])]
    queries, target_ids, targets = map(gather_rows, (queries, target_ids, targets))
    lines = torch.arange(len(queries), device=items.device)
    # A query leaves out its seen items and its target, which stands behind all items.
    left_out, owners = [target_ids], [lines]
    if seen is not None:
        left_out.append(gather_rows(seen[0]))
        owners.append(lines.repeat_interleave(gather_rows(seen[1].diff())))
    ids, owners = torch.cat(left_out), torch.cat(owners)
    is_here = ids % num_ranks() == rank()
    rows, owners = (ids[is_here] - (rank() or num_ranks())) // num_ranks(), owners[is_here]
    num_items = torch.tensor(len(items), device=items.device)
    above = [lines[:0]]
    for first in range(0, len(queries), SHARDED_QUERIES):
        stop = min(first + SHARDED_QUERIES, len(queries))
        is_own = (owners >= first) & (owners < stop)
        own_lines = lines[: stop - first]  # each leaves out the others' targets, too
        others = (own_lines[:, None] != own_lines).nonzero()  # (b (b - 1), 2)
        own, order = torch.cat([owners[is_own] - first, others[:, 0]]).sort(stable=True)
        left = torch.cat([rows[is_own], len(items) + others[:, 1]])[order]
        offsets = F.pad(own.bincount(minlength=stop - first).cumsum(0), (1, 0))
        candidates = torch.cat([items, targets[first:stop]])
        places = len(items) + own_lines
        above.append(target_ranks(queries[first:stop], candidates, places, (left, offsets)) - 1)
    above = torch.cat(above)
    sum_over_ranks([above, num_items])
    return (above.split(counts)[rank()] + 1).clamp_max(num_items)  # NaN is last on each rank
