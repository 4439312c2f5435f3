"""A Megatron student's state, written while it trains on, comes back to the bit: every kind of optimizer and layout."""

import pytest

from foreign import needs_megatron
from megatron_actor.layouts import LAYOUTS
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]


@pytest.mark.parametrize("layout", ["tp2 sequence parallel", "pp2", "dp2 distributed optimizer"])
def test_a_fresh_student_goes_on_with_the_same_bits(layout, tmp_path):
    """Weights, running mean, moments, learning rate, publications, and dropout's generators."""
    (tmp_path / "checkpoint").mkdir()
    ranks = run_ranks(
        "megatron_actor.checkpoint_ranks",
        "everything",
        LAYOUTS[layout].ranks,
        timeout=200,
        layout=layout,
        folder=str(tmp_path / "checkpoint"),
    )
    for rank, found in enumerate(ranks):
        assert found["read"] == [] and found["later"] == [], f"rank {rank}: {found}"
        assert found["changed"] == found["of"], "what never moves shows nothing"
        assert "wanted the trainable weights 'student' live, got 'earlier'" in found["refusals"]["teacher live"]
