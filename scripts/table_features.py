"""Tables of items and of users to features: a role per column, and vectors."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from files.atomic_io import DataError
from files.data_writer import Column
from table_like import TRANSFORMATIONS, Earlier, Known
from table_sides import LIST_END, SideTable, Texts, are_numbers, ranked, shown

DELIMITERS = LIST_END + "|;, "  # of lists
ROLES = ("sparse", "array", "continual", "drop")
SKEWED = 30  # a positive number whose largest is this many medians becomes log(1 + x)
COUNTS_EVENTS = 0.95  # rank correlation with an item's number of events, of what counts them
FEW = 20  # items whose correlation with anything says little


def make_features(
    tables: dict[str, SideTable],
    roles: dict[str, list[str]],
    num_events: np.ndarray,
    earlier: Earlier,
) -> dict[str, dict[str, Column]]:
    """A feature per column that is worth one; what became of each column is shown.

    Args:
        num_events: (X,) int64, of each item.
        earlier: its features stay what they were there, and new ones come on request alone.

    Raises:
        DataError: a flag or a table does not fit the columns, or the earlier features.
    """
    names = [name for table in tables.values() for name in table.columns]
    for pattern in itertools.chain(*roles.values()):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(
                f"no column is called {pattern}; there are {', '.join(names) or 'none'}"
            )
    features: dict[str, dict[str, Column]] = {"item": {}, "user": {}}
    for side, table in tables.items():
        kept: dict[bytes, str] = {}
        for name in table.columns:
            feature_id = name
            while any(feature_id in taken for taken in features.values()):
                feature_id = f"user_{feature_id}"
            known = earlier.features[side].get(feature_id)
            role, detail = asked_role(name, roles), "as asked"
            if earlier.folder is not None:
                role, detail = kept_role(name, role, known, earlier.folder)
            if role == "drop":
                print(f"  {side}  {name:24} {role:10} {detail}")
                continue
            column = table.texts(name)
            content = hashlib.sha256(column.codes.tobytes()).digest()
            if role is None:
                role, detail = guess(column, kept.get(content))
                doubt = table.doubts.get(name)
                if side == "item" and role != "drop" and counts_events(column, num_events):
                    doubt = "it counts an item's events, those held out among them"
                role, detail = ("drop", doubt) if doubt and role != "drop" else (role, detail)
            if role != "drop":
                kept[content] = name
                features[side][feature_id], detail = BUILDERS[role](name, column, known)
            print(f"  {side}  {name:24} {role:10} {detail}")
    for side, known_features in earlier.features.items():
        if absent := sorted(known_features.keys() - features[side].keys()):
            raise DataError(
                f"{earlier.folder}: has the features {', '.join(absent)} of {side}s, but no column "
                f"of these names is in a table of {side}s; name that table (--{side}_features)"
            )
    return features


def kept_role(name: str, asked: str | None, known: Known | None, folder: Path) -> tuple[str, str]:
    """The role of a column in the earlier folder; a column that is no feature there is dropped."""
    if known is None:
        return (asked, "as asked") if asked else ("drop", f"no feature in {folder}")
    if asked not in (None, known.role):
        raise DataError(
            f"column {name}: --{asked}, but it is {known.role} in {folder}; leave out the flag, or "
            "--like"
        )
    return known.role, ""


def asked_role(name: str, roles: dict[str, list[str]]) -> str | None:
    """The role that a flag gives to a column; None: none does."""
    if len(by_name := [role for role in ROLES if name in roles[role]]) > 1:
        raise DataError(f"column {name}: named by both --{by_name[0]} and --{by_name[1]}")
    asked = [r for r in ROLES if any(fnmatchcase(name, pattern) for pattern in roles[r])]
    return asked[0] if asked else None


def counts_events(column: Texts, num_events: np.ndarray) -> bool:
    """Whether a column of numbers ranks the items as their events in the whole log do."""
    known = [text for text in column.texts if text]
    if len(known) < FEW // 2 or not are_numbers(known):
        return False
    is_known = ~missing(column)
    if is_known.sum() < FEW:
        return False
    values = np.array([float(text or 0) for text in column.texts])[column.codes]
    ranks = [mean_ranks(x[is_known]) for x in (values, num_events)]
    return min(map(np.std, ranks)) > 0 and np.corrcoef(*ranks)[0, 1] > COUNTS_EVENTS


def mean_ranks(values: np.ndarray) -> np.ndarray:
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - counts / 2)[codes]


def guess(column: Texts, twin: str | None) -> tuple[str, str]:
    """The role of a column, and the reason to drop it; `twin` has a value for each of its own."""
    known = [text for text in column.texts if text]
    num_known = int((~missing(column)).sum())
    if len(column.texts) < 2:
        return "drop", "constant"
    if are_numbers(known) and not all(float(text).is_integer() for text in known):
        return "continual", ""
    if all(text[0] == "{" for text in known):
        return "drop", "objects; write their fields as columns"
    delimiter = delimiter_of(known)
    if delimiter == "," and all(re.fullmatch(r"-?\d+(,\d+)?", text) for text in known):
        return "drop", "numbers with decimal commas, or lists (--array)? write points for numbers"
    role = "array" if delimiter else "sparse"
    if role == "sparse" and len(known) > num_known / 2:
        return "drop", f"{len(known):,} different values in {num_known:,} rows"
    return ("drop", f"a copy of {twin}") if twin else (role, "")


def missing(column: Texts) -> np.ndarray:
    """(n,) bool."""
    return np.array([not text for text in column.texts], bool)[column.codes]


def delimiter_of(texts: Sequence[str]) -> str | None:
    """What separates lists: it leaves no more pieces than texts; a blank, only whole numbers."""
    are_lists = any(LIST_END in text for text in texts)  # their values may hold the others
    for delimiter in LIST_END if are_lists else DELIMITERS:
        pieces = {piece for text in texts for piece in pieces_of(text, delimiter)}
        is_list = len(pieces) <= len(texts) and any(
            delimiter in text.removesuffix(LIST_END) for text in texts
        )
        if is_list and (delimiter != " " or all(map(str.isdecimal, pieces))):
            return delimiter
    return None


def pieces_of(text: str, delimiter: str) -> list[str]:
    return [piece.strip() for piece in text.split(delimiter) if piece.strip()]


def sparse_column(_: str, column: Texts, earlier: Known | None) -> tuple[Column, str]:
    ranks, known = ranked(list(map(shown, column.texts)), earlier.values if earlier else ())
    detail = f"{num_values(known, earlier)}, {1 - missing(column).mean():.1%} known"
    return Column("sparse", ranks[column.codes], known), detail


def num_values(values: list, earlier: Known | None) -> str:
    new = f" ({len(values) - len(earlier.values):,} new)" if earlier else ""
    return f"{len(values):,} values{new}"


def array_column(_: str, column: Texts, earlier: Known | None) -> tuple[Column, str]:
    texts = column.texts
    used = [d for d in DELIMITERS if any(d in text for text in texts)]
    delimiter = delimiter_of(texts) or (used or DELIMITERS)[0]
    if earlier and delimiter != LIST_END:
        delimiter = delimiter_of_known(texts, set(map(str, earlier.values)))
    lists = [pieces_of(text, delimiter) for text in texts]
    pieces = list(dict.fromkeys(itertools.chain(*lists)))
    ranks, known = ranked(pieces, earlier.values if earlier else ())
    rank = dict(zip(pieces, ranks.tolist(), strict=True))
    values = [[rank[piece] for piece in lists[code]] for code in column.codes]
    mean = sum(map(len, values)) / len(values)
    how = "in lists" if delimiter == LIST_END else f"by {delimiter!r}"
    detail = f"{num_values(known, earlier)}, {mean:.1f} per row, {how}"
    return Column("array", values, known), detail


def delimiter_of_known(texts: Sequence[str], known: set[str]) -> str:
    """The delimiter that leaves the most known values, and of such the fewest others."""
    pieces = {d: {piece for text in texts for piece in pieces_of(text, d)} for d in DELIMITERS}
    return max(DELIMITERS, key=lambda d: (len(pieces[d] & known), -len(pieces[d] - known)))


def continual_column(name: str, column: Texts, earlier: Known | None) -> tuple[Column, str]:
    """Numbers; a missing one is the median, and skewed ones become log(1 + x).

    Where there is an earlier folder, the median and the choice of the logarithm are those of it.
    """
    bad = [text for text in column.texts if text and not are_numbers([text])]
    if bad or not any(column.texts):
        raise DataError(f"column {name}: {bad[:1]} is no number; choose another role for it")
    is_missing = missing(column)
    values = np.array([float(text or 0) for text in column.texts])[column.codes]
    median = np.median(values[~is_missing])
    values[is_missing] = median
    detail = f"{values.min():.4g} to {values.max():.4g}, median {median:.4g}"
    if is_missing.any():
        remark = "as in the earlier folder" if earlier else "as that"
        detail += f", {is_missing.sum():,} missing read {remark}"
    is_skewed = values.min() >= 0 and values.max() > SKEWED * median
    (transformation,) = earlier.values if earlier else [TRANSFORMATIONS[int(is_skewed)]]
    if transformation == "log(1 + x)":
        if values.min() <= -1:
            raise DataError(f"column {name}: {values.min():g} has no log(1 + x); correct it")
        values = np.log1p(values)
        detail = f"{transformation}, x {detail}"
    default = float(np.log1p(median) if transformation == "log(1 + x)" else median)
    if earlier:
        default = values[is_missing] = earlier.missing
    return Column("continual", values, [transformation], default), detail


BUILDERS = {"sparse": sparse_column, "array": array_column, "continual": continual_column}
