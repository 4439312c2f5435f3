"""The baselines in torch, as the field writes them; torch.compile compiles the same text.

Half precision is widened to float32 once, because float32 scores are what ours return. Tails are log(1 - sum), the
cheapest way and the usual one, except where a function says otherwise; what that costs in accuracy is in each record's
max_abs_err.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(logits: Tensor) -> Tensor:
    """Float32 of half precision; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def log_tail(log_probs: Tensor) -> Tensor:
    """log(1 - sum of probabilities); loses digits as the tail vanishes."""
    return torch.log1p(-log_probs.exp().sum(-1))


def topk_scores(logits: Tensor, k: int) -> dict[str, Tensor]:
    """torch.topk, logsumexp, and the entropy as lse - sum q z."""
    values, indices = torch.topk(logits, k, dim=-1)
    z = widen(logits)
    lse = torch.logsumexp(z, -1)
    entropy = lse - (torch.softmax(z, -1) * z).sum(-1)
    log_probs = widen(values) - lse.unsqueeze(-1)
    scores = {"log_probs": log_probs, "tail_log_prob": log_tail(log_probs), "lse": lse, "entropy": entropy}
    return {"indices": indices.flatten(0, -2), **{name: _flat(name, value) for name, value in scores.items()}}


def gather_scores(logits: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """gather, logsumexp, and the tail summed over the off-support columns; indices have the logits' leading shape.

    No entropy: ours gives one more.
    """
    z = widen(logits)
    lse = torch.logsumexp(z, -1)
    log_probs = z.gather(-1, indices) - lse.unsqueeze(-1)
    tail = torch.logsumexp(z.scatter(-1, indices, -torch.inf), -1) - lse
    scores = {"log_probs": log_probs, "tail_log_prob": tail, "lse": lse}
    return {name: _flat(name, value) for name, value in scores.items()}


def gather_scores_cheap_tail(logits: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """The same but the tail, which is log(1 - sum): another answer where the tail is small, for half the work."""
    z = widen(logits)
    lse = torch.logsumexp(z, -1)
    log_probs = z.gather(-1, indices) - lse.unsqueeze(-1)
    scores = {"log_probs": log_probs, "tail_log_prob": log_tail(log_probs), "lse": lse}
    return {name: _flat(name, value) for name, value in scores.items()}


def bucket_losses(logits: Tensor, indices: Tensor, teacher_buckets: Tensor) -> Tensor:
    """reverse_kl on k + 1 buckets from logits, per row; teacher_buckets [*, k + 1] with the tail last."""
    z = widen(logits)
    log_probs = z.gather(-1, indices) - torch.logsumexp(z, -1, keepdim=True)
    log_q = torch.cat([log_probs, log_tail(log_probs).unsqueeze(-1)], -1)
    return (log_q.exp() * (log_q - teacher_buckets)).sum(-1)


def full_losses(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """reverse_kl over the whole vocabulary, per row."""
    log_q = torch.log_softmax(widen(student_logits), -1)
    log_p = torch.log_softmax(widen(teacher_logits), -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def shard_topk(logits: Tensor, k: int, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One shard's message: values, global ids, its lse, its mean logit (for the entropy)."""
    values, indices = torch.topk(logits, k, dim=-1)
    z = widen(logits)
    return widen(values), indices + start, torch.logsumexp(z, -1), (torch.softmax(z, -1) * z).sum(-1)


def merge_topk(values: Tensor, ids: Tensor, lses: Tensor, mean_logits: Tensor, k: int) -> dict[str, Tensor]:
    """[tp, T, k] values and ids, [tp, T] the rest."""
    lse = torch.logsumexp(lses, 0)
    entropy = lse - ((lses - lse).exp() * mean_logits).sum(0)
    values, order = torch.topk(values.permute(1, 0, 2).flatten(1), k, dim=-1)
    indices = ids.permute(1, 0, 2).flatten(1).gather(-1, order)
    log_probs = values - lse.unsqueeze(-1)
    tail = log_tail(log_probs)
    return {"indices": indices, "log_probs": log_probs, "tail_log_prob": tail, "lse": lse, "entropy": entropy}


def shard_gather(logits: Tensor, indices: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """One shard's part: its lse, and the logits at the ids it owns (0 elsewhere)."""
    z = widen(logits)
    local = indices - start
    owned = (local >= 0) & (local < logits.size(-1))
    return torch.logsumexp(z, -1), z.gather(-1, local.clamp(0, logits.size(-1) - 1)).masked_fill(~owned, 0.0)


def merge_gather(lses: Tensor, support_logits: Tensor) -> dict[str, Tensor]:
    """[tp, T] and the summed [T, k]."""
    lse = torch.logsumexp(lses, 0)
    log_probs = support_logits - lse.unsqueeze(-1)
    return {"log_probs": log_probs, "tail_log_prob": log_tail(log_probs), "lse": lse}


def _flat(name: str, value: Tensor) -> Tensor:
    return value.flatten(0, -2) if name == "log_probs" else value.flatten()
