"""The full vocabulary's divergence of two models, a number a row: to look at, in evaluation. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.full import full_distill_loss
from opd_engine.teachers.limits import check_given, max_positions, readable, unread_rows
from opd_engine.teachers.protocols import FullTeacher

_ROWS = 1024
"""Rows of the two models' logits that exist at a time, where a model can make them in parts."""


@torch.no_grad()
def full_divergence(
    student: FullTeacher,
    teacher: FullTeacher,
    batch: RolloutBatch,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    seen: RolloutBatch | None = None,
) -> Tensor | None:
    """In nats, of each row that counts and that the teacher can read, in order: [rows] on the host.

    Nothing of a pipeline stage that has no head.

    seen: the batch as the teacher sees it, under a prompt of its own (`RolloutBatch.teacher_view`); None: as it is

    Returns: None where the two models' shards of the vocabulary differ, since their columns then do not meet.
    Raises: ValueError for ids and lengths that one of the two has no row for, by sample and position.
    Communicates: as the models' forwards and full_distill_loss.
    """
    check_given(batch, model="student", vocab_size=student.vocab_size, max_positions=max_positions(student))
    limits = {"vocab_size": teacher.vocab_size, "max_positions": max_positions(teacher)}
    seen = batch if seen is None else seen
    check_given(seen, model="teacher", prompts_only=True, **limits)
    ours, theirs = student.full_rows(batch), teacher.full_rows(readable(seen, teacher.vocab_size))
    if ours.shard is not None and theirs.shard is not None and not _meet(ours.shard, theirs.shard):
        return None
    parts = [torch.empty(0)]
    for start in range(0, ours.num_rows, _ROWS):
        rows = slice(start, start + _ROWS)
        losses = full_distill_loss(
            ours.logits(rows),
            theirs.logits(rows),
            divergence=divergence,
            temperature=temperature,
            shard=ours.shard,
            teacher_vocab_size=teacher.vocab_size,
        )
        parts.append(losses.cpu())
    read = ~unread_rows(batch, teacher.vocab_size)[batch.loss_mask].cpu()
    return torch.cat(parts)[read if ours.num_rows else slice(0)]


def _meet(ours, theirs) -> bool:
    own = (ours.vocab_start_index, ours.vocab_end_index)
    return ours.tp_group is None or own == (theirs.vocab_start_index, theirs.vocab_end_index)
