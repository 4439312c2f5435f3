"""Denominators fixed on the global batch before micro-batching, so that a loss does not depend on how it is split.

Every loss row gets one weight, 1 / denominator times its sample's weight; losses of micro-batches and of data-parallel
ranks then simply add up. One small table per sequence is what ranks exchange; nothing is exchanged per micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.rollout import RolloutBatch

StackOverRanks = Callable[[Tensor], Tensor]
"""Maps a tensor to [ranks, ...], in rank order: opd_engine.parallel.collectives.all_gather_stacked over data-parallel
ranks."""


@dataclasses.dataclass(frozen=True)
class Denominators:
    """The weight of every loss row of one optimizer step's global batch.

    num_rows, num_samples, num_rollouts: global counts; a sample or rollout without a loss row is not counted
    row_weights: sample id -> weight of each of its loss rows
    reward_weight_min, reward_weight_max: of the samples' weights, 1 without rewards
    """

    reduction: str
    num_rows: int
    num_samples: int
    num_rollouts: int
    row_weights: dict[int, float]
    reward_weight_min: float = 1.0
    reward_weight_max: float = 1.0

    @classmethod
    def of(cls, batch: RolloutBatch, config: OPDConfig, stack_over_ranks: StackOverRanks | None = None) -> Denominators:
        """Fix the denominators of a step.

        Equation: docs/math.md (47), (48)
        batch: this rank's share of the global batch, before micro-batching
        stack_over_ranks: None where this rank holds the whole global batch

        `token_mean` is the mean over loss rows; `sample_mean` the mean over samples of the mean over a sample's rows;
        `rollout_mean` the mean over rollouts of the mean over all rows of a rollout's samples. Reward weights are
        softmax(reward / reward_beta) x samples over the samples that have a loss row; `batch.sample_weights`, if
        given, are taken as they are instead.

        Raises:
            ValueError: `reward_beta` without rewards; a sample id that two sequences of the global batch share.
        Communicates: two calls of `stack_over_ranks`, 8 bytes and 32 bytes a sequence of the largest share.
        """
        ids, rollouts, counts, weights = _global_table(batch, config, stack_over_ranks)
        if ids.unique().numel() != ids.numel():
            unique, seen = ids.unique(return_counts=True)
            raise ValueError(
                f"sample_ids: {int(unique[seen > 1][0])} occurs more than once in the global batch; ids must be unique "
                "over all data-parallel ranks"
            )
        counted = counts > 0
        ids, rollouts, counts, weights = ids[counted], rollouts[counted], counts[counted], weights[counted]
        if config.reward_beta is not None and batch.sample_weights is None:
            weights = torch.softmax(weights / config.reward_beta, dim=0) * weights.numel()
        rollout_ids, rollout_of = rollouts.unique(return_inverse=True)
        num_rows, num_samples, num_rollouts = int(counts.sum()), ids.numel(), rollout_ids.numel()
        if config.reduction == "token_mean":
            divisors = torch.full_like(weights, float(num_rows))
        elif config.reduction == "sample_mean":
            divisors = counts.double() * num_samples
        else:
            rows_of_rollout = torch.zeros(num_rollouts, dtype=torch.float64).index_add_(0, rollout_of, counts.double())
            divisors = rows_of_rollout[rollout_of] * num_rollouts
        return cls(
            reduction=config.reduction,
            num_rows=num_rows,
            num_samples=num_samples,
            num_rollouts=num_rollouts,
            row_weights=dict(zip(ids.tolist(), (weights / divisors).tolist())),
            reward_weight_min=float(weights.min()) if num_samples else 1.0,
            reward_weight_max=float(weights.max()) if num_samples else 1.0,
        )

    def of_rows(self, batch: RolloutBatch) -> Tensor:
        """The weight of each row: [num_tokens] float64, 0 where `loss_mask` is False.

        Raises:
            ValueError: a sequence with a loss row was not in the batch the denominators were fixed on.
        """
        values = []
        for sample, rows in zip(batch.sample_ids.tolist(), batch.loss_row_counts().tolist()):
            if rows and sample not in self.row_weights:
                raise ValueError(f"denominators: sample {sample} was not in the global batch they were fixed on")
            values.append(self.row_weights.get(sample, 0.0))
        per_sequence = torch.tensor(values, dtype=torch.float64, device=batch.tokens.device)
        return per_sequence[batch.row_sequence()].where(batch.loss_mask, 0.0)


def _global_table(
    batch: RolloutBatch, config: OPDConfig, stack_over_ranks: StackOverRanks | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per sequence of the global batch: sample id, rollout id, loss rows, and weight (the reward, before softmax)."""
    if batch.sample_weights is not None:
        weights = batch.sample_weights.double()
    elif config.reward_beta is None:
        weights = torch.ones(batch.num_seqs, dtype=torch.float64)
    elif batch.rewards is None:
        raise ValueError(f"reward_beta={config.reward_beta}: wanted rewards in the batch, got None")
    else:
        weights = batch.rewards.double()
    # float64 bits travel as int64, so that one table holds ids beyond 2**53 and exact weights.
    columns = [batch.sample_ids, batch.rollout_ids, batch.loss_row_counts(), weights.contiguous().view(torch.int64)]
    table = torch.stack([column.cpu() for column in columns], dim=1)
    if stack_over_ranks is not None:
        device = batch.tokens.device
        sizes = stack_over_ranks(torch.tensor([batch.num_seqs], dtype=torch.int64, device=device)).flatten().tolist()
        padded = torch.zeros(max(sizes), 4, dtype=torch.int64)
        padded[: batch.num_seqs] = table
        stacked = stack_over_ranks(padded.to(device)).cpu()
        table = torch.cat([rank_table[:size] for rank_table, size in zip(stacked, sizes)])
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3].contiguous().view(torch.float64)
