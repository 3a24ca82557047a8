"""A model of last week on the folder of next week, which extends the one of its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recommend
from weeks import DEARER, GONE, NEW_ITEM, RECOLOURED, convert

from dataset import load_emb
from engine.trained_model import extended, load_model, padded, read_model
from files.data_folder import read_manifest
from main import main

pytestmark = pytest.mark.slow

TRAIN = ("--device=cpu", "--num_workers=0", "--hidden_units=8", "--num_epochs=1", "--batch_size=4")


class Weeks:
    """Data of two weeks, and the model of the first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.first = convert(folder, 1)
        self.second = convert(folder, 2, "--like", self.first)
        flags = [f"--data_dir={self.first}", f"--output_dir={folder}/run", f"--log_dir={folder}/l"]
        assert main([*flags, *TRAIN, "--target_action"]) == 0
        self.model = folder / "run" / "model_best.pt"

    def call(self, data_dir: Path, output_dir: Path, *flags: str) -> int:
        folders = [f"--data_dir={data_dir}", f"--output_dir={output_dir}"]
        return main([*folders, f"--state_dict_path={self.model}", "--device=cpu", *flags])


@pytest.fixture(scope="module")
def weeks(tmp_path_factory) -> Weeks:
    return Weeks(tmp_path_factory.mktemp("weeks"))


def exported(folder: Path) -> dict[int, np.ndarray]:
    """Item id -> embedding."""
    folder = folder / "item_embeddings"
    ids = load_emb(folder / "id.u64bin")[:, 0].tolist()
    return dict(zip(ids, load_emb(folder / "embedding.fbin"), strict=True))


def test_known_items_are_exported_as_before_and_new_ones_by_their_features(weeks, tmp_path, capsys):
    assert weeks.call(weeks.first, tmp_path / "one", "--inference_only") == 0
    assert "without a vector" not in capsys.readouterr().out
    assert weeks.call(weeks.second, tmp_path / "two", "--inference_only", "--whole_history") == 0
    out = capsys.readouterr().out
    line = "without a vector: 1 items, 1 action types, 1 values of colour, 1 values of tags"
    assert f"{weeks.second}: new since the training of {weeks.model}, {line}\n" in out
    before, after = exported(tmp_path / "one"), exported(tmp_path / "two")
    assert after.keys() == before.keys() | {NEW_ITEM}
    changed = {item for item in before if not np.allclose(before[item], after[item], atol=1e-6)}
    assert changed == {RECOLOURED, DEARER} and GONE in before
    model = load_model(weeks.model, weeks.second, read_manifest(weeks.second))
    assert not model.embedding_module.item_emb.weight[15].any()
    assert np.linalg.norm(after[NEW_ITEM]) == pytest.approx(1)


def test_a_new_week_is_evaluated_with_an_old_model(weeks, tmp_path, capsys):
    assert weeks.call(weeks.second, tmp_path, "--evaluate", "valid") == 0
    assert "action HR@10" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics_model_best_valid.json").read_text())
    assert 0 <= metrics["valid"]["HR@10"] <= 1


def test_a_history_with_a_new_item_and_a_new_action_is_answered(weeks, capsys):
    output_dir, history = weeks.folder / "run", weeks.folder / "history.csv"
    assert weeks.call(weeks.second, output_dir, "--inference_only", "--whole_history") == 0
    capsys.readouterr()
    history.write_text(f"item,action\n5,view\n{NEW_ITEM},refund\n")
    folders = ["--data_dir", str(weeks.second), "--output_dir", str(output_dir)]
    assert recommend.main([*folders, "--events", str(history), "--request_action=refund"]) == 0
    assert "a new thing" in capsys.readouterr().out
    assert recommend.main([*folders, "--user", "40"]) == 0
    assert "user 40: 5 events" in capsys.readouterr().out


def test_a_fresh_conversion_is_refused_by_name(weeks, tmp_path, capsys):
    fresh = convert(weeks.folder, 2, "--overwrite", name="fresh")
    assert weeks.call(fresh, tmp_path, "--inference_only") == 1
    assert f"{fresh}: not the data that" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_a_table_is_padded_for_each_number_that_is_new_and_no_other(weeks):
    config, weights, _ = read_model(weeks.model)
    grown = extended(config, weeks.second, read_manifest(weeks.second))
    rows = {n: len(w) - len(weights[n]) for n, w in padded(weights, config, grown).items()}
    assert {name: number for name, number in rows.items() if number} == {
        "embedding_module.item_emb.weight": 1,
        "input_preprocessor.action_emb.weight": 1,
        "input_preprocessor.target_action_emb.weight": 1,
        "sparse_emb.feature_colour.weight": 1,
        "sparse_emb.feature_tags.weight": 1,
    }


def test_a_config_is_as_it_was_where_the_data_is_the_same_or_smaller(weeks):
    config, *_ = read_model(weeks.model)
    assert extended(config, weeks.first, read_manifest(weeks.first)) == config
    more = extended(config, weeks.second, read_manifest(weeks.second))
    assert extended(more, weeks.first, read_manifest(weeks.first)) == more
    unknown = replace(config, item_ids_digest=None, feature_digests={}, action_names=None)
    assert extended(unknown, weeks.second, read_manifest(weeks.second)) == unknown
