"""linear_topk_log_probs and linear_gather_log_probs, docs/math.md (53) to (56), against the oracle."""

import pytest
import torch

import opd_engine
import oracles
from opd_engine import VocabShard
from tolerances import DTYPES, NAMES
from truth.compare import check_scores, mixed_support, upstream_like
from truth.linear_cases import CASES, WIDTH, K, check_gradients, three_ways

TARGET = torch.tensor([0, -1, 5, 9, 52, 3, 7, 7, 1, 2, 40, 30])


def arguments(case):
    return {
        "bias": case.bias,
        "logit_softcap": case.softcap,
        "temperature": case.temperature,
        "shard": VocabShard(0, WIDTH, case.vocab_size),
    }


def every_score(scores):
    names = ("log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob")
    return [getattr(scores, name) for name in names]


def weighed(scores):
    values = every_score(scores)
    weights = [weight.to(value.dtype) for value, weight in zip(values, upstream_like(scores), strict=True)]
    present = [torch.where(value.detach().isfinite(), value * weight, 0.0) for value, weight in zip(values, weights)]
    return sum(value.sum() for value in present)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_topk(name, dtype):
    oracle_case, _ = three_ways(CASES[name], dtype)
    case = CASES[name].cast(dtype)
    z = oracle_case.logits(dtype).detach()
    ours = opd_engine.linear_topk_log_probs(case.hidden, case.weight, K, target=TARGET, **arguments(case))
    rest = (z, K, TARGET, case.vocab_size, case.temperature)
    oracle = oracles.topk_scores(*rest)
    assert torch.equal(ours.indices, oracle.indices)
    check_scores(f"linear topk {name}", dtype, ours, oracle, oracles.topk_scores(*rest, oracles.score_dtype(dtype)))


@pytest.mark.parametrize("support", ["student", "mixed", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_gather(name, dtype, support):
    true, eager = three_ways(CASES[name], dtype)
    mine = CASES[name].cast(dtype).require_grad()
    ids = mixed_support(0 if support == "none" else K, mine.vocab_size, (len(mine.hidden),))
    if support == "student":
        ids = oracles.topk_ids(true.logits(dtype).detach(), K, mine.vocab_size)
    rest = (ids, TARGET, mine.vocab_size, mine.temperature)
    oracle = oracles.gather_scores(true.logits(dtype), *rest)
    plain = oracles.gather_scores(eager.logits(None), *rest, oracles.score_dtype(dtype))
    for workspace_bytes in (None, 5 * WIDTH * dtype.itemsize, 1):  # all at once; chunks of 5 rows; of 1, tiles of 8 x 8
        ours = opd_engine.linear_gather_log_probs(
            mine.hidden, mine.weight, ids, target=TARGET, workspace_bytes=workspace_bytes, **arguments(mine)
        )
        where = f"linear gather {name} {support}"
        check_scores(where, dtype, ours, oracle, plain)
        grads = [
            torch.autograd.grad(weighed(scores), case.leaves(), retain_graph=True)
            for scores, case in ((ours, mine), (oracle, true), (plain, eager))
        ]
        check_gradients(where, dtype, *grads)
        assert not grads[0][1][mine.vocab_size :].any(), "a row of padding has a gradient"


@pytest.mark.parametrize("name", ["softcap", "padded"])
def test_gradcheck(name):
    """torch's own finite differences through hidden states, weight and bias, every score at once, float64."""
    case = CASES[name]
    hidden, weight = case.hidden[:3, :5].clone().requires_grad_(), case.weight[:, :5].clone().requires_grad_()
    bias = torch.zeros(WIDTH, dtype=torch.float64).requires_grad_()
    ids = mixed_support(4, case.vocab_size, (3,))
    rest = {**arguments(case), "bias": bias, "target": torch.tensor([1, -1, 50]), "workspace_bytes": 2 * 8 * WIDTH}
    present, kept = ids >= 0, torch.tensor([True, False, True])

    def scores(hidden, weight, bias):
        got = opd_engine.linear_gather_log_probs(hidden, weight, ids, **{**rest, "bias": bias})
        return got.log_probs[present], got.tail_log_prob, got.lse, got.entropy, got.target_log_prob[kept]

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias))
