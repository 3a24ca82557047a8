"""What is in a data folder, in one screen; `--check full` verifies every byte and every record."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from screen import say

from files.atomic_io import DataError, exit_code, read_json, sha256_of
from files.data_folder import (
    SPLITS,
    Manifest,
    check_re_ids,
    log_ids,
    original_ids,
    read_candidates,
    read_indexer,
    read_item_names,
    read_manifest,
)
from files.features import Feature, load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from files.sequences import (
    EVENT_DTYPE,
    check_split,
    item_ids_of,
    open_split,
    split_path,
)
from history_source import date

BLOCK = 1 << 22  # events looked at at once
MAX_PROBLEMS = 20  # shown
NUM_SEQUENCES, NUM_EVENTS = 3, 4  # shown
SPANS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What is in a data folder, in one screen.")
    parser.add_argument("data_dir", type=Path, help="folder of train_data.bin and the rest")
    parser.add_argument("--check", choices=["full"], help="full: verify every byte and record too")
    trust_help = "load .pkl files unchecked: they can run any code"
    parser.add_argument("--trust_pickle", action="store_true", help=trust_help)
    args = parser.parse_args(argv)
    return exit_code(lambda: look(args.data_dir, args.trust_pickle, bool(args.check)))


def look(data_dir: Path, trust: bool, is_check: bool) -> None:
    """Show the folder; or all that is wrong in it."""
    if is_check:
        problems = list(itertools.islice(find_problems(data_dir, trust), MAX_PROBLEMS + 1))
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = ["and more"]
        if problems:
            raise DataError("\nerror: ".join(problems))
    show(data_dir, trust)
    if is_check:
        print("\nverified every file and every record: no problem")


# ------------------------------------------------------------------------------------------ screen


def show(data_dir: Path, trust: bool) -> None:
    manifest = read_manifest(data_dir, trust=trust)
    show_splits(data_dir, manifest)
    show_actions(open_split(data_dir, "train")[0], manifest)
    show_features(data_dir, manifest, trust)
    show_sequences(data_dir, manifest, trust)


def show_splits(data_dir: Path, manifest: Manifest) -> None:
    print(
        f"{data_dir}: {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_action_types} action types\n\n"
        "split  target  sequences       events  median, mean, most   from and to"
    )
    is_trained, cold = np.zeros(manifest.num_items + 1, bool), []
    for split in filter(manifest.targets.get, SPLITS):
        target = manifest.targets[split]
        events, offsets, users = open_split(data_dir, split)
        check_split(data_dir, split, offsets, users, manifest.num_users)
        lengths = np.diff(offsets)
        known = lengths if len(lengths) else np.zeros(1, int)
        shape = f"{np.median(known):g}, {known.mean():.1f}, {known.max():,}"
        counts = f"{len(lengths):11,}{len(events):13,}"
        print(f"{split:7}{target:6}{counts}  {shape:21}{time_span(events)}")
        if split == "train":
            for block in blocks(events):
                is_trained[item_ids_of(block).clip(0, manifest.num_items)] = True
        elif target == "last" and len(events):
            targets = item_ids_of(events)[offsets[1:][lengths > 0] - 1].clip(0, manifest.num_items)
            cold.append(f"{(~is_trained[targets]).mean():.2%} of the {split} targets")
    print(f"\nnever in train: {(~is_trained[1:]).sum():,} items" + "".join(f", {c}" for c in cold))


def blocks(events: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(events), BLOCK):
        yield events[start : start + BLOCK]


def time_span(events: np.ndarray) -> str:
    ends: list[int] = []
    for block in blocks(events) if events.dtype == EVENT_DTYPE else ():
        times = block["timestamp"][block["timestamp"] > 0]
        ends += [times.min(), times.max()] if len(times) else []
    return f"{date(min(ends))} {date(max(ends))}" if ends else "no times"


def show_actions(events: np.ndarray, manifest: Manifest) -> None:
    num_types = manifest.num_action_types
    if events.dtype != EVENT_DTYPE or not len(events):
        return
    counts = np.zeros(num_types + 1, np.int64)
    for block in blocks(events):
        types = block["action_type"].clip(-1, num_types - 1)
        counts += np.bincount(types + 1, minlength=num_types + 1)
    names = map(str, range(num_types))
    if manifest.action_names:
        names = map(" = ".join, zip(names, manifest.action_names, strict=True))
    shares = zip(["unknown", *names], counts / len(events), strict=True)
    print(
        "actions in train: " + ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
    )


def show_features(data_dir: Path, manifest: Manifest, trust: bool) -> None:
    print("\nfeature                     kind       known   content")
    for side, rows in (("item", manifest.num_items), ("user", manifest.num_users)):
        for name, feature in load_features(data_dir, side, rows).items():
            show_feature(f"{side} {name}", feature)
    for name, feature in vectors(data_dir, manifest, trust).items():
        show_feature(f"item {name}", feature)


def vectors(data_dir: Path, manifest: Manifest, trust: bool) -> dict[str, Feature]:
    found = find_vectors(data_dir)
    needs_ids = not all(map(is_by_re_id, found.values()))
    item_ids = read_indexer(data_dir, trust=trust)["i"] if needs_ids else {}
    if needs_ids:
        check_re_ids(data_dir / "indexer.pkl", "i", item_ids, manifest.num_items)
    return load_vectors(data_dir, list(found), item_ids, manifest.num_items, trust_pickle=trust)


def show_feature(name: str, feature: Feature) -> None:
    values, known = feature.values[1:], "      "
    content = f"{feature.size:,} values"
    if feature.kind == "sparse":
        known = f"{(values > 0).mean():6.1%}"
    elif feature.kind == "array":
        lengths = np.diff(feature.offsets)[1:]
        known, content = f"{(lengths > 0).mean():6.1%}", f"{content}, {lengths.mean():.1f} per list"
    elif feature.kind == "emb":
        known, content = f"{feature.present[1:].mean():6.1%}", f"vectors of width {feature.size}"
    elif feature.kind == "continual":
        content = f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"
    print(f"{name:28}{feature.kind:10} {known}  {content}")


def show_sequences(data_dir: Path, manifest: Manifest, trust: bool) -> None:
    events, offsets, users = open_split(data_dir, "train")
    sides = {"i": manifest.num_items, "u": manifest.num_users}
    item_ids, user_ids = (log_ids(data_dir, s, count, trust=trust) for s, count in sides.items())
    titles = read_item_names(data_dir, manifest.num_items)
    print()
    for k in range(min(NUM_SEQUENCES, len(offsets) - 1)):
        start, end = int(offsets[k]), int(offsets[k + 1])
        user = k + 1 if users is None else int(users[k])
        parts, before = [], 0
        for event in events[start : min(end, start + NUM_EVENTS)]:
            is_record = events.dtype == EVENT_DTYPE
            item = int(event["item_id"] if is_record else event)
            text = f"item {repr(titles[item][:40]) if titles[item] else item_ids[item]}"
            if is_record:
                action, time = int(event["action_type"]), int(event["timestamp"])
                how = f" ({manifest.action_name(action)})" if action >= 0 else ""
                text = f"{when(time, before)} {text}{how}"
                before = time
            parts.append(text.strip())
        more = f", ... {end - start} events" if end - start > NUM_EVENTS else ""
        say(f"user {user_ids[user]}: {', '.join(parts)}{more}")


def when(time: int, before: int) -> str:
    """The date of the first event, and of others the time since the one before."""
    if time <= 0 or before <= 0:
        return date(time) if time > 0 else ""
    gap = time - before
    size, unit = next((row for row in SPANS if gap >= 2 * row[0]), SPANS[-1])
    return f"{gap // size} {unit} later" if gap else "then"


# ------------------------------------------------------------------------------------------- check


def find_problems(data_dir: Path, trust: bool = False) -> Iterator[str]:
    """What is wrong with the folder, a line each; falling times are only warned of."""
    manifest = read_manifest(data_dir, trust=trust)
    files = {}
    if (data_dir / "manifest.json").exists():
        files = read_json(data_dir / "manifest.json")["files"]
    for name, entry in files.items():
        if sha256_of(data_dir / name) != entry.get("sha256"):
            yield f"{data_dir / name}: not the SHA-256 of manifest.json; write the data again"
    for split in manifest.targets:
        yield from split_problems(data_dir, split, manifest)
    loads = [
        lambda: load_features(data_dir, "item", manifest.num_items),
        lambda: load_features(data_dir, "user", manifest.num_users),
        lambda: vectors(data_dir, manifest, trust),
        lambda: original_ids(data_dir, "i", manifest.num_items, trust=trust),
        lambda: original_ids(data_dir, "u", manifest.num_users, trust=trust),
        lambda: candidate_features(data_dir, manifest, trust),
    ]
    for load in loads:
        try:
            load()
        except DataError as error:
            yield str(error)


def candidate_features(data_dir: Path, manifest: Manifest, trust: bool) -> None:
    folder = data_dir / "candidates"
    if any(folder.glob("*_ids.bin")):  # an earlier conversion may leave an empty folder
        found = read_candidates(folder, data_dir, manifest.num_items, trust=trust)
        if (folder / "feature_types.json").exists():
            load_features(folder, "item", len(found.item_ids))


def split_problems(data_dir: Path, split: str, manifest: Manifest) -> Iterator[str]:
    try:
        events, offsets, users = open_split(data_dir, split)
        check_split(data_dir, split, offsets, users, manifest.num_users)
    except DataError as error:
        yield str(error)
        return
    path, falls, last = split_path(data_dir, split, "data"), 0, None
    for number, block in enumerate(blocks(events)):
        ids, first = item_ids_of(block), number * BLOCK
        bad = [("item id", ids, 1, manifest.num_items)]
        if block.dtype == EVENT_DTYPE:
            bad.append(("action type", block["action_type"], -1, manifest.num_action_types - 1))
            times = block["timestamp"] if last is None else np.append(last, block["timestamp"])
            last = times[-1:]
            at = first + len(block) - len(times) + 1 + np.flatnonzero(np.diff(times) < 0)
            falls += int((offsets[np.searchsorted(offsets, at)] != at).sum())
        for what, values, low, high in bad:
            for event in np.flatnonzero((values < low) | (values > high)):
                k = int(np.searchsorted(offsets, first + event, side="right")) - 1
                yield (
                    f"{path}: sequence {k} event {first + event - offsets[k]}: {what} "
                    f"{values[event]}, expected {low}..{high}"
                )
    if falls:
        print(f"warning: {path}: {falls:,} events are older than the one before", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into `head`, say
    sys.exit(main())
