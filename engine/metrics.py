"""Ranks of targets to HR@K, NDCG@K and MRR, one relevant item per query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dot_product_similarity import MISS

CUTOFFS = (10, 50, 200)


def hit(ranks: Tensor, k: int) -> Tensor:
    """1 for a rank within k, else 0."""
    return (ranks <= k).double()


def gain(ranks: Tensor, k: int) -> Tensor:
    """1 / log2(1 + rank) within k, else 0: NDCG's value where one item is relevant."""
    return hit(ranks, k) / torch.log2(1.0 + ranks)


# Name -> value of each rank at a cut-off. Another metric is one more entry.
METRICS: dict[str, Callable[[Tensor, int], Tensor]] = {"HR": hit, "NDCG": gain}


def ranking_metrics(ranks: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over queries: "HR@10", "NDCG@10", ... for each metric and cut-off K, and "MRR".

    `ranks`: (n,) int64, 1 is best, MISS adds 0 to each metric; n > 0.
    """
    ranks, result = ranks.double().masked_fill(ranks >= MISS, torch.inf), {}
    for k in cutoffs:
        result |= {f"{name}@{k}": f(ranks, k).mean().item() for name, f in METRICS.items()}
    return result | {"MRR": (1.0 / ranks).mean().item()}
