"""distill_loss: the divergence between two models on the k + 1 buckets of a support and its tail.

Bound: none worth the name, [T, k] in and [T] out; it never sees logits and never communicates.
The mathematics of the terms and their gradients is in docs/math.md; masking is by index, never 0 x inf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from opd_engine import ops  # noqa: F401  (registers the op and, in ops/autograd.py, its backward)
from opd_engine.functional.arguments import (
    check_device,
    check_divergence,
    check_tail_mode,
    reads_values,
    shape_choice,
)
from opd_engine.functional.token_scores import TokenScores

Divergence = str | Callable[[TokenScores, TokenScores], Tensor]


def distill_loss(
    student: TokenScores,
    teacher: TokenScores,
    *,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    tail: str = "bucket",
    teacher_log_prob_min: float | None = None,
) -> Tensor:
    """The divergence between student and teacher in every row, on the same ids in the same order.

    THE SAME IDS IN THE SAME ORDER: column j of both is one id. Scores at different ids give a number that means
    nothing. On a CPU they raise; on a GPU looking would stop the host until the device is done, so there they raise
    under debug alone. Score the teacher at `student.indices`, or bring both to one support first.

    Equation: docs/math.md (16) to (20) on the buckets (28) to (30), floor (31), (32); its gradient (23) to (27)
    student: TokenScores [*, k], float64 or float32; the loss flows back through log_probs and tail_log_prob
    teacher: TokenScores [*, k] or flat [T, k], no grad, cast to the student's dtype
    divergence: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), "jsd", "skew_forward_kl",
        "skew_reverse_kl", or a function of the two TokenScores that gives the loss per row
    beta: 0 <= beta <= 1, for jsd: 0 is forward_kl and 1 is reverse_kl by convention
    alpha: 0 <= alpha < 1, for the skewed ones: the share of the first distribution in the mixture
    tail: "bucket" (the rest of the vocabulary is one more category), "truncate" (terms of the support alone) or
        "renormalize" (both distributions conditioned on the support)
    teacher_log_prob_min: floor of the teacher's log-probs, <= 0, or None for off
    Returns: [*] of the student's dtype. Rows that do not count are to be masked with torch.where, never by x 0.
    Raises: ValueError where an argument is not as above, shapes or devices differ, a teacher score requires grad, or
        the ids differ (on a CPU, and everywhere under debug). Arguments that the divergence does not use are ignored.
    Communicates: nothing. Mutates: nothing.
    Precision: the student's dtype; terms whose buckets sum to 1 are computed in forms that do not cancel.
    Grad: for student.log_probs and student.tail_log_prob, once differentiable; absent ids and rows whose upstream
        gradient is zero receive exactly 0, also where a user's function, which differentiates whatever it reads,
        brings NaN there (outside torch.compile).
    Source: the tail bucket follows from the data-processing inequality (a lower bound of the full divergence); the
        generalised JSD is that of GKD (Agarwal et al., 2023), the skewed ones that of DistiLLM (Ko et al., 2024).
    """
    student, teacher = _check_scores(student, teacher)
    if callable(divergence):
        return _user_loss(divergence, student, teacher)
    check_divergence(divergence, beta, alpha)
    check_tail_mode(tail, teacher_log_prob_min)
    num_rows, k = student.tail_log_prob.numel(), student.k
    loss, _, _ = torch.ops.opd_engine.bucket_divergence(
        student.indices.reshape(num_rows, k).to(torch.int64).contiguous(),
        student.log_probs.reshape(num_rows, k).contiguous(),
        student.tail_log_prob.reshape(num_rows).contiguous(),
        teacher.log_probs.reshape(num_rows, k).contiguous(),
        teacher.tail_log_prob.reshape(num_rows).contiguous(),
        divergence,
        float(beta) if divergence == "jsd" else 0.5,
        float(alpha) if divergence.startswith("skew_") else 0.0,
        tail,
        None if teacher_log_prob_min is None else float(teacher_log_prob_min),
    )
    return loss.view(student.leading_shape)


def _check_scores(student: TokenScores, teacher: TokenScores) -> tuple[TokenScores, TokenScores]:
    """Both sides under the student's leading shape, the teacher in the student's dtype."""
    for name, scores in (("student", student), ("teacher", teacher)):
        if not isinstance(scores, TokenScores):
            raise ValueError(f"{name}: wanted TokenScores, got {type(scores).__name__}")
    dtype = student.log_probs.dtype
    if dtype not in (torch.float32, torch.float64) or student.tail_log_prob.dtype != dtype:
        raise ValueError(
            "student: wanted log_probs and tail_log_prob both float32 or both float64, "
            f"got {dtype} and {student.tail_log_prob.dtype}"
        )
    if teacher.requires_grad:
        wanting = [name for name in _score_names(teacher) if getattr(teacher, name).requires_grad]
        raise ValueError(f"teacher: wanted constant scores, got {', '.join(wanting)} that require grad; use .detach()")
    num_rows = student.leading_shape.numel()
    if teacher.k != student.k or teacher.leading_shape not in (student.leading_shape, (num_rows,)):
        wanted = shape_choice(student.leading_shape, num_rows, str(student.k))
        raise ValueError(f"teacher: wanted scores of the student's {wanted}, got {list(teacher.indices.shape)}")
    check_device(teacher.log_probs, "teacher", student.log_probs, "the student")
    if teacher.leading_shape != student.leading_shape:
        teacher = teacher.reshape(*student.leading_shape)
    if student.indices is not teacher.indices and reads_values(student.indices):
        differs = (student.indices != teacher.indices).reshape(num_rows, student.k)
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            theirs, ours = (one.indices.reshape(num_rows, student.k)[row, column].item() for one in (teacher, student))
            raise ValueError(
                f"teacher: wanted the student's ids in the same order, got {theirs} for {ours} in row {row}, "
                f"column {column}"
            )
    return student, teacher.to(dtype=dtype)


def _score_names(scores: TokenScores) -> list[str]:
    names = [field.name for field in dataclasses.fields(scores) if field.name != "indices"]
    return [name for name in names if getattr(scores, name) is not None]


def _user_loss(divergence: Callable[[TokenScores, TokenScores], Tensor], student: TokenScores, teacher: TokenScores):
    watched = student.requires_grad and not torch.compiler.is_compiling()
    masked = _MaskedRows()
    loss = divergence(masked.keep_clean(student) if watched else student, teacher)
    if not isinstance(loss, Tensor) or loss.shape != student.leading_shape or not loss.is_floating_point():
        got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "divergence: wanted a function that gives one floating loss per row, "
            f"{list(student.leading_shape)}, got {got}"
        )
    loss = loss.to(student.log_probs.dtype)
    return _Watch.apply(loss, masked) if watched else loss


class _MaskedRows:
    """Which rows of one loss its caller masked: their upstream gradient is 0, known once the backward is there.

    A user's function multiplies it by derivatives of its own, and 0 x NaN is NaN; those do not count.
    """

    rows: Tensor | None = None  # [*] bool

    def keep_clean(self, student: TokenScores) -> TokenScores:
        """The scores, whose gradient in masked rows is 0 where it would not be finite."""
        fields = {name: getattr(student, name) for name in _score_names(student)}
        fields = {name: _Clean.apply(value, self) if value.requires_grad else value for name, value in fields.items()}
        return TokenScores(indices=student.indices, **fields)


class _Watch(Function):
    """A loss per row, unchanged; its backward, the first of the loss, sees which rows are masked."""

    @staticmethod
    def forward(ctx, loss: Tensor, masked: _MaskedRows) -> Tensor:
        ctx.masked = masked
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        ctx.masked.rows = upstream == 0
        return upstream, None


class _Clean(Function):
    """Scores, unchanged; differentiable as often as the user's function is."""

    @staticmethod
    def forward(ctx, scores: Tensor, masked: _MaskedRows) -> Tensor:
        ctx.masked = masked
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows = ctx.masked.rows
        if rows is None:  # the function kept the scores and differentiates them on its own
            return gradient, None
        rows = rows.unsqueeze(-1) if gradient.dim() > rows.dim() else rows
        return torch.where(rows & ~gradient.isfinite(), 0, gradient), None
