"""Ranking of a split; tests/test_main.py and tests/test_collectives.py have it in a training."""

from __future__ import annotations

import pytest
import torch
from conftest import write_tiny

from dot_product_similarity import MISS
from engine.evaluation import Ranking, evaluate
from engine.flags import get_args
from engine.report import split_metrics
from engine.training_setup import eval_loader, prepare_run
from files.data_folder import read_manifest


def test_targets_never_trained_on_and_those_had_before_are_counted_apart():
    ranks, target_ids = torch.tensor([1, 30, 4, 2]), torch.tensor([5, 2, 5, 3])
    ranking = Ranking(ranks, target_ids, ranks, ranks < 3, ranks, ranks * 0.0, ranks * 0.0, 0.5)
    cold = ranking.metrics_of(torch.tensor([0, 9, 1, 0, 4, 0])[target_ids] == 0)
    assert cold["targets"] == 3
    assert cold["HR@10"] == 1.0
    assert cold["MRR"] == (1 + 1 / 4 + 1 / 2) / 3
    repeats = ranking.metrics_of(ranking.is_repeat)
    assert (repeats["targets"], repeats["MRR"]) == (2, (1 + 1 / 2) / 2)


def test_each_action_type_has_its_own_metrics_where_there_are_several():
    ranks, actions = torch.tensor([1, 30, 4, 2]), torch.tensor([1, 0, 1, -1])
    nothing = ranks * 0.0
    ranking = Ranking(ranks, ranks, ranks, ranks < 0, actions, nothing, nothing, 0.5)
    counts = torch.ones(31, dtype=torch.int64)
    found = split_metrics("test", ranking, counts, ["view", "buy"])["test_by_action"]
    assert {name: metrics["targets"] for name, metrics in found.items()} == {"view": 1, "buy": 2}
    assert found["buy"]["MRR"] == (1 + 1 / 4) / 2
    assert split_metrics("test", ranking, counts, None)["test_by_action"].keys() == {"0", "1"}
    counts[ranks[:2]] = 0
    seen = ranking._replace(is_repeat=torch.tensor([True, False, False, False]))
    found = split_metrics("test", seen, counts, None)
    assert [found[f"test_{name}"]["targets"] for name in ("repeat", "new")] == [1, 3]
    cold = found["test_cold"]
    assert (cold["targets"], cold["MRR"]) == (2, (1 + 1 / 30) / 2)
    alike = ranking._replace(target_actions=actions.clamp(max=0))
    assert "test_by_action" not in split_metrics("test", alike, counts, ["view", "buy"])


def test_ranks_are_those_of_every_item_by_hand(tmp_path):
    data = write_tiny(tmp_path)
    args = get_args([f"--data_dir={data}", "--device=cpu", "--num_workers=0", "--batch_size=4"])
    manifest = read_manifest(data)
    run = prepare_run(args)
    loader = eval_loader(args, run, "test")
    ranking = evaluate(run.model, loader, removes_seen=True)
    as_trained = evaluate(run.model, loader)  # a quarter of the validation targets are repeats
    assert as_trained.metrics() == evaluate(run.model, loader, removes_seen=False).metrics()
    model, place = run.model.eval(), 0
    items = model.item_embeddings(torch.arange(1, manifest.num_items + 1))
    for batch in loader:
        queries = model.predict(batch)
        for b, (query, target) in enumerate(zip(queries, batch.target_ids(), strict=True)):
            seen = batch.seen_ids[batch.seen_offsets[b] : batch.seen_offsets[b + 1]]
            scores = items @ query
            others = set(range(1, manifest.num_items + 1)) - set(seen.tolist()) - {target.item()}
            rank = 1 + sum(bool(scores[k - 1] >= scores[target - 1]) for k in others)
            rank = MISS if target in seen else rank
            assert (ranking.ranks[place], ranking.target_ids[place]) == (rank, target)
            assert ranking.num_seen[place] == len(seen)
            assert ranking.is_repeat[place] == (target in seen)
            torch.testing.assert_close(ranking.target_cosines[place], scores[target - 1])
            last = batch.offsets[b + 1] - 1
            assert ranking.target_actions[place] == batch.target_action_types[last]
            place += 1
    assert place == len(ranking.ranks) == len(run.datasets["test"])
    assert 0 < ranking.is_repeat.sum() < place


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_queries_are_computed_in_the_precision_asked_for(tmp_path, monkeypatch, precision):
    args = get_args([f"--data_dir={write_tiny(tmp_path)}", "--device=cpu", "--num_workers=0"])
    run, casts = prepare_run(args), []
    predict = run.model.predict_with_loss

    def record(batch):
        casts.append(torch.is_autocast_enabled("cpu"))
        return predict(batch)

    monkeypatch.setattr(run.model, "predict_with_loss", record)
    evaluate(run.model, eval_loader(args, run, "test"), precision=precision)
    assert set(casts) == {precision == "bf16"}
