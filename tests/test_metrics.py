"""Ranks to HR@K, NDCG@K and MRR, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from engine import metrics
from engine.metrics import ranking_metrics


def test_metrics_of_hand_computed_ranks():
    result = ranking_metrics(torch.tensor([1, 3, 10, 11, 700]), cutoffs=(1, 3, 10))
    expected = {
        "HR@1": 1 / 5,
        "HR@3": 2 / 5,
        "HR@10": 3 / 5,
        "NDCG@1": 1 / 5,
        "NDCG@3": (1 + 1 / 2) / 5,  # rank 3: 1 / log2(4)
        "NDCG@10": (1 + 1 / 2 + 1 / math.log2(11)) / 5,
        "MRR": (1 + 1 / 3 + 1 / 10 + 1 / 11 + 1 / 700) / 5,
    }
    assert result == pytest.approx(expected, rel=1e-12)


def test_a_perfect_ranking_has_every_metric_at_one():
    assert set(ranking_metrics(torch.ones(7, dtype=torch.int64)).values()) == {1.0}


def test_a_target_beyond_every_cutoff_counts_in_mrr_only():
    result = ranking_metrics(torch.tensor([201]))
    assert result.pop("MRR") == pytest.approx(1 / 201)
    assert set(result.values()) == {0.0}


def test_the_default_cutoffs_are_10_50_and_200():
    names = {f"{name}@{k}" for name in ("HR", "NDCG") for k in (10, 50, 200)} | {"MRR"}
    assert set(ranking_metrics(torch.tensor([4, 2]))) == names


@pytest.mark.parametrize("k", [10, 50, 200])
def test_the_cutoff_itself_is_within(k):
    inside, outside = (ranking_metrics(torch.tensor([rank])) for rank in (k, k + 1))
    assert inside[f"HR@{k}"] == 1.0
    assert inside[f"NDCG@{k}"] == pytest.approx(1 / math.log2(k + 1))
    assert outside[f"HR@{k}"] == outside[f"NDCG@{k}"] == 0.0


def test_a_metric_added_to_the_table_shows_up_at_every_cutoff(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "Top", lambda ranks, k: (ranks == 1).double() * k)
    result = ranking_metrics(torch.tensor([1, 2, 1, 5]), cutoffs=(3, 8))
    assert (result["Top@3"], result["Top@8"]) == (1.5, 4.0)
    assert result["HR@3"] == 0.75


def test_values_are_plain_floats_that_json_and_checkpoints_hold():
    values = ranking_metrics(torch.tensor([1, 2, 90])).values()
    assert {type(value) for value in values} == {float}
