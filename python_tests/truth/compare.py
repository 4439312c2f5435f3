"""Runs one comparison three ways (the engine, the float64 oracle, eager torch) and applies the table of tolerances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import oracles
from tolerances import INFINITE_LOSS, check

FIELDS = ("log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob")


def leaf(logits: Tensor) -> Tensor:
    """A view of the same memory (its layout is part of the case) that collects a gradient."""
    return logits.detach().requires_grad_()


def mixed_support(k: int, vocab_size: int, rows: tuple[int, ...], seed: int = 5) -> Tensor:
    """Ids in no order, with absent slots among them, and a row that has none at all."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for size in rows:
        count *= size
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:k] for _ in range(count)]) if count else None
    ids = torch.empty(0, min(k, vocab_size), dtype=torch.int64) if ids is None else ids
    holes = torch.rand(ids.shape, generator=generator) < 0.2
    ids = torch.where(holes, -1, ids)
    if count > 1:
        ids[-1] = -1
    return ids.reshape(*rows, ids.shape[-1])


def upstream_like(scores, seed: int = 11) -> list[Tensor]:
    """One random weight for each score, multiples of 1/16."""
    generator = torch.Generator().manual_seed(seed)
    present = [getattr(scores, name) for name in FIELDS if getattr(scores, name) is not None]
    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in present]
    return [(weight * 16).round() / 16 for weight in weights]


def score_gradient(scores, logits: Tensor) -> Tensor:
    """Gradient of a random combination of every score: all terms of docs/math.md (36) at once."""
    values = [getattr(scores, name) for name in FIELDS if getattr(scores, name) is not None]
    upstream = [weight.to(value.dtype) for weight, value in zip(upstream_like(scores), values)]
    return torch.autograd.grad(values, logits, upstream)[0]


def check_scores(where: str, dtype: torch.dtype, ours, oracle, eager) -> None:
    """Every score of one TokenScores against the oracle's."""
    for name in FIELDS:
        mine, true = getattr(ours, name), getattr(oracle, name)
        assert (mine is None) == (true is None), f"{where}: {name} is {'absent' if mine is None else 'unexpected'}"
        if mine is None:
            continue
        assert mine.dtype == oracles.score_dtype(dtype), f"{where}: {name} has {mine.dtype}"
        quantity = "tail" if name == "tail_log_prob" else "score"
        check(quantity, dtype, mine, true, getattr(eager, name), f"{where} {name}")


def check_loss(
    where: str,
    logits: Tensor,
    ours: Callable[[Tensor], Tensor],
    definition: Callable[[Tensor, torch.dtype], Tensor],
) -> None:
    """Value and gradient of a loss per row. `definition(logits, dtype)` is the oracle's text, run twice.

    Rows whose true loss is infinite have no gradient to compare: they are selected away, on all three sides.
    """
    dtype = logits.dtype
    true_leaf, eager_leaf, our_leaf = leaf(logits.double()), leaf(logits), leaf(logits)
    true_loss, eager_loss = definition(true_leaf, torch.float64), definition(eager_leaf, oracles.score_dtype(dtype))
    our_loss = ours(our_leaf)
    assert our_loss.dtype == oracles.score_dtype(dtype), f"{where}: loss has {our_loss.dtype}"
    check("loss", dtype, our_loss, true_loss, eager_loss, where)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(true_loss.shape, generator=generator, dtype=torch.float64) * 16).round() / 16 + 0.5
    weight = torch.where(true_loss < INFINITE_LOSS, weight, 0.0)
    grads = [
        torch.autograd.grad(loss, at, weight.to(loss.dtype))[0]
        for loss, at in ((our_loss, our_leaf), (true_loss, true_leaf), (eager_loss, eager_leaf))
    ]
    assert grads[0].dtype == dtype and grads[0].shape == logits.shape
    kept = weight > 0
    check("gradient", dtype, grads[0][kept], grads[1][kept], grads[2][kept], where)
    assert not grads[0][~kept].any(), f"{where}: a row of zero upstream has a gradient"
