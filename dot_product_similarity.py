"""Queries against items as it is defined: scores, ranks of targets, top-k.

Letters as in simplified_hstu.py. Here an item is a row 0..X-1 of `items`; mapping rows to ids is
the caller's. `ops/ranking.py` ranks the same without ever holding all scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Scores this close tie: one dot product is rounded differently in matrix products of other shapes.
TIE = 1e-6
# The rank of a target that is left out of the ranking: a miss at every cut-off.
MISS = 1 << 62


class DotProductSimilarity(nn.Module):
    """Inner product of queries and items, with what follows from it."""

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """(B, D), (X, D) -> (B, X)."""
        return queries @ items.T

    def target_ranks(
        self,
        queries: Tensor,
        items: Tensor,
        target_rows: Tensor,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Rank of each query's target among all items, 1 is best.

        Args:
            queries: (B, D) float32 of length 1.
            items: (X, D) float32 of length 1.
            target_rows: (B,) int64 in 0..X-1.
            seen: items to leave out, as flat rows (V,) int64 and offsets (B + 1,) int64.

        Returns:
            (B,) int64 in 1..X; MISS where the target is left out, as in the top-k.

        Ties and NaN count against the target: a model that scores every item alike, or whose scores
        are no numbers, must look bad.
        """
        scores = self(queries, items)  # (B, X)
        own = target_rows[:, None]  # (B, 1)
        is_above = ~(scores < scores.gather(1, own) - TIE)  # (B, X)
        is_seen = torch.zeros_like(is_above)
        if seen:
            is_seen[_lines(seen), seen[0]] = True
        ranks = 1 + (is_above & ~is_seen).scatter_(1, own, False).sum(1)
        return ranks.masked_fill(is_seen.gather(1, own)[:, 0], MISS)

    def top_k(
        self, queries: Tensor, items: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and rows of each query's k best items, best first; arguments as `target_ranks`.

        Returns:
            (B, k) float and (B, k) int64; where fewer than k items are left, -inf and -1.

        Equal scores come in any order, and any of them may take the last place. NaN comes first.
        """
        scores = self(queries, items)  # (B, X)
        if seen:
            scores[_lines(seen), seen[0]] = -torch.inf
        missing = max(0, k - len(items))
        scores, rows = nn.functional.pad(scores, (0, missing), value=-torch.inf).topk(k, 1)
        return scores, rows.masked_fill(scores == -torch.inf, -1)

    def sample_scores(
        self, queries: Tensor, items: Tensor, target_rows: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Scores of each query's target, and of one other item, each as likely; (B,) and (B,).

        `generator`: of the CPU. Where there is one item only, it is the other one too.
        """
        shifts = torch.randint(1, max(2, len(items)), target_rows.shape, generator=generator)
        other_rows = (target_rows + shifts.to(items.device, non_blocking=True)) % len(items)
        target_scores = (queries * items[target_rows]).sum(1)
        return target_scores, (queries * items[other_rows]).sum(1)


def _lines(seen: tuple[Tensor, Tensor]) -> Tensor:
    """(V,) int64, the query of each seen row."""
    rows, offsets = seen
    lines = torch.arange(len(offsets) - 1, device=rows.device)
    return lines.repeat_interleave(offsets.diff(), output_size=len(rows))
