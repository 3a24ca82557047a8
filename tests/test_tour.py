"""docs/tour.md names what exists, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import re
from functools import reduce
from pathlib import Path

TOUR = (Path(__file__).resolve().parent.parent / "docs" / "tour.md").read_text()


def test_every_name_of_the_tour_exists():
    names = re.findall(r"`([\w/]+)\.py: ([\w.]+)`", TOUR)
    assert len(names) > 20
    for module, name in names:
        reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))


def test_the_examples_of_the_tour_print_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(re.findall(r"^```python\n(.*?)^```", TOUR, re.MULTILINE | re.DOTALL))
    example = doctest.DocTestParser().get_doctest(text, {}, "tour.md", "docs/tour.md", 0)
    failures = []
    doctest.DocTestRunner().run(example, out=failures.append)
    assert len(example.examples) > 40
    assert not failures, "".join(failures)
