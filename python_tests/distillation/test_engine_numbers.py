"""Numbers by which engines mean "none": accepted where harmless, masked where they cannot count, else refused."""

import math

import pytest
import torch

from opd_engine.distillation import OPDConfig, pack_rollouts, policy_losses, state_weights
from opd_engine.distillation.batch_fields import along, require_declared

LOWEST = torch.finfo(torch.float32).min
NONES = [None, math.nan, -math.inf, LOWEST]


def batch(value, masks=None, advantage=1.0):
    return pack_rollouts(
        [[1, 2]],
        [[3, 4, 5]],
        response_log_probs=[[-1.0, value, -1.0]],
        response_masks=masks,
        advantages=[advantage],
        sample_ids=[7],
    )


@pytest.mark.parametrize("value", [*NONES, math.inf, 0.5])
def test_a_token_that_counts_needs_a_log_prob(value):
    with pytest.raises(ValueError, match=r"response_log_probs: .* for sample 7, response token 1; .*response_masks"):
        batch(value)
    masked = batch(value, [[True, False, True]])
    assert masked.rollout_log_probs.tolist() == [0.0, -1.0, 0.0, -1.0, 0.0]
    masked.rollout_log_probs[3] = math.nan if value is None else value
    with pytest.raises(
        ValueError, match=r"rollout_log_probs: wanted log-probs <= 0.* at row 3 \(sample 7, position 3\)"
    ):
        masked.validate()


def test_a_rounding_above_zero_is_zero():
    assert batch(1.2e-7).rollout_log_probs[2] == 0.0
    given = pack_rollouts([[1]], [[2]], response_top_logprobs=[[[(1.2e-7, 2)]]])
    assert given.rollout_topk_log_probs[0].tolist() == [0.0]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [-800.0, -1e3, -1e29])
def test_a_ratio_that_is_cut_off_gives_exact_zeros_however_far_it_is(gap, advantage):
    """gap: the engine's log-prob, or with a negative advantage the student's."""
    rollout, own = (gap, -1.0) if advantage > 0 else (-1.0, gap)
    written = batch(rollout, advantage=advantage)
    student = torch.tensor([0.0, -1.0, own, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    losses, clipped = policy_losses(written, student, OPDConfig(policy_coefficient=1.0))
    losses.sum().backward()
    assert clipped.tolist() == [False, False, True, False, False]
    assert student.grad.tolist() == [0.0, -advantage, 0.0, -advantage, 0.0]
    bound = 1.2 if advantage > 0 else 0.8
    assert losses[2].item() == pytest.approx(-advantage * bound)
    assert bool(state_weights(written, student, 2.0).isfinite().all())


@pytest.mark.parametrize("advantage", [0.0, -1.0])
def test_a_ratio_that_nothing_cuts_off_stays_a_number(advantage):
    """Of an engine's -800; a ratio of e^30 is still its own."""
    student = torch.tensor([0.0, -1.0, -2.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    losses, clipped = policy_losses(batch(-800.0, advantage=advantage), student, OPDConfig(policy_coefficient=1.0))
    losses.sum().backward()
    assert not clipped.any() and bool(losses.isfinite().all())
    assert student.grad.tolist() == [0.0, -advantage, 0.0, -advantage, 0.0]
    losses, _ = policy_losses(batch(-32.0, advantage=advantage), student, OPDConfig(policy_coefficient=1.0))
    assert losses[2].item() == pytest.approx(-advantage * math.exp(30.0))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rewards": [1.0, None]}, r"rewards\[1\]: wanted a number, got None"),
        ({"advantages": [None, 1.0]}, r"advantages\[0\]: wanted a number, got None"),
        ({"responses": [[3], [4, None]]}, r"responses\[1\]\[1\]: wanted a token id, got None"),
        ({"responses": [[3], [4, 2.0]]}, r"responses\[1\]\[1\]: wanted a token id, got 2.0"),
        ({"responses": [[3], [4, -100]]}, r"tokens: wanted ids >= 0, got -100 in sample 1, position 2"),
    ],
)
def test_nothing_in_the_place_of_a_number_is_refused_by_its_place(fields, message):
    with pytest.raises(ValueError, match=message):
        pack_rollouts([[1], [2]], **{"responses": [[3], [4, 5]], **fields})


@pytest.mark.parametrize("none", NONES)
def test_an_entry_without_a_log_prob_is_absent(none):
    given = pack_rollouts([[1]], [[2, 3]], response_top_logprobs=[[[(none, 9), (-0.5, 2)], None]])
    assert given.rollout_topk_ids.tolist() == [[2], [-1], [-1]]
    assert given.rollout_topk_log_probs[0].item() == -0.5


def test_an_id_given_twice_counts_once():
    given = pack_rollouts([[1]], [[2]], response_top_logprobs=[[[(-0.5, 2), (-1.7, 4), (-0.5, 2)]]])
    assert given.rollout_topk_ids[0].tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"response_top_logprobs\[0\]\[0\]: token 2 has two log-probs, -0.5 and -1.5"):
        pack_rollouts([[1]], [[2]], response_top_logprobs=[[[(-0.5, 2), (-1.5, 2)]]])


def test_weights_of_samples_are_finite_and_not_negative():
    written = batch(-1.0)
    for value in (-1.0, math.nan, math.inf):
        written.sample_weights = torch.tensor([value])
        with pytest.raises(ValueError, match="sample_weights: wanted"):
            written.validate()


def test_a_field_that_declares_nothing_is_refused():
    import dataclasses

    @dataclasses.dataclass
    class Forgetful:
        tokens: torch.Tensor = along("rows", "int64")
        more: int = 0

    with pytest.raises(AssertionError, match=r"Forgetful.more: declare it with `along`"):
        require_declared(Forgetful)
