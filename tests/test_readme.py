"""The README says what the program does: flags, defaults, commands, and code that runs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import recommend

from engine import flags as flags_module
from engine.flags import get_args

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


def test_the_parser_is_argparse_and_help_fits(capsys):
    with pytest.raises(SystemExit):
        get_args(["--help"])
    text = capsys.readouterr().out
    assert all(group in text for group in ("data:", "model:", "loss:", "optimisation:", "run:"))
    assert isinstance(flags_module.get_args([]), argparse.Namespace)
