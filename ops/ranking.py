"""Ranks and top-k over a whole catalogue, tile by tile; `dot_product_similarity` defines both.

A tile of scores is used while it lies in the CPU's cache, so that memory follows the tile instead
of B times X (benchmarks/ranking_speed.py has its speed).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TIE, MISS = 1e-6, 1 << 62  # as in dot_product_similarity.py
# Scores of a tile, 8 MB of float32, and its items.
TILE_SCORES, TILE_ITEMS = 1 << 21, 1 << 12
GPU_TILE_FACTOR = 32  # of both: a GPU is faster with few kernels than with cached scores

Seen = tuple[Tensor, Tensor]


def target_ranks(
    queries: Tensor, items: Tensor, target_rows: Tensor, seen: Seen | None = None
) -> Tensor:
    """As `DotProductSimilarity.target_ranks`.

    Raises:
        ValueError: a target lies outside 0..X-1; on a GPU this is not looked for.
    """
    X, is_on_cpu = len(items), items.device.type == "cpu"  # a GPU would have to wait for this
    if is_on_cpu and len(target_rows) and not 0 <= target_rows.min() <= target_rows.max() < X:
        raise ValueError(f"target rows must lie in 0..{X - 1}")
    ranks = count_above(queries, items, (queries * items[target_rows]).sum(1), seen)
    return ranks if seen is None else ranks.masked_fill_(is_among(seen, target_rows), MISS)


def is_among(seen: Seen, target_rows: Tensor) -> Tensor:
    """(B,) bool, True where a query's target is one of its seen items."""
    rows, offsets = seen
    counts = F.pad((rows == target_rows[_lines(seen)]).cumsum(0), (1, 0))[offsets]
    return counts.diff() > 0


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
    is_on_cpu = items.device.type == "cpu"
    factor = 1 if is_on_cpu else GPU_TILE_FACTOR
    width = min(max(1, len(items)), factor * TILE_ITEMS)
    size = max(1, factor * TILE_SCORES // width)
    # One more than the scores: there a GPU puts the items that are not in the tile.
    buffer = queries.new_empty(min(size, len(queries)) * width + 1)
    for start in range(0, len(queries), size):
        part = slice(start, min(start + size, len(queries)))
        b = part.stop - start
        places = None
        if seen is not None and is_on_cpu:
            places = _seen_places(seen, part, len(items), width)
        for number, first in enumerate(range(0, len(items), width)):
            tile_items = items[first : first + width]
            tile = buffer[: b * len(tile_items)].view(b, -1)
            torch.mm(queries[part], tile_items.T, out=tile)
            if seen is not None:
                here = places[number] if is_on_cpu else _all_seen_places(seen, part, first, tile)
                buffer[: tile.numel() + 1].index_fill_(0, here, -torch.inf)
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


def _all_seen_places(seen: Seen, part: slice, first: int, tile: Tensor) -> Tensor:
    """(V,) the flat index of each seen item in the tile (b, n) of these queries; b * n: outside.

    Of all queries, whatever the tile: so a GPU need not wait for how many there are in it.
    """
    (b, n), columns, lines = tile.shape, seen[0] - first, _lines(seen) - part.start
    is_inside = (columns >= 0) & (columns < n) & (lines >= 0) & (lines < b)
    return torch.where(is_inside, lines * n + columns, b * n)


def _lines(seen: Seen) -> Tensor:
    """(V,) int64, the query of each seen row."""
    rows, offsets = seen
    lines = torch.arange(len(offsets) - 1, device=rows.device)
    return lines.repeat_interleave(offsets.diff(), output_size=len(rows))


def _merge_best(best_scores: Tensor, best_rows: Tensor, tile: Tensor, first: int) -> None:
    """Update (b, k) in place by a tile's scores (b, n), whose first item is row `first`."""
    k, lines = best_scores.shape[1], slice(None)
    if tile.device.type == "cpu":  # a GPU would have to wait for their number
        # After the first tiles, few queries have anything better here.
        lines = (~(tile.amax(1) <= best_scores[:, -1])).nonzero()[:, 0]
    values, columns = tile[lines].topk(min(k, tile.shape[1]), 1)
    values = torch.cat([best_scores[lines], values], 1)
    rows = torch.cat([best_rows[lines], first + columns], 1)
    best_scores[lines], best = values.topk(k, 1)
    best_rows[lines] = rows.gather(1, best)
