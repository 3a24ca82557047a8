"""README and docs say what the program does: flags, defaults, commands, links; and stay short."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import prepare_table
import pytest
import recommend
from reproduce import table
from settings import SETTINGS

from engine.flags import FREE_FLAGS, get_args

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
FLAGS = (ROOT / "docs" / "flags.md").read_text()
TOUR = (ROOT / "docs" / "tour.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def written(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(value) if isinstance(value, list) else value}`"


def test_every_flag_and_its_default_is_in_the_table_in_the_order_of_the_help():
    rows = re.findall(r"^\| `--([a-z_0-9]+)` \| (.*?) \|", FLAGS, re.MULTILINE)
    assert rows == [(name, written(value)) for name, value in vars(get_args([])).items()]


def test_the_flags_that_a_resumed_run_may_change_are_listed():
    section = FLAGS.split("\n## What may change when a run goes on\n")[1]
    listed = section.split("All others")[0]
    assert set(re.findall(r"`--([a-z_0-9]+)`", listed)) == FREE_FLAGS


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(python|bash|torchrun) ", line)]


@each_page
def test_every_command_names_a_script_that_is_there_and_flags_that_parse(page):
    for command in commands(page.read_text()):
        words = [word for word in shlex.split(command)[1:] if "nproc_per_node" not in word]
        script, *rest = words
        assert (ROOT / script).exists(), command
        if script == "benchmarks/reproduce.py":
            assert rest[0] in SETTINGS, command
        parsers = {
            "main.py": get_args,
            "scripts/recommend.py": recommend.get_args,
            "scripts/prepare_table.py": prepare_table.get_args,
        }
        parsers.get(script, list)(rest)


def test_both_documented_commands_parse_to_what_they_say():
    assert len(commands(README)) > 5
    train, infer = (c for c in commands(README) if "--infonce_temp 0.1" in c or "epoch_5.pt" in c)
    assert get_args(shlex.split(train)[2:]).num_epochs == 10
    assert get_args(shlex.split(infer)[2:]).inference_only


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_a_readme_is_an_invitation(text):
    assert len(text.splitlines()) <= 230
    assert len(text.encode()) <= 15 * 1024


@pytest.mark.parametrize("what", [r"^```.*?^```", r"^#+ ", r"\]\(([^)]+)\)"])
def test_the_chinese_readme_has_the_same_blocks_headings_and_links(what):
    found = [re.findall(what, text, re.MULTILINE | re.DOTALL) for text in (README, CHINESE)]
    assert found[0]
    if what.startswith(r"\]"):
        found = [sorted(set(links) - {"README.md", "README.zh-CN.md"}) for links in found]
    assert found[0] == found[1]


def test_the_chinese_readme_has_the_same_numbers_in_its_tables():
    tables = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (README, CHINESE)]
    rows = [[sorted(re.findall(r"\d*\.?\d+", row)) for row in table] for table in tables]
    assert len(rows[0]) > 5
    assert rows[0] == rows[1]


def slug(heading: str) -> str:
    """What GitHub makes of a heading in a link: small letters, blanks as hyphens."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@each_page
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in map(slug, headings), link


def test_every_module_has_a_row_in_the_tour():
    folders = (".", "engine", "files", "ops")
    modules = {p.relative_to(ROOT) for f in folders for p in (ROOT / f).glob("*.py")}
    rows = re.findall(r"^\| \[(.*?)\]\(\.\./(.*?)\) \|", TOUR, re.MULTILINE)
    assert all(name == path for name, path in rows)
    assert {Path(path) for _, path in rows} == {m for m in modules if m.name != "__init__.py"}


def test_the_parser_is_argparse_and_help_fits(capsys):
    with pytest.raises(SystemExit):
        get_args(["--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^\*\*(.*)\*\*$", FLAGS, re.MULTILINE)
    assert groups == [g for g in re.findall(r"^(\w+):$", text, re.MULTILINE) if g != "options"]
    assert isinstance(get_args([]), argparse.Namespace)


def test_the_table_of_results_is_what_the_result_files_say():
    assert table() in (ROOT / "docs" / "results.md").read_text()
