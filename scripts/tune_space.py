"""Which settings tune.py tries, by what is in the data, and which come first."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from engine.flags import ALL_NEGATIVES_UP_TO

with suppress(ImportError):  # tune.py says so
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

# What is tried first: the defaults, and settings for long histories, as ml-1m-small's, and for
# short ones, as KuaiRand's (benchmarks/settings.py).
STARTS = {
    "defaults": {},
    "long histories": {"lr": 0.0072, "dropout_rate": 0.1, "infonce_temp": 0.04},
    "short histories": {
        "batch_size": 512, "lr": 0.006, "dropout_rate": 0.4, "infonce_temp": 0.06, "muon": False,
        "mix_previous": 8,
    },
}  # fmt: skip
# The best batches of benchmarks/settings.py have 16 to 1,024 sequences, all some thousand events.
EVENTS_PER_BATCH = 500, 16_000
FEWEST_STEPS = 10  # in an epoch, with the largest batch that is tried
MAXLENS = 20, 50, 101, 200
# The best rates of benchmarks/settings.py, from .003 with 16 sequences to .008 with 1,024, grow
# about as this power of the batch; for RATE_BATCH sequences all of them come to .004 to .005.
RATE_POWER, RATE_BATCH = 0.25, 128


def search_space(
    lengths: np.ndarray, num_items: int, flags: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """Flag -> Optuna's distribution of its values, the default among them.

    `lengths`: (S,) events of each training sequence. `flags`: main.py's, with the defaults.
    `given`: what is not searched. "lr" is that for RATE_BATCH sequences (`settings_of`).
    """
    mean = max(1.0, np.minimum(lengths, flags["maxlen"]).mean())
    most = min(EVENTS_PER_BATCH[1] / mean, len(lengths) / FEWEST_STEPS)
    fewest = min(EVENTS_PER_BATCH[0] / mean, most / 8)
    batches = [power_of_two(size) for size in (fewest, flags["batch_size"], most)]
    median, long = np.quantile(lengths, [0.5, 0.95])
    enough = next((n for n in MAXLENS if n >= long), MAXLENS[-1])
    maxlens = {n for n in MAXLENS if median <= n <= enough} | {enough, flags["maxlen"]}
    space = {
        "batch_size": IntDistribution(min(batches), max(batches), log=True),
        "lr": FloatDistribution(0.0005, 0.012, log=True),
        "dropout_rate": FloatDistribution(0.0, 0.6, step=0.1),
        "infonce_temp": FloatDistribution(0.03, 0.15, step=0.01),
        "muon": CategoricalDistribution([True, False]),
        "mix_previous": IntDistribution(0, 8, step=4),
        "maxlen": CategoricalDistribution(sorted(maxlens)),
    }
    if num_items > ALL_NEGATIVES_UP_TO:
        space["num_negatives"] = IntDistribution(256, 8192, log=True)
    return {name: of for name, of in space.items() if name not in given and not of.single()}


def power_of_two(value: float) -> int:
    return 2 ** round(math.log2(max(1, value)))


def rate_factor(batch_size: int) -> float:
    return (batch_size / RATE_BATCH) ** RATE_POWER


def settings_of(params: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values for main.py at a point of the search space."""
    whole = {n: power_of_two(params[n]) for n in ("batch_size", "num_negatives") if n in params}
    settings = {**params, **whole}
    if "lr" in settings:
        settings["lr"] *= rate_factor(settings.get("batch_size", flags["batch_size"]))
    return {n: float(f"{v:.2g}") if isinstance(v, float) else v for n, v in settings.items()}


def params_of(
    start: Mapping[str, Any], flags: Mapping[str, Any], space: Mapping[str, Any]
) -> dict[str, Any]:
    """The point of the search space nearest to one of STARTS."""
    values = {**flags, **start}
    values["lr"] /= rate_factor(values["batch_size"])
    return {
        name: values[name] if hasattr(of, "choices") else min(max(values[name], of.low), of.high)
        for name, of in space.items()
    }
