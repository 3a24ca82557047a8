"""Kills and other faults: a run that is hit ends, under the same command, with the same bytes.

benchmarks/faults.py has the scenarios, and numbers them as its table does. What it does not have is
tested elsewhere:

    6, 9, 11, 16, 18, 20   the tests that it names
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import faults
import pytest


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Of processes that run no operator of torch, which pytest's own has."""
    with faults.new_pool() as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("row", faults.ROWS)
def test_a_run_that_is_hit_ends_like_a_whole_one(row, pool):
    found = faults.run_row(pool, row, faults.ROWS[row].few)
    if not found:
        pytest.skip("only root may mount a file system")
    assert list(filter(None, found)) == []
