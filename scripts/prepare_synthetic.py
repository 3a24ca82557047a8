"""A small synthetic data set with every feature type, whose best reachable HR@10 is known.

Items lie in clusters and are not equally likely in them. A user's next item comes from

    the user's home cluster                  after a pause of hours (time, user features)
    the cluster of the last item             else, if its action was 0 (transitions, actions)
    one of the two that follow the cluster   else, if its action was 1 or 2

or, in one event of ten, from any cluster. Nobody meets an item twice. One item in ten is cold: an
event only as a test target, so that nothing but its features tells its cluster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine.flags import at_least
from files.atomic_io import exit_code
from files.data_writer import Column, leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE

NUM_CLUSTERS = 20
ACTION_RATES = (0.4, 0.35, 0.25)
NOISE = 0.1  # share of events from any cluster
PAUSE_RATE = 0.3  # share of events that begin a visit
COLD_ITEMS = 0.1  # share of items
COLD_TARGETS = 0.1  # share of test targets, before items already met are left out
LENGTHS = (10, 40)  # events per user
SKEW = 0.7  # an item's weight in its cluster is rank ** -SKEW
SHORT_GAP, PAUSE = (20, 300), (6 * 3600, 48 * 3600)  # seconds
START = 1_700_000_000
NUM_AISLES = 5  # a cluster is an aisle and a shelf
AISLES = [f"aisle {number}" for number in range(1, NUM_AISLES + 1)]
TAGS = [*(f"shelf {number}" for number in range(1, 10)), *(f"tag {n}" for n in range(10, 20))]
VECTOR_WIDTH, VECTOR_NOISE, WITHOUT_VECTOR = 32, 0.5, 0.2
EFFECTS = ("transitions", "actions", "time", "features")


class Process(NamedTuple):
    """What the next item depends on, for X items, C clusters and A action types."""

    clusters: np.ndarray  # (X,) int
    weights: np.ndarray  # (X,) an item's probability within its cluster; cold: 0
    test_weights: np.ndarray  # (X,) the same of test targets
    is_cold: np.ndarray  # (X,) bool
    successors: np.ndarray  # (A, C) int, the cluster that follows action and cluster


class State(NamedTuple):
    """What it depends on for each of U users."""

    homes: np.ndarray  # (U,) int, cluster
    clusters: np.ndarray  # (U,) int, of the last item
    actions: np.ndarray  # (U,) int, of the last event
    is_pause: np.ndarray  # (U,) bool, the next event begins a visit
    seen: np.ndarray  # (U, X) bool


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data_dir", type=Path, help="folder to write")
    parser.add_argument("--num_users", type=at_least(1), default=2000, help="sequences")
    parser.add_argument(
        "--num_items", type=at_least(10 * NUM_CLUSTERS), default=400, help="a tenth are cold"
    )
    parser.add_argument("--seed", type=at_least(0), default=7, help="of everything drawn")
    parser.add_argument("--overwrite", action="store_true", help="the data that data_dir holds")
    args = parser.parse_args(argv)
    return exit_code(lambda: write_and_tell(args))


def write_and_tell(args: argparse.Namespace) -> None:
    report = write(args.data_dir, args.num_users, args.num_items, args.seed, args.overwrite)
    print(f"wrote {args.data_dir}: " + ", ".join(f"{n:,} {k}" for k, n in report["counts"].items()))
    print(f"test split, {report['cold']:.1%} of the targets never occur in training; HR@10 of")
    for name, value in report["HR@10"].items():
        print(f"  {name:24}{value:.4f}")


def write(
    data_dir: Path, num_users: int, num_items: int, seed: int, overwrite: bool = False
) -> dict:
    """Write the data set.

    Returns:
        "counts", "cold" (the share of cold test targets), and "HR@10" on the test split:
        "optimum" and what else `best_hit_rates` has.
    """
    generator = np.random.default_rng(seed)
    process = make_process(num_items, generator)
    events, offsets, state = simulate(process, num_users, generator)
    splits = leave_one_out(events, offsets)
    write_dataset(
        data_dir,
        splits,
        item_ids=500_000 + 3 * np.arange(num_items),
        user_ids=10_000 + 7 * np.arange(num_users),
        num_action_types=len(ACTION_RATES),
        item_features=item_features(process, generator),
        user_features=user_features(state.homes, generator),
        item_vectors={"81": item_vectors(process, generator)},
        item_names=[f"item {i} (cluster {c})" for i, c in enumerate(process.clusters, 1)],
        overwrite=overwrite,
    )
    targets = events["item_id"][offsets[1:] - 1] - 1
    train_counts = np.bincount(splits["train"].events["item_id"] - 1, minlength=num_items)
    return {
        "counts": {"users": num_users, "items": num_items, "events": len(events)},
        "cold": process.is_cold[targets].mean(),
        "HR@10": best_hit_rates(process, state, targets)
        | {"popularity": hit_rate(train_counts * ~state.seen, targets)},
    }


# ------------------------------------------------------------------------------------- the process


def make_process(num_items: int, generator: np.random.Generator) -> Process:
    places = generator.permutation(num_items)
    clusters, ranks = places % NUM_CLUSTERS, places // NUM_CLUSTERS + 1
    is_cold = places >= num_items - round(COLD_ITEMS * num_items)
    warm = within_clusters(np.where(is_cold, 0, ranks**-SKEW), clusters)
    cold = within_clusters(is_cold, clusters)
    first, second = generator.permutation(NUM_CLUSTERS), generator.permutation(NUM_CLUSTERS)
    successors = np.stack([np.arange(NUM_CLUSTERS), first, second])
    test_weights = (1 - COLD_TARGETS) * warm + COLD_TARGETS * cold
    return Process(clusters, warm, test_weights, is_cold, successors)


def within_clusters(weights: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The weights, summing to 1 in each cluster."""
    return weights / np.bincount(clusters, weights)[clusters]


def cluster_probabilities(process: Process, state: State, blind_to: str = "") -> np.ndarray:
    """(U, C) of the next item; blind to "transitions", all clusters may follow alike."""
    known, anything = np.eye(NUM_CLUSTERS), np.full(NUM_CLUSTERS, 1 / NUM_CLUSTERS)
    follows = known[process.successors][:, state.clusters]  # (A, U, C)
    if blind_to == "transitions":
        moved = anything
    elif blind_to == "actions":
        moved = np.tensordot(ACTION_RATES, follows, 1)
    else:
        moved = follows[state.actions, np.arange(len(state.actions))]
    pause = PAUSE_RATE if blind_to == "time" else state.is_pause[:, None]
    expected = pause * known[state.homes] + (1 - pause) * moved
    return NOISE * anything + (1 - NOISE) * expected  # (U, C)


def item_probabilities(
    process: Process, state: State, is_test: bool, blind_to: str = ""
) -> np.ndarray:
    """(U, X) of the next item, zero for items already met; blind to "features" of cold ones."""
    weights = process.test_weights if is_test else process.weights
    clusters = cluster_probabilities(process, state, blind_to)[:, process.clusters]
    if blind_to == "features":
        clusters[:, process.is_cold] = 1 / NUM_CLUSTERS
    joint = clusters * weights * ~state.seen
    return joint / joint.sum(1, keepdims=True)


def simulate(
    process: Process, num_users: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, State]:
    """(E,) EVENT_DTYPE, (U + 1,) offsets, and the state before each user's last event."""
    U, L, X = num_users, LENGTHS[1], len(process.clusters)
    step, first = np.arange(L), L - generator.integers(LENGTHS[0], L + 1, (U, 1))
    is_event = step >= first  # users differ in their first step and share the last
    is_pause = (generator.random((U, L)) < PAUSE_RATE) | (step == first)
    gaps = np.where(is_pause, *(generator.integers(*gap, (U, L)) for gap in (PAUSE, SHORT_GAP)))
    steps = np.empty((U, L), EVENT_DTYPE)
    steps["action_type"] = generator.choice(len(ACTION_RATES), (U, L), p=ACTION_RATES)
    steps["timestamp"] = START + gaps.cumsum(1)
    homes, clusters = generator.integers(NUM_CLUSTERS, size=(2, U))
    seen = np.zeros((U, X), bool)
    for t in range(L):
        state = State(homes, clusters, steps["action_type"][:, t - 1], is_pause[:, t], seen.copy())
        chances = item_probabilities(process, state, is_test=t == L - 1)
        # The largest of p / Exp(1) is item i with probability p[i].
        items = (chances / generator.exponential(size=(U, X))).argmax(1)
        clusters = process.clusters[items]
        seen[np.arange(U), items] |= is_event[:, t]
        steps["item_id"][:, t] = items + 1
    return steps[is_event], np.concatenate([[0], is_event.sum(1).cumsum()]), state


# ------------------------------------------------------------------------------------ the features


def item_features(process: Process, generator: np.random.Generator) -> dict[str, Column]:
    """The aisle of the cluster, its shelf among two random tags, and a price."""
    shelves, aisles = np.divmod(process.clusters, NUM_AISLES)
    prices = (1 + shelves) * generator.lognormal(0, 0.3, len(shelves))
    return {
        "aisle": Column("sparse", aisles + 1, AISLES),
        "tags": Column("array", listed(shelves + 1, generator), TAGS),
        "price": Column("continual", prices.round(2), ["x"]),
    }


def user_features(homes: np.ndarray, generator: np.random.Generator) -> dict[str, Column]:
    """Region and interests are aisle and shelf of the home cluster; age depends on the aisle."""
    shelves, aisles = np.divmod(homes, NUM_AISLES)
    interests = listed(shelves + 1, generator)
    ages = 20 + 10 * aisles + generator.integers(10, size=len(homes))
    return {
        "region": Column("sparse", aisles + 1, AISLES),
        "interests": Column("array", interests, TAGS),
        "age": Column("continual", ages, ["x"]),
    }


def listed(values: np.ndarray, generator: np.random.Generator) -> list[list[int]]:
    """Each value in 1..9, and none to two others that say nothing."""
    counts = generator.integers(3, size=len(values))
    return [
        [v, *generator.integers(10, 20, n).tolist()]
        for v, n in zip(values.tolist(), counts, strict=True)
    ]


def item_vectors(process: Process, generator: np.random.Generator) -> np.ndarray:
    """(X, W) a noisy copy of the cluster's vector; NaN for items without one."""
    centres = generator.normal(size=(NUM_CLUSTERS, VECTOR_WIDTH))
    vectors = centres[process.clusters]
    vectors += VECTOR_NOISE * generator.normal(size=vectors.shape)
    vectors[generator.random(len(vectors)) < WITHOUT_VECTOR] = np.nan
    return vectors


# ------------------------------------------------------------------------------------- the optimum


def best_hit_rates(process: Process, state: State, targets: np.ndarray) -> dict[str, float]:
    """HR@10 of whoever knows the process, and of the same without one effect.

    "optimum" is measured on these targets, "optimum, expected" is its mean over all that could
    have been drawn. Items already met are left out, as in engine/evaluation.py.
    """
    chances = item_probabilities(process, state, is_test=True)
    rates = {
        "optimum": hit_rate(chances, targets),
        "optimum, expected": float(np.sort(chances)[:, -10:].sum(1).mean()),
    }
    for effect in EFFECTS:
        blind = item_probabilities(process, state, is_test=True, blind_to=effect)
        rates[f"blind to {effect}"] = hit_rate(blind, targets)
    return rates


def hit_rate(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of users whose target is among the ten best of (U, X); ties count against it."""
    own = np.take_along_axis(scores, targets[:, None], 1)
    return float(((scores >= own).sum(1) <= 10).mean())


if __name__ == "__main__":
    sys.exit(main())
