"""The union of several models' top-k as one support: deduplicated, -1 padded, capped, and what the cap dropped counted.

Works on [rows, sum of k], nothing of vocabulary size. Every rank of a tensor-parallel group computes the same union
from the same scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores


@dataclasses.dataclass
class UnionSupport:
    """A union support.

    indices: [rows, width] int64, distinct ids, highest mass first, then -1
    dropped: [rows] int64, distinct ids that the cap left out
    """

    indices: Tensor
    dropped: Tensor


def union_support(scores: Sequence[TokenScores], cap: int | None = None) -> UnionSupport:
    """Unite the supports of a student and its teachers.

    Equation: docs/math.md (44)
    scores: each model's own top-k, [rows, k_m]; their rows are the same tokens, their ids the student's vocabulary
    cap: widest support, or None for no cap (the sum of the k_m)

    An id's mass is the sum of its probabilities over the models whose top-k holds it (a model that does not hold it
    gives it no more than its own k-th). Order: mass descending, then id ascending; the cap drops from the end.

    Raises:
        ValueError: no scores, row counts that differ, or cap < 1.
    """
    lists = list(scores)
    if not lists:
        raise ValueError("scores: wanted at least one top-k, got none")
    if cap is not None and cap < 1:
        raise ValueError(f"cap: wanted at least 1, got {cap}")
    rows = lists[0].indices.shape[:-1]
    for position, item in enumerate(lists):
        if item.indices.shape[:-1] != rows:
            raise ValueError(
                f"scores[{position}]: wanted rows {list(rows)} as scores[0], got {list(item.indices.shape[:-1])}"
            )
    with torch.no_grad():
        ids = torch.cat([item.indices for item in lists], dim=-1)
        mass = torch.cat([item.log_probs.double() for item in lists], dim=-1).exp().nan_to_num(nan=0.0)
        ids, order = ids.sort(dim=-1, stable=True)
        mass = mass.gather(-1, order).masked_fill_(ids == -1, 0.0)
        # Equal ids are now neighbours: the first of a run stands for it, with the run's mass.
        leads = torch.ones_like(ids, dtype=torch.bool)
        leads[..., 1:] = ids[..., 1:] != ids[..., :-1]
        run = leads.long().cumsum(-1) - 1
        mass = torch.zeros_like(mass).scatter_add_(-1, run, mass).gather(-1, run)
        distinct = leads & (ids != -1)
        # Ids are ascending here, so a stable sort on mass keeps ascending ids among equals.
        key = mass.masked_fill(~distinct, -1.0)
        order = key.sort(dim=-1, descending=True, stable=True).indices
        ids = ids.masked_fill(~distinct, -1).gather(-1, order)
        width = ids.shape[-1] if cap is None else min(cap, ids.shape[-1])
        dropped = (ids[..., width:] != -1).sum(-1)
        return UnionSupport(indices=ids[..., :width].contiguous(), dropped=dropped)


def shared_fraction(left: Tensor, right: Tensor) -> Tensor:
    """How much of one support lies in another: [rows] float64, 0 for an empty one.

    left, right: [rows, k], distinct global ids, -1 absent; the fraction is of left's ids
    """
    # Distinct on each side: equal neighbours after sorting are ids of both. No [k, k] comparison is made.
    both = torch.cat([left, right], dim=-1).sort(dim=-1).values
    shared = ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] != -1)).sum(-1)
    return shared.double() / (left != -1).sum(-1).clamp(min=1)
