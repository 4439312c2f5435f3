"""Several rollout batches as one, the inverse of splitting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.distillation.batch_fields import BOUNDS, joined
from opd_engine.distillation.rollout import RolloutBatch


def concat_rollouts(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of all the sequences; a field must be present in all batches or in none."""
    if not batches:
        raise ValueError("batches: wanted at least one, got none")
    if any(batch.teacher_prompts is not None for batch in batches):
        batches = [
            dataclasses.replace(batch, teacher_prompts=batch.teacher_prompts or [None] * batch.num_seqs)
            for batch in batches
        ]
    lengths = torch.cat([torch.zeros_like(batches[0].cu_seqlens[:1]), *(batch.cu_seqlens.diff() for batch in batches)])

    def to_rows(which: int, weights: Tensor) -> Tensor:
        batch = batches[which]
        return weights if weights.shape[0] == batch.num_tokens else weights[batch.row_sequence()]

    whole = RolloutBatch(
        **{
            field.name: lengths.cumsum(0).to(torch.int32)
            if field.metadata["axis"] == BOUNDS
            else joined(field, [getattr(batch, field.name) for batch in batches], to_rows)
            for field in dataclasses.fields(RolloutBatch)
        }
    )
    whole.validate()
    return whole
