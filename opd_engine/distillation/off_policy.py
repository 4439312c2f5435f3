"""The weight of a visited state when the student has moved on since the rollout: a detached, truncated ratio product.

The bucket divergence needs no ratio for the action at its own position: its support is frozen and the student in it is
the current one. What shifts is how often a prefix is reached, and that is the product over the tokens BEFORE the row's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch


def state_weights(batch: RolloutBatch, student_log_probs: Tensor, cap: float) -> Tensor:
    """min(cap, prod over earlier generated tokens of q_student / q_rollout), per row.

    Equation: docs/math.md (45)
    batch: with `rollout_log_probs`
    student_log_probs: [num_tokens], the current student's log-prob of the token each row predicts; read where
        `loss_mask` is True
    cap: > 0

    Returns:
        [num_tokens] float64 without gradient, on `student_log_probs`' device; 1 where no generated token comes before.
    Raises:
        ValueError: the batch has no `rollout_log_probs`.
    """
    if batch.rollout_log_probs is None:
        raise ValueError("rollout_log_probs: the visited-state weight needs them, got None")
    device = student_log_probs.device
    mask = batch.loss_mask.to(device)
    log_ratio = student_log_probs.detach().double() - batch.rollout_log_probs.to(device).double()
    log_ratio = log_ratio.where(mask, 0.0)
    lengths = batch.lengths()
    # One padded row a sequence: a running sum over the packed rows could not be undone across an infinite ratio.
    table = torch.zeros(batch.num_seqs, max(lengths, default=0) + 1, dtype=torch.float64, device=device)
    sequence, position = batch.row_sequence().to(device), batch.row_positions().to(device)
    table[sequence, position + 1] = log_ratio
    return table.cumsum(1)[sequence, position].exp().clamp(max=cap)
