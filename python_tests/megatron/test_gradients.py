"""MegatronActor on real megatron-core: loss, every parameter's gradient and optimizer steps, layout by layout.

One launch a layout; each layout x check is a test of its own. Bounds are over the largest gradient, in float32.
"""

import functools
import importlib.util

import pytest

from megatron.layouts import BOUND, CHECKS, LAYOUTS
from ranks import run_ranks

missing = importlib.util.find_spec("megatron.core") is None
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(missing, reason="megatron-core is not installed (the [megatron] extra)"),
]


@functools.cache
def measured(layout: str) -> list[dict[str, dict[str, float]]]:
    """What every rank measured. Kept, also when it failed, so that a broken layout is launched once."""
    try:
        return run_ranks("megatron.gradient_ranks", "everything", LAYOUTS[layout].ranks, timeout=240, layout=layout)
    except Exception as problem:
        return [{"failed": str(problem)}]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_the_dense_reference(layout, check):
    ranks = measured(layout)
    assert "failed" not in ranks[0], ranks[0]["failed"]
    for rank, found in enumerate(ranks):
        assert found[check], "nothing was measured"
        too_far = {name: value for name, value in found[check].items() if not value <= BOUND}
        assert not too_far, f"rank {rank}: wanted at most {BOUND}, got {too_far}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_control_is_red(layout):
    ranks = measured(layout)
    assert "failed" not in ranks[0], ranks[0]["failed"]
    for rank, found in enumerate(ranks):
        assert len(found["controls"]) >= 4
        green = {name: value for name, value in found["controls"].items() if not value > 100 * BOUND}
        assert not green, f"rank {rank}: planted errors that stayed green: {green}"


def test_the_table_of_worst_errors(capsys):
    """Printed, not checked: what the tests above compared."""
    names = ["layout", *CHECKS]
    with capsys.disabled():
        print("\nMegatronActor in float32 against float64, worst errors\n" + " | ".join(names))
        for layout in LAYOUTS:
            found = measured(layout)
            if "failed" in found[0]:
                print(f"{layout} | failed")
                continue
            worst = [max(max(rank[check].values()) for rank in found) for check in CHECKS]
            print(" | ".join([layout, *(f"{value:.1e}" for value in worst)]))
