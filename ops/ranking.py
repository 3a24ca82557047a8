"""Ranks and top-k over a whole catalogue, tile by tile; `dot_product_similarity` defines both.

A tile of scores is used while it lies in the CPU's cache, so that memory follows the tile instead
of B times X (benchmarks/ranking_speed.py has its speed).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TIE, MISS = 1e-6, 1 << 62  # as in dot_product_similarity.py
# Scores of a tile, 8 MB of float32, and its items.
TILE_SCORES, TILE_ITEMS = 1 << 21, 1 << 12
CUDA_TILE_FACTOR = 32  # of both: a GPU is faster with few kernels than with cached scores

Seen = tuple[Tensor, Tensor]


def target_ranks(
    queries: Tensor, items: Tensor, target_rows: Tensor, seen: Seen | None = None
) -> Tensor:
    """As `DotProductSimilarity.target_ranks`.

    Raises:
        ValueError: a target lies outside 0..X-1.
    """
    X = len(items)
    if len(target_rows) and not 0 <= int(target_rows.min()) <= int(target_rows.max()) < X:
        raise ValueError(f"target rows must lie in 0..{X - 1}")
    ranks = count_above(queries, items, (queries * items[target_rows]).sum(1), seen)
    return ranks if seen is None else ranks.masked_fill_(is_among(seen, target_rows), MISS)


def is_among(seen: Seen, target_rows: Tensor) -> Tensor:
    """(B,) bool, True where a query's target is one of its seen items."""
    lines = _lines(seen)
    found = lines[seen[0] == target_rows[lines]]
    return torch.bincount(found, minlength=len(target_rows)) > 0


def count_above(queries: Tensor, items: Tensor, scores: Tensor, seen: Seen | None = None) -> Tensor:
    """(B,) int64: how many items, without `seen`, score not below `scores` (B,) or tie."""
    num_below = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    # No score is below the limit of a NaN, but for -inf: that of a seen item.
    limits = (scores - TIE).nan_to_num(nan=torch.finfo(scores.dtype).min)[:, None]
    for part, _, tile in _tiles(queries, items, seen):
        # In place, and floats: a bool mask and its sum take longer than the product.
        num_below[part] += tile.lt_(limits[part]).sum(1, dtype=torch.float32).long()
    return len(items) - num_below


def top_k(
    queries: Tensor, items: Tensor, k: int, seen: Seen | None = None
) -> tuple[Tensor, Tensor]:
    """As `DotProductSimilarity.top_k`."""
    best_scores = queries.new_full((len(queries), k), -torch.inf)
    best_rows = torch.full((len(queries), k), -1, device=queries.device)
    for part, first, tile in _tiles(queries, items, seen):
        _merge_best(best_scores[part], best_rows[part], tile, first)
    return best_scores, best_rows.masked_fill_(best_scores == -torch.inf, -1)


@torch.no_grad()
def _tiles(
    queries: Tensor, items: Tensor, seen: Seen | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """Some queries, the first of some items, and their scores (b, n); those of seen items -inf."""
    factor = CUDA_TILE_FACTOR if items.is_cuda else 1
    width = min(max(1, len(items)), factor * TILE_ITEMS)
    size = max(1, factor * TILE_SCORES // width)
    buffer = queries.new_empty(min(size, len(queries)) * width)
    for start in range(0, len(queries), size):
        part = slice(start, min(start + size, len(queries)))
        b = part.stop - start
        places = None if seen is None else _seen_places(seen, part, len(items), width)
        for number, first in enumerate(range(0, len(items), width)):
            tile_items = items[first : first + width]
            tile = buffer[: b * len(tile_items)].view(b, -1)
            torch.mm(queries[part], tile_items.T, out=tile)
            if places is not None:
                tile.view(-1).index_fill_(0, places[number], -torch.inf)
            yield part, first, tile


def _seen_places(seen: Seen, part: slice, num_items: int, width: int) -> list[Tensor]:
    """Flat indices of the seen items in each tile of these queries."""
    rows, offsets = seen
    bounds = offsets[part.start : part.stop + 1]
    rows = rows[int(bounds[0]) : int(bounds[-1])]
    lines = _lines((rows, bounds))
    tiles = rows // width
    widths = (num_items - tiles * width).clamp_max(width)  # the last tile is narrower
    places = lines * widths + rows - tiles * width
    if width >= num_items:
        return [places]
    order = tiles.argsort()
    counts = tiles.bincount(minlength=-(-num_items // width))
    return list(places[order].split(counts.tolist()))


def _lines(seen: Seen) -> Tensor:
    """(V,) int64, the query of each seen row."""
    rows, offsets = seen
    lines = torch.arange(len(offsets) - 1, device=rows.device)
    return lines.repeat_interleave(offsets.diff(), output_size=len(rows))


def _merge_best(best_scores: Tensor, best_rows: Tensor, tile: Tensor, first: int) -> None:
    """Update (b, k) in place by a tile's scores (b, n), whose first item is row `first`."""
    k, lines = best_scores.shape[1], torch.arange(len(tile), device=tile.device)
    if not tile.is_cuda:  # a GPU would have to wait for their number
        # After the first tiles, few queries have anything better here.
        lines = lines[~(tile.amax(1) <= best_scores[:, -1])]
    values, columns = tile[lines].topk(min(k, tile.shape[1]), 1)
    values = torch.cat([best_scores[lines], values], 1)
    rows = torch.cat([best_rows[lines], first + columns], 1)
    best_scores[lines], best = values.topk(k, 1)
    best_rows[lines] = rows.gather(1, best)
