"""Where autograd, a caller's mask or a label has nothing to say: exact zeros, absence, or an error; never a number.

References are float64; what is named float32 also runs on the CUDA kernels in the emulator (truth/test_emulated.py).
"""

import math

import pytest
import torch

import opd_engine
import oracles
from opd_engine import (
    TokenScores,
    distill_loss,
    full_distill_loss,
    gather_log_probs,
    linear_distill_loss,
    linear_full_distill_loss,
    linear_gather_log_probs,
    linear_topk_log_probs,
    topk_log_probs,
)

ROWS, HIDDEN, VOCAB, K = 5, 6, 13, 3
INDICES = torch.tensor([[0, 5, 12], [1, -1, 4], [2, 3, 4], [9, 8, 7], [6, 0, 1]])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


def teacher():
    found = oracles.gather_scores(randn(ROWS, VOCAB, seed=9), INDICES)
    return TokenScores(indices=INDICES, log_probs=found.log_probs, tail_log_prob=found.tail_log_prob)


def close(got, wanted, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def logits():
    return randn(ROWS, VOCAB)


WEIGHT = randn(VOCAB, HIDDEN, seed=1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
FUNCTIONS = {  # name: (the argument, a loss per row of it); constant upstream where it is summed
    "gather_log_probs": (logits, lambda z: gather_log_probs(z, INDICES).tail_log_prob),
    "gather_log_probs, in place": (
        logits,
        lambda z: gather_log_probs(z * 1, INDICES, inplace_backward=True).tail_log_prob,
    ),
    "full_distill_loss": (logits, lambda z: full_distill_loss(z, randn(ROWS, VOCAB, seed=2))),
    "bucket_divergence": (
        lambda: randn(ROWS).abs().neg(),
        lambda tail: distill_loss(
            TokenScores(indices=INDICES, log_probs=teacher().log_probs * 1.5, tail_log_prob=tail), teacher()
        ),
    ),
    "linear_gather_log_probs": (
        lambda: randn(ROWS, HIDDEN),
        lambda hidden: linear_gather_log_probs(hidden, WEIGHT, INDICES).tail_log_prob,
    ),
    "linear loss": (lambda: randn(ROWS, HIDDEN), lambda hidden: linear_distill_loss(hidden, WEIGHT, teacher()).loss),
    "linear loss, whole": (
        lambda: WEIGHT.clone(),
        lambda weight: linear_full_distill_loss(randn(ROWS, HIDDEN), weight, randn(ROWS, 4), randn(VOCAB, 4)).loss,
    ),
}


@pytest.mark.parametrize("upstream", ["constant", "with a graph"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name, upstream):
    """Also of a term that keeps other gradients, which would be all that is left if this one were dropped."""
    make, function = FUNCTIONS[name]
    leaf = make().requires_grad_()
    loss = function(leaf)
    loss = loss.sum() if upstream == "constant" else loss.exp().sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name.split(',')[0]}: differentiable once"):
        (gradient.square().sum() + leaf.square().sum()).backward()


def test_a_graph_that_nobody_differentiates_again_is_no_error():
    z = logits().requires_grad_()
    (kept,) = torch.autograd.grad(gather_log_probs(z, INDICES).log_probs[0, 0], z, create_graph=True)
    (plain,) = torch.autograd.grad(gather_log_probs(z, INDICES).log_probs[0, 0], z)
    assert torch.equal(kept, plain)


# --- rows that do not count ---


def spoilt():
    """A teacher without numbers in one row."""
    scores = teacher()
    scores.log_probs[1] = math.nan
    return scores


def users(student, teacher):
    return (student.log_probs.exp() * (student.log_probs - teacher.log_probs)).sum(-1)


def reference(z, weights, rows):
    """The same in rows whose ids are all there, from the definition."""
    log_q = z[rows].log_softmax(-1).gather(1, INDICES[rows])
    log_p = teacher().log_probs[rows]
    return (weights[rows] * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()


@DTYPES
def test_a_users_divergence_that_is_nan_in_a_masked_row(dtype):
    z = logits().to(dtype).requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0], dtype=dtype)
    loss = distill_loss(gather_log_probs(z, INDICES), spoilt(), divergence=users)
    assert loss[1].isnan()
    (gradient,) = torch.autograd.grad(torch.where(weights > 0, loss * weights, 0).sum(), z)
    exact = logits().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(exact, weights.double(), [0, 2, 3]), exact)
    assert not gradient[1].any() and not gradient[4].any()
    close(gradient, wanted, dtype)


def test_a_users_divergence_that_is_nan_in_a_row_that_counts_stays_nan():
    z = logits().requires_grad_()
    (gradient,) = torch.autograd.grad(distill_loss(gather_log_probs(z, INDICES), spoilt(), divergence=users).sum(), z)
    assert gradient[1].isnan().all() and gradient[[0, 2, 3, 4]].isfinite().all()


def test_a_users_divergence_may_be_differentiated_twice():
    log_probs = teacher().log_probs.clone().requires_grad_()
    student = TokenScores(indices=INDICES, log_probs=log_probs, tail_log_prob=teacher().tail_log_prob)
    loss = distill_loss(student, teacher(), divergence=lambda ours, theirs: ours.log_probs.exp().sum(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), log_probs)
    torch.testing.assert_close(second, log_probs.exp())


@DTYPES
@pytest.mark.parametrize("workspace_bytes", [None, 2 * VOCAB * 8])
def test_a_users_divergence_in_a_linear_loss(workspace_bytes, dtype):
    exact = randn(ROWS, HIDDEN).requires_grad_(), WEIGHT.clone().requires_grad_()
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in exact)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    options = {"divergence": users, "token_weights": weights, "workspace_bytes": workspace_bytes}
    out = linear_distill_loss(hidden, weight, spoilt(), **options)
    assert out.token_losses[1].isnan() and out.token_losses[4].isfinite()
    wanted = reference(exact[0] @ exact[1].t(), weights, [0, 2, 3])
    close(out.loss, wanted, dtype)
    got = torch.autograd.grad(out.loss, (hidden, weight))
    for one, other in zip(got, torch.autograd.grad(wanted, exact), strict=True):
        close(one, other, dtype)
    assert not got[0][[1, 4]].any()


def linear_losses(hidden, weight, bias):
    yield linear_distill_loss(hidden, weight, teacher(), bias=bias).loss
    yield linear_distill_loss(hidden, weight, teacher(), bias=bias, divergence=users).loss
    theirs = randn(ROWS, 4, dtype=hidden.dtype), randn(VOCAB, 4, dtype=hidden.dtype)
    yield linear_full_distill_loss(hidden, weight, *theirs, bias=bias).loss


@DTYPES
def test_a_linear_loss_that_its_caller_masks_gives_exact_zeros(dtype):
    """Its gradients are there before the mask is known, with NaN in them."""
    leaves = randn(ROWS, HIDDEN), WEIGHT.clone(), randn(VOCAB, seed=4)
    leaves[0][2] = math.nan
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    for loss in linear_losses(*leaves):
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True))
        masked = torch.where(loss.isnan(), 0, loss)
        for _ in range(2):  # the second backward computes them again
            gradients = torch.autograd.grad(masked, leaves, retain_graph=True)
            assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_a_masked_linear_loss_leaves_main_grad_alone():
    hidden, weight = randn(ROWS, HIDDEN), WEIGHT.clone().requires_grad_()
    hidden[2] = math.nan
    weight.main_grad = torch.ones_like(weight)
    loss = linear_distill_loss(hidden, weight, teacher()).loss
    torch.where(loss.isnan(), 0, loss).backward()
    assert (weight.main_grad == 1).all()


# --- labels ---


@DTYPES
@pytest.mark.parametrize("mode", ["eager", "debug"])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int8], ids=str)
def test_a_target_of_minus_100_is_absent(ids, mode, dtype):
    """As cross_entropy's ignore_index: a log-prob of -inf whose gradient is 0."""
    target = torch.tensor([4, -100, 0, -1, 12], dtype=ids)
    exact = randn(ROWS, HIDDEN).requires_grad_()
    hidden, weight = exact.detach().to(dtype).requires_grad_(), WEIGHT.to(dtype)
    z = hidden @ weight.t()
    wanted = (exact @ WEIGHT.t()).log_softmax(-1).gather(1, target.long().clamp(min=0)[:, None])[:, 0]
    wanted = wanted.where(torch.tensor([True, False, True, False, True]), -math.inf)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=dtype)
    finite = torch.where(wanted.isfinite(), wanted * upstream.double(), 0).sum()
    (expected,) = torch.autograd.grad(finite, exact, retain_graph=True)
    with opd_engine.debug(mode == "debug"):
        for scores in (
            gather_log_probs(z, INDICES, target=target),
            topk_log_probs(z, K, target=target),
            linear_gather_log_probs(hidden, weight, INDICES, target=target),
            linear_topk_log_probs(hidden, weight, K, target=target),
        ):
            close(scores.target_log_prob, wanted, dtype)
            if scores.requires_grad:
                (gradient,) = torch.autograd.grad(scores.target_log_prob, hidden, upstream, retain_graph=True)
                close(gradient, expected, dtype)
                assert not gradient[[1, 3]].any()


@pytest.mark.parametrize("wrong", [-2, -99, -101, VOCAB])
def test_any_other_target_is_refused_under_debug_and_nan_without(wrong):
    target = torch.tensor([4, wrong, 0, -1, 12])
    assert gather_log_probs(logits(), INDICES, target=target).target_log_prob.isnan().tolist() == [
        False, True, False, False, False,
    ]  # fmt: skip
    with opd_engine.debug(), pytest.raises(ValueError, match=rf"target: wanted ids in .* got {wrong} in row 1"):
        gather_log_probs(logits(), INDICES, target=target)


# --- compiled ---


def test_compiled_as_one_graph_of_any_size():
    def step(z, teacher_logits, indices):
        scores = gather_log_probs(z, indices)
        theirs = gather_log_probs(teacher_logits, indices)
        best = topk_log_probs(z, K)
        whole = full_distill_loss(z, teacher_logits)
        return distill_loss(scores, theirs).sum() + whole.sum() + best.tail_log_prob.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3, 4):
        z, theirs, indices = logits()[:rows].requires_grad_(), randn(ROWS, VOCAB, seed=2)[:rows], INDICES[:rows]
        values = [function(z, theirs, indices) for function in (step, compiled)]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, z)[0] for value in values))
