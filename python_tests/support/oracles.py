"""Definitions of docs/math.md in plain torch on full logits: slow, obvious, float64 unless told otherwise.

Nothing here imports opd_engine, uses the stable statistics, or spells out a gradient: gradients come from autograd
on the definition. `dtype=torch.float32` evaluates the same text in float32; that is the "eager torch" whose own
error python_tests/support/tolerances.py measures ours against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
TAIL_MODES = ("bucket", "truncate", "renormalize")
NEG_INF = -math.inf
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass
class Scores:
    """Oracle counterpart of TokenScores; all tensors have the computing dtype."""

    indices: Tensor  # [T, k] int64
    log_probs: Tensor  # [T, k]
    tail_log_prob: Tensor  # [T]
    lse: Tensor | None = None  # [T]
    entropy: Tensor | None = None  # [T]
    target_log_prob: Tensor | None = None  # [T]


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores and losses: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """log sum of e^x over mask, along the last dim; -inf with gradient 0 where nothing above -inf is left."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], NEG_INF)
    kept = torch.where(mask, x, NEG_INF)
    empty = (kept == NEG_INF).all(-1)
    summed = torch.logsumexp(torch.where(empty[..., None], 0.0, kept), -1)
    return torch.where(empty, NEG_INF, summed)


def log_softmax_rows(
    logits: Tensor, vocab_size: int | None, temperature: float | Tensor = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """docs/math.md (2): (log q [T, vocab_size], lse [T]); a row without a distribution is NaN."""
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[..., None]
    z = logits[..., :vocab_size].to(dtype)
    masked = z == NEG_INF
    z = torch.where(masked, 0.0, z)
    # The truth is centred (a softmax does not see a common shift), so that its own rounding is far below float64's
    # floor. Eager torch divides what it is given.
    center = z.detach().max(-1, keepdim=True).values if dtype == torch.float64 and z.numel() else 0.0
    y = (z - center) / temperature
    # What overflows in float32 scores is a mask, in their truth too; the gradient still passes, as in eager torch.
    y = torch.where(masked, NEG_INF, y + torch.where(y < -FLOAT32_MAX, NEG_INF, 0.0).detach())
    lse = masked_logsumexp(y, torch.ones_like(y, dtype=torch.bool))
    lse = lse + (lse - lse).detach()  # an infinite lse (a +inf logit, or none above -inf) makes the whole row NaN
    shift = (center / temperature)[..., 0] if isinstance(center, Tensor) else 0.0
    return y - lse[..., None], lse + shift


def pick(log_q: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """docs/math.md (3): log-probs at ids; -1 is absent (-inf, gradient 0), anything else out of range is NaN.

    The value only: that a NaN score has a NaN gradient is a convention, which tests state by themselves.
    """
    inside = (ids >= 0) & (ids < vocab_size)
    got = log_q.gather(-1, ids.clamp(0, max(vocab_size - 1, 0)))
    got = torch.where(inside, got, torch.where(ids == -1, NEG_INF, math.nan))
    return torch.where(log_q.isnan().any(-1, keepdim=True), math.nan, got)


def gather_scores(
    logits: Tensor,
    indices: Tensor,
    target: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Scores:
    """docs/math.md (2) (3) (4) (8) (9) at given ids."""
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    log_q, lse = log_softmax_rows(logits, vocab_size, temperature, dtype)
    off = torch.ones(log_q.shape, dtype=torch.bool)
    inside = (indices >= 0) & (indices < vocab_size)
    if indices.shape[-1]:
        # Absent slots scatter into a column of their own, so they cannot overwrite a present id.
        wide = torch.ones(*log_q.shape[:-1], vocab_size + 1, dtype=torch.bool)
        off = wide.scatter(-1, torch.where(inside, indices, vocab_size), False)[..., :vocab_size]
    tail = masked_logsumexp(log_q, off)
    tail = torch.where(lse.isnan(), math.nan, tail)
    positive = log_q > NEG_INF
    safe = torch.where(positive, log_q, 0.0)
    entropy = -torch.where(positive, safe.exp() * safe, 0.0).sum(-1)
    entropy = torch.where(lse.isnan(), math.nan, entropy)
    return Scores(
        indices=indices,
        log_probs=pick(log_q, indices, vocab_size),
        tail_log_prob=tail,
        lse=lse,
        entropy=entropy,
        target_log_prob=None if target is None else pick(log_q, target[..., None], vocab_size)[..., 0],
    )


def topk_ids(logits: Tensor, k: int, vocab_size: int | None = None) -> Tensor:
    """docs/math.md (14): value descending, then id ascending; -1 past the finite columns and in broken rows."""
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    z = logits[..., :vocab_size].detach().double() + 0.0  # -0.0 + 0.0 is 0.0: the two zeros tie
    broken = z.isnan().any(-1) | (z == math.inf).any(-1)
    z = torch.where(broken[..., None], NEG_INF, z)
    values, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    values, ids = values[..., :k], ids[..., :k]
    ids = torch.where(values == NEG_INF, -1, ids)
    if ids.shape[-1] < k:
        ids = torch.nn.functional.pad(ids, (0, k - ids.shape[-1]), value=-1)
    return ids


def topk_scores(
    logits: Tensor,
    k: int,
    target: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Scores:
    """The k first ids of (14) and their scores."""
    return gather_scores(logits, topk_ids(logits, k, vocab_size), target, vocab_size, temperature, dtype)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b), 0 where a = 0, +inf where a > 0 = b; along the last dim."""
    positive = log_a > NEG_INF
    safe_a = torch.where(positive, log_a, 0.0)
    impossible = positive & (log_b == NEG_INF)
    safe_b = torch.where(positive & ~impossible, log_b, 0.0)
    terms = torch.where(positive, safe_a.exp() * (safe_a - safe_b), 0.0)
    terms = torch.where(impossible, math.inf, terms)
    return torch.where(log_a.isnan() | log_b.isnan(), math.nan, terms).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, weight_p: float) -> Tensor:
    """log(c p + (1-c) q), -inf where both are 0."""
    if weight_p == 0.0:
        return log_q
    both_zero = (log_p == NEG_INF) & (log_q == NEG_INF)
    a = torch.where(both_zero, 0.0, log_p + math.log(weight_p))
    b = torch.where(both_zero, 0.0, log_q + math.log1p(-weight_p))
    stacked = torch.stack([a, b], -1)
    return torch.where(both_zero, NEG_INF, masked_logsumexp(stacked, torch.ones_like(stacked, dtype=torch.bool)))


def divergence_of(log_q: Tensor, log_p: Tensor, divergence: str, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """docs/math.md (16) to (20), plain definitions; log_q student, log_p teacher, summed over the last dim."""
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0.0):
        return kl(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0):
        return kl(log_q, log_p)
    if divergence == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if divergence == "skew_forward_kl":
        return kl(log_p, log_mixture(log_p, log_q, alpha))
    if divergence == "skew_reverse_kl":
        return kl(log_q, log_mixture(log_q, log_p, alpha))
    raise ValueError(f"divergence: wanted one of {DIVERGENCES}, got {divergence!r}")


def distill(
    student: Scores,
    teacher: Scores,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    tail: str = "bucket",
    teacher_log_prob_min: float | None = None,
) -> Tensor:
    """docs/math.md (28) to (32): loss of each row. The teacher is a constant."""
    present = student.indices != -1
    log_q, log_p = student.log_probs, teacher.log_probs.detach().to(student.log_probs.dtype)
    tail_q, tail_p = student.tail_log_prob, teacher.tail_log_prob.detach().to(student.log_probs.dtype)
    broken = tail_q.isnan() | tail_p.isnan()
    if teacher_log_prob_min is not None:
        log_p = torch.where(present & (log_q > NEG_INF), log_p.clamp_min(teacher_log_prob_min), log_p)
        tail_p = torch.where(tail_q > NEG_INF, tail_p.clamp_min(teacher_log_prob_min), tail_p)
    log_q, log_p = torch.where(present, log_q, NEG_INF), torch.where(present, log_p, NEG_INF)
    if tail == "bucket":
        log_q, log_p = torch.cat([log_q, tail_q[..., None]], -1), torch.cat([log_p, tail_p[..., None]], -1)
    elif tail == "renormalize":
        few = present.sum(-1) < 2
        log_q = log_q - masked_logsumexp(log_q, present)[..., None]
        log_p = log_p - masked_logsumexp(log_p, present)[..., None]
        log_q, log_p = torch.where(present, log_q, NEG_INF), torch.where(present, log_p, NEG_INF)
        log_q = torch.where(few[..., None], NEG_INF, log_q)
        log_p = torch.where(few[..., None], NEG_INF, log_p)
    elif tail != "truncate":
        raise ValueError(f"tail: wanted one of {TAIL_MODES}, got {tail!r}")
    loss = divergence_of(log_q, log_p, divergence, beta, alpha)
    return torch.where(broken, math.nan, loss)


def full_distill(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """docs/math.md (38) (39): both normalised over what they share, ids of the student alone have p = 0."""
    vocab_size = student_logits.shape[-1] if vocab_size is None else vocab_size
    teacher_vocab_size = vocab_size if teacher_vocab_size is None else teacher_vocab_size
    shared = min(vocab_size, teacher_vocab_size)
    log_q, _ = log_softmax_rows(student_logits, vocab_size, temperature, dtype)
    log_p, _ = log_softmax_rows(teacher_logits.detach(), shared, temperature, dtype)
    log_p = torch.nn.functional.pad(log_p, (0, vocab_size - shared), value=NEG_INF)
    return divergence_of(log_q, log_p, divergence, beta, alpha)


def mix(members: list[Scores], weights: Tensor, mode: str = "arithmetic") -> Scores:
    """docs/math.md (41) (42); weights [M] or [M, T]; a zero weight drops its member."""
    weights = weights.double()
    if weights.dim() == 1:
        weights = weights[:, None].expand(len(members), members[0].tail_log_prob.numel())
    share = (weights / weights.sum(0)).reshape(len(members), *members[0].tail_log_prob.shape)
    log_share = share.log()[..., None]  # [M, T, 1]
    buckets = torch.stack([torch.cat([m.log_probs, m.tail_log_prob[..., None]], -1).double() for m in members])
    dropped = (share == 0)[..., None].expand_as(buckets)
    target = None
    if mode == "arithmetic":
        mixed = masked_logsumexp(
            (log_share + torch.where(dropped, 0.0, buckets)).movedim(0, -1), ~dropped.movedim(0, -1)
        )
        if all(m.target_log_prob is not None for m in members):
            targets = torch.stack([m.target_log_prob.double() for m in members], -1)
            keep = ~dropped[..., 0].movedim(0, -1)
            target = masked_logsumexp(log_share[..., 0].movedim(0, -1) + torch.where(keep, targets, 0.0), keep)
    elif mode == "geometric":
        mixed = torch.where(dropped, 0.0, share[..., None] * torch.where(dropped, 0.0, buckets)).sum(0)
        mixed = mixed - masked_logsumexp(mixed, torch.ones_like(mixed, dtype=torch.bool))[..., None]
    else:
        raise ValueError(f"mode: wanted arithmetic or geometric, got {mode!r}")
    return Scores(members[0].indices, mixed[..., :-1], mixed[..., -1], target_log_prob=target)


def round_through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once to dtype; the gradient passes."""
    return values + (values.to(dtype).to(values.dtype) - values).detach()


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    model_dtype: torch.dtype | None = None,
) -> Tensor:
    """docs/math.md (53) (54). float64 arguments of values in model_dtype: the definition.

    Arguments in the model's own dtype (model_dtype None): the same in eager torch, as a model computes it.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if model_dtype is not None:
        logits = round_through(logits, model_dtype)
    if softcap is not None:
        wide = logits.double() if model_dtype is not None else logits.to(score_dtype(logits.dtype))
        capped = softcap * torch.tanh(wide / softcap)
        logits = round_through(capped, model_dtype) if model_dtype is not None else capped.to(logits.dtype)
    return logits


def reduce_rows(losses: Tensor, mask: Tensor, unit: Tensor | None = None) -> Tensor:
    """docs/math.md (47): token_mean, or the mean over units (sequence or rollout of each row) of token means."""
    if unit is None:
        return losses[mask].sum() / mask.sum()
    means = [losses[mask & (unit == u)].mean() for u in unit.unique() if (mask & (unit == u)).any()]
    return torch.stack(means).mean()


def gradient(value: Tensor, wrt: Tensor, upstream: Tensor | None = None) -> Tensor:
    """Autograd's gradient of sum(upstream * value), NaN-free where the definition does not depend on wrt."""
    total = value.sum() if upstream is None else torch.where(upstream == 0, 0.0, value * upstream).sum()
    return torch.autograd.grad(total, wrt)[0]
