"""Several rollout batches as one, the inverse of splitting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch


def concat_rollouts(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of all the sequences; a field must be present in all batches or in none."""
    if not batches:
        raise ValueError("batches: wanted at least one, got none")

    def joined(name: str) -> Tensor | None:
        values = [getattr(batch, name) for batch in batches]
        missing = sum(value is None for value in values)
        if missing == len(values):
            return None
        if missing:
            raise ValueError(f"{name}: present in {len(values) - missing} of {len(values)} batches, wanted all or none")
        return torch.cat(values)

    lengths = torch.cat([torch.zeros_like(batches[0].cu_seqlens[:1]), *(batch.cu_seqlens.diff() for batch in batches)])
    weights = None
    if any(batch.teacher_weights is not None for batch in batches):
        names = {name for batch in batches for name in (batch.teacher_weights or {})}
        for batch in batches:
            if set(batch.teacher_weights or {}) != names:
                raise ValueError(f"teacher_weights: wanted {sorted(names)} in every batch")
        weights = {name: torch.cat([_per_row(batch, name) for batch in batches]) for name in sorted(names)}
    prompts = None
    if any(batch.teacher_prompts is not None for batch in batches):
        prompts = [p for batch in batches for p in (batch.teacher_prompts or [None] * batch.num_seqs)]
    whole = RolloutBatch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        loss_mask=torch.cat([batch.loss_mask for batch in batches]),
        sample_ids=torch.cat([batch.sample_ids for batch in batches]),
        rollout_ids=torch.cat([batch.rollout_ids for batch in batches]),
        teacher_names=[name for batch in batches for name in batch.teacher_names],
        rewards=joined("rewards"),
        rollout_log_probs=joined("rollout_log_probs"),
        **_joined_topk(batches),
        teacher_weights=weights,
        teacher_prompts=prompts,
        sample_weights=joined("sample_weights"),
        advantages=joined("advantages"),
        task_names=_joined_lists(batches, "task_names"),
    )
    whole.validate()
    return whole


def _joined_lists(batches: Sequence[RolloutBatch], name: str) -> list | None:
    missing = sum(getattr(batch, name) is None for batch in batches)
    if missing == len(batches):
        return None
    if missing:
        raise ValueError(f"{name}: present in {len(batches) - missing} of {len(batches)} batches, wanted all or none")
    return [value for batch in batches for value in getattr(batch, name)]


def _per_row(batch: RolloutBatch, name: str) -> Tensor:
    weights = batch.teacher_weights[name]
    return weights if weights.shape[0] == batch.num_tokens else weights[batch.row_sequence()]


def _joined_topk(batches: Sequence[RolloutBatch]) -> dict[str, Tensor]:
    """The engines' top-k as wide as the widest."""
    given = [batch for batch in batches if batch.rollout_topk_ids is not None]
    if not given:
        return {}
    if len(given) < len(batches):
        raise ValueError(f"rollout_topk_ids: present in {len(given)} of {len(batches)} batches, wanted all or none")
    width = max(batch.rollout_topk_ids.shape[1] for batch in given)

    def joined(name: str, fill: float) -> Tensor:
        values = [getattr(batch, name) for batch in given]
        return torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values])

    return {
        "rollout_topk_ids": joined("rollout_topk_ids", -1),
        "rollout_topk_log_probs": joined("rollout_topk_log_probs", -torch.inf),
    }
