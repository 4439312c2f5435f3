"""Recompute, overlap and dropout: the gradient is right with each, or the option is refused by its name."""

import pytest

from foreign import needs_megatron
from megatron_actor.layouts import BOUND, LAYOUTS
from ranks import run_ranks_once

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
HERE = ("tp2", "tp2 sequence parallel", "pp2", "dp2 distributed optimizer")
OPTIONS = (
    "selective recompute",
    "full recompute, uniform",
    "full recompute, block",
    "gradient reduction overlapped",
    "gradient reduction overlapped, full recompute",
)
REFUSED = {
    "virtual pipeline": "virtual_pipeline_model_parallel_size=2: interleaved (virtual) pipelines are not supported",
    "parameter gather overlapped": "overlap_param_gather=True: not supported, weights would be read",
}


def measured(layout: str) -> list[dict]:
    return run_ranks_once("megatron_actor.option_ranks", "everything", LAYOUTS[layout].ranks, layout=layout)


@pytest.fixture(params=HERE)
def ranks(request):
    return measured(request.param)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_gradient_is_the_dense_references_with(ranks, option):
    for rank in ranks:
        assert max(rank[option].values()) <= BOUND, rank[option]


def test_the_gradient_under_dropout_is_that_of_its_own_loss(ranks):
    """The slope of a loss that is evaluated in float32 at two points: 5e-3 is what rounding and curvature leave."""
    for rank in ranks:
        found = rank["dropout"]
        assert found["drops nothing"] == 0.0 and found["another draw"] == 0.0, found
        assert found["slope"] < 5e-3 and found["replicas"] <= BOUND, found
        assert rank["dropout, planted"]["a gradient 2% too long"] > 1e-2


@pytest.mark.parametrize("how", ["selective recompute", "full recompute"])
def test_recompute_draws_the_same_drops_again(ranks, how):
    for rank in ranks:
        assert rank["dropout"][how] <= BOUND, rank["dropout"]


def test_scoring_passes_see_no_dropout(ranks):
    for rank in ranks:
        assert rank["dropout"]["old policy's ids"] == 0.0


@pytest.mark.parametrize("option", REFUSED)
def test_it_is_refused_at_launch(ranks, option):
    for rank in ranks:
        assert REFUSED[option] in rank[option]
