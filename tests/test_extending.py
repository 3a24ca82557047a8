"""What docs/extending.md shows runs, as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import NUM_ITEMS, write_tiny

import simplified_hstu
from dataset import PARSERS
from files.checkpoint import load_checkpoint
from files.data_writer import Column
from files.features import load_features
from hstu_components import ENCODERS
from main import METRICS, main
from model import KERNELS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()


def example(title: str) -> str:
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(r"^```python\n(.*?)^```", section, re.M | re.S)[1]


@pytest.fixture
def flags(tmp_path) -> Iterator[list[str]]:
    """Of a short training on tiny data; what an extension registers is gone after the test."""
    registries = (PARSERS, ENCODERS, METRICS)
    before = [dict(registry) for registry in registries]
    write_tiny(tmp_path / "data")
    yield [
        f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l",
        "--device=cpu", "--num_workers=0", "--num_epochs=1",
    ]  # fmt: skip
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def test_the_notebook_trains_and_ranks(tmp_path, monkeypatch):
    write_tiny(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {}
    exec(example("In a notebook"), scope)
    assert scope["losses"][-1] < scope["losses"][0]
    assert scope["rows"].shape == (10, 5)


def test_a_notebook_gets_recommendations_in_the_ids_of_the_log(flags, tmp_path, monkeypatch):
    assert main([*flags, f"--output_dir={tmp_path}/outputs"]) == 0
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example("Recommendations in Python"), scope)
    assert scope["item_ids"].shape == scope["scores"].shape == (2, 5)
    assert set(scope["item_ids"].ravel()) <= {1000 + 3 * k for k in range(NUM_ITEMS)}
    assert scope["vectors"].shape == (2, 64)


def test_a_feature_type_trains(flags, tmp_path):
    exec(example("A feature type"), {})
    hours = Column("hour", [None, *(k % 24 for k in range(1, NUM_ITEMS))], default=-1)
    write_tiny(tmp_path / "hours", opened=hours)
    assert main([*flags, f"--data_dir={tmp_path}/hours"]) == 0
    weights = load_checkpoint(tmp_path / "o" / "model_best.pt")["weights"]
    assert any("feature_opened" in name for name in weights)
    feature = load_features(tmp_path / "hours", "item", NUM_ITEMS)["opened"]
    encoded = ENCODERS["hour"](8, 1)(torch.from_numpy(feature.values[:3].copy()))
    assert (encoded.norm(dim=1) > 0).tolist() == [True, False, True]  # the first has no hour


@pytest.mark.parametrize(
    ("title", "name"), [("Another loss", "PairwiseModel"), ("Another attention", "MeanModel")]
)
def test_a_model_of_ones_own_trains_and_exports(flags, tmp_path, title, name):
    scope: dict = {}
    exec(example(title), scope)
    assert main([*flags, "--num_blocks=2"], model_class=scope[name]) == 0
    checkpoint = f"--state_dict_path={tmp_path}/o/model_best.pt"
    assert main([*flags, "--inference_only", checkpoint], model_class=scope[name]) == 0


def test_a_metric_is_reported(flags, tmp_path):
    exec(example("Another metric"), {})
    assert main(flags) == 0
    assert "Precision@10" in (tmp_path / "o" / "metrics.json").read_text()


def test_another_score_is_an_edit_of_one_line(flags, tmp_path, monkeypatch):
    """And it trains, validates and exports under --kernels plain."""
    section = TEXT.split("## Another score")[1].split("\n## ")[0]
    old, new = re.findall(r"^```\n(.*?)\n```", section, re.M | re.S)
    source = Path(simplified_hstu.__file__).read_text()
    assert source.count(old) == 1
    (tmp_path / "edited_hstu.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited_hstu", tmp_path / "edited_hstu.py")
    edited = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited_hstu", edited)
    spec.loader.exec_module(edited)
    assert main([*flags, "--kernels=plain"]) == 0
    weights = load_checkpoint(tmp_path / "o" / "model_best.pt")["weights"]
    monkeypatch.setitem(KERNELS, "plain", KERNELS["plain"]._replace(attention=edited.DEFINITION))
    folders = [f"--output_dir={tmp_path}/o2", f"--log_dir={tmp_path}/l2", "--kernels=plain"]
    assert main([*flags, *folders]) == 0
    others = load_checkpoint(tmp_path / "o2" / "model_best.pt")["weights"]
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    checkpoint = f"--state_dict_path={tmp_path}/o2/model_best.pt"
    assert main([*flags, *folders, "--inference_only", checkpoint]) == 0
