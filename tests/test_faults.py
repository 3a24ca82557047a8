"""Kills and other faults: a run that is hit ends, under the same command, with the same bytes.

benchmarks/faults.py has the scenarios, and numbers them as its table does. Rows that are not here
are tested elsewhere:

    1                      rows 3 and 21, which kill at random times and anywhere in an export
    6, 9, 11, 16, 18, 20   the tests that benchmarks/faults.py names
    7, 8                   tests/test_checkpoint.py, damage
    17                     tests/test_signals.py, one training per folder
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import faults
import pytest

# Trials of each row. Those of "2" are at most 8 calls apart, and a save makes 15; those of "21" at
# most 4, of the 52 of an export.
TRIALS = {
    "2": range(36),
    "3": range(4),
    "4": range(4),
    "5": range(1, 18, 5),  # loaders 0 then 1, 2 then 0; with another thread 0 then 2, 2 then 1
    "10": range(4),
    "10, tmpfs": range(2),
    "12": range(3),
    "13": range(12),
    "15": range(4),
    "19": range(1),
    "21": range(17),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Its one process runs no operator of torch, which pytest's own has."""
    with faults.new_pool() as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("row", TRIALS)
def test_a_run_that_is_hit_ends_like_a_whole_one(row, pool):
    found = pool.submit(faults.outcomes, row, TRIALS[row]).result()
    if not found:
        pytest.skip("only root may mount a file system")
    assert len(found) == len(TRIALS[row])
    assert list(filter(None, found)) == []
