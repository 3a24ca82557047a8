"""Queries against items: scores, ranks of targets, top-k. Letters as in simplified_hstu.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Scores held at once, 8 MB of float32: each pass over them finds them in the last cache, and their
# queries are enough to find the best on two cores.
CHUNK_SCORES = 1 << 21
TILE_ITEMS = 1 << 12
# BLAS may round the last columns otherwise than the ones before, and then an item with the target's
# embedding would not tie with it: tiles end at a multiple of the columns that it takes at a time.
TILE_STEP = 64
# A GPU wants few launches more than it wants cached scores: as many times longer tiles.
CUDA_TILE_FACTOR = 32
# Columns that share a maximum; for the 10 best of 4,096, 4 and 12 were no faster.
GROUP = 8


class DotProductSimilarity(nn.Module):
    """Inner product of queries and items; ranks and top-k over a whole catalogue, tile by tile.

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
        return self._walk(queries, items, seen, target_rows=target_rows)[0]

    def top_k(
        self, queries: Tensor, items: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and rows of each query's k best items, best first.

        Args as `target_ranks`.

        Returns:
            (B, k) float and (B, k) int64; where fewer than k items are left, -inf and -1.

        Equal scores come in any order, and any of them may take the last place. NaN comes first.
        """
        return self._walk(queries, items, seen, k=k)[1:]

    def sample_scores(
        self, queries: Tensor, items: Tensor, target_rows: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Scores of each query's target, and of one other item, each as likely; (B,) and (B,).

        `generator`: of the CPU. Where there is one item only, it is the other one too.
        """
        shifts = torch.randint(1, max(2, len(items)), target_rows.shape, generator=generator)
        other_rows = (target_rows + shifts.to(items.device)) % len(items)
        of_targets = (queries * items[target_rows]).sum(1)
        return of_targets, (queries * items[other_rows]).sum(1)

    @torch.no_grad()
    def _walk(
        self,
        queries: Tensor,
        items: Tensor,
        seen: tuple[Tensor, Tensor] | None,
        k: int = 0,
        target_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks (B,), and scores and rows (B, k); the ranks mean nothing without `target_rows`."""
        X, (size, width) = len(items), _tile_shape(items)
        if width > X:
            items = pad(items, (0, 0, 0, width - X))
        num_below = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        best_scores = queries.new_full((len(queries), k), -torch.inf)
        best_rows = torch.full((len(queries), k), -1, device=queries.device)
        buffer = queries.new_empty(max(2, min(size, len(queries))), width)
        for part, block in self._chunks(queries, items):
            b, targets, target_scores = len(block), None, None
            # BLAS treats a lone query as a vector, and then rounds by the place an item has.
            block = block if b > 1 else block.expand(2, -1)
            tile = buffer[: len(block)]
            line = torch.arange(b, device=items.device)
            best = best_scores[part], best_rows[part]
            seen_places = _seen_places(seen, part, items) if seen else None
            if target_rows is not None:
                targets = target_rows[part]
                target_places = _places(line, targets, b, items)
                target_scores = _target_scores(block, items, targets) if width < X else None
            for index, first in enumerate(range(0, X, width)):
                # The last tile reaches back, as all must have one shape: see _target_scores.
                start = min(first, len(items) - width)
                torch.mm(block, items[start : start + width].T, out=tile)
                scores = tile[:b, first - start : X - start]
                if targets is not None and target_scores is None:
                    target_scores = scores.gather(1, targets[:, None])  # (b, 1)
                if seen:
                    tile.view(-1).index_fill_(0, seen_places[index], -torch.inf)
                if k:
                    # All columns, for whole groups; no item is found twice, or where none is.
                    tile[:b, : first - start] = tile[:b, X - start :] = -torch.inf
                    _keep_best(*best, tile[:b], start)
                if targets is not None:
                    tile.view(-1).index_fill_(0, target_places[index], -torch.inf)
                    # In place, and floats: a bool mask and its sum take longer than the product.
                    num_below[part] += scores.lt_(target_scores).sum(1, dtype=torch.float32).long()
        # The target itself is below, unless nothing can be: its score is NaN or -inf.
        ranks = (X + 1 - num_below).clamp_max(X)
        return ranks, best_scores, best_rows.masked_fill_(best_scores == -torch.inf, -1)

    def _chunks(self, queries: Tensor, items: Tensor) -> Iterator[tuple[slice, Tensor]]:
        size = _tile_shape(items)[0]
        for start in range(0, len(queries), size):
            part = slice(start, min(start + size, len(queries)))
            yield part, queries[part]


def _tile_shape(items: Tensor) -> tuple[int, int]:
    """Queries and items whose scores are held at once; fewer queries if the call has fewer."""
    factor = CUDA_TILE_FACTOR if items.is_cuda else 1
    width = min(-(-max(1, len(items)) // TILE_STEP) * TILE_STEP, factor * TILE_ITEMS)
    return max(1, factor * CHUNK_SCORES // width), width


def _seen_places(seen: tuple[Tensor, Tensor], part: slice, items: Tensor) -> list[Tensor]:
    rows, offsets = seen
    bounds = offsets[part.start : part.stop + 1]
    rows = rows[int(bounds[0]) : int(bounds[-1])]
    b = len(bounds) - 1
    lines = torch.arange(b, device=rows.device)
    return _places(lines.repeat_interleave(bounds.diff(), output_size=len(rows)), rows, b, items)


def _places(lines: Tensor, rows: Tensor, b: int, items: Tensor) -> list[Tensor]:
    """For each tile of b queries, the flat places in it of the pairs of a line and an item."""
    X, width = len(items), _tile_shape(items)[1]
    places = lines * width + rows
    if width >= X:
        return [places]
    tiles = rows // width
    places += tiles * (b * width) - (tiles * width).clamp_max(X - width)
    places = places.sort().values
    ends = torch.arange(b * width, b * X, b * width, device=rows.device)
    parts = places.tensor_split(torch.searchsorted(places, ends).tolist())
    return [part - tile * b * width for tile, part in enumerate(parts)]


def _target_scores(block: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
    """(b, 1), by a matmul of a tile's shape.

    BLAS may round another shape's scores otherwise, and then the target and an item with the same
    embedding would not tie.
    """
    width = _tile_shape(items)[1]
    parts = [pad(rows, (0, width - len(rows))) for rows in target_rows.split(width)]
    scores = torch.cat([block @ items[rows].T for rows in parts], 1)
    return scores.diagonal()[: len(target_rows), None]


def _keep_best(best_scores: Tensor, best_rows: Tensor, scores: Tensor, first: int) -> None:
    """Update (b, k) in place by a tile's scores (b, n), whose first item is row `first`."""
    K, n = best_scores.shape[1], scores.shape[1]
    k = min(K, n)
    if not first:
        best_scores[:, :k], best_rows[:, :k] = _top_columns(scores, k)
        return
    # Few lines have something better here: maxima of groups say which, and where.
    size = TILE_STEP if n % TILE_STEP == 0 and n >= 2 * k * TILE_STEP else 1
    groups = scores.unflatten(1, (-1, size))  # (b, n / size, size)
    maxima = groups.amax(2)
    lines = torch.arange(len(scores), device=scores.device)
    if not scores.is_cuda:  # A GPU would have to wait for their number.
        lines = lines[~(maxima.amax(1) <= best_scores[:, -1])]
    best = _top_columns(maxima[lines], k)[1]  # (b', k) groups
    values = groups.flatten(0, 1)[best + lines[:, None] * (n // size)].flatten(1)  # (b', k * size)
    values, columns = _top_columns(values, k)
    rows = first + best.gather(1, columns // size) * size + columns % size
    values = torch.cat([best_scores[lines], values], 1)
    rows = torch.cat([best_rows[lines], rows], 1)
    best_scores[lines], best = values.topk(K, 1)
    best_rows[lines] = rows.gather(1, best)


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As scores.topk(k, 1), but faster over long rows: the best groups by their maxima first."""
    groups = scores.shape[1] // GROUP
    if groups < 2 * k:
        return scores.topk(k, 1)
    firsts = torch.arange(0, GROUP * groups, groups, device=scores.device)
    rest = torch.arange(GROUP * groups, scores.shape[1], device=scores.device)
    maxima = scores[:, : GROUP * groups].unflatten(1, (GROUP, groups)).amax(1)
    best = _top_columns(maxima, k)[1]
    columns = (best[:, None] + firsts[:, None]).flatten(1)  # (b, GROUP * k)
    columns = torch.cat([columns, rest.expand(len(scores), -1)], 1)
    values, best = scores.gather(1, columns).topk(k, 1)
    return values, columns.gather(1, best)
