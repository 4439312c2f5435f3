"""Teachers kept as hidden states, so that the student's top-k is chosen in the training forward: no old-policy pass.

Bound: host memory, hidden_size x 2 bytes a token in bf16 (8 KB at 4096) where k scores take k x 8 + 16. Each teacher's
LM head is on the device during the step. Only right for one optimizer step a rollout: a later step's top-k would no
longer be the rollout's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.distillation.cache import ScoreCache
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.support import asked, scoring_batches
from opd_engine.functional.token_scores import TokenScores
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import HiddenTeacher, TeacherHead
from opd_engine.teachers.sentinel import DeadTeacherError, check_alive

_LOOKED_AT = 64
"""Rows of a teacher that are scored to see whether it is alive."""


def keep_hidden(
    cache: ScoreCache, batch: RolloutBatch, shares: dict[str, list[int]], teachers: TeacherPool, config: OPDConfig
) -> None:
    """Every teacher's hidden states of its own samples, into the cache. No gradient.

    Raises: ValueError for a teacher that does not give its hidden states; DeadTeacherError with `check_teachers`.
    """
    cache.put_support(batch, torch.empty(batch.num_tokens, 0, dtype=torch.int64))
    for name, share in shares.items():
        if share and not isinstance(teachers[name], HiddenTeacher):
            raise ValueError(
                f"keep_teacher_hidden: wanted hidden states of teacher {name!r}, but {type(teachers[name]).__name__} "
                "gives scores only"
            )
    for name in teachers.turns(asked(shares, teachers)):
        for micro in scoring_batches(batch.select(shares[name]), teachers[name], config):
            try:
                hidden = teachers.hidden(name, micro)
            except ValueError as problem:
                raise ValueError(f"keep_teacher_hidden: teacher {name!r}: {problem}") from problem
            cache.put_hidden(name, micro, hidden)
            if config.check_teachers and getattr(teachers[name], "holds_scores", True):
                _check_alive(name, micro, hidden, teachers, config)


def _check_alive(name: str, batch: RolloutBatch, hidden: Tensor, teachers: TeacherPool, config: OPDConfig) -> None:
    """As for scores, on some rows, at the sampled tokens. Communicates: as score_hidden."""
    rows = batch.loss_mask.nonzero().flatten()
    if rows.numel() == 0:
        return
    samples = batch.sample_ids[batch.row_sequence()[rows]]
    broken = hidden.isnan().any(1)
    if bool(broken.any()):
        raise DeadTeacherError(
            f"teacher {name!r}: NaN in {int(broken.sum())} of {rows.numel()} rows, first in sample "
            f"{int(samples[broken.cpu()][0])}"
        )
    looked_at = torch.linspace(0, rows.numel() - 1, min(_LOOKED_AT, rows.numel())).long()
    head = teachers[name].head_on(None)
    ids = batch.next_tokens()[rows[looked_at], None]
    options = {"vocab_size": teachers[name].vocab_size, "temperature": config.temperature}
    scores = teachers.score_hidden(name, head, hidden[looked_at], ids, **options).to("cpu")
    check_alive(name, scores, batch.tokens[rows[looked_at]], samples[looked_at], vocab_size=teachers[name].vocab_size)


def members_from_hidden(
    batch: RolloutBatch,
    indices: Tensor,
    rows: Tensor,
    owners: list[list[str | None]],
    cache: ScoreCache,
    heads: dict[str, TeacherHead],
    teachers: TeacherPool,
    *,
    vocab_size: int,
    temperature: float,
) -> list[TokenScores]:
    """The teachers' scores at the student's ids, of the rows asked for, from their hidden states. No gradient.

    indices: [n, k], the student's; rows: [n] int64 packed rows of the batch, -1 for one that only fills
    owners: per member, per sequence the teacher's name or None; heads: on the device, by name

    Returns: a member's scores [n, k]; rows without the teacher hold no mass on the support, all of it in the tail.
    Communicates: as score_hidden, teacher by teacher in pool order.
    """
    device, host_rows = indices.device, rows.cpu()
    counted = torch.full((batch.num_tokens,), -1, dtype=torch.int64)
    counted[batch.loss_mask.cpu()] = torch.arange(int(batch.loss_mask.sum()))
    counted = torch.where(host_rows >= 0, counted[host_rows.clamp(min=0)], -1)
    sequence = batch.row_sequence().cpu()[host_rows.clamp(min=0)]
    found = []
    for owner in owners:
        parts, places = [], []
        for name in teachers.names:
            if name not in owner:
                continue
            here = torch.tensor([own == name for own in owner], dtype=torch.bool)[sequence] & (counted >= 0)
            where = here.nonzero().flatten()
            hidden = cache.hidden(name, batch, counted[where], device)
            options = {"vocab_size": vocab_size, "temperature": temperature}
            parts.append(teachers.score_hidden(name, heads[name], hidden, indices[where.to(device)], **options))
            places.append(where)
        if parts:
            found.append(TokenScores.cat(parts).place(torch.cat(places), len(host_rows), indices=indices))
        else:
            found.append(TokenScores.absent(*indices.shape, indices=indices))
    return found
