"""MegatronActor on real megatron-core: loss, every parameter's gradient and optimizer steps, layout by layout.

One launch a layout; each layout x check is a test of its own. Bounds are over the largest gradient, in float32.
"""

import pytest

from foreign import needs_megatron
from megatron_actor.layouts import BOUND, CHECKS, LAYOUTS
from ranks import RanksFailed, run_ranks_once

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]


def measured(layout: str) -> list[dict[str, dict[str, float]]]:
    """What every rank measured."""
    return run_ranks_once("megatron_actor.gradient_ranks", "everything", LAYOUTS[layout].ranks, layout=layout)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_the_dense_reference(layout, check):
    for rank, found in enumerate(measured(layout)):
        assert found[check], "nothing was measured"
        too_far = {name: value for name, value in found[check].items() if not value <= BOUND}
        assert not too_far, f"rank {rank}: wanted at most {BOUND}, got {too_far}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_control_is_red(layout):
    for rank, found in enumerate(measured(layout)):
        assert len(found["controls"]) >= 4
        green = {name: value for name, value in found["controls"].items() if not value > 100 * BOUND}
        assert not green, f"rank {rank}: planted errors that stayed green: {green}"


def test_the_table_of_worst_errors(capsys):
    """Printed, not checked: what the tests above compared."""
    names = ["layout", *CHECKS]
    with capsys.disabled():
        print("\nMegatronActor in float32 against float64, worst errors\n" + " | ".join(names))
        for layout in LAYOUTS:
            try:
                found = measured(layout)
            except RanksFailed:
                print(f"{layout} | failed")
                continue
            worst = [max(max(rank[check].values()) for rank in found) for check in CHECKS]
            print(" | ".join([layout, *(f"{value:.1e}" for value in worst)]))
