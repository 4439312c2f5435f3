"""Tensor parallelism 1 to 4 in real processes: value and gradient of everything, against the one-process oracle.

One launch for each world size; what each rank runs is in tp_checks.py and tp_controls.py.
"""

import pytest

import tolerances
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_conformance(tp_size):
    """Uneven and zero-width shards, padding, masked shards, ties across bounds, k over a shard, all dtypes."""
    results = run_ranks("truth.tp_checks", "everything", tp_size, timeout=300)
    tolerances.absorb(results[0])
    assert results[0], "rank 0 compared nothing"


@pytest.mark.parametrize("tp_size", [2, 3])
def test_controls_are_red(tp_size):
    """Each planted error is seen, at every dtype, by the comparison that the conformance uses."""
    results = run_ranks("truth.tp_controls", "controls", tp_size, timeout=200)
    missed = [name for name, seen in results[0].items() if not seen]
    assert not missed, f"planted errors that stayed green: {missed}"
    assert len(results[0]) >= 4 * 6
