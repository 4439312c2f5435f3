"""distill_loss on one process: who is cast, who may differentiate, masked and absent entries, a user's own divergence.

The five divergences and three tail modes are compared with oracles in truth/; here they are compared with the plain
definitions on ordinary rows.
"""

import math

import pytest
import torch

from opd_engine import TokenScores, distill_loss, full_distill_loss, gather_log_probs
from opd_engine.ops import DIVERGENCES, TAIL_MODES

ROWS, VOCAB, K = 5, 13, 4
INDICES = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(row))[:K] for row in range(ROWS)])


def logits(seed=0):
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both():
    student = logits().requires_grad_()
    return student, gather_log_probs(student, INDICES), gather_log_probs(logits(1), INDICES)


def definition(divergence, p, q, beta, alpha):
    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    mixed = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
    }[divergence]()


def buckets(scores, tail):
    if tail == "truncate":
        return scores.log_probs.exp()
    if tail == "renormalize":
        return scores.log_probs.softmax(-1)
    return torch.cat((scores.log_probs, scores.tail_log_prob.unsqueeze(-1)), -1).exp()


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_of_the_definition(divergence, tail):
    student, ours, teacher = both()
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    loss = distill_loss(ours, teacher, divergence=divergence, beta=0.3, alpha=0.2, tail=tail)
    wanted = definition(divergence, buckets(teacher, tail), buckets(ours, tail), 0.3, 0.2)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    grad, expected = (
        torch.autograd.grad((value * weights).sum(), student, retain_graph=True)[0] for value in (loss, wanted)
    )
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("beta", "twin"), [(0.0, "forward_kl"), (1, "reverse_kl")])
def test_the_ends_of_jsd_are_the_two_kl(beta, twin):
    _, ours, teacher = both()
    assert distill_loss(ours, teacher, divergence="jsd", beta=beta).equal(distill_loss(ours, teacher, divergence=twin))
    full = full_distill_loss(logits(), logits(1), divergence="jsd", beta=beta)
    assert full.equal(full_distill_loss(logits(), logits(1), divergence=twin))


def test_the_teacher_is_cast_to_the_student():
    _, ours, teacher = both()
    wanted = distill_loss(ours, teacher.to(dtype=torch.float32).to(dtype=torch.float64))
    assert distill_loss(ours, teacher.to(dtype=torch.float32)).equal(wanted)
    assert distill_loss(ours.to(dtype=torch.float32), teacher).dtype == torch.float32
    for narrow in (torch.bfloat16, torch.float16):
        assert distill_loss(ours, teacher.to(dtype=narrow)).dtype == torch.float64


def test_a_flat_teacher_serves_a_shaped_student():
    _, ours, teacher = both()
    shaped = ours.reshape(1, ROWS)
    assert distill_loss(shaped, teacher).equal(distill_loss(ours, teacher).view(1, ROWS))
    assert distill_loss(shaped, teacher.reshape(1, ROWS)).shape == (1, ROWS)


def test_scores_of_any_layout():
    _, ours, teacher = both()
    wide = torch.stack((ours.log_probs, ours.log_probs), -1)[..., 0]
    assert not wide.is_contiguous()
    strided = TokenScores(indices=ours.indices.t().contiguous().t(), log_probs=wide, tail_log_prob=ours.tail_log_prob)
    assert distill_loss(strided, teacher).equal(distill_loss(ours, teacher))


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_absent_ids_contribute_exactly_nothing(divergence, tail):
    """The same support with two absent columns appended: bit-equal value and gradient."""

    def run(indices):
        student = logits().requires_grad_()
        ours, teacher = (gather_log_probs(each, indices) for each in (student, logits(1)))
        loss = distill_loss(ours, teacher, divergence=divergence, tail=tail)
        return loss, torch.autograd.grad(loss.sum(), student)[0]

    absent = torch.full((ROWS, 1), -1)
    for plain, padded in zip(run(INDICES), run(torch.cat((absent, INDICES, absent), 1)), strict=True):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-16)


def one_hot_rows():
    """Row 0: the teacher excludes what the student may say; row 1: the reverse; row 2: ordinary."""
    teacher, student = logits(1)[:3].clone(), logits()[:3].clone()
    teacher[0, INDICES[0, 0]] = -math.inf
    student[1, INDICES[1, 0]] = -math.inf
    return student.requires_grad_(), teacher


def empty_tail_rows():
    """The same through the tail: all that is off the support is excluded by the teacher, or by the student."""
    student, teacher = logits()[:3].clone(), logits(1)[:3].clone()
    for row, excluding in ((0, teacher), (1, student)):
        excluding[row] = torch.full((VOCAB,), -math.inf, dtype=torch.float64).scatter(0, INDICES[row], excluding[row])
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("make", [one_hot_rows, empty_tail_rows])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_masked_row_keeps_its_infinity_to_itself(divergence, make):
    student, teacher = make()
    ours, theirs = (gather_log_probs(each, INDICES[:3]) for each in (student, teacher))
    loss = distill_loss(ours, theirs, divergence=divergence)
    infinite = loss.isinf()
    assert infinite.sum() == 1
    torch.where(infinite, 0, loss).sum().backward()
    assert student.grad[infinite].eq(0).all()
    assert student.grad.isfinite().all()
    assert student.grad[~infinite].ne(0).any()


def test_the_floor_makes_an_infinite_reverse_kl_finite():
    student, teacher = one_hot_rows()
    ours, theirs = (gather_log_probs(each, INDICES[:3]) for each in (student, teacher))
    loss = distill_loss(ours, theirs, teacher_log_prob_min=-20.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_users_divergence_sees_both_scores_and_differentiates():
    student, ours, teacher = both()

    def squared_gap(ours, theirs):
        assert isinstance(ours, TokenScores) and isinstance(theirs, TokenScores)
        assert theirs.log_probs.dtype == torch.float64
        return (ours.log_probs.exp() - theirs.log_probs.exp()).square().sum(-1) + ours.entropy

    loss = distill_loss(ours, teacher.to(dtype=torch.float32), divergence=squared_gap, beta=9, tail="ignored")
    p = teacher.to(dtype=torch.float32).log_probs.double().exp()
    log_probs = student.log_softmax(-1)
    wanted = (log_probs.gather(1, INDICES).exp() - p).square().sum(-1) - (log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    grad, expected = (torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (loss, wanted))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [torch.sum, torch.logsumexp], ids=["constant upstream", "upstream with a graph"])
def test_a_second_derivative_is_refused(function):
    """It would lack the op's own; silently so where the first gradient is one term of several."""
    log_probs, tail = torch.full((2, K), -2.0, requires_grad=True), torch.full((2,), -1.0, requires_grad=True)
    ours = TokenScores(indices=INDICES[:2], log_probs=log_probs, tail_log_prob=tail)
    loss = distill_loss(ours, ours.detach().to(dtype=torch.float64))
    for leaf in (log_probs, tail):
        (gradient,) = torch.autograd.grad(function(loss, 0), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="bucket_divergence: differentiable once"):
            (gradient * leaf).sum().backward()


def test_a_second_derivative_of_the_scores_is_refused():
    student = logits().requires_grad_()
    scores = torch.ops.opd_engine.gather_log_probs(student, INDICES, None, VOCAB, 1.0, None)
    (gradient,) = torch.autograd.grad(scores[1].exp().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="gather_log_probs: differentiable once"):
        (gradient * student).sum().backward()


def test_vocabularies_of_unequal_width():
    """Ids that only one side has: the teacher's are left out and its rest renormalised, the student's get p = 0."""
    narrow, wide = logits()[:, :9], logits(1)
    wanted = definition("forward_kl", wide[:, :9].softmax(-1), narrow.softmax(-1), 0, 0)
    torch.testing.assert_close(full_distill_loss(narrow, wide, divergence="forward_kl"), wanted)
    assert full_distill_loss(wide, narrow, divergence="reverse_kl").isinf().all()
    p = torch.cat((narrow.softmax(-1), torch.zeros(ROWS, VOCAB - 9, dtype=torch.float64)), -1)
    terms = torch.where(p > 0, p * (p.log() - wide.log_softmax(-1)), 0)
    torch.testing.assert_close(full_distill_loss(wide, narrow, divergence="forward_kl"), terms.sum(-1))
