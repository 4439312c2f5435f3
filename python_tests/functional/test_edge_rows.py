"""Rows at the edge of the numbers or of the contract: an id given twice, the lowest finite float, zeros while denormals
are flushed, offsets that a difference of halves would round away. References are float64.

Runs in every CPU variant (truth/test_variants.py); what is named float32 or bfloat16 also on the CUDA kernels in the
emulator (truth/test_emulated.py).
"""

import itertools
import math

import pytest
import torch

import oracles
from opd_engine import (
    TokenScores,
    distill_loss,
    full_distill_loss,
    gather_log_probs,
    linear_distill_loss,
    linear_gather_log_probs,
    topk_log_probs,
)

OPS = torch.ops.opd_engine
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2)


def close(got, wanted, dtype=torch.float32):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


# Twice in one shard, in both of its halves, absent twice (legal), the target in the support (legal).
IDS = torch.tensor([[0, 5, 40], [7, 30, 7], [-1, 3, -1], [2, 9, 4]])
TARGET = torch.tensor([1, 30, 3, 9])
REPEATED = torch.tensor([False, True, False, False])


def with_nan(values):
    return torch.where(REPEATED.reshape(-1, *[1] * (values.dim() - 1)), math.nan, values)


@DTYPES
def test_a_repeated_id_makes_its_row_nan_and_no_other(dtype):
    logits = randn(4, 41).to(dtype).requires_grad_()
    scores = gather_log_probs(logits, IDS, target=TARGET)
    wanted = oracles.gather_scores(logits.detach(), IDS, TARGET)
    close(scores.log_probs.detach(), torch.where(IDS == -1, -math.inf, with_nan(wanted.log_probs)), dtype)
    for name in ("tail_log_prob", "lse", "entropy", "target_log_prob"):
        close(getattr(scores, name).detach(), with_nan(getattr(wanted, name)), dtype)
    (gradient,) = torch.autograd.grad(scores.tail_log_prob.sum(), logits)
    assert gradient.isnan().all(-1).equal(REPEATED) and gradient.isnan().any(-1).equal(REPEATED)


@DTYPES
@pytest.mark.parametrize("bounds", [[0, 41], [0, 6, 31, 41], [0, 41, 41]], ids=str)
def test_shards_pass_on_that_an_id_is_repeated(bounds, dtype):
    """Whichever shard owns the id: the others see nothing wrong."""
    logits = randn(4, 41).to(dtype)
    parts = [
        OPS.gather_partials(logits[:, a:b].contiguous(), IDS, None, a, 41, 1.0, None)
        for a, b in itertools.pairwise(bounds)
    ]
    stats, support = (torch.stack(part) for part in zip(*parts, strict=True))
    log_probs, tail, lse, entropy = OPS.merge_gather(stats, support.sum(0), IDS, None, 41, 1.0, None)[:4]
    wanted = oracles.gather_scores(logits, IDS)
    close(log_probs, torch.where(IDS == -1, -math.inf, with_nan(wanted.log_probs)), dtype)
    close(tail, with_nan(wanted.tail_log_prob), dtype)
    assert lse.isnan().equal(REPEATED) and entropy.isnan().equal(REPEATED)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_loss_of_a_repeated_id_is_a_plausible_number(tail, dtype):
    hidden, weight = randn(4, 6).to(dtype), randn(41, 6, seed=1).to(dtype)
    found = oracles.gather_scores(randn(4, 41, seed=2), IDS)
    teacher = TokenScores(indices=IDS, log_probs=found.log_probs.to(dtype), tail_log_prob=found.tail_log_prob.to(dtype))
    scores = linear_gather_log_probs(hidden, weight, IDS)
    assert scores.tail_log_prob.isnan().equal(REPEATED)
    for student in (scores, gather_log_probs(hidden @ weight.T, IDS)):
        assert distill_loss(student, teacher, tail=tail).isnan().equal(REPEATED)
    for row in range(4):
        of_row = teacher.select(torch.tensor([row]))
        loss = linear_distill_loss(hidden[row : row + 1], weight, of_row, tail=tail).loss
        assert bool(loss.isnan()) == bool(REPEATED[row])


def shifted(logits):
    """In float64 with a maximum of 0: z - lse would lose every digit at the lowest value."""
    z = logits.detach().double()
    return (z - z.amax(-1, keepdim=True)).requires_grad_()


def lowest_rows(width, dtype):
    """All alike; half of them absent; one column above them; the lowest and its neighbour."""
    lowest = torch.finfo(dtype).min
    rows = torch.full((4, width), lowest, dtype=dtype)
    rows[1, ::2] = -math.inf
    rows[2, width // 2] = 0
    rows[3, 1] = torch.nextafter(rows[3, 1], torch.zeros((), dtype=dtype))
    return rows


@DTYPES
@pytest.mark.parametrize("width", [9, 16, 300, 4500], ids=str)  # padding lanes; whole vectors; groups; chunks
def test_the_lowest_finite_value_is_a_value_and_absent_is_none(width, dtype):
    logits = lowest_rows(width, dtype).requires_grad_()
    exact = shifted(logits)
    ids = torch.tensor([[1, 3], [1, 3], [1, width // 2], [1, 3]])
    gathered = gather_log_probs(logits, ids)
    wanted = oracles.gather_scores(exact, ids)
    for name in ("log_probs", "tail_log_prob", "entropy"):
        close(getattr(gathered, name).detach()[:2], getattr(wanted, name).detach()[:2], dtype)
    # Rows 2 and 3 by hand: beside such distances an lse in float64 holds no log of a count.
    below = exact.detach()[2:].amin(-1)
    assert below.isfinite().all() and (below < -1e29).all()
    zero = torch.zeros((), dtype=torch.float64)
    close(gathered.log_probs.detach()[2:], torch.stack([below[0], zero, zero, below[1]]).reshape(2, 2), dtype)
    close(gathered.tail_log_prob.detach()[2:], below, dtype)
    found = topk_log_probs(logits.detach(), 2)
    assert found.indices.tolist() == [[0, 1], [1, 3], [width // 2, 0], [1, 0]]
    close(
        found.tail_log_prob[:2],
        torch.tensor([(width - 2) / width, 1 - 2 / (width // 2)], dtype=torch.float64).log(),
        dtype,
    )
    (gradient,) = torch.autograd.grad(gathered.tail_log_prob.sum() + gathered.log_probs[:2].sum(), logits)
    (right,) = torch.autograd.grad(wanted.tail_log_prob.sum() + wanted.log_probs[:2].sum(), exact)
    right[2:] = 1 / (width - 2)  # of the tail's columns, which share it alike
    right[[2, 3], ids[2:].T] = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient.double(), right, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_full_loss_beside_a_row_of_the_lowest_value(divergence, dtype):
    for student_is_lowest in (True, False):
        rows = [lowest_rows(9, dtype)[:2], randn(2, 9).to(dtype)]
        rows[1][1, ::2] = -math.inf
        student, teacher = rows if student_is_lowest else rows[::-1]
        student = student.clone().requires_grad_()
        exact = shifted(student)
        loss = full_distill_loss(student, teacher, divergence=divergence)
        wanted = oracles.full_distill(exact, shifted(teacher), divergence)
        close(loss.detach(), wanted.detach(), dtype)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        (right,) = torch.autograd.grad(wanted[0], exact)  # the row without an absent column: autograd's has no NaN
        torch.testing.assert_close(
            gradient[0].double(), right[0], rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@DTYPES
def test_topk_of_zeros_while_denormals_are_flushed(dtype):
    """A neighbour of 0 is a denormal: flushed, it is 0 itself, and nothing was above the floor."""
    least = torch.finfo(dtype).smallest_normal
    rows = torch.zeros(5, 40000, dtype=dtype)
    rows[1] = -least
    rows[2] = least
    rows[3, 100:] = -1.0
    rows[4, ::2] = -0.0
    assert torch.set_flush_denormal(True)
    try:
        found = topk_log_probs(rows, 5)
    finally:
        torch.set_flush_denormal(False)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 5
    log_probs = rows.double().log_softmax(-1)
    close(found.log_probs, log_probs[:, :5], dtype)
    close(found.tail_log_prob, log_probs[:, 5:].logsumexp(-1), dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.bfloat16, 1e4), (torch.bfloat16, -6e4), (torch.bfloat16, 1e6), (torch.float16, 1e4), (torch.float16, -6e4)],
    ids=str,
)
def test_halves_apart_by_an_offset_lose_no_more_than_eager(divergence, offset, dtype):
    """The difference of two logits rounds to 1e-3 of a nat at 1e4: each is to be taken from its own maximum."""
    near, far = randn(6, 500).to(dtype), torch.full((6, 500), offset).to(dtype)  # far: uniform, but for what is absent
    far[:, ::7] = -math.inf if divergence == "reverse_kl" else far[0, 0]
    for student, teacher in ((near, far), (far, near)):
        if divergence == "reverse_kl" and teacher is far:
            student = student.masked_fill(far == -math.inf, -math.inf)
        student = student.clone().requires_grad_()
        loss = full_distill_loss(student, teacher, divergence=divergence)
        exact = shifted(student)
        right = oracles.full_distill(exact, shifted(teacher), divergence)
        # As torch.log_softmax does it: the maximum first.
        eager = oracles.full_distill(exact.detach(), shifted(teacher), divergence, dtype=torch.float32)
        assert (loss - right).abs().max() <= 2 * (eager - right).abs().max() + 1e-7 * right.max()
        (got,), (wanted,) = torch.autograd.grad(loss.sum(), student), torch.autograd.grad(right.sum(), exact)
        assert (got - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
