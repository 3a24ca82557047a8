"""The README says what the program does: flags, defaults, commands, and code that runs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import recommend
from conftest import NUM_ITEMS, write_tiny

import main as main_module
from engine import flags as flags_module
from engine.flags import get_args
from engine.metrics import METRICS
from files.checkpoint import load_checkpoint
from files.data_writer import Column
from files.features import PARSERS
from hstu_components import ENCODERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()


def flag_rows(text: str) -> dict[str, str]:
    """Flag -> the default written in the table of flags."""
    return dict(re.findall(r"^\| `--([a-z_0-9]+)` \| (.*?) \|", text, re.MULTILINE))


def written(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(value) if isinstance(value, list) else value}`"


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_every_flag_and_its_default_is_in_the_table(text):
    assert flag_rows(text) == {name: written(value) for name, value in vars(get_args([])).items()}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(("python ", "bash "))]


def test_every_command_names_a_script_that_is_there_and_flags_that_parse():
    assert len(commands(README)) > 5
    for command in commands(README):
        script, *rest = shlex.split(command)[1:]
        assert (ROOT / script).exists(), command
        if script == "main.py":
            get_args(rest)
        if script == "scripts/recommend.py":
            recommend.get_args(rest)


def test_both_documented_commands_parse_to_what_they_say():
    train, infer = (c for c in commands(README) if "--infonce_temp 0.1" in c or "epoch_5.pt" in c)
    assert get_args(shlex.split(train)[2:]).num_epochs == 10
    assert get_args(shlex.split(infer)[2:]).inference_only


@pytest.mark.parametrize("what", [r"^```.*?^```", r"^#+ ", r"\]\(([^)]+)\)"])
def test_the_chinese_readme_has_the_same_blocks_headings_and_links(what):
    found = [re.findall(what, text, re.MULTILINE | re.DOTALL) for text in (README, CHINESE)]
    assert found[0]
    if what.startswith(r"\]"):
        found = [sorted(set(links) - {"README.md", "README.zh-CN.md"}) for links in found]
    assert found[0] == found[1]


def test_every_file_that_is_linked_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def extension(name: str) -> str:
    section = README.split("## Extension points")[1].split("\n## ")[0]
    return re.search(rf"\*\*{name}.*?^```python\n(.*?)^```", section, re.M | re.S).group(1)


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Runs main on tiny data; what an extension registers is gone after the test."""
    for registry in (PARSERS, ENCODERS, METRICS):
        for key in list(registry):
            monkeypatch.setitem(registry, key, registry[key])
    monkeypatch.setattr(main_module, "HSTUModel", main_module.HSTUModel)
    data = write_tiny(tmp_path / "data")
    yield data, [
        f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l",
        "--device=cpu", "--num_workers=0", "--num_epochs=1",
    ]  # fmt: skip
    for registry in (PARSERS, ENCODERS, METRICS):
        for key in set(registry) & {"hour", "Recall", "Precision"}:
            del registry[key]


def test_the_custom_feature_of_the_readme_trains(small_run):
    data, flags = small_run
    write_tiny(data, opened=Column("hour", [k % 24 for k in range(NUM_ITEMS)]))
    exec(extension("A feature type"), {})
    assert main_module.main(flags) == 0
    weights = load_checkpoint(Path(flags[1].split("=")[1]) / "model_best.pt")["weights"]
    assert any("feature_opened" in name for name in weights)


def test_the_custom_loss_of_the_readme_trains(small_run):
    _, flags = small_run
    scope: dict = {}
    exec(extension("Another loss"), scope)
    assert main_module.HSTUModel is not scope["HSTUModel"]
    assert main_module.main(flags) == 0


def test_the_custom_attention_of_the_readme_trains(small_run):
    _, flags = small_run
    scope: dict = {}
    exec(extension("Another attention"), scope)
    assert main_module.main([*flags, "--num_blocks=1"]) == 0


def test_the_custom_metric_of_the_readme_is_reported(small_run):
    _, flags = small_run
    exec(extension("Another metric"), {})
    assert main_module.main(flags) == 0
    result = (Path(flags[1].split("=")[1]) / "metrics.json").read_text()
    assert "Precision@10" in result


def test_the_parser_is_argparse_and_help_fits(capsys):
    with pytest.raises(SystemExit):
        get_args(["--help"])
    text = capsys.readouterr().out
    assert all(group in text for group in ("data:", "model:", "loss:", "optimisation:", "run:"))
    assert isinstance(flags_module.get_args([]), argparse.Namespace)
