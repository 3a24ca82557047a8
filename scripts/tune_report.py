"""What tune.py's trials found: lines, a table, a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from plot_run import COLOURS, STYLE
from screen import show_table

from engine.run_log import duration
from files.atomic_io import atomic_write

NUM_COLUMNS = 3  # of the picture


def line_of(trial: FrozenTrial) -> str:
    """What a trial has come to, as it ends."""
    attrs = trial.user_attrs
    value = "" if trial.value is None else f"NDCG@10 {trial.value:.4f}, "
    start = f" ({attrs['start']})" if "start" in attrs else ""
    words = " ".join(words_of(attrs["settings"]))
    return (
        f"trial {trial.number}{start}: {value}{attrs['end']}, {duration(attrs['seconds'])}; {words}"
    )


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command."""
    words = []
    for flag, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def show_trials(trials: Sequence[FrozenTrial], names: Sequence[str]) -> None:
    """Print a table of whole trials with the settings that were searched."""
    rows = [["trial", "NDCG@10", *names, "time", ""]]
    for trial in trials:
        attrs = trial.user_attrs
        settings = [written(attrs["settings"][name]) for name in names]
        end = ", ".join(filter(None, [attrs["end"], attrs.get("start")]))
        rows.append(
            [str(trial.number), f"{trial.value:.4f}", *settings, duration(attrs["seconds"]), end]
        )
    show_table(rows)


def written(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}"


def write_trials(path: Path, trials: Sequence[FrozenTrial]) -> None:
    """Write a row per trial; the NDCG@10 of a pruned one is that of its last epoch."""
    rows = [
        {
            "trial": trial.number,
            "NDCG@10": trial.value,
            "end": trial.user_attrs["end"],
            "seconds": round(trial.user_attrs["seconds"], 1),
            **trial.user_attrs["settings"],
        }
        for trial in trials
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


@matplotlib.rc_context(STYLE)
def draw_trials(trials: Sequence[FrozenTrial], names: Sequence[str]) -> Figure:
    """NDCG@10 by each setting: hollow where a trial was pruned, dashed for the first trial."""
    num_rows = math.ceil(len(names) / NUM_COLUMNS)
    figure = Figure(figsize=(9, 2.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, sharey=True, squeeze=False)
    shown = [trial for trial in trials if trial.value is not None]
    faces = [COLOURS[0] if trial.state.name == "COMPLETE" else "none" for trial in shown]
    for ax, name in zip(grid.flat, names, strict=False):
        values = [trial.user_attrs["settings"][name] for trial in shown]
        if isinstance(values[0], bool):
            values = list(map(written, values))
        options = {"edgecolors": COLOURS[0], "facecolors": faces}
        ax.scatter(values, [trial.value for trial in shown], **options)
        ax.axhline(trials[0].value, color="#404040", linestyle="--", linewidth=1)
        ax.set_title(f"--{name}")
        if name in ("batch_size", "lr", "maxlen", "num_negatives"):
            ax.set_xscale("log")
            ticks = sorted(set(values)) if name != "lr" else [0.001, 0.003, 0.01]
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    for ax in grid[:, 0]:
        ax.set_ylabel("NDCG@10, validation")
    return figure
