"""The linear functions at tensor-parallel sizes 1 to 3 in real processes, sequence parallelism on and off.

One launch for each world size; what each rank runs is in linear_ranks.py.
"""

import pytest

import tolerances
from ranks import run_ranks
from truth.linear_ranks import CHECKS, DTYPES, PLANTED

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_conformance(tp_size):
    """Uneven and zero-width shards, padding, unequal vocabularies; planted errors in the reductions turn red."""
    results = run_ranks("truth.linear_ranks", "everything", tp_size, timeout=240)
    tolerances.absorb(results[0]["errors"])
    assert results[0]["errors"], "rank 0 compared nothing"
    missed = [name for name, seen in results[0]["red"].items() if not seen]
    assert not missed, f"planted errors that stayed green: {missed}"
    assert len(results[0]["red"]) == (0 if tp_size == 1 else len(CHECKS) * len(PLANTED) * len(DTYPES))
