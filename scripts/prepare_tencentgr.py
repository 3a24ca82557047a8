"""TencentGR, the data of the Tencent Advertising Algorithm Challenge 2025, to a data folder.

Reads the folder of the demo and of the competition (seq.jsonl, item_feat_dict.json, indexer.pkl,
creative_emb/, predict_seq.jsonl, predict_set.jsonl) or the Parquet release (seq/, user_feat/,
item_feat/, candidate/, mm_emb/, indexer.pkl). Sequences are streamed; what has our format already
is linked, or copied where it lies on another file system.

    valid  some users, drawn by the seed: the target is their last click, or their last event
    test   the users of predict_seq.jsonl, targets unknown; without it, everyone's last event
    train  all events but these targets; of valid's users, those before the target
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine.flags import at_least
from files.atomic_io import DataError, atomic_write, exit_code
from files.data_folder import Manifest, check_re_ids, digest_of_ids, read_indexer
from files.data_writer import (
    begin_folder,
    check_folder,
    finish_folder,
    write_records,
    write_schema,
    write_split,
)
from files.item_vectors import find_vectors
from files.sequences import EVENT_DTYPE, USER_DTYPE, Sequences, gather, last_two_of
from tencentgr_source import (
    ACTIONS,
    FAULTS,
    SAME_AS_ITEM,
    Block,
    Limits,
    candidates,
    features_text,
    has_candidates,
    parquet_items,
    read_blocks,
)

CLICK = ACTIONS.index("click")
SCHEMA = {
    **{str(i): "user_sparse" for i in (103, 104, 105, 109)},
    **{str(i): "user_array" for i in (106, 107, 108, 110)},
    **{str(i): "item_sparse" for i in (100, 101, 102, 112, *range(114, 123))},
}
HEAD_BYTES = 4 << 20  # of item_feat_dict.json, searched for features that SCHEMA lacks
HEAD_VALUE = re.compile(r'"([^"\\]+)"\s*:\s*(\[|"|-?\d+[.eE]?)')
CHUNK = 10_000  # sequences written at once


class Index(NamedTuple):
    """What indexer.pkl says, without its item ids: 4.8 million of them take a gigabyte."""

    limits: Limits
    users: dict[Any, int]  # original id -> re-id; users that it lacks are added as they come
    cardinalities: dict[str, int]  # feature -> largest value
    digests: dict[str, str]  # feature -> what its values stand for


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, help="folder of seq.jsonl, or of seq/")
    add("data_dir", type=Path, help="folder to write")
    add("--predict_dir", type=Path, help="folder of predict_*.jsonl; None: the source")
    help_text = "users held out for validation, at most one in ten; 0: none"
    add("--valid_users", type=at_least(0), default=10_000, help=help_text)
    add("--seed", type=at_least(0), default=1, help="of the choice of these users")
    add("--num_workers", type=at_least(1), default=2, help="processes that parse JSON lines")
    add("--overwrite", action="store_true", help="in place of the data that data_dir holds")
    help_text = "run what a .pkl asks for; off: only plain data is read"
    add("--trust_pickle", action="store_true", help=help_text)
    args = parser.parse_args(argv)
    return exit_code(lambda: convert(**vars(args)))


def convert(
    source: Path,
    data_dir: Path,
    predict_dir: Path | None = None,
    valid_users: int = 10_000,
    seed: int = 1,
    num_workers: int = 2,
    trust_pickle: bool = False,
    overwrite: bool = False,
) -> Counter:
    """Write the data folder; what there was and what was left out, by description."""
    has_predict_set = predict_dir and (predict_dir / "predict_seq.jsonl").exists()
    if predict_dir and not has_predict_set and not has_candidates(predict_dir):
        raise DataError(f"{predict_dir}: --predict_dir has no predict_seq.jsonl and no candidates")
    predict_dir = predict_dir or source
    if data_dir.resolve() in (source.resolve(), predict_dir.resolve()):
        raise DataError(f"{data_dir}: is the source; name another folder to write")
    check_folder(data_dir, overwrite)
    indexer = read_indexer(source, trust=trust_pickle)
    index, counts, kinds = make_index(source, indexer), Counter(), {}
    folders = {"seq": source}
    if (predict_dir / "predict_seq.jsonl").exists():
        folders["predict_seq"] = predict_dir
    blocks = {
        name: read_blocks(folder, name, index.limits, num_workers, trust_pickle)
        for name, folder in folders.items()
    }
    find_vectors(source)  # may refuse them
    vectors = vector_files(source)
    begin_folder(data_dir, overwrite, list(vectors))
    files = write_candidates(predict_dir, data_dir, indexer["i"], counts)
    digest = digest_of_ids(sorted(indexer["i"], key=indexer["i"].get))
    del indexer
    splits, targets = write_sequences(data_dir, blocks, index, kinds, counts, valid_users, seed)
    files += splits + write_item_features(source, data_dir)
    for name, path in vectors.items():
        link(path, data_dir / name)
    files += [*vectors]
    files += describe_features(data_dir, index, kinds)
    files.append(write_index(source, data_dir, index, trust_pickle))
    sizes = index.limits.num_items, len(index.users), len(ACTIONS)
    manifest = Manifest(*sizes, targets, digest, ACTIONS, index.digests)
    finish_folder(data_dir, manifest, files)
    counts["users that indexer.pkl lacks, added"] = len(index.users) - index.limits.num_users
    print(f"wrote {data_dir}: {manifest.num_items:,} items, {manifest.num_users:,} users")
    for text, count in counts.items():
        if count:
            print(f"{count:13,}  {text}")
    return counts


# ------------------------------------------------------------------------------------ indexer.pkl


def make_index(source: Path, indexer: dict) -> Index:
    path = source / "indexer.pkl"
    for side in "ui":
        check_re_ids(path, side, indexer[side], len(indexer[side]))
    try:
        features = indexer.get("f", {}).items()
        cardinalities = {str(i): int(max(codes.values(), default=0)) for i, codes in features}
        digests = {str(i): digest_of_ids(sorted(codes, key=codes.get)) for i, codes in features}
    except FAULTS as error:
        raise DataError(f"{path}: its 'f' is not {{feature: {{value: re-id}}}}") from error
    limits = Limits(len(indexer["u"]), len(indexer["i"]))
    return Index(limits, indexer["u"], cardinalities, digests)


def write_index(source: Path, data_dir: Path, index: Index, trust_pickle: bool) -> str:
    """The source's indexer.pkl, or one with the users that it lacks; its name."""
    if len(index.users) == index.limits.num_users:
        return link(source / "indexer.pkl", data_dir / "indexer.pkl")
    indexer = read_indexer(source, trust=trust_pickle) | {"u": index.users}
    with atomic_write(data_dir / "indexer.pkl") as file:
        pickle.dump(indexer, file, protocol=4)
    return "indexer.pkl"


def link(source: Path, target: Path) -> str:
    """A hard link, or a copy on another file system; the target's name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):  # through a link of the folder's, say
        return target.name
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with open(source, "rb") as original, atomic_write(target) as file:
            shutil.copyfileobj(original, file, 1 << 20)
    return target.name


# -------------------------------------------------------------------------------------- sequences


def write_sequences(
    data_dir: Path,
    blocks: dict[str, Iterator[Block]],
    index: Index,
    kinds: dict[str, set[type]],
    counts: Counter,
    valid_users: int,
    seed: int,
) -> tuple[list[str], dict[str, str]]:
    """Write the splits and the users' features; files and targets. `kinds`, `counts` are filled."""
    with tempfile.TemporaryFile(dir=data_dir) as one, tempfile.TemporaryFile(dir=data_dir) as two:
        seen = ItemSums(index.limits.num_items)
        files = zip((one, two), blocks, strict=False)
        stores = [Store(file, index.users, seen) for file, _ in files]
        profiles = chain.from_iterable(map(Store.fill, stores, blocks.values(), repeat(kinds)))
        files = [write_records(data_dir / "user_feat_dict.json", profiles)]
        splits = cut(*(store.sequences() for store in stores), valid_users=valid_users, seed=seed)
        for name, split in splits.items():
            files += write_split(data_dir, name, prefixes(split))
    if seen.differing:
        print(
            f"warning: {len(seen.differing):,} items have other features in some lines than in "
            f"others, the first: item {min(seen.differing)}; those of item_feat_dict.json count"
        )
    if len(stores) > 1 and (lost := stores[1].left_out):
        first = ", ".join(map(str, lost[:3])) + ", ..." * (len(lost) > 3)
        print(
            f"warning: {len(lost):,} users of predict_seq have no event of an item of indexer.pkl; "
            f"they get no query and no recommendations: {first}"
        )
    for name, store in zip(blocks, stores, strict=True):
        counts.update({f"{name}: {text}": n for text, n in store.counts.items()})
    for name, split in splits.items():
        counts[f"{name}: sequences"] = len(split.rows)
        counts[f"{name}: events"] = int(split.lengths.sum())
    return files, {name: split.target for name, split in splits.items()}


class ItemSums:
    """Which items have other features in some lines than in others; see Block.item_sums."""

    def __init__(self, num_items: int):
        self.sums = np.full(num_items + 1, -1)  # of the last line with the item
        self.differing: set[int] = set()

    def add(self, pairs: np.ndarray) -> None:
        pairs = pairs[(pairs[:, 0] > 0) & (pairs[:, 0] < len(self.sums))]
        items, sums = pairs.T
        before = self.sums[items]
        self.sums[items] = sums
        differs = (before >= 0) & (before != sums) | (self.sums[items] != sums)
        self.differing |= set(items[differs].tolist())


class Store:
    """Sequences, put into a file as they come, and mapped when all are there."""

    def __init__(self, file: IO[bytes], users: dict[Any, int], item_sums: ItemSums):
        self.file, self.users, self.item_sums = file, users, item_sums
        self.lengths, self.user_ids = [np.zeros(1, np.int64)], array("i")
        self.counts: Counter = Counter()
        self.left_out: list[int | str] = []

    def fill(
        self, blocks: Iterable[Block], kinds: dict[str, set[type]]
    ) -> Iterator[tuple[int, str]]:
        """Take in all blocks; yields re-id and JSON text of their profiles."""
        for block in blocks:
            self.file.write(block.events.tobytes())
            self.lengths.append(block.lengths)
            self.user_ids.extend(map(self.re_id, block.users))
            self.counts.update(block.counts)
            self.left_out += filter(None, block.left_out)
            self.item_sums.add(block.item_sums)
            for i, types in block.kinds.items():
                kinds.setdefault(i, set()).update(types)
            yield from ((self.re_id(user), text) for user, text in block.profiles)

    def re_id(self, user: int | str) -> int:
        """The user's re-id; one without gets the next."""
        return user if type(user) is int else self.users.setdefault(user, len(self.users) + 1)

    def sequences(self) -> Sequences:
        self.file.flush()
        offsets = np.concatenate(self.lengths).cumsum()
        user_ids = np.array(self.user_ids, USER_DTYPE)
        num_twice = len(user_ids) - len(np.unique(user_ids))
        self.counts["sequences of a user that has one already"] = num_twice
        events = np.empty(0, EVENT_DTYPE)
        if len(user_ids):
            events = np.memmap(self.file, EVENT_DTYPE, "r")
        return Sequences(events, offsets, user_ids)


class Split(NamedTuple):
    """The first `lengths` events of some of the sequences."""

    target: str  # as in the manifest
    sequences: Sequences
    rows: np.ndarray  # (R,) int64, of the sequences
    lengths: np.ndarray  # (R,) int64


def cut(
    known: Sequences, asked: Sequences | None = None, *, valid_users: int, seed: int
) -> dict[str, Split]:
    """The splits of the known sequences and of those whose next event is asked for."""
    lengths = np.diff(known.offsets)
    if not len(lengths):
        raise DataError("no event of an item of indexer.pkl; the two are not of one data set")
    train_lengths = lengths.copy()
    if asked is not None:
        rows = np.arange(len(asked.user_ids))
        test = Split("none", asked, rows, np.diff(asked.offsets))
    else:  # a single event has no history to be predicted from, so it stays in train
        rows = np.flatnonzero(lengths > 1)
        train_lengths[rows] -= 1
        test = Split("last", known, rows, lengths[rows])
    rows, targets = choose_valid(known, train_lengths, valid_users, seed)
    train_lengths[rows] = targets
    splits = {"train": Split("next", known, np.arange(len(lengths)), train_lengths)}
    if len(rows):
        splits["valid"] = Split("last", known, rows, targets + 1)
    return splits | {"test": test}


def choose_valid(
    history: Sequences, lengths: np.ndarray, valid_users: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of users drawn for validation, and which of their first `lengths` events is the target.

    It is the last click, or the last event where there is none; users without an event before it
    are passed over.
    """
    starts, actions = history.offsets[:-1], history.events["action_type"].copy()
    ends = history.offsets[1:]
    actions[ends[lengths < ends - starts] - 1] = -1  # at most the last event is not among them
    last_click, _ = last_two_of(actions, history.offsets, [CLICK])
    targets = np.where(last_click >= 0, last_click - starts, lengths - 1)
    rows = np.random.default_rng(seed).permutation(len(lengths))
    wanted = min(valid_users, max(1, len(lengths) // 10))
    rows = np.sort(rows[targets[rows] > 0][:wanted])
    return rows, targets[rows]


def prefixes(split: Split) -> Iterator[Sequences]:
    """The events of a split, some thousand sequences at a time."""
    sequences = split.sequences
    for at in range(0, len(split.rows), CHUNK):
        rows = split.rows[at : at + CHUNK]
        starts = sequences.offsets[rows]
        ends = starts + split.lengths[at : at + CHUNK]
        yield gather(sequences.events, starts, ends, sequences.user_ids[rows])


# --------------------------------------------------------------------------------------- features


def write_item_features(source: Path, data_dir: Path) -> list[str]:
    """Put item_feat_dict.json into the data folder, if there are features; its name."""
    path = data_dir / "item_feat_dict.json"
    if (source / path.name).exists():
        return [link(source / path.name, path)]
    if (source / "item_feat").is_dir():
        return [write_records(path, parquet_items(source / "item_feat"))]
    print(f"{source}: no item_feat_dict.json, nor a folder item_feat: items have no features")
    return []


def vector_files(source: Path) -> dict[str, Path]:
    """The files of multimodal vectors, by their names in a data folder."""
    return {
        f"creative_emb/{path.relative_to(folder).as_posix()}": path
        for folder in (source / "creative_emb", source / "mm_emb")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name[0] not in "._"
    }


def describe_features(data_dir: Path, index: Index, user_kinds: dict[str, set[type]]) -> list[str]:
    """Write the three small files, beside the candidates too; their names."""
    found = {"user": user_kinds, "item": kinds_at_head(data_dir / "item_feat_dict.json")}
    sizes, kinds = index.cardinalities, {}
    for side, types in found.items():
        expected = {i for i in sizes if SCHEMA.get(i, "").startswith(side) and types}
        for i in sorted({*types, *expected} - {SAME_AS_ITEM}):
            kinds[i] = kind_of(side, i, types.get(i, set()), i in sizes)
            if not kinds[i]:
                print(f"{side} feature {i}: left out, its values are text or not in indexer.pkl")
            elif i not in SCHEMA:
                print(f"{side} feature {i}: not in the schema, taken as {kinds[i]}")
    for i in sorted(sizes.keys() - {*kinds, SAME_AS_ITEM}):
        print(f"feature {i} of indexer.pkl: left out, no value seen")
    paths = find_vectors(data_dir).items()
    types = {"item_emb": [i for i, path in paths if path.is_file() or any(path.iterdir())]}
    for i, kind in kinds.items():
        if kind:
            types.setdefault(kind, []).append(i)
    listed = [i for i, kind in kinds.items() if kind]
    statistics = {i: sizes[i] for i in listed if i in sizes}
    defaults = {i: [] if kinds[i].endswith("array") else 0 for i in listed}
    names = write_schema(data_dir, types, statistics, defaults)
    if (data_dir / "candidates" / "item_feat_dict.json").exists():
        write_schema(data_dir / "candidates", types, statistics, defaults)
        names += [f"candidates/{name}" for name in names]
    return names


def kind_of(side: str, i: str, types: set[type], is_indexed: bool) -> str | None:
    """The key of a feature in feature_types.json; None where its values cannot be used."""
    if i in SCHEMA:
        return SCHEMA[i] if is_indexed and SCHEMA[i].startswith(side) else None
    if is_indexed and types and float not in types:
        return f"{side}_array" if list in types else f"{side}_sparse"
    return f"{side}_continual" if types and types <= {int, float} else None


def kinds_at_head(path: Path) -> dict[str, set[type]]:
    """Feature ids at the file's head, and the types of their values."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES).decode(errors="replace")
    kinds: dict[str, set[type]] = {}
    for name, value in HEAD_VALUE.findall(head):
        types = kinds.setdefault(name, set())
        if value != '"':  # text has no kind: it is a value that training lacks
            types.add(list if value == "[" else float if value[-1] in ".eE" else int)
    return kinds


# ------------------------------------------------------------------------------------- candidates


def write_candidates(
    folder: Path, data_dir: Path, item_ids: dict[Any, int], counts: Counter
) -> list[str]:
    """The candidate set, if there is one, as DATA/candidates/; the names of its files.

    Row 1, 2, ... of item_feat_dict.json is a candidate; the three arrays have a value for each:
    retrieval_ids.bin <u8, original_ids.bin <u8 (the vectors' ids), item_ids.bin <i4 (0: cold).
    """
    columns = {"retrieval_ids": array("Q"), "original_ids": array("Q"), "item_ids": array("i")}
    texts = Counter()

    def records() -> Iterator[tuple[int, str]]:
        for row, (retrieval_id, original, features) in enumerate(candidates(folder), 1):
            columns["retrieval_ids"].append(retrieval_id)
            columns["original_ids"].append(original)
            columns["item_ids"].append(item_ids.get(original, item_ids.get(str(original), 0)))
            yield row, features_text(features, texts, {})

    if not has_candidates(folder):
        return []
    target = data_dir / "candidates"
    target.mkdir(exist_ok=True)
    names = [write_records(target / "item_feat_dict.json", records())]
    retrieval_ids, originals, rows = columns.values()
    if len(set(retrieval_ids)) < len(rows):
        raise DataError(f"{folder}: a retrieval id occurs twice among the candidates")
    for name, column in columns.items():
        with atomic_write(target / f"{name}.bin") as file:
            file.write(np.array(column, "<i4" if name == "item_ids" else "<u8").tobytes())
        names.append(f"{name}.bin")
    counts["candidates"] = len(rows)
    counts["candidates: cold"] = rows.count(0)
    counts["candidates: of an item that has one already"] = len(rows) - len(set(originals))
    counts.update({f"candidates: {text}": n for text, n in texts.items()})
    return [f"candidates/{name}" for name in names]


if __name__ == "__main__":
    sys.exit(main())
