"""What Megatron's home does not take is refused by name, on every rank; scoring leaves no trace in the models."""

import dataclasses

import pytest

from foreign import needs_megatron
from megatron_actor.layouts import LAYOUTS
from opd_engine.distillation import RolloutBatch
from ranks import run_ranks_once

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
HERE = ("tp2", "pp2", "dp2 distributed optimizer")


def found(layout: str) -> list[dict]:
    return run_ranks_once("megatron_actor.refusal_ranks", "everything", LAYOUTS[layout].ranks, layout=layout)


def found_at_a_step(layout: str) -> list[dict]:
    return run_ranks_once("megatron_actor.refusal_ranks", "at_a_step", LAYOUTS[layout].ranks, layout=layout)


@pytest.fixture(params=HERE)
def ranks(request):
    return found(request.param)


def test_options_are_refused_by_name(ranks):
    for rank in ranks:
        assert len(rank["options"]) == 6
        for option, text in rank["options"].items():
            assert text.startswith(f"{option}="), text
            assert "not supported" in text


LAUNCH = {
    "two chunks": "wanted one chunk a rank, got 2",
    "no language model": "wanted a Megatron language model",
    "without DDP": "wanted megatron.core.distributed.DistributedDataParallel, got GPTModel",
    "cannot distil": "tail 'truncate'",
    "other sizes": "groups: wanted",
    "late weights": "overlap_param_gather=True: not supported",
    "weights without marks": "wanted weights marked tensor_model_parallel at 2 tensor-parallel ranks, got none",
    "vocabulary too large": "vocab_size: wanted the real vocabulary, at most the output layer's 64",
    "per-token changed": "calculate_per_token_loss=False: the DistributedDataParallel was built with True",
}


def test_what_cannot_work_is_refused_at_launch(ranks):
    together = {}
    for rank in ranks:
        together |= rank["launch"]
    for name, text in together.items():
        if name == "other sizes" and "groups" not in text:
            continue  # a data-parallel layout has the same sizes either way
        assert LAUNCH[name] in text, (name, text)
    assert len(together) >= 5


def test_a_step_is_refused_on_every_rank_alike(ranks):
    for rank in ranks:
        assert "freed after 1 optimizer step(s)" in rank["step"]["freed"]
        for name in ("guard while scoring", "guard while training", "guard before the update"):
            assert rank["step"][name] == "the active weights are not the student's"


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2 zigzag"])
def test_ranks_of_one_share_that_differ_in_any_field_or_option_are_refused(layout):
    """A field that is added to the batch is walked here by itself."""
    ranks = found(layout) if layout in HERE else found_at_a_step(layout)
    wanted = f"wanted the same on every {layout[:2]} rank"
    for rank in ranks:
        assert wanted in rank["step"]["other batch"]
        assert list(rank["step"]["fields"]) == [field.name for field in dataclasses.fields(RolloutBatch)]
        for name, text in rank["step"]["fields"].items():
            assert text.startswith(f"{name}: {wanted}"), (name, text)
        assert rank["step"]["the same"] == "nothing was refused"
        assert rank["step"]["options"].startswith(f"config.coefficient: {wanted}")


def test_scoring_leaves_modes_and_gradients_alone(ranks):
    for rank in ranks:
        assert rank["modes"] and all(rank["modes"].values()), rank["modes"]


def test_the_old_policy_is_passed_only_where_its_ids_are_wanted(ranks):
    for rank in ranks:
        assert rank["student_passes"] == {"student": 1, "union": 1, "teacher": 0, "rollout": 0}


def test_bf16_logits_stay_bf16_and_only_wanted_rows_are_projected(ranks):
    """bf16 keeps 8 bits: 2^-8 is 4e-3; the planted half loss of the gradient tests would be 0.5."""
    for rank in ranks:
        assert rank["bf16"]["error"] < 0.05
        assert rank["bf16"]["error in three products"] < 0.05
    last = ranks[-1]["bf16"]
    assert last["dtypes"] == ["torch.bfloat16"]
    # A micro-batch without a row that counts projects one, so that its graph is not empty.
    assert last["wanted"] <= last["projected"] <= last["wanted"] + 2


def test_a_dead_teacher_is_named_on_every_rank(ranks):
    for rank in ranks:
        assert rank["dead teacher"].startswith("teacher '") and "NaN" in rank["dead teacher"], rank["dead teacher"]
    assert len({rank["dead teacher"] for rank in ranks}) == 1


def test_what_comes_after_the_head_is_refused_however_little_it_changes_these_logits(ranks):
    for rank in ranks:
        assert len(rank["after the head"]) == 4
        for name, text in rank["after the head"].items():
            kind = "Scaled" if name == "a scale before it" else "Capped"
            assert f"{kind}'s logits are not its output_layer of its last hidden states" in text, name


def test_an_output_layer_that_is_more_than_its_weight_is_never_taken_for_it(ranks):
    """From the start it is refused on every rank; a hook that comes later keeps its logits and ends kept states."""
    for rank in ranks:
        found = rank["in the head"]
        assert found["a cap"].startswith("workspace_bytes: the output layer is more than a product with its weight")
        assert found["a hook"].startswith("hidden: wanted an output layer that is a product with its weight")
        assert found.get("kinds", ["HiddenRows", "LogitRows"]) == ["HiddenRows", "LogitRows"]
