"""The clipped policy gradient on the sampled tokens, from the same forward as the divergence, and its advantages.

Needs one number a row beyond the divergence: the student's log-prob of the sampled token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.engine_numbers import MAX_LOG_RATIO
from opd_engine.distillation.rollout import RolloutBatch


def policy_losses(batch: RolloutBatch, student_log_probs: Tensor, config: OPDConfig) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per row, r the student/rollout ratio of the sampled token.

    batch: with `advantages` and `rollout_log_probs`
    student_log_probs: [num_tokens], read where `loss_mask` is True

    Returns: losses [num_tokens] float64 and which rows are cut off [num_tokens] bool; 0 and False on other rows.
    Raises: ValueError where the batch lacks one of the two.
    Grad: for student_log_probs; exactly 0 on the rows that are cut off, on those of advantage 0, and where the ratio is
        beyond e^40, which no two models of one text are apart and whose square is no float32.
    """
    for name in ("advantages", "rollout_log_probs"):
        if getattr(batch, name) is None:
            raise ValueError(f"{name}: policy_coefficient {config.policy_coefficient} needs them, got None")
    device = student_log_probs.device
    mask = batch.loss_mask.to(device)
    advantages = batch.advantages.to(device).double()[batch.row_sequence().to(device)]
    rollout = batch.rollout_log_probs.to(device).double()
    counted = mask & (advantages != 0)
    log_ratio = torch.where(counted, student_log_probs.double() - rollout, 0.0).clamp(max=MAX_LOG_RATIO)
    with torch.no_grad():
        above, below = log_ratio > math.log1p(config.clip_high), log_ratio < _log(1.0 - config.clip_low)
        clipped = mask & ((above & (advantages > 0)) | (below & (advantages < 0)))
        bound = torch.full_like(log_ratio, 1.0 - config.clip_low).masked_fill(above, 1.0 + config.clip_high)
    # Cut off before the exponential: where it overflows, its derivative times the 0 of a minimum would be NaN.
    ratio = torch.where(clipped, 0.0, log_ratio).exp()
    losses = -torch.where(clipped, bound, ratio) * advantages
    return torch.where(mask, losses, 0.0), clipped


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: bool = True) -> Tensor:
    """Each sample's reward less the mean of its group, divided by the group's standard deviation.

    rewards: [num_seqs]; groups: [num_seqs] int64, for samples of one prompt the same number; a whole group must be here
    scale: False leaves the differences as they are

    Returns: [num_seqs] float64; 0 in a group of one, or whose rewards are all the same.
    """
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"groups: wanted one a reward, {list(rewards.shape)}, got {list(groups.shape)}")
    _, of_sample, sizes = groups.unique(return_inverse=True, return_counts=True)
    values = rewards.double()

    def mean(numbers: Tensor) -> Tensor:
        total = torch.zeros(sizes.numel(), dtype=torch.float64, device=values.device)
        return (total.index_add_(0, of_sample, numbers) / sizes)[of_sample]

    centred = values - mean(values)
    if not scale:
        return centred
    spread = mean(centred.square()).sqrt()
    return torch.where(spread > 0, centred / spread.where(spread > 0, 1.0), 0.0)
