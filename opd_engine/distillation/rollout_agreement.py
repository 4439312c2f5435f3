"""What wrote the rollouts against what is trained on them: the sampled tokens' log-probs of both, token by token.

They differ where an engine serves other weights, loses its state, masks or scales its logits, or answers log-probs of
another temperature; none of it raises by itself, and all of it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.teachers.protocols import Teacher, holds_scores

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest mean difference in nats that rounding explains, by the dtype in which a model computes."""


class RolloutMismatchError(ValueError):
    """The rollouts' log-probs are not those of the student that trains on them."""


@dataclass(frozen=True)
class Agreement:
    """mean, largest: |log-prob that came with a rollout - the student's own|, nats; rows: compared
    sample, position: where it is largest, in this rank's share
    """

    mean: float
    largest: float
    rows: int
    sample: int
    position: int

    def check(self, dtype: torch.dtype) -> None:
        """Raises: RolloutMismatchError where the mean is more than rounding in that dtype."""
        if not self.mean <= TOLERANCES[dtype]:  # NaN too
            raise RolloutMismatchError(
                f"rollout_log_probs: wanted the student's own to {TOLERANCES[dtype]:g} nats a token in the mean "
                f"({str(dtype).removeprefix('torch.')}), got {self.mean:.4g} over {self.rows} tokens, at most "
                f"{self.largest:.4g} (sample {self.sample}, position {self.position}): what writes the rollouts is not "
                "what is trained. Look at the engine's weights and their version, its temperature and the log-probs' "
                "(before top-k and top-p), its dtype, and dropout in the engine"
            )


@torch.no_grad()
def compare_rollouts(
    batch: RolloutBatch,
    student: Teacher,
    *,
    temperature: float,
    known: Callable[[Tensor], Tensor] = lambda values: values,
    sum_over_shares: Callable[[Tensor], list[float]] = Tensor.tolist,
    largest_over_shares: Callable[[Tensor], Tensor] = lambda values: values,
) -> Agreement:
    """How far the log-probs that came with a batch are from the student's, scored once more; the same on every rank.

    batch: with `rollout_log_probs`
    temperature: they were sampled at; 0 stands for 1, as engines answer then
    known, sum_over_shares, largest_over_shares: of opd_engine.parallel.shares.Shares; the defaults where one process
        has all

    Communicates: a scoring pass; 16 bytes over the shares, twice.
    """
    mask = batch.loss_mask
    target = batch.next_tokens().masked_fill(~mask, -1)
    nothing = torch.empty(batch.num_tokens, 0, dtype=torch.int64)
    scores = student.score(batch, nothing, target=target, temperature=temperature or 1.0)
    gaps = torch.zeros(batch.num_tokens, dtype=torch.float64)
    if holds_scores(student):
        own = scores.target_log_prob.double().cpu()
        gaps = torch.where(mask, (own - batch.rollout_log_probs.double()).abs(), 0.0)
    gaps = known(gaps).double().cpu()
    row = int(gaps.argmax()) if gaps.numel() else 0
    sequence = int(batch.row_sequence()[row]) if gaps.numel() else 0
    total, rows = sum_over_shares(torch.tensor([float(gaps.sum()), float(mask.sum())], dtype=torch.float64))
    largest = largest_over_shares(gaps.max() if gaps.numel() else torch.zeros((), dtype=torch.float64))
    return Agreement(
        mean=total / rows if rows else 0.0,
        largest=float(largest),
        rows=int(rows),
        sample=int(batch.sample_ids[sequence]) if gaps.numel() else -1,
        position=row - int(batch.cu_seqlens[sequence]) if gaps.numel() else -1,
    )
