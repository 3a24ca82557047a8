"""Queries against items: scores, ranks of targets, top-k. Letters as in simplified_hstu.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Scores held at once, in floats: 32 MB.
CHUNK_SCORES = 1 << 23


class DotProductSimilarity(nn.Module):
    """Inner product of queries and items; ranks and top-k over a whole catalogue in chunks.

    In this module an item is a row 0..X-1 of `items`; mapping rows to ids is the caller's.
    """

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
            queries: (B, D) float.
            items: (X, D) float.
            target_rows: (B,) int64 in 0..X-1.
            seen: items to leave out, as flat rows (V,) int64 and offsets (B + 1,) int64; a target
                is never left out.

        Returns:
            (B,) int64 in 1..X.

        Raises:
            ValueError: a target lies outside 0..X-1.

        Ties and NaN count against the target: a model that scores every item alike, or whose scores
        are no numbers, must look bad.
        """
        if len(target_rows) and not 0 <= int(target_rows.min()) <= int(target_rows.max()) < len(
            items
        ):
            raise ValueError(f"target rows must lie in 0..{len(items) - 1}")
        ranks = [torch.empty(0, dtype=torch.int64, device=queries.device)]
        for part, scores in self._chunks(queries, items):
            targets = scores.gather(1, target_rows[part, None])  # (b, 1)
            _hide_seen(scores, part, seen)
            scores.scatter_(1, target_rows[part, None], targets)
            ranks.append(len(items) - (scores < targets).sum(1))
        return torch.cat(ranks)

    def top_k(
        self, queries: Tensor, items: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and rows of each query's k best items, best first.

        Args as `target_ranks`.

        Returns:
            (B, k) float and (B, k) int64; where fewer than k items are left, -inf and -1.
        """
        best_scores = queries.new_full((len(queries), k), -torch.inf)
        best_rows = torch.full((len(queries), k), -1, device=queries.device)
        found = min(k, len(items))
        for part, scores in self._chunks(queries, items):
            _hide_seen(scores, part, seen)
            top = scores.topk(found, dim=1)
            best_scores[part, :found] = top.values
            best_rows[part, :found] = top.indices.masked_fill(top.values == -torch.inf, -1)
        return best_scores, best_rows

    def _chunks(self, queries: Tensor, items: Tensor) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, CHUNK_SCORES // max(1, len(items)))
        for start in range(0, len(queries), size):
            part = slice(start, min(start + size, len(queries)))
            yield part, self(queries[part], items)


def _hide_seen(scores: Tensor, part: slice, seen: tuple[Tensor, Tensor] | None) -> None:
    """Set, in place, the scores of the seen items of queries `part` to -inf."""
    if seen is None:
        return
    rows, offsets = seen
    bounds = offsets[part.start : part.stop + 1]
    queries = torch.arange(len(bounds) - 1, device=scores.device)
    queries = queries.repeat_interleave(bounds.diff())
    scores[queries, rows[int(bounds[0]) : int(bounds[-1])]] = -torch.inf
