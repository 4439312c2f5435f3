"""mix_teachers (docs/math.md (41), (42)) against the oracle."""

import pytest
import torch

import opd_engine
import oracles
from tolerances import DTYPES, NAMES, check
from truth import shapes
from truth.compare import mixed_support

WEIGHTS = {
    "equal": [1.0, 1.0, 1.0],
    "uneven": [0.1, 3.0, 0.5],
    "one dropped": [2.0, 0.0, 1.0],
    "by row": [[1.0, 0.0, 2.0, 1.0, 1.0], [0.5, 1.0, 2.0, 0.0, 1.0], [0.0, 3.0, 2.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_mixture(name, mode, dtype):
    """A member of zero weight is dropped even where it holds NaN; the result is a distribution over the buckets."""
    ids, target = mixed_support(6, 40, (5,)), torch.tensor([3, 0, -1, 39, 7])
    logits = [shapes.quantised(5, 40, seed).to(dtype) for seed in (1, 2, 3)]
    logits[0][:, 11:15] = -torch.inf
    weights = torch.tensor(WEIGHTS[name])
    if name == "one dropped":
        logits[1][2] = torch.nan
    members = [opd_engine.gather_log_probs(z, ids, target=target) for z in logits]
    ours = opd_engine.mix_teachers(members, weights, mode)
    true, eager = (
        oracles.mix([oracles.gather_scores(z, ids, target, dtype=compute) for z in logits], weights, mode)
        for compute in (torch.float64, oracles.score_dtype(dtype))
    )
    where = f"mixture {mode} {name}"
    check("score", dtype, ours.log_probs, true.log_probs, eager.log_probs, where)
    check("score", dtype, ours.tail_log_prob, true.tail_log_prob, eager.tail_log_prob, where)
    assert ours.lse is None and ours.entropy is None
    assert (ours.target_log_prob is not None) == (mode == "arithmetic")
    if mode == "arithmetic":
        check("score", dtype, ours.target_log_prob, true.target_log_prob, eager.target_log_prob, where)
    total = ours.log_probs.exp().sum(-1) + ours.tail_log_prob.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


def test_the_bucketed_arithmetic_mixture_is_the_mixture_bucketed():
    """The tail of the mixture is the mixture of the tails: no teacher's full distribution is needed."""
    ids = mixed_support(6, 40, (5,))
    logits = [shapes.quantised(5, 40, seed) for seed in (1, 2)]
    ours = opd_engine.mix_teachers([opd_engine.gather_log_probs(z, ids) for z in logits], [1.0, 3.0])
    whole = (0.25 * logits[0].softmax(-1) + 0.75 * logits[1].softmax(-1)).log()
    true = oracles.gather_scores(whole, ids)
    torch.testing.assert_close(ours.tail_log_prob, true.tail_log_prob)
    torch.testing.assert_close(ours.log_probs, true.log_probs)
