"""A student sharded over two ranks: gradients against dense float64, weights, checkpoints on one, two and three."""

import pytest
import torch

from fsdp import gradient_ranks
from fsdp.dense import BOUND
from fsdp.steps import make_actor, make_model
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def gradients(folder):
    return run_ranks("fsdp.gradient_ranks", "gradients", 2, timeout=300, folder=str(folder))


@pytest.fixture(scope="module")
def steps(folder):
    return run_ranks("fsdp.gradient_ranks", "steps_taken", 2, timeout=300, folder=str(folder))


@pytest.mark.parametrize("way", gradient_ranks.WAYS)
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_the_gradient_of_every_parameter_is_the_dense_float64_models(gradients, head, way):
    for rank in gradients:
        for again in ("", ", again"):
            loss, gradient = rank[f"{head}, {way}{again}"]
            assert loss <= BOUND and gradient <= BOUND


@pytest.mark.parametrize("case", ["general head", "sharded teachers", "LoRA", "tensor-parallel head", "two phases"])
def test_the_gradient_holds_with_a(gradients, case):
    for rank in gradients:
        assert max(rank[case]) <= BOUND


@pytest.mark.parametrize("case", ["reduced early", "staged bytes"])
def test_nothing_is_wrong_with(gradients, case):
    """Gradients cross ranks once a step; a sharded teacher's bytes are this rank's."""
    for rank in gradients:
        assert rank[case] == [0.0, 0.0]


def test_planted_errors_are_a_hundred_times_the_bound(gradients):
    for rank in gradients:
        planted = {name: value for name, value in rank.items() if name.startswith("planted")}
        assert len(planted) >= 2 and min(planted.values()) > 100 * BOUND, planted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_has_the_same_bits(steps, dtype):
    for rank in steps:
        assert rank[f"{dtype}: stored"] == ["torch.float32"] and rank[f"{dtype}: resumed"]


def test_other_weights_are_worn_and_leave_nothing(steps):
    for rank in steps:
        assert rank["worn"] and rank["restored"] and rank["a foreign write is seen"]


def test_weights_that_are_not_finite_on_one_rank_are_refused_on_all(steps, folder):
    for rank in steps:
        assert "model.norm.weight are not finite" in rank["not finite"]
    assert list((folder / "broken").iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_of_two_ranks_continues_on(steps, folder, ranks):
    """To rounding: Adam turns a different order of sums into different signs where a gradient is nothing."""
    found = run_ranks("fsdp.gradient_ranks", "continued", ranks, timeout=200, folder=str(folder), start=2)
    for rank in found:
        assert rank["float32"] < 1e-2 and rank["bfloat16"] < 0.3, rank


def test_transformers_loads_what_two_ranks_wrote(steps, folder):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder / "bfloat16-2", dtype=torch.float32)
    actor = make_actor(make_model(seed=9), dtype=torch.bfloat16)
    actor.load(folder / "bfloat16-2")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, actor.trained[name]), name
