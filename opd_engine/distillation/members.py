"""The teachers of a micro-batch: who scored which sequence, their frozen scores, and one teacher out of several."""

from __future__ import annotations

from torch import Tensor

from opd_engine.distillation.cache import ScoreCache
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.token_scores import TokenScores
from opd_engine.teachers.mixture import mix_teachers
from opd_engine.teachers.pool import TeacherPool


def shares_of(batch: RolloutBatch, weights: Tensor, teachers: TeacherPool) -> dict[str, list[int]]:
    """Teacher name -> the sequences in which it scores a row that counts, in pool order."""
    sequence = batch.row_sequence()
    rows = (weights > 0) & batch.loss_mask
    return {name: sequence[rows[position]].unique().tolist() for position, name in enumerate(teachers.names)}


def taught_rows(weights: Tensor) -> Tensor:
    """Rows of which some teacher says something: [num_tokens] bool; the others have no divergence.

    weights: [teachers, num_tokens], as TeacherPool.route gives them
    """
    return (weights > 0).any(0)


def owners_of(batch: RolloutBatch, teachers: TeacherPool, mixture: str) -> tuple[list[list[str | None]], Tensor]:
    """(per member, per sequence the teacher that scored it or None; the weights [teachers, num_tokens]).

    Under "route" one member holds each sequence's own teacher; otherwise there is one a teacher, in pool order.
    """
    weights = teachers.route(batch, mixture)
    owners: list[list[str | None]] = [[None] * batch.num_seqs for _ in teachers.names]
    for position, share in enumerate(shares_of(batch, weights, teachers).values()):
        for sequence in share:
            owners[position][sequence] = teachers.names[position]
    if mixture == "route":
        owners = [[next((name for name in column if name is not None), None) for column in zip(*owners)]]
    return owners, weights


def load_members(
    batch: RolloutBatch, cache: ScoreCache, teachers: TeacherPool, mixture: str, indices: Tensor
) -> tuple[list[TokenScores], Tensor]:
    """(the members' frozen scores at `indices`, the weights), on its device, as `owners_of` divides them."""
    owners, weights = owners_of(batch, teachers, mixture)
    members = [cache.scores(batch, column, indices.device, indices) for column in owners]
    return members, weights.to(indices.device)


def one_teacher(members: list[TokenScores], weights: Tensor, mixture: str) -> TokenScores:
    """One teacher out of several; of a weighted sum of losses, the arithmetic mixture (for metrics)."""
    if mixture == "route" or len(members) == 1:
        return members[0]
    # Rows that do not count may have no weight at all; there any weights do.
    weights = weights.where((weights > 0).any(0), 1.0)
    return mix_teachers(members, weights, mode="geometric" if mixture == "geometric" else "arithmetic")
