"""A data folder on disk: its files' bytes, and what is checked on opening.

docs/data_format.md describes every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic_io import DataError, read_json
from files.safe_pickle import load_pickle
from files.sequences import EVENT_DTYPE, item_ids_of, map_file, open_split, split_path

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
# Numbers without an event, where only the events tell how many there are; a damaged one would make
# tables beyond any memory.
MOST_UNSEEN = 1 << 22

log = logging.getLogger("hstu")


class Manifest(NamedTuple):
    """What a data folder holds, read from manifest.json or, without one, from the files."""

    num_items: int
    num_users: int
    num_action_types: int
    targets: dict[str, str]  # split -> "next" | "last" | "none"
    item_ids_digest: str | None = None  # of the original ids in the order of their re-ids
    action_names: list[str] | None = None  # of the types 0, 1, ...; None: not known
    feature_digests: dict[str, str] | None = None  # of what a feature's numbers mean; None: unknown

    def action_name(self, action_type: int) -> str:
        return self.action_names[action_type] if self.action_names else f"action {action_type}"

    def action_types(self) -> dict[str, int]:
        """Each type by its name, and by its number where no name is one of these numbers."""
        names = {name: number for number, name in enumerate(self.action_names or [])}
        numbers = {str(number): number for number in range(self.num_action_types)}
        return names if names.keys() & numbers.keys() else names | numbers


# ---------------------------------------------------------------------------------- reading files


def read_manifest(data_dir: str | Path, *, trust: bool = False) -> Manifest:
    """Counts and targets of a data folder; `trust`: of the indexer.pkl, as load_pickle has it.

    Raises:
        DataError: no such folder, an unknown format version, a field missing or wrong, or a file
            whose size is not the one in the manifest.
    """
    data_dir = Path(data_dir)
    path = data_dir / "manifest.json"
    content = read_json(path) if path.exists() else None
    if isinstance(content, dict) and content.get("is_unfinished"):
        raise DataError(f"{data_dir}: its conversion did not finish; write the data again")
    if not split_path(data_dir, "train", "data").exists():
        raise DataError(
            f"{data_dir}: no train_data.bin there; name a data folder with --data_dir, or write "
            "one, of your events with scripts/prepare_table.py, to try things with "
            "scripts/prepare_synthetic.py"
        )
    if not path.exists():
        return _infer_manifest(data_dir, trust)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise _bad(path, f"format version {version}, expected {FORMAT_VERSION}")
    try:
        sizes = {name: entry["size"] for name, entry in content["files"].items()}
        manifest = Manifest(**{name: content[name] for name in Manifest._fields if name in content})
        is_right = _is_right(manifest)
        # An item or a user has a byte somewhere, if only in indexer.pkl.
        is_right = is_right and max(manifest[:2]) <= MOST_UNSEEN + sum(sizes.values())
    except (AttributeError, LookupError, TypeError) as error:
        raise _bad(path, f"a field is missing or of the wrong type ({error})") from error
    if not is_right:
        raise _bad(path, f"{manifest!s:.300} cannot be")
    for name, size in sizes.items():
        file = data_dir / name
        found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
        if found != f"{size} bytes":
            raise _bad(file, f"{found}, but manifest.json says {size} bytes")
    return manifest


def _bad(path: Path, found: str) -> DataError:
    return DataError(f"{path}: {found}; write the data again")


def _is_right(manifest: Manifest) -> bool:
    """Whether types fit, counts can be, and targets and names are legal."""
    num_items, num_users, num_types, targets, digest, names, feature_digests = manifest
    targets_of = {"train": ["next"], "valid": ["last", "none"], "test": ["last", "none"]}
    return (
        all(type(count) is int and count >= 0 for count in (num_items, num_users, num_types))
        and (max(num_items, num_users) < 2**31 and num_types < 2**16)
        and all(target in targets_of.get(split, []) for split, target in targets.items())
        and isinstance(digest, str | None)
        and isinstance(feature_digests, dict | None)
        and (names is None or all(isinstance(name, str) for name in names))
        and (names is None or len(names) == len(set(names)) == num_types)
    )


def _infer_manifest(data_dir: Path, trust: bool) -> Manifest:
    num_items = num_users = num_events = num_sequences = 0
    max_action = -1
    targets = {}
    for split in SPLITS:
        if not split_path(data_dir, split, "data").exists():
            continue
        events, offsets, users = open_split(data_dir, split)
        targets[split] = "next" if split == "train" else "last"
        num_events, num_sequences = num_events + len(events), num_sequences + len(offsets)
        num_items = max(num_items, int(item_ids_of(events).max(initial=0)))
        num_users = max(num_users, len(offsets) - 1 if users is None else int(users.max(initial=0)))
        if events.dtype == EVENT_DTYPE:
            max_action = max(max_action, int(events["action_type"].max(initial=-1)))
    if (data_dir / "indexer.pkl").exists():
        indexer = read_indexer(data_dir, trust=trust)
        num_items, num_users = len(indexer["i"]), len(indexer["u"])
        for side, count in (("i", num_items), ("u", num_users)):
            check_re_ids(data_dir / "indexer.pkl", side, indexer[side], count)
    largest = {"item id": num_items, "user id": num_users, "action type": max_action}
    for what, number in largest.items():
        if number > MOST_UNSEEN + num_events + num_sequences:
            raise _bad(
                split_path(data_dir, "train", "data"),
                f"the largest {what} is {number}, of all splits, but {num_events} events are "
                "stored and numbers are dense",
            )
    return Manifest(num_items, num_users, max_action + 1, targets)


def fingerprint(data_dir: str | Path) -> str:
    """A hash of the manifest's sizes and hashes; without one, of the sequence files' sizes."""
    data_dir = Path(data_dir)
    files = {path.name: path.stat().st_size for path in data_dir.glob("*_*.bin")}
    if (data_dir / "manifest.json").exists():
        files = read_json(data_dir / "manifest.json")["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def read_indexer(data_dir: str | Path, *, trust: bool = False) -> dict[str, dict[Any, int]]:
    """{"u": user id -> re-id, "i": item id -> re-id, ...} of indexer.pkl."""
    path = Path(data_dir) / "indexer.pkl"
    indexer = load_pickle(path, trust=trust)
    if not isinstance(indexer, dict) or not all(isinstance(indexer.get(s), dict) for s in "ui"):
        raise _bad(path, "no dictionary with dictionaries 'u' and 'i'")
    return indexer


def original_ids(
    data_dir: str | Path, side: str, count: int, *, trust: bool = False
) -> np.ndarray | None:
    """(count + 1,) uint64 original ids by re-id (row 0 unused), or None unless all are integers.

    `side` is "i" for items or "u" for users. A text such as "123" is an integer, "0123" is not, nor
    are two ids of one value. None too where there is no indexer.pkl.

    Raises:
        DataError: the indexer is not one to one onto 1..count.
    """
    re_ids = _read_re_ids(data_dir, side, count, trust)
    return None if re_ids is None else _as_numbers(re_ids, count)


def _read_re_ids(data_dir: str | Path, side: str, count: int, trust: bool) -> dict[Any, int] | None:
    path = Path(data_dir) / "indexer.pkl"
    if not path.exists():
        return None
    re_ids = read_indexer(data_dir, trust=trust)[side]
    check_re_ids(path, side, re_ids, count)
    return re_ids


def _as_numbers(re_ids: Mapping[Any, int], count: int) -> np.ndarray | None:
    originals = np.zeros(count + 1, np.uint64)
    for original, re_id in re_ids.items():
        number = number_of(original)
        if number is None:
            return None
        originals[re_id] = number
    return originals if len(np.unique(originals[1:])) == count else None


def number_of(original: Any) -> int | None:
    """An id as a number in 0..2^63 - 1, if it is one: "123" is, "0123" is not."""
    original = original.item() if isinstance(original, np.generic) else original
    if isinstance(original, str) and re.fullmatch(r"0|[1-9][0-9]{0,18}", original):
        original = int(original)
    return original if type(original) is int and 0 <= original < 2**63 else None


def log_ids(data_dir: str | Path, side: str, count: int, *, trust: bool = False) -> np.ndarray:
    """(count + 1,) ids as the log has them, by re-id: int64 if all are, else text (object).

    Row 0 is unused. `side` as of `original_ids`; without an indexer.pkl the re-ids.
    """
    re_ids = _read_re_ids(data_dir, side, count, trust)
    if re_ids is None:
        return np.arange(count + 1)
    numbers = _as_numbers(re_ids, count)
    if numbers is not None:
        return numbers.astype(np.int64)
    texts = np.full(count + 1, "", object)
    texts[list(re_ids.values())] = list(map(str, re_ids))
    return texts


def digest_of_ids(ids: Iterable[Any]) -> str:
    """What tells whether the numbers 1, 2, ... mean the same: SHA-256 of what they stand for."""
    digest = hashlib.sha256()
    for original in ids:
        digest.update(f"{original!r}\n".encode())
    return digest.hexdigest()


def check_re_ids(path: Path, side: str, re_ids: Mapping[Any, int], count: int) -> None:
    """Refuse a side of an indexer that is not one to one onto 1..count."""
    is_whole = all(issubclass(kind, int | np.integer) for kind in set(map(type, re_ids.values())))
    if is_whole and sorted(re_ids.values()) == list(range(1, count + 1)):
        return
    found, owners = f"there are {len(re_ids)}", {}
    for original, re_id in re_ids.items():
        if not isinstance(re_id, int | np.integer) or not 1 <= re_id <= count:
            found = f"{original!r:.60} is {re_id!r:.60}"
        elif (other := owners.setdefault(int(re_id), original)) != original:
            found = f"{other!r:.60} and {original!r:.60} are both {re_id}"
    raise _bad(path, f"the re-ids of {side!r} are not 1..{count}, each once: {found}")


def read_item_names(data_dir: str | Path, num_items: int) -> list[str]:
    """(X + 1) texts for people by re-id (the first unused); empty ones without item_names.txt.

    Raises:
        DataError: not UTF-8, or not a line per item.
    """
    path = Path(data_dir) / "item_names.txt"
    if not path.exists():
        return [""] * (num_items + 1)
    try:
        names = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise _bad(path, f"byte {error.start} is not UTF-8") from error
    if len(names) != num_items:
        raise _bad(path, f"{len(names)} lines, but there are {num_items} items, a line each")
    return ["", *(name.strip() for name in names)]


class Candidates(NamedTuple):
    """The items to export and rank instead of the catalogue, C of them, in their order."""

    retrieval_ids: np.ndarray  # (C,) uint64, each once
    item_ids: np.ndarray  # (C,) int32 re-ids, may repeat; 0: not in the catalogue
    original_ids: np.ndarray  # (C,) uint64, for the multimodal vectors; may repeat


def read_candidates(
    folder: str | Path, data_dir: str | Path, num_items: int, *, trust: bool = False
) -> Candidates:
    """The three id files of a candidate folder, which belongs to a data folder.

    Raises:
        DataError: a file is missing or truncated, their lengths differ, ids are out of range, a
            retrieval id occurs twice. That re-ids stand for other items than in the data is a
            warning.
    """
    dtypes = {"retrieval_ids": "<u8", "item_ids": "<i4", "original_ids": "<u8"}
    paths = {name: Path(folder) / f"{name}.bin" for name in dtypes}
    found = Candidates(*(map_file(paths[name], np.dtype(dtype)) for name, dtype in dtypes.items()))
    lengths = [len(ids) for ids in found]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise _bad(Path(folder), f"id files of different or no length, {lengths}")
    lowest, highest = found.item_ids.min(), found.item_ids.max()
    if not 0 <= lowest <= highest <= num_items:
        raise _bad(paths["item_ids"], f"ids from {lowest} to {highest}, not in 0..{num_items}")
    if found.retrieval_ids.max() >= 2**63 or len(np.unique(found.retrieval_ids)) < lengths[0]:
        raise _bad(paths["retrieval_ids"], "an id occurs twice, or is 2^63 or more")
    ids = original_ids(data_dir, "i", num_items, trust=trust)
    if ids is not None:  # texts cannot be compared
        differs = (found.item_ids > 0) & (ids[found.item_ids] != found.original_ids)
        if differs.any():
            row = int(differs.argmax())
            log.warning(
                "%s: of another data folder than %s? %d of %d original ids differ, the first: "
                "candidate %d is item %d, there %d, here %d",
                folder, data_dir, differs.sum(), lengths[0],
                row + 1, found.item_ids[row], ids[found.item_ids[row]], found.original_ids[row],
            )  # fmt: skip
    return found
