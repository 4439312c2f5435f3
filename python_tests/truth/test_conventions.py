"""What rows without a distribution, rows without a loss, absent and wrong ids do: docs/math.md (3), (36)."""

import itertools
import math

import pytest
import torch

import opd_engine
import oracles
from opd_engine import VocabShard
from tolerances import DTYPES, NAMES
from truth import shapes
from truth.compare import FIELDS, leaf

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


@DTYPE
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_is_nan_alone(poison, dtype):
    """In the support, off it, at column 0 and in the last, odd one; top-k returns ids -1 there."""
    clean = shapes.quantised(5, 43, 1).to(dtype)
    ids = oracles.topk_ids(clean, 6)
    target = torch.tensor([1, 2, -1, 4, 5])

    def topk(z):
        return opd_engine.topk_log_probs(z, 6, target=target)

    def gather(z):
        return opd_engine.gather_log_probs(z, ids, target=target)

    for column in (0, 21, 42, int(ids[2, 0])):
        logits = clean.clone()
        logits[2, column] = poison
        for score, expected_ids in (
            (topk, [-1] * 6),
            (gather, ids[2].tolist()),
        ):
            scores, reference = score(logits), score(clean)
            assert scores.indices[2].tolist() == expected_ids
            for name in ("log_probs", "tail_log_prob", "lse", "entropy"):
                assert getattr(scores, name)[2].isnan().all(), f"{name} of a row with {poison} in column {column}"
            for name, row in itertools.product(FIELDS, (0, 1, 3, 4)):
                assert torch.equal(getattr(scores, name)[row], getattr(reference, name)[row])
        at = leaf(logits)
        scores = opd_engine.gather_log_probs(at, ids)
        (grad,) = torch.autograd.grad(scores.log_probs.sum() + scores.tail_log_prob.sum(), at)
        assert grad[2].isnan().any() and grad[[0, 1, 3, 4]].isfinite().all()


@DTYPE
def test_a_row_with_no_logit_above_minus_infinity_is_nan_alone(dtype):
    logits = shapes.quantised(3, 40, 1).to(dtype)
    logits[1] = -math.inf
    scores = opd_engine.topk_log_probs(logits, 4)
    assert scores.indices[1].tolist() == [-1] * 4
    given = opd_engine.gather_log_probs(logits, torch.zeros(3, 1, dtype=torch.int64))
    for name in ("tail_log_prob", "lse", "entropy"):
        for got in (scores, given):
            assert getattr(got, name).isnan().tolist() == [False, True, False], name
    full = opd_engine.full_distill_loss(logits, shapes.quantised(3, 40, 2).to(dtype))
    assert full.isnan().tolist() == [False, True, False]


@DTYPE
def test_a_row_of_zero_upstream_is_not_read(dtype):
    """A NaN in a masked row stays there: losses mask with a select, and the row's gradient is exactly 0."""
    logits = shapes.quantised(4, 40, 1).to(dtype)
    logits[1] = math.nan
    ids = oracles.topk_ids(shapes.quantised(4, 40, 1), 5)
    teacher_logits = shapes.quantised(4, 40, 2).to(dtype)
    mask = torch.tensor([True, False, True, False])
    teacher = opd_engine.gather_log_probs(teacher_logits, ids)
    for divergence in oracles.DIVERGENCES:
        for loss_of in (
            lambda z: opd_engine.distill_loss(opd_engine.gather_log_probs(z, ids), teacher, divergence=divergence),  # noqa: B023
            lambda z: opd_engine.full_distill_loss(z, teacher_logits, divergence=divergence),  # noqa: B023
        ):
            at = leaf(logits)
            loss = loss_of(at)
            (grad,) = torch.autograd.grad(torch.where(mask, loss, 0.0).sum(), at)
            assert not grad[~mask].any() and grad[mask].isfinite().all() and grad[mask].any()


@DTYPE
def test_everything_masked_gives_exact_zeros(dtype):
    logits = torch.full((3, 24), math.nan, dtype=dtype).requires_grad_()
    scores = opd_engine.gather_log_probs(logits, torch.zeros(3, 2, dtype=torch.int64))
    loss = torch.where(torch.zeros(3, dtype=torch.bool), scores.log_probs.sum(-1) + scores.tail_log_prob, 0.0).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


@DTYPE
def test_absent_ids_count_for_nothing(dtype):
    """Adding absent slots changes no bit of the other scores, and none of the gradient, whatever their upstream."""
    logits = shapes.quantised(4, 50, 3).to(dtype)
    ids = oracles.topk_ids(logits, 4)
    wide = torch.full((4, 7), -1)
    wide[:, [1, 2, 4, 6]] = ids
    results = []
    for indices in (ids, wide):
        at = leaf(logits)
        scores = opd_engine.gather_log_probs(at, indices)
        absent = indices == -1
        assert (scores.log_probs[absent] == -math.inf).all()
        weight = torch.where(absent, 1e30, torch.full(indices.shape, 0.5)).to(scores.log_probs.dtype)
        outputs, upstream = [scores.log_probs, scores.tail_log_prob], [weight, torch.ones(4).to(weight)]
        results.append((scores.log_probs[~absent], scores.tail_log_prob, *torch.autograd.grad(outputs, at, upstream)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(
    opd_engine.debug_enabled() if hasattr(opd_engine, "debug_enabled") else False, reason="debug raises"
)
@pytest.mark.parametrize("bad", [40, 1000, -2])
def test_an_id_out_of_range_is_nan_never_silence(bad):
    logits = shapes.quantised(3, 44, 3).requires_grad_()
    ids = torch.tensor([[1, 2], [3, bad], [5, 6]])
    shard = VocabShard(0, 44, 40)
    scores = opd_engine.gather_log_probs(logits, ids, shard=shard)
    assert scores.log_probs.isnan().tolist() == [[False, False], [False, True], [False, False]]
    (grad,) = torch.autograd.grad(scores.log_probs[:, 1].sum(), logits)
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    target = opd_engine.gather_log_probs(logits, ids[:, :1].clamp(0), target=torch.tensor([1, bad, -1]), shard=shard)
    assert target.target_log_prob.isnan().tolist() == [False, True, False]
    assert target.target_log_prob[2] == -math.inf
    with opd_engine.debug(), pytest.raises(ValueError, match="indices"):
        opd_engine.gather_log_probs(logits, ids, shard=shard)
    with opd_engine.debug(), pytest.raises(ValueError, match="target"):
        opd_engine.gather_log_probs(logits, ids[:1].expand(3, 2), target=torch.tensor([1, bad, -1]), shard=shard)


@DTYPE
def test_columns_at_minus_infinity_have_gradient_zero(dtype):
    """Also where such a column is in the support with an upstream of its own, or is the target."""
    logits = shapes.quantised(3, 40, 3).to(dtype)
    logits[:, 10:20] = -math.inf
    at = leaf(logits)
    ids = torch.tensor([[10, 3, 25]]).expand(3, 3).contiguous()
    scores = opd_engine.gather_log_probs(at, ids, target=torch.tensor([11, 12, 3]))
    assert (scores.log_probs[:, 0] == -math.inf).all()
    values = [scores.log_probs, scores.tail_log_prob, scores.entropy, scores.target_log_prob]
    (grad,) = torch.autograd.grad(values, at, [torch.ones_like(value) for value in values])
    assert not grad[:, 10:20].any() and grad.isfinite().all()


@DTYPE
@pytest.mark.parametrize("name", ["ragged", "padded", "masked", "misaligned", "transposed", "empty", "gpt2"])
def test_inplace_backward_writes_the_same_gradient(name, dtype):
    """The logits become their own gradient; a caller who opted in loses them, nobody else does."""
    case = shapes.CASES[name]
    logits, teacher_logits = shapes.in_dtype(case, dtype)
    ids = oracles.topk_ids(logits, case.k, case.vocab_size)
    shard = VocabShard(0, logits.shape[-1], case.vocab_size)
    teacher = opd_engine.gather_log_probs(teacher_logits, ids, shard=shard)

    def bucket(z, inplace):
        student = opd_engine.gather_log_probs(z, ids, shard=shard, inplace_backward=inplace)
        return opd_engine.distill_loss(student, teacher)

    def full(z, inplace):
        return opd_engine.full_distill_loss(z, teacher_logits, shard=shard, inplace_backward=inplace, divergence="jsd")

    for loss_of in (bucket, full):
        grads = []
        for inplace in (False, True):
            start = torch.nn.functional.pad(logits.detach().clone(), (0, 0)).requires_grad_()
            owned = case.layout(start * 1) if case.layout and name != "transposed" and not inplace else start * 1
            loss = loss_of(owned, inplace)
            (grad,) = torch.autograd.grad(torch.where(loss.isfinite(), loss, 0.0).sum(), start)
            grads.append(grad)
        assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    """Rows are shared out between threads; no sum crosses a row, so no bit may depend on their number."""
    logits, teacher_logits = (shapes.quantised(300, 1500, seed).float() for seed in (1, 2))
    ids = oracles.topk_ids(logits, 20)

    def everything():
        at = logits.clone().requires_grad_()
        top = opd_engine.topk_log_probs(at.detach(), 20)
        student = opd_engine.gather_log_probs(at, ids)
        loss = opd_engine.distill_loss(student, opd_engine.gather_log_probs(teacher_logits, ids), divergence="jsd")
        full = opd_engine.full_distill_loss(at, teacher_logits)
        grads = torch.autograd.grad(loss.sum(), at)[0], torch.autograd.grad(full.sum(), at)[0]
        return top.indices, top.log_probs, top.tail_log_prob, loss.detach(), full.detach(), *grads

    torch.set_num_threads(1)
    alone = everything()
    torch.set_num_threads(threads)
    for one, several in zip(alone, everything()):
        assert torch.equal(one, several)
