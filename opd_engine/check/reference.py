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


def log_probabilities(logits: Tensor, vocab_size: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """Equation: docs/math.md (2). logits: [T, padded width]. Returns: [T, vocab_size], columns beyond it ignored."""
    return torch.log_softmax(logits[:, :vocab_size].to(dtype) / temperature, -1)


def top_ids(logits: Tensor, k: int, vocab_size: int) -> Tensor:
    """Equation: docs/math.md (14), by a stable sort."""
    return torch.sort(logits[:, :vocab_size].detach().double(), dim=-1, descending=True, stable=True).indices[:, :k]


def buckets(log_q: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Equations: docs/math.md (3) (4). ids: [T, k], -1 absent. Returns: log-probs [T, k] (absent -inf) and tail [T]."""
    present = ids >= 0
    picked = torch.where(present, log_q.gather(-1, ids.clamp_min(0)), -math.inf)
    off = torch.ones(log_q.shape[0], log_q.shape[1] + 1, dtype=torch.bool, device=log_q.device)
    off = off.scatter(-1, torch.where(present, ids, log_q.shape[1]), False)[:, :-1]
    return picked, torch.logsumexp(torch.where(off, log_q, -math.inf), -1)


def kl(log_a: Tensor, log_b: Tensor, counted: Tensor) -> Tensor:
    """sum of a (log a - log b) over what is counted; every counted log-prob is finite here."""
    a, b = torch.where(counted, log_a, 0.0), torch.where(counted, log_b, 0.0)
    return torch.where(counted, a.exp() * (a - b), 0.0).sum(-1)


def divergence(log_q: Tensor, log_p: Tensor, counted: Tensor, name: str, beta: float, alpha: float) -> Tensor:
    """Equations: docs/math.md (16) to (20). log_q the student, log_p the teacher."""

    def mixture(weight_p: float) -> Tensor:
        p, q = torch.where(counted, log_p, 0.0), torch.where(counted, log_q, 0.0)
        return torch.logaddexp(p + math.log(weight_p), q + math.log1p(-weight_p))

    if name == "forward_kl":
        return kl(log_p, log_q, counted)
    if name == "reverse_kl":
        return kl(log_q, log_p, counted)
    if name == "jsd":
        middle = mixture(beta)
        return beta * kl(log_p, middle, counted) + (1 - beta) * kl(log_q, middle, counted)
    if name == "skew_forward_kl":
        return kl(log_p, mixture(alpha), counted)
    return kl(log_q, mixture(1 - alpha), counted)


def distill_loss(log_q: Tensor, log_p: Tensor, ids: Tensor, tail: str, name: str, beta: float, alpha: float) -> Tensor:
    """Equations: docs/math.md (28) to (30). log_q, log_p: [T, vocab]. Returns: [T]."""
    (student, student_tail), (teacher, teacher_tail) = buckets(log_q, ids), buckets(log_p.detach(), ids)
    counted = ids >= 0
    if tail == "bucket":
        student = torch.cat([student, student_tail[:, None]], -1)
        teacher = torch.cat([teacher, teacher_tail[:, None]], -1)
        counted = torch.nn.functional.pad(counted, (0, 1), value=True)
    elif tail == "renormalize":
        student = student - torch.logsumexp(student, -1, keepdim=True)
        teacher = teacher - torch.logsumexp(teacher, -1, keepdim=True)
    return divergence(student, teacher, counted, name, beta, alpha)


def full_loss(log_q: Tensor, log_p: Tensor, name: str, beta: float, alpha: float) -> Tensor:
    """Equation: docs/math.md (38), equal vocabularies."""
    return divergence(log_q, log_p.detach(), torch.ones_like(log_q, dtype=torch.bool), name, beta, alpha)
