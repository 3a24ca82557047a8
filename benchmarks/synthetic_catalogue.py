"""Trainings over catalogues of any size: the same events, spread over the ids of each.

10,000 items occur, with mixed negatives: 1,024 uniform ones of all items, and those of the batch.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import record  # noqa: F401 (puts the package on the path)

from engine.flags import get_args
from engine.state import Run
from engine.training_setup import prepare_run
from files.data_folder import Manifest
from files.data_writer import begin_folder, finish_folder, write_split
from files.sequences import EVENT_DTYPE, Sequences

KNOWN_ITEMS, LENGTH, BATCH, WIDTH, NEGATIVES = 10_000, 101, 128, 64, 1024


def write_data(data_dir: Path, num_items: int, num_batches: int) -> Path:
    """As many sequences as that, of LENGTH inputs and a last target."""
    return write_sequences(data_dir, num_items, np.full(BATCH * num_batches, LENGTH + 1))


def write_sequences(data_dir: Path, num_items: int, lengths: np.ndarray) -> Path:
    """Sequences of these lengths; popularity as it is: a few items make most events."""
    generator = np.random.default_rng(1)
    count, offsets = len(lengths), np.concatenate([[0], lengths.cumsum()])
    events = np.zeros(offsets[-1], EVENT_DTYPE)
    ranks = generator.zipf(1.2, 4 * len(events))
    events["item_id"] = ranks[ranks <= KNOWN_ITEMS][: len(events)] * (num_items // KNOWN_ITEMS)
    seconds = generator.integers(1, 90_000, len(events)).cumsum()
    events["timestamp"] = 1_700_000_000 + seconds - np.repeat(seconds[offsets[:-1]], lengths)
    sequences = Sequences(events, offsets, np.arange(1, count + 1))
    begin_folder(data_dir)
    names = write_split(data_dir, "train", [sequences])
    finish_folder(data_dir, Manifest(num_items, count, 1, {"train": "next"}), names)
    return data_dir


def open_run(data_dir: Path, *flags: str) -> Run:
    """A training; there are no features, so every item of the catalogue can be a negative."""
    shape = [f"--batch_size={BATCH}", f"--maxlen={LENGTH}", f"--hidden_units={WIDTH}"]
    negatives = ["--negatives=mixed", f"--num_negatives={NEGATIVES}"]
    where = [f"--data_dir={data_dir}", "--device=cpu"]
    return prepare_run(get_args([*where, *shape, *negatives, *flags]))


def sizes_gb(run: Run) -> dict[str, float]:
    """Of this process's item table, of its optimiser's state, and of all at the peak."""
    table = run.model.embedding_module.item_emb.weight
    state = run.training_step.optimizer.state[table].values()
    for value in state:
        value.add_(0)  # zeros that were never written to take no memory yet
    return {
        "table_gb": table.nbytes / 1e9,
        "state_gb": sum(value.nbytes for value in state) / 1e9,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
