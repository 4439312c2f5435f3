"""Drawing a token from each row's distribution by one uniform number a row, so that rows never affect each other.

Which token a number gives does not depend on the batch, the device or the ranks that hold the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_seeds(seed: int, step: int, samples: Sequence[int]) -> list[int]:
    """A number for each sample of a step: the same however samples are dealt to ranks, and after a resume.

    Method: the finaliser of SplitMix64, so that neighbours share nothing.
    """
    return [_mixed(_mixed(_mixed(seed) + step) + sample) for sample in samples]


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return (value ^ (value >> 31)) % 2**63


def uniform_rows(seeds: Sequence[int], count: int) -> Tensor:
    """[len(seeds), count] float64 in [0, 1), each row from its own seed."""
    found = torch.empty(len(seeds), count, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(found, seeds, strict=True):
        torch.rand(count, dtype=torch.float64, generator=generator.manual_seed(seed), out=row)
    return found


def draw(log_probs: Tensor, uniforms: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Samples of the inverse distribution function: [rows] int64.

    log_probs: [rows, vocab_size]; uniforms: [rows] in [0, 1)
    top_k, top_p: keep the k likeliest ids only, or the smallest set of that mass; 0 and 1 switch them off

    The sum runs in float64: in float32 a vocabulary of 150,000 would lose the small ids to rounding.
    """
    cdf = _kept(log_probs.exp(), top_k, top_p).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, uniforms.to(cdf)[:, None] * cdf[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=log_probs.shape[-1] - 1)


def likeliest(log_probs: Tensor, k: int) -> list[list[tuple[float, int]]]:
    """Each row's k likeliest tokens as rollout engines answer them: (log-prob, id), likeliest first.

    log_probs: [rows, vocab_size]
    """
    top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    rows = zip(top.values.clamp(max=0.0).tolist(), top.indices.tolist(), strict=True)
    return [list(zip(values, ids, strict=True)) for values, ids in rows]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises: ValueError for a setting out of range, by name."""
    if not (temperature >= 0.0 and temperature != float("inf")):
        raise ValueError(f"temperature: wanted finite and >= 0 (0 is greedy), got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: wanted >= 0 (0 is off), got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: wanted in (0, 1] (1 is off), got {top_p}")


def _kept(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """probs [rows, vocab_size] with 0 outside the top_k ids and outside the smallest set of mass >= top_p."""
    if 0 < top_k < probs.shape[-1]:
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(top_k, dim=-1).indices, True)
        probs = probs.where(kept, torch.zeros_like(probs))
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < top_p * ordered.sum(-1, keepdim=True), torch.zeros_like(ordered))
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    return probs
