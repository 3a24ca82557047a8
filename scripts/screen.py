"""Lines and tables for a terminal: no wider than it is, and no control characters."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np


def show_table(rows: Iterable[list[str]]) -> None:
    """Rows in columns, numbers to the right and names, the last, to the left; no empty columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, name in rows:
        padded = (cell.rjust(w) for cell, w in zip(cells, widths, strict=False) if w)
        say(f"  {'  '.join(padded)}  {name}".rstrip())


def say(text: str) -> None:
    """Print a line, in a terminal no longer than that is wide."""
    # Names are other people's text: no control character of theirs reaches the terminal.
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if sys.stdout.isatty():
        text = cut(text, shutil.get_terminal_size().columns)
    print(text)


def cut(text: str, width: int) -> str:
    """The text in so many columns, of which a Chinese letter takes two and an accent none."""
    columns = np.cumsum([columns_of(letter) for letter in text])
    if not len(text) or columns[-1] <= width:
        return text
    return text[: int((columns < width).sum())] + "…"


def columns_of(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
