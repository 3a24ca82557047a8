"""Ranks and top-k, as defined and tile by tile, against an obvious slow version."""

from __future__ import annotations

import pytest
import torch

from dot_product_similarity import MISS, DotProductSimilarity
from ops import ranking

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


@pytest.fixture(params=[DotProductSimilarity(), ranking], ids=["defined", "tuned"])
def similarity(request):
    """What has target_ranks and top_k."""
    return request.param


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
        rank = 1 + sum(scores[x] >= scores[target] for x in rivals)
        ranks.append(MISS if target in hidden[b] else rank)
    return ranks


def test_scores_are_inner_products():
    queries, items, *_ = make_case(0)
    scores = DotProductSimilarity()(queries, items)
    assert scores.shape == (B, X)
    assert scores.tolist() == slow_scores(queries.tolist(), items.tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removes_seen", [False, True])
def test_ranks_equal_the_slow_version(similarity, seed, removes_seen):
    queries, items, targets, seen = make_case(seed)
    seen = seen if removes_seen else None
    ranks = similarity.target_ranks(queries, items, targets, seen)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == slow_ranks(queries, items, targets, seen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removes_seen", [False, True])
def test_the_top_k_equals_the_slow_version(similarity, seed, removes_seen):
    queries, items, _, seen = make_case(seed)
    hidden = seen_sets(seen) if removes_seen else [set()] * B
    scores, rows = similarity.top_k(queries, items, K, seen if removes_seen else None)
    assert scores.shape == rows.shape == (B, K)
    for b, row in enumerate(slow_scores(queries.tolist(), items.tolist())):
        left = {x: score for x, score in enumerate(row) if x not in hidden[b]}
        assert scores[b].tolist() == sorted(left.values(), reverse=True)[:K]
        # Equal scores may come in any order, but each row once, with its own score.
        assert len(set(rows[b].tolist())) == K
        assert [left[x] for x in rows[b].tolist()] == scores[b].tolist()


def test_ties_count_against_the_target(similarity):
    queries, items = torch.ones(2, D), torch.ones(X, D)
    ranks = similarity.target_ranks(queries, items, torch.tensor([0, X - 1]))
    assert ranks.tolist() == [X, X]


def test_scores_that_are_no_numbers_rank_last(similarity):
    queries, items = torch.ones(3, D), torch.ones(X, D)
    queries[1] = torch.nan
    items[4] = torch.nan
    ranks = similarity.target_ranks(queries, items, torch.tensor([0, 0, 4]))
    assert ranks.tolist() == [X, X, X]


def test_a_target_that_is_left_out_is_a_miss(similarity):
    queries, items = torch.ones(2, 1), torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    seen, targets = (torch.tensor([0, 2, 0]), torch.tensor([0, 2, 3])), torch.tensor([2, 2])
    assert similarity.target_ranks(queries, items, targets).tolist() == [3, 3]
    assert similarity.target_ranks(queries, items, targets, seen).tolist() == [MISS, 2]


def test_the_seen_items_of_one_query_are_left_to_the_others(similarity):
    queries, items = torch.ones(2, 1), torch.tensor([[5.0], [4.0], [3.0]])
    seen = torch.tensor([0]), torch.tensor([0, 0, 1])
    _, rows = similarity.top_k(queries, items, 2, seen)
    assert rows.tolist() == [[0, 1], [1, 2]]


def test_fewer_than_k_items_left_give_minus_one(similarity):
    queries, items = torch.ones(2, 1), torch.tensor([[1.0], [3.0], [2.0]])
    seen = torch.tensor([1, 0, 2, 1]), torch.tensor([0, 1, 4])
    scores, rows = similarity.top_k(queries, items, 5, seen)
    assert rows.tolist() == [[2, 0, -1, -1, -1], [-1] * 5]
    infinity = float("inf")
    assert scores.tolist() == [[2.0, 1.0, -infinity, -infinity, -infinity], [-infinity] * 5]


def test_no_queries_give_empty_results(similarity):
    empty, items = torch.empty(0, D), torch.ones(X, D)
    no_rows = torch.empty(0, dtype=torch.int64)
    assert similarity.target_ranks(empty, items, no_rows).shape == (0,)
    assert similarity.top_k(empty, items, K)[1].shape == (0, K)


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
