"""The pairs of one JSON object of any size, read a block at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files.atomic_io import DataError, reading

BLOCK = 1 << 22  # characters
LONGEST_PAIR = 1 << 26  # characters; what is longer is broken


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*([,}])")


def read_pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value of each pair in order; of a key that occurs twice, both.

    Raises:
        DataError: the file cannot be read, or holds anything but one JSON object in UTF-8 (a byte
            order mark is accepted).
    """
    with reading(path), open(path, encoding="utf-8-sig") as file:
        text, position = file.read(BLOCK), 0
        start = re.match(r"[ \t\n\r]*\{[ \t\n\r]*(\}?)", text)
        if not start:
            raise DataError(f"{path}: no JSON object; the file is empty, truncated or not JSON")
        at, is_closed = start.end(), bool(start[1])
        while not is_closed:
            try:
                key, value, end = _pair(text, at)
            except ValueError as error:  # the pair goes on in the next block, or is broken
                block = file.read(BLOCK)
                text, at, position = text[at:] + block, 0, position + at
                if not block or len(text) > LONGEST_PAIR:
                    raise DataError(
                        f"{path}: after character {position}: {error}; truncated or not JSON"
                    ) from error
                continue
            yield key, value
            at, is_closed = end.end(), end[1] == "}"
        if (text[at:] + file.read(BLOCK)).strip(" \t\n\r"):
            raise DataError(f"{path}: text after the end of the object; remove it")


def _pair(text: str, at: int) -> tuple[str, Any, re.Match[str]]:
    """A key, its value, and the `,` or `}` without which a number might go on in the next block."""
    key, at = _DECODER.raw_decode(text, _SPACE.match(text, at).end())
    colon = _COLON.match(text, at)
    if not isinstance(key, str) or not colon:
        raise ValueError('expected "key":')
    value, at = _DECODER.raw_decode(text, colon.end())
    end = _END.match(text, at)
    if not end:
        raise ValueError("expected , or }")
    return key, value, end
