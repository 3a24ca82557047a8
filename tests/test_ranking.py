"""Ranking tile by tile against its definition, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from test_dot_product_similarity import D, K, X, make_case, seen_sets, slow_ranks, slow_scores
from torch.nn.functional import normalize

from ops import ranking


@pytest.mark.parametrize("row", [-1, X])
def test_a_target_outside_the_catalogue_is_refused(row):
    queries, items, targets, _ = make_case(1)
    targets[6] = row
    with pytest.raises(ValueError, match=rf"0\.\.{X - 1}"):
        ranking.target_ranks(queries, items, targets)


TILES = [(1, 1), (2, 2), (3, 8), (4, 4), (X - 1, 3 * X), (X, 2 * X), (5, 1 << 20)]


def make_tiles_small(monkeypatch, tile_items: int, chunk: int) -> None:
    monkeypatch.setattr(ranking, "TILE_ITEMS", tile_items)
    monkeypatch.setattr(ranking, "TILE_SCORES", chunk)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tile_items", "chunk"), TILES)
def test_tiles_do_not_change_results(monkeypatch, tile_items, chunk, seed):
    queries, items, targets, seen = make_case(seed, span=1)
    rows, offsets = seen
    targets[0] = rows[offsets[1] - 1]  # a seen target, if the first query has seen any
    make_tiles_small(monkeypatch, tile_items, chunk)
    ranks = ranking.target_ranks(queries, items, targets, seen)
    assert ranks.tolist() == slow_ranks(queries, items, targets, seen)
    assert ranking.target_ranks(queries, items, targets).tolist() == slow_ranks(
        queries, items, targets
    )
    for k in (1, K, X + 3):
        scores, top = ranking.top_k(queries, items, k, seen)
        for b, row in enumerate(slow_scores(queries.tolist(), items.tolist())):
            left = {x: row[x] for x in set(range(X)) - seen_sets(seen)[b]}
            found = min(k, len(left))
            assert scores[b, :found].tolist() == sorted(left.values(), reverse=True)[:found]
            assert len(set(top[b, :found].tolist())) == found
            assert [left[x] for x in top[b, :found].tolist()] == scores[b, :found].tolist()
            assert set(top[b, found:].tolist()) <= {-1}


@pytest.mark.parametrize(("tile_items", "chunk"), TILES)
def test_no_number_ranks_last_and_comes_first_in_any_tile(monkeypatch, tile_items, chunk):
    make_tiles_small(monkeypatch, tile_items, chunk)
    queries, items = torch.ones(3, D), torch.arange(1.0, X + 1)[:, None].expand(X, D).clone()
    queries[1] = torch.nan
    items[X - 2] = torch.nan
    ranks = ranking.target_ranks(queries, items, torch.tensor([X - 1, 0, X - 2]))
    assert ranks.tolist() == [2, X, X]  # the item that is no number is not below any target
    assert ranking.top_k(queries, items, 2)[1][0].tolist() == [X - 2, X - 1]


@pytest.mark.parametrize("num_queries", [1, 2, 17])
@pytest.mark.parametrize("width", [31, 64, 100])
@pytest.mark.parametrize("tile_items", [64, 128, 4096])
def test_equal_embeddings_tie_wherever_they_stand(monkeypatch, tile_items, width, num_queries):
    make_tiles_small(monkeypatch, tile_items, 16 * tile_items)
    for target in range(0, 149, 4):  # other vectors each time: not all are rounded
        generator = torch.Generator().manual_seed(target)
        queries = normalize(torch.randn(num_queries, width, generator=generator))
        items = normalize(torch.randn(1, width, generator=generator)).expand(149, -1).contiguous()
        ranks = ranking.target_ranks(queries, items, torch.full((num_queries,), target))
        assert ranks.tolist() == [149] * num_queries


@pytest.mark.parametrize("num_items", [896, 1000, 1805, 2000])
def test_the_top_of_several_tiles_is_the_top_of_all(monkeypatch, num_items):
    make_tiles_small(monkeypatch, 896, 4 * 896)
    generator = torch.Generator().manual_seed(num_items)
    queries, items = (torch.randn(n, D, generator=generator) for n in (9, num_items))
    items[num_items - 3] = torch.nan
    rows = torch.randint(0, num_items, (9 * 50,), generator=generator)
    scores, found = ranking.top_k(queries, items, K, (rows, 50 * torch.arange(10)))
    expected = queries @ items.T
    expected[torch.arange(9).repeat_interleave(50), rows] = -torch.inf
    torch.testing.assert_close(scores, expected.topk(K, 1).values, equal_nan=True)
    torch.testing.assert_close(scores, expected.gather(1, found), equal_nan=True)
    assert all(len(set(line)) == K for line in found.tolist())


@pytest.mark.parametrize("first", [0, 3, 6])
def test_a_gpu_finds_the_seen_items_of_a_tile_among_all(first):
    """Items first..first + 2 for queries 1 and 2 of three; what is outside shares a place."""
    rows, offsets = torch.tensor([0, 4, 1, 4, 6, 7, 0, 5]), torch.tensor([0, 2, 5, 8])
    tile = torch.zeros(2, 3)
    places = ranking._all_seen_places((rows, offsets), slice(1, 3), first, tile)
    expected = torch.zeros(3, 9, dtype=torch.bool)
    expected[ranking._lines((rows, offsets)), rows] = True
    found = torch.zeros(7, dtype=torch.bool).index_fill(0, places, True)
    assert torch.equal(found[:6].view(2, 3), expected[1:, first : first + 3])
