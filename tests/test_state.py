"""Where a run is: which epoch is the best, and which is the last."""

from __future__ import annotations

import pytest

from engine.state import Progress

RISING_THEN_EQUAL = [
    {"NDCG@10": 0.1, "loss": 3.0},
    {"NDCG@10": 0.3, "loss": 2.0},
    {"NDCG@10": 0.3, "loss": 2.5},
    {"NDCG@10": 0.2, "loss": 1.0},
    {"NDCG@10": 0.2, "loss": 1.0},
]


def run_through(criterion: str, patience: int, curve=RISING_THEN_EQUAL) -> Progress:
    progress = Progress()
    for metrics in curve:
        progress.end_epoch(metrics, criterion, num_epochs=5, patience=patience)
        if progress.is_finished:
            return progress
    raise AssertionError("longer than num_epochs")


@pytest.mark.parametrize(("criterion", "best"), [("ndcg", 2), ("loss", 4)])
def test_the_first_of_equal_epochs_is_the_best(criterion, best):
    progress = run_through(criterion, patience=0)
    assert (progress.best_epoch, progress.epoch) == (best, 5)
    assert progress.best_metrics == RISING_THEN_EQUAL[best - 1]


@pytest.mark.parametrize(("patience", "last"), [(0, 5), (1, 3), (2, 4), (3, 5), (9, 5)])
def test_patience_counts_epochs_without_a_better_one_and_0_is_without_end(patience, last):
    assert run_through("ndcg", patience).epoch == last


def test_without_a_validation_the_newest_epoch_is_the_best():
    assert run_through("ndcg", 1, [{}] * 5).best_epoch == 5
