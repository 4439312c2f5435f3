"""Float64 definitions that every measured answer is compared with; gradients come from autograd on them.

Written from docs/math.md, sharing nothing with the ops: softmax in float64, tails summed over the columns off the
support.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def scores(logits: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """log_probs [n, k], tail_log_prob, lse, entropy [n] of float64 rows [n, V] at ids [n, k]."""
    lse = logits.logsumexp(-1)
    log_q = logits - lse[:, None]
    off = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, indices, False)
    return {
        "log_probs": log_q.gather(-1, indices),
        "tail_log_prob": log_q.masked_fill(~off, -torch.inf).logsumexp(-1),
        "lse": lse,
        "entropy": -(log_q.exp() * log_q).sum(-1),
    }


def topk_scores(logits: Tensor, k: int) -> dict[str, Tensor]:
    """As scores, of the k largest; ids are not given, because equal logits have more than one right order."""
    values, indices = logits.topk(k, dim=-1)
    return {**scores(logits, indices), "values": values}


def bucket_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """reverse_kl on the k + 1 buckets, [n]."""
    log_q = torch.cat([student["log_probs"], student["tail_log_prob"][:, None]], -1)
    log_p = torch.cat([teacher["log_probs"], teacher["tail_log_prob"][:, None]], -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def full_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """reverse_kl over the whole vocabulary, [n]."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def max_abs_err(got: Tensor, truth: Tensor) -> float:
    """Largest difference; inf where one is NaN or infinite and the other is not."""
    difference = (got.double().cpu() - truth.double().cpu()).abs()
    difference = torch.where(got.double().cpu() == truth.double().cpu(), 0.0, difference)
    return difference.nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0
