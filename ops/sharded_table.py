"""An item table over several processes: each has a part of its rows, and of their moments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.collectives import (
    all_gather_ints,
    all_gather_rows,
    all_reduce,
    rank,
    sparse_rows,
    waiting_for_others,
    world_size,
)
from ops.ranking import MISS, count_above, is_among

# Rows of a sharded table that one message carries, or that are drawn at once: 16 MB of 64 numbers.
CHUNK_ROWS = 1 << 16


class ShardedEmbedding(nn.Embedding):
    """A table of which each of n processes has every n-th row: id i is row i // n of rank i % n.

    Popular items often have neighbouring ids, so processes get about as many lookups. All processes
    look up the same ids at the same time, and get the vectors of all of them; a process's gradient
    is a sparse one of its own rows, summed over the processes. Id 0 is padding and zero.

    The main process's state dict has the whole table; every process loads from a whole one.
    """

    def __init__(self, num_rows: int, width: int):
        """As nn.Embedding(num_rows, width, padding_idx=0), and from the same random numbers."""
        self.num_rows = num_rows
        super().__init__(len(range(rank(), num_rows, world_size())), width)

    def reset_parameters(self) -> None:
        self.draw(nn.init.normal_)

    @torch.no_grad()
    def draw(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill the rows with what `fill` would write into a whole table, which never exists.

        `fill` draws from the global generator. In long chunks of a multiple of 16 rows, torch
        draws what it draws for the whole.
        """
        starts = range(0, max(1, self.num_rows - CHUNK_ROWS), CHUNK_ROWS)
        for start, end in itertools.pairwise([*starts, self.num_rows]):
            chunk = self.weight.new_empty(end - start, self.embedding_dim)
            fill(chunk)
            part = chunk[(rank() - start) % world_size() :: world_size()]
            first = -(-(start - rank()) // world_size())
            self.weight[first : first + len(part)] = part
        if rank() == 0:
            self.weight[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """(n,) int64 in 0..num_rows - 1, the same on all processes -> (n, D)."""
        return _Lookup.apply(self.weight, ids)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = gather_table(self.weight.detach(), self.num_rows)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *_: Any) -> None:
        self.weight.copy_(own_rows(state_dict[prefix + "weight"]))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        places = ((ids % world_size() == rank()) & (ids > 0)).nonzero()[:, 0]
        rows = ids[places] // world_size()
        ctx.save_for_backward(places, rows)
        ctx.num_rows = len(weight)
        vectors = weight.new_zeros(len(ids), weight.shape[1])
        vectors[places] = weight[rows]
        all_reduce([vectors])  # of one vector and zeros: to the bit what the owner has
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        places, rows = ctx.saved_tensors
        grad = grad.clone()
        all_reduce([grad])
        return sparse_rows(rows, grad[places], ctx.num_rows), None


def own_rows(table: Tensor) -> Tensor:
    """A view of the rows of a whole table that are this process's."""
    return table[rank() :: world_size()]


def gather_table(shard: Tensor, num_rows: int) -> Tensor:
    """The whole table of all `own_rows`, on the main process's CPU; on others only its shape.

    Chunk by chunk: a device never has more than a chunk of it.
    """
    shape = num_rows, *shard.shape[1:]
    table = torch.empty(shape, dtype=shard.dtype, device="cpu" if rank() == 0 else "meta")
    longest = -(-num_rows // world_size())
    for start in range(0, longest, CHUNK_ROWS):
        chunk = shard.new_zeros(min(CHUNK_ROWS, longest - start), *shard.shape[1:])
        part = shard[start : start + CHUNK_ROWS]
        chunk[: len(part)] = part
        chunks = [torch.empty_like(chunk) for _ in range(world_size())] if rank() == 0 else None
        with waiting_for_others():
            dist.gather(chunk, chunks)
        for owner, rows in enumerate(chunks or ()):
            own = table[owner :: world_size()][start : start + CHUNK_ROWS]
            own.copy_(rows[: len(own)])
    return table


def keep_own_items(chunks: Iterable[Tensor]) -> Tensor:
    """This process's rows, of those of items 1, 2, ... in order, (c, D) at a time."""
    own, first = [], 1
    for chunk in chunks:
        own.append(chunk[(rank() - first) % world_size() :: world_size()].clone())
        first += len(chunk)
    return torch.cat(own)


def sharded_target_ranks(
    queries: Tensor,
    items: Tensor,
    target_ids: Tensor,
    target_scores: Tensor,
    seen: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As `ops.ranking.target_ranks`, (B,), where each process has some of the items.

    All queries go to all processes; each counts its own items that are above, and counts add up.
    `queries`: (B, D) of this process, B may be 0. `items`: of `keep_own_items`. `target_ids`,
    `target_scores`: (B,). `seen`: item ids (V,) and offsets (B + 1,), or None.
    """
    counts = [count for (count,) in all_gather_ints([len(queries)])]
    own_seen = None
    if seen is not None:
        ids, lengths = all_gather_rows(seen[0]), all_gather_rows(seen[1].diff())
        lines = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)
        is_here = ids % world_size() == rank()
        per_query = lines[is_here].bincount(minlength=len(lengths))
        rows = (ids[is_here] - (rank() or world_size())) // world_size()
        own_seen = rows, F.pad(per_query.cumsum(0), (1, 0))
    above = count_above(all_gather_rows(queries), items, all_gather_rows(target_scores), own_seen)
    all_reduce([above])
    above = above.split(counts)[rank()]
    return above if seen is None else above.masked_fill(is_among(seen, target_ids), MISS)
