"""A whole training step, validation and export without a GPU: nothing waits, order is fixed."""

from __future__ import annotations

import pytest
from meta_device import make_batch, patch_torch, prepare

import hstu_components

FEATURES = {
    "ids": ["--item_features=none", "--user_features=none", "--mm_emb_id"],
    "features": ["--item_features=all", "--user_features=all", "--target_action"],
}


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    patch_torch(monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("negatives", ["all", "mixed"])
@pytest.mark.parametrize("dense_rows", [3, 20_000])
def test_a_training_step_waits_for_no_number(
    data, monkeypatch, precision, features, negatives, dense_rows
):
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", dense_rows)
    run = prepare(data, *FEATURES[features], f"--precision={precision}", f"--negatives={negatives}")
    run.training_step([make_batch(run)], epoch=1, step=1)
