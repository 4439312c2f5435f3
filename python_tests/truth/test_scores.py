"""Scores and the one backward (docs/math.md (2) to (9), (36)) against the oracle, on every kind of row."""

import pytest
import torch

import opd_engine
import oracles
from opd_engine import VocabShard
from tolerances import DTYPES, NAMES, check
from truth import shapes
from truth.compare import check_scores, leaf, mixed_support, score_gradient

EVERY_CASE = [
    pytest.param(case, dtype, id=f"{case.name}-{NAMES[dtype]}") for case in shapes.CASES.values() for dtype in DTYPES
]


def whole(case) -> VocabShard | None:
    """The shard that says which columns are padding; None where there are none."""
    width = case.logits.shape[-1]
    return None if width == case.vocab_size else VocabShard(0, width, case.vocab_size)


@pytest.mark.parametrize("case, dtype", EVERY_CASE)
def test_topk(case, dtype):
    logits, _ = shapes.in_dtype(case, dtype)
    target = None if case.target is None else case.target.reshape(logits.shape[:-1])
    ours = opd_engine.topk_log_probs(logits, case.k, target=target, temperature=case.temperature, shard=whole(case))
    arguments = (logits, case.k, target, case.vocab_size, case.temperature)
    oracle = oracles.topk_scores(*arguments)
    assert torch.equal(ours.indices, oracle.indices), "ids differ from a stable sort's"
    check_scores(f"topk {case.name}", dtype, ours, oracle, oracles.topk_scores(*arguments, oracles.score_dtype(dtype)))
    assert not ours.log_probs.requires_grad


@pytest.mark.parametrize("support", ["student", "mixed", "none"])
@pytest.mark.parametrize("case, dtype", EVERY_CASE)
def test_gather(case, dtype, support):
    logits, _ = shapes.in_dtype(case, dtype)
    rows = logits.shape[:-1]
    target = None if case.target is None else case.target.reshape(rows)
    if support == "student":
        ids = oracles.topk_ids(logits, case.k, case.vocab_size)
    else:
        ids = mixed_support(case.k if support == "mixed" else 0, case.vocab_size, tuple(rows))
    true_leaf, eager_leaf, our_leaf = leaf(logits.double()), leaf(logits), leaf(logits)
    definition = (ids, target, case.vocab_size, case.temperature)
    oracle = oracles.gather_scores(true_leaf, *definition)
    eager = oracles.gather_scores(eager_leaf, *definition, oracles.score_dtype(dtype))
    ours = opd_engine.gather_log_probs(our_leaf, ids, target=target, temperature=case.temperature, shard=whole(case))
    where = f"gather {support} {case.name}"
    check_scores(where, dtype, ours, oracle, eager)
    grads = [score_gradient(ours, our_leaf), score_gradient(oracle, true_leaf), score_gradient(eager, eager_leaf)]
    assert grads[0].dtype == dtype and grads[0].shape == logits.shape
    check("gradient", dtype, *grads, where)
    assert not grads[0][..., case.vocab_size :].any(), "a padding column has a gradient"
    assert not grads[0][logits == -torch.inf].any(), "a masked column has a gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("which", ["log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob"])
def test_each_score_alone(which, dtype):
    """A gradient of one score may not lean on another's."""
    case = shapes.CASES["masked"]
    logits, _ = shapes.in_dtype(case, dtype)
    ids = mixed_support(case.k, case.vocab_size, (logits.shape[0],))
    grads = []
    for at, scores in (
        (mine := leaf(logits), opd_engine.gather_log_probs(mine, ids, target=case.target)),
        (true := leaf(logits.double()), oracles.gather_scores(true, ids, case.target)),
        (eager := leaf(logits), oracles.gather_scores(eager, ids, case.target, dtype=oracles.score_dtype(dtype))),
    ):
        value = getattr(scores, which)
        grads.append(torch.autograd.grad(value, at, torch.ones_like(value))[0])
    check("gradient", dtype, *grads, f"gather {which} alone")


def test_gradcheck():
    """torch's own finite differences, float64, all outputs at once."""
    logits = shapes.quantised(4, 23, 1).requires_grad_()
    ids, target = mixed_support(5, 21, (4,)), torch.tensor([0, -1, 20, 3])
    shard = VocabShard(0, 23, 21)
    present = ids >= 0

    def scores(z):
        got = opd_engine.gather_log_probs(z, ids, target=target, temperature=0.7, shard=shard)
        kept = target >= 0
        return got.log_probs[present], got.tail_log_prob, got.lse, got.entropy, got.target_log_prob[kept]

    assert torch.autograd.gradcheck(scores, logits)
