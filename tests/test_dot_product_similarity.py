"""Ranks and top-k against an obvious slow version."""

from __future__ import annotations

import pytest
import torch

import dot_product_similarity
from dot_product_similarity import DotProductSimilarity

B, X, D, K = 11, 29, 5, 7


def make_case(seed: int, span: int = 2):
    """Integer-valued vectors, so that scores are exact and many are equal; seen items; targets."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-span, span + 1, shape, generator=generator).float()

    queries, items = integers(B, D), integers(X, D)
    counts = torch.randint(0, 13, (B,), generator=generator)
    counts[3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    rows = torch.randint(0, X, (int(offsets[-1]),), generator=generator)  # with repeats
    targets = torch.randint(0, X, (B,), generator=generator)
    return queries, items, targets, (rows, offsets)


def slow_scores(queries, items):
    return [[sum(a * b for a, b in zip(q, i, strict=True)) for i in items] for q in queries]


def seen_sets(seen):
    rows, offsets = (part.tolist() for part in seen)
    return [set(rows[offsets[b] : offsets[b + 1]]) for b in range(len(offsets) - 1)]


def slow_ranks(queries, items, targets, seen=None):
    hidden = [set()] * len(queries) if seen is None else seen_sets(seen)
    ranks = []
    for b, scores in enumerate(slow_scores(queries.tolist(), items.tolist())):
        target = int(targets[b])
        rivals = [x for x in range(len(items)) if x != target and x not in hidden[b]]
        ranks.append(1 + sum(scores[x] >= scores[target] for x in rivals))
    return ranks


def test_scores_are_inner_products():
    queries, items, *_ = make_case(0)
    scores = DotProductSimilarity()(queries, items)
    assert scores.shape == (B, X)
    assert scores.tolist() == slow_scores(queries.tolist(), items.tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removes_seen", [False, True])
def test_ranks_equal_the_slow_version(seed, removes_seen):
    queries, items, targets, seen = make_case(seed)
    seen = seen if removes_seen else None
    ranks = DotProductSimilarity().target_ranks(queries, items, targets, seen)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == slow_ranks(queries, items, targets, seen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removes_seen", [False, True])
def test_the_top_k_equals_the_slow_version(seed, removes_seen):
    queries, items, _, seen = make_case(seed)
    hidden = seen_sets(seen) if removes_seen else [set()] * B
    scores, rows = DotProductSimilarity().top_k(queries, items, K, seen if removes_seen else None)
    assert scores.shape == rows.shape == (B, K)
    for b, row in enumerate(slow_scores(queries.tolist(), items.tolist())):
        left = {x: score for x, score in enumerate(row) if x not in hidden[b]}
        assert scores[b].tolist() == sorted(left.values(), reverse=True)[:K]
        # Equal scores may come in any order, but each row once, with its own score.
        assert len(set(rows[b].tolist())) == K
        assert [left[x] for x in rows[b].tolist()] == scores[b].tolist()


def test_ties_count_against_the_target():
    queries, items = torch.ones(2, D), torch.ones(X, D)
    ranks = DotProductSimilarity().target_ranks(queries, items, torch.tensor([0, X - 1]))
    assert ranks.tolist() == [X, X]


def test_scores_that_are_no_numbers_rank_last():
    queries, items = torch.ones(3, D), torch.ones(X, D)
    queries[1] = torch.nan
    items[4] = torch.nan
    ranks = DotProductSimilarity().target_ranks(queries, items, torch.tensor([0, 0, 4]))
    assert ranks.tolist() == [X, X, X]


def test_a_seen_target_keeps_its_rank():
    queries, items = torch.tensor([[1.0]]), torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    seen = torch.tensor([0, 2]), torch.tensor([0, 2])
    similarity = DotProductSimilarity()
    assert similarity.target_ranks(queries, items, torch.tensor([2])).tolist() == [3]
    assert similarity.target_ranks(queries, items, torch.tensor([2]), seen).tolist() == [2]


def test_the_seen_items_of_one_query_are_left_to_the_others():
    queries, items = torch.ones(2, 1), torch.tensor([[5.0], [4.0], [3.0]])
    seen = torch.tensor([0]), torch.tensor([0, 0, 1])
    _, rows = DotProductSimilarity().top_k(queries, items, 2, seen)
    assert rows.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("chunk", [1, X - 1, X, 2 * X + 1, 4 * X, B * X])
def test_chunks_do_not_change_results(monkeypatch, chunk):
    queries, items, targets, seen = make_case(7)
    similarity = DotProductSimilarity()
    monkeypatch.setattr(dot_product_similarity, "TILE_STEP", 1)
    ranks = similarity.target_ranks(queries, items, targets, seen)
    scores, rows = similarity.top_k(queries, items, K, seen)
    monkeypatch.setattr(dot_product_similarity, "CHUNK_SCORES", chunk)
    sizes = [len(part) for _, part in similarity._chunks(queries, items)]
    assert sum(sizes) == B and max(sizes) == min(B, max(1, chunk // X))
    assert torch.equal(similarity.target_ranks(queries, items, targets, seen), ranks)
    chunked_scores, chunked_rows = similarity.top_k(queries, items, K, seen)
    assert torch.equal(chunked_scores, scores) and torch.equal(chunked_rows, rows)


def test_fewer_than_k_items_left_give_minus_one():
    queries, items = torch.ones(2, 1), torch.tensor([[1.0], [3.0], [2.0]])
    seen = torch.tensor([1, 0, 2, 1]), torch.tensor([0, 1, 4])
    scores, rows = DotProductSimilarity().top_k(queries, items, 5, seen)
    assert rows.tolist() == [[2, 0, -1, -1, -1], [-1] * 5]
    infinity = float("inf")
    assert scores.tolist() == [[2.0, 1.0, -infinity, -infinity, -infinity], [-infinity] * 5]


def test_no_queries_give_empty_results():
    empty, items = torch.empty(0, D), torch.ones(X, D)
    similarity = DotProductSimilarity()
    no_rows = torch.empty(0, dtype=torch.int64)
    assert similarity.target_ranks(empty, items, no_rows).shape == (0,)
    assert similarity.top_k(empty, items, K)[1].shape == (0, K)


@pytest.mark.parametrize("row", [-1, X])
def test_a_target_outside_the_catalogue_is_refused(row):
    queries, items, targets, _ = make_case(1)
    targets[6] = row
    with pytest.raises(ValueError, match=rf"0\.\.{X - 1}"):
        DotProductSimilarity().target_ranks(queries, items, targets)


TILES = [(1, 1), (2, 2), (3, 8), (4, 4), (X - 1, 3 * X), (X, 2 * X), (5, 1 << 20)]


def make_tiles_small(monkeypatch, tile_items: int, chunk: int, group: int = 2) -> None:
    monkeypatch.setattr(dot_product_similarity, "TILE_ITEMS", tile_items)
    monkeypatch.setattr(dot_product_similarity, "CHUNK_SCORES", chunk)
    monkeypatch.setattr(dot_product_similarity, "GROUP", group)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tile_items", "chunk"), TILES)
def test_tiles_do_not_change_results(monkeypatch, tile_items, chunk, seed):
    queries, items, targets, seen = make_case(seed, span=1)
    rows, offsets = seen
    targets[0] = rows[offsets[1] - 1]  # a seen target, if the first query has seen any
    make_tiles_small(monkeypatch, tile_items, chunk)
    similarity = DotProductSimilarity()
    ranks = similarity.target_ranks(queries, items, targets, seen)
    assert ranks.tolist() == slow_ranks(queries, items, targets, seen)
    assert similarity.target_ranks(queries, items, targets).tolist() == slow_ranks(
        queries, items, targets
    )
    for k in (1, K, X + 3):
        scores, top = similarity.top_k(queries, items, k, seen)
        for b, row in enumerate(slow_scores(queries.tolist(), items.tolist())):
            left = {x: row[x] for x in set(range(X)) - seen_sets(seen)[b]}
            found = min(k, len(left))
            assert scores[b, :found].tolist() == sorted(left.values(), reverse=True)[:found]
            assert len(set(top[b, :found].tolist())) == found
            assert [left[x] for x in top[b, :found].tolist()] == scores[b, :found].tolist()
            assert set(top[b, found:].tolist()) <= {-1}
        both = similarity._walk(queries, items, seen, k, targets)
        assert all(torch.equal(a, b) for a, b in zip(both, (ranks, scores, top), strict=True))


@pytest.mark.parametrize(("tile_items", "chunk"), TILES)
def test_no_number_ranks_last_and_comes_first_in_any_tile(monkeypatch, tile_items, chunk):
    make_tiles_small(monkeypatch, tile_items, chunk)
    queries, items = torch.ones(3, D), torch.arange(1.0, X + 1)[:, None].expand(X, D).clone()
    queries[1] = torch.nan
    items[X - 2] = torch.nan
    similarity = DotProductSimilarity()
    ranks = similarity.target_ranks(queries, items, torch.tensor([X - 1, 0, X - 2]))
    assert ranks.tolist() == [2, X, X]  # the item that is no number is not below any target
    assert similarity.top_k(queries, items, 2)[1][0].tolist() == [X - 2, X - 1]


@pytest.mark.parametrize("num_queries", [1, 2, 17])
@pytest.mark.parametrize("width", [31, 64, 100])
@pytest.mark.parametrize("tile_items", [64, 128, 4096])
def test_equal_embeddings_tie_wherever_they_stand(monkeypatch, tile_items, width, num_queries):
    make_tiles_small(monkeypatch, tile_items, 16 * tile_items)
    similarity = DotProductSimilarity()
    for target in range(0, 149, 4):  # other vectors each time: not all are rounded
        generator = torch.Generator().manual_seed(target)
        queries = torch.randn(num_queries, width, generator=generator)
        items = torch.randn(1, width, generator=generator).expand(149, -1).contiguous()
        ranks = similarity.target_ranks(queries, items, torch.full((num_queries,), target))
        assert ranks.tolist() == [149] * num_queries


@pytest.mark.parametrize("length", [5, 16, 100, 517])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("group", [2, 8])
def test_the_top_by_groups_is_the_top(monkeypatch, length, k, group):
    monkeypatch.setattr(dot_product_similarity, "GROUP", group)
    scores = torch.randn(6, length, generator=torch.Generator().manual_seed(length))
    scores[2, -2:] = torch.nan
    scores[3] = -torch.inf
    values, columns = dot_product_similarity._top_columns(scores, k)
    torch.testing.assert_close(values, scores.topk(k, 1).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, scores.gather(1, columns), rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("num_items", [896, 1000, 1805, 2000])
def test_the_top_of_whole_groups_of_columns_is_the_top(monkeypatch, num_items):
    make_tiles_small(monkeypatch, 896, 4 * 896)
    generator = torch.Generator().manual_seed(num_items)
    queries, items = (torch.randn(n, D, generator=generator) for n in (9, num_items))
    items[num_items - 3] = torch.nan
    rows = torch.randint(0, num_items, (9 * 50,), generator=generator)
    scores, found = DotProductSimilarity().top_k(queries, items, K, (rows, 50 * torch.arange(10)))
    expected = queries @ items.T
    expected[torch.arange(9).repeat_interleave(50), rows] = -torch.inf
    torch.testing.assert_close(scores, expected.topk(K, 1).values, equal_nan=True)
    torch.testing.assert_close(scores, expected.gather(1, found), equal_nan=True)
    assert all(len(set(line)) == K for line in found.tolist())


def test_sampled_scores_are_the_targets_and_any_other_items():
    items = torch.eye(X)  # an item's score is the query's number in its place
    queries = torch.arange(X).float().expand(2000, -1)
    targets = torch.full((2000,), 6)
    generator = torch.Generator()
    scores = DotProductSimilarity().sample_scores(queries, items, targets, generator)
    of_targets, of_others = scores
    assert (of_targets == targets).all()
    assert set(of_others.tolist()) == set(range(X)) - {6}


def test_a_sample_of_one_item_is_that_item_and_draws_no_global_number():
    state = torch.get_rng_state()
    scores = DotProductSimilarity().sample_scores(
        torch.ones(3, D), torch.ones(1, D), torch.zeros(3, dtype=torch.int64), torch.Generator()
    )
    assert [part.tolist() for part in scores] == [[D] * 3, [D] * 3]
    assert torch.equal(state, torch.get_rng_state())
