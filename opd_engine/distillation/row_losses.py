"""The loss of every row, from the student's scores and its teachers': divergences, or the sampled token's advantage."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.engine_numbers import MAX_LOG_RATIO
from opd_engine.distillation.members import one_teacher
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.losses import distill_loss
from opd_engine.functional.token_scores import TokenScores


def only_live(scores: TokenScores, indices: Tensor, live: Tensor) -> TokenScores:
    """Flat scores whose other rows are constants, so that nothing flows back to them, whatever the loss there is.

    A loss masked afterwards would not do for a user's own divergence: its backward multiplies by what it read, and
    0 x NaN is NaN.
    """

    def flat(value: Tensor | None, fill: float) -> Tensor | None:
        return None if value is None else torch.where(live, value.reshape(-1), fill)

    return TokenScores(
        indices=indices,
        log_probs=torch.where(live.unsqueeze(1), scores.log_probs.reshape(indices.shape), -torch.inf),
        tail_log_prob=flat(scores.tail_log_prob, 0.0),
        lse=flat(scores.lse, 0.0),
        entropy=flat(scores.entropy, 0.0),
        target_log_prob=flat(scores.target_log_prob, 0.0),
    )


def row_divergence(student: TokenScores, teacher: TokenScores, config: OPDConfig) -> Tensor:
    """The config's divergence of two models at the same ids, a number a row."""
    return distill_loss(
        student,
        teacher,
        divergence=config.divergence,
        beta=config.beta,
        alpha=config.alpha,
        tail=config.tail,
        teacher_log_prob_min=config.teacher_log_prob_min,
    )


def divergence_losses(
    student: TokenScores, members: list[TokenScores], weights: Tensor, config: OPDConfig
) -> tuple[Tensor, list[Tensor]]:
    """Loss per row, and [that of the combined teacher, then each teacher's own, if there are several]."""

    def divergence(teacher: TokenScores, of: TokenScores = student) -> Tensor:
        return row_divergence(of, teacher, config)

    if len(members) == 1:
        losses = divergence(members[0])
        return losses, [losses.detach()]
    frozen = dataclasses.replace(
        student, log_probs=student.log_probs.detach(), tail_log_prob=student.tail_log_prob.detach()
    )
    # A teacher without weight in a row may hold NaN there: the student itself stands in, at divergence zero.
    members = [_stand_in(member, frozen, weights[position] > 0) for position, member in enumerate(members)]
    if config.mixture != "loss_sum":
        losses = divergence(one_teacher(members, weights, config.mixture))
        with torch.no_grad():
            return losses, [losses.detach(), *(divergence(member, frozen) for member in members)]
    shares = (weights / weights.sum(0)).nan_to_num(nan=0.0)
    parts = [divergence(member) for member in members]
    losses = sum(torch.where(share > 0, part.double() * share, 0.0) for part, share in zip(parts, shares))
    return losses, [losses.detach(), *(part.detach() for part in parts)]


def _stand_in(teacher: TokenScores, student: TokenScores, rows: Tensor) -> TokenScores:
    """The teacher on `rows`, the student elsewhere."""
    return TokenScores(
        indices=teacher.indices,
        log_probs=torch.where(rows.unsqueeze(1), teacher.log_probs, student.log_probs.to(teacher.log_probs.dtype)),
        tail_log_prob=torch.where(rows, teacher.tail_log_prob, student.tail_log_prob.to(teacher.log_probs.dtype)),
    )


def advantage_losses(
    student: TokenScores, members: list[TokenScores], weights: Tensor, batch: RolloutBatch, config: OPDConfig
) -> tuple[Tensor, list[Tensor]]:
    """Policy gradient of reverse_kl on the sampled token: -(log p - log q_rollout) q / q_rollout."""
    if batch.rollout_log_probs is None:
        raise ValueError("rollout_log_probs: loss_type 'advantage' needs them, got None")
    device = student.tail_log_prob.device
    rollout = batch.rollout_log_probs.to(device=device, dtype=torch.float64).where(student.indices[:, 0] != -1, 0.0)
    teacher = one_teacher(members, weights, config.mixture).log_probs[:, 0].double()
    if config.teacher_log_prob_min is not None:
        teacher = teacher.clamp(min=config.teacher_log_prob_min)
    counts = student.indices[:, 0] != -1
    advantage = (teacher - rollout).where(counts, 0.0)
    ratio = (student.target_log_prob.double() - rollout).clamp(max=MAX_LOG_RATIO).exp()
    return -advantage * ratio, [-advantage]
