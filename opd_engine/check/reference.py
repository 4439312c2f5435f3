"""The float64 reference of `opd-engine check`: the definitions of docs/math.md on whole logits, in plain torch.

It shares no line with the engine and imports none of it; gradients are autograd's on these definitions. Evaluated in
float32 it is also the eager implementation whose own error sets what is allowed. One process, slow on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
TAIL_MODES = ("bucket", "truncate", "renormalize")

Buckets = tuple[Tensor, Tensor]  # log-probs [T, k] (absent -inf) and the tail's [T]


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype, compute: torch.dtype
) -> Tensor:
    """Equations: docs/math.md (53) (54). Logits of the LM head as they are in `dtype`: rounded once, capped, once more.

    hidden: [T, hidden_size]; weight: [vocab, hidden_size]. Returns: [T, vocab] in `compute`.
    """
    logits = hidden.to(compute) @ weight.to(compute).t()
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = _rounded(logits, dtype)
    return logits if softcap is None else _rounded(softcap * torch.tanh(logits / softcap), dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a half precision where `dtype` is one; in float64 the gradient passes unrounded."""
    if dtype in (torch.float64, torch.float32):
        return values
    if values.dtype == torch.float64:
        return values + (values.detach().to(dtype).to(values.dtype) - values.detach())
    return values.to(dtype).to(values.dtype)


def log_probabilities(logits: Tensor, vocab_size: int, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Equation: docs/math.md (2). logits: [T, padded width]. Returns: [T, vocab_size], columns beyond it ignored."""
    return torch.log_softmax(scaled(logits, vocab_size, temperature, dtype), -1)


def scaled(logits: Tensor, vocab_size: int, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Logits / temperature, of which there may be one a row."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    y = logits[:, :vocab_size].to(dtype) / temperature
    return y.masked_fill(y == -math.inf, -math.inf)  # and without a gradient there, by convention: docs/math.md (37)


def top_ids(logits: Tensor, k: int, vocab_size: int) -> Tensor:
    """Equation: docs/math.md (14), by a stable sort; -1 where no column above -inf is left."""
    values, ids = torch.sort(logits[:, :vocab_size].detach().double(), dim=-1, descending=True, stable=True)
    return torch.where(values == -math.inf, -1, ids)[:, :k]


def scores(
    logits: Tensor,
    ids: Tensor,
    target: Tensor,
    vocab_size: int,
    temperature: float | Tensor,
    compute: torch.dtype,
    fields: tuple[str, ...],
) -> dict[str, Tensor]:
    """Equations: docs/math.md (4) (6) to (9). The fields asked for, by name; a target below 0 is absent."""
    y = scaled(logits, vocab_size, temperature, compute)
    ordered = ids.sort(-1).values
    is_repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    y = y * torch.where(is_repeated, math.nan, 1.0)[:, None].to(y)  # such a row has no support, and NaN gradients
    log_q = torch.log_softmax(y, -1)
    found = {}
    if "log_probs" in fields or "tail_log_prob" in fields:
        found["log_probs"], found["tail_log_prob"] = buckets(log_q, ids)
    if "lse" in fields:
        found["lse"] = torch.logsumexp(y, -1)
    if "entropy" in fields:
        found["entropy"] = -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)
    if "target_log_prob" in fields:
        picked = log_q.gather(-1, target.clamp_min(0)[:, None])[:, 0]
        found["target_log_prob"] = torch.where(target >= 0, picked, -math.inf)
    return {name: found[name] for name in fields}


def buckets(log_q: Tensor, ids: Tensor) -> Buckets:
    """Equations: docs/math.md (3) (4). ids: [T, k], -1 absent."""
    present = ids >= 0
    picked = torch.where(present, log_q.gather(-1, ids.clamp_min(0)), -math.inf)
    off = torch.ones(log_q.shape[0], log_q.shape[1] + 1, dtype=torch.bool, device=log_q.device)
    off = off.scatter(-1, torch.where(present, ids, log_q.shape[1]), False)[:, :-1]
    return picked, torch.logsumexp(torch.where(off, log_q, -math.inf), -1)


def mixture(members: list[Buckets], weights: Tensor, mode: str, ids: Tensor) -> Buckets:
    """Equations: docs/math.md (41) (42). weights: [members] or [members, T], not yet normalised."""
    table = torch.stack([torch.cat([picked, tail[:, None]], -1) for picked, tail in members])
    weights = weights.to(table.dtype)
    share = (weights / weights.sum(0)).reshape(len(members), -1, 1)
    counted = torch.nn.functional.pad(ids >= 0, (0, 1), value=True)
    if mode == "arithmetic":
        mixed = torch.where(counted, (share * table.exp()).sum(0).log(), -math.inf)
    else:
        mixed = (share * torch.where(counted, table, 0.0)).sum(0)
        mixed = torch.log_softmax(torch.where(counted, mixed, -math.inf), -1)
    return mixed[:, :-1], mixed[:, -1]


def kl(log_a: Tensor, log_b: Tensor, counted: Tensor) -> Tensor:
    """sum of a (log a - log b) over what is counted; a term is 0 where a is."""
    counted = counted & (log_a > -math.inf)
    a, b = torch.where(counted, log_a, 0.0), torch.where(counted, log_b, 0.0)
    return torch.where(counted, a.exp() * (a - b), 0.0).sum(-1)


def divergence(log_q: Tensor, log_p: Tensor, counted: Tensor, name: str, beta: float, alpha: float) -> Tensor:
    """Equations: docs/math.md (16) to (20). log_q the student, log_p the teacher."""

    def mixed(weight_p: float, weight_q: float) -> Tensor:  # both as given: 1 - (1 - 1e-17) is 0
        p, q = torch.where(counted, log_p, 0.0), torch.where(counted, log_q, 0.0)
        return torch.logaddexp(p + math.log(weight_p), q + math.log(weight_q))

    if name == "forward_kl":
        return kl(log_p, log_q, counted)
    if name == "reverse_kl":
        return kl(log_q, log_p, counted)
    if name == "jsd":
        middle = mixed(beta, 1 - beta)
        return beta * kl(log_p, middle, counted) + (1 - beta) * kl(log_q, middle, counted)
    if name == "skew_forward_kl":
        return kl(log_p, mixed(alpha, 1 - alpha), counted)
    return kl(log_q, mixed(1 - alpha, alpha), counted)


def distill_loss(
    student: Buckets,
    teacher: Buckets,
    ids: Tensor,
    tail: str,
    name: str,
    beta: float,
    alpha: float,
    floor: float | None = None,
) -> Tensor:
    """Equations: docs/math.md (28) to (32). Returns: [T]."""
    log_q, q_tail = student
    log_p, p_tail = (value.detach() if floor is None else value.detach().clamp_min(floor) for value in teacher)
    counted = ids >= 0
    if tail == "bucket":
        log_q, log_p = torch.cat([log_q, q_tail[:, None]], -1), torch.cat([log_p, p_tail[:, None]], -1)
        counted = torch.nn.functional.pad(counted, (0, 1), value=True)
    elif tail == "renormalize":
        log_q, log_p = (
            values - torch.logsumexp(torch.where(counted, values, -math.inf), -1, keepdim=True)
            for values in (log_q, log_p)
        )
    return divergence(log_q, log_p, counted, name, beta, alpha)


def full_loss(log_q: Tensor, log_p: Tensor, name: str, beta: float, alpha: float) -> Tensor:
    """Equations: docs/math.md (38) (39). log_q: [T, student's vocabulary]; log_p: [T, the ids that both have]."""
    log_p = torch.nn.functional.pad(log_p.detach(), (0, log_q.shape[1] - log_p.shape[1]), value=-math.inf)
    return divergence(log_q, log_p, torch.ones_like(log_q, dtype=torch.bool), name, beta, alpha)
