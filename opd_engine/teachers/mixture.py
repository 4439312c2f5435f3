"""The mixture of several teachers on the k+1 buckets of one support, arithmetic or geometric. No gradient.

All members score the same ids in the same order. Works in float64 on [members, rows, k + 1]; the full vocabulary is
never touched, because a mixture of bucket masses is the bucket mass of the mixture (arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.functional.arguments import reads_values
from opd_engine.functional.token_scores import TokenScores
from opd_engine.ops.debug import debug_enabled

MIXTURE_MODES = ("arithmetic", "geometric")


def mix_teachers(
    scores: Sequence[TokenScores], weights: Sequence[float] | Tensor, mode: str = "arithmetic"
) -> TokenScores:
    """Mix the scores of several teachers at the same ids.

    Arithmetic is log sum_m w_m p_m in every bucket; geometric is prod_m p_m^w_m, divided by its sum over the k + 1
    buckets.

    Equation: docs/math.md (41), (42)

    scores: M TokenScores with the same indices [*, k]
    weights: [M], or [M, *] for weights a row; >= 0, divided by their sum. A member of zero weight is dropped: its
        scores may be anything, NaN included.
    mode: "arithmetic" or "geometric"

    Returns:
        TokenScores with the members' indices (an absent id stays absent); lse and entropy are None; target_log_prob
        is there for arithmetic only, when every member has it. A row whose weights are all zero, or a geometric row
        with no bucket where all members have mass, is NaN.
    Raises:
        ValueError: no members, wrong mode, weights of the wrong shape, negative, non-finite or without a positive
            entry; members whose indices differ (what is on a device is read only in debug).
    Precision: float64 inside, rounded to the members' widest dtype.
    Grad: none; members that require grad are refused.
    """
    members = list(scores)
    if not members:
        raise ValueError("scores: wanted at least one teacher, got none")
    if mode not in MIXTURE_MODES:
        raise ValueError(f"mode: wanted one of {', '.join(MIXTURE_MODES)}, got {mode!r}")
    first = members[0]
    for position, member in enumerate(members):
        if member.log_probs.shape != first.log_probs.shape or member.tail_log_prob.shape != first.tail_log_prob.shape:
            raise ValueError(
                f"scores[{position}]: wanted log_probs {list(first.log_probs.shape)} as scores[0], "
                f"got {list(member.log_probs.shape)}"
            )
        if member.log_probs.requires_grad or member.tail_log_prob.requires_grad:
            raise ValueError(f"scores[{position}]: a teacher must not require grad; detach it")
        if member.indices is not first.indices and reads_values(first.indices):
            differs = (member.indices != first.indices).flatten()
            if bool(differs.any()):
                row = int(differs.nonzero()[0]) // first.k
                raise ValueError(
                    f"scores[{position}]: wanted the ids of scores[0] in the same order, got others in row {row}"
                )
    with torch.no_grad():
        log_weights = _log_weights(weights, len(members), first.tail_log_prob)
        dtype = torch.float64 if any(m.log_probs.dtype == torch.float64 for m in members) else torch.float32
        buckets = torch.stack([_buckets(member) for member in members])
        target = None
        if mode == "arithmetic":
            mixed = _weighted_sum(buckets, log_weights.unsqueeze(-1))
            if all(member.target_log_prob is not None for member in members):
                targets = torch.stack([member.target_log_prob.double() for member in members])
                target = _weighted_sum(targets, log_weights).to(dtype)
        else:
            mixed = _weighted_product(buckets, log_weights.unsqueeze(-1))
            # Absent ids are not buckets: they must not take part in the normalisation.
            mixed[..., :-1].masked_fill_(first.indices.eq(-1), -torch.inf)
            mixed = mixed - torch.logsumexp(mixed, dim=-1, keepdim=True)
        mixed = mixed.to(dtype)
        absent = first.indices.eq(-1) & mixed[..., -1:].isfinite()
        return TokenScores(
            indices=first.indices,
            log_probs=mixed[..., :-1].masked_fill(absent, -torch.inf),
            tail_log_prob=mixed[..., -1].contiguous(),
            target_log_prob=target,
        )


def normalized_log_weights(weights: Tensor) -> Tensor:
    """log(w_m / sum_m w_m) in float64 over dim 0; -inf for zero weights, NaN where all are zero."""
    weights = weights.double()
    return (weights / weights.sum(0, keepdim=True)).log()


def _log_weights(weights: Sequence[float] | Tensor, num_members: int, row_like: Tensor) -> Tensor:
    """Normalised log-weights [M, *1 or rows]."""
    rows = row_like.shape
    from_host = not isinstance(weights, Tensor) or weights.device.type == "cpu"
    table = torch.as_tensor(weights, dtype=torch.float64)
    if table.dim() == 0 or table.shape[0] != num_members:
        raise ValueError(f"weights: wanted [{num_members}], one a teacher, or a row each, got {list(table.shape)}")
    if table.dim() == 1:
        table = table.view(num_members, *([1] * len(rows)))
    elif table.shape[1:].numel() == rows.numel():
        table = table.reshape(num_members, *rows)
    else:
        raise ValueError(f"weights: wanted [{num_members}] or [{num_members}, {rows.numel()}], got {list(table.shape)}")
    if from_host or debug_enabled():
        if not bool((table.isfinite() & (table >= 0)).all()):
            raise ValueError(f"weights: wanted finite values >= 0, got {table.min().item()} to {table.max().item()}")
        # A row without a positive weight has no mixture. Per row that is NaN, alone; for the whole call, a mistake.
        if not bool((table > 0).any()) and table.numel():
            raise ValueError("weights: wanted at least one above zero, got only zeros")
    return normalized_log_weights(table).to(row_like.device)


def _buckets(member: TokenScores) -> Tensor:
    return torch.cat([member.log_probs, member.tail_log_prob.unsqueeze(-1)], dim=-1).double()


def _weighted_sum(values: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_m w_m e^values; dropped members are masked before the sum, so their NaN never enters."""
    kept = torch.where(log_weights == -torch.inf, -torch.inf, values + log_weights)
    return torch.logsumexp(kept, dim=0)


def _weighted_product(values: Tensor, log_weights: Tensor) -> Tensor:
    """sum_m w_m values without 0 x inf."""
    return torch.where(log_weights == -torch.inf, 0.0, log_weights.exp() * values).sum(0)
