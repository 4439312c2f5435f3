"""Rows of TokenScores put together: absent ones, one after the other, wider, and in their places."""

import math

import pytest
import torch

from opd_engine import TokenScores, gather_log_probs

VOCAB = 11


def scores(rows, k, target=False, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:k] for _ in range(rows)])
    return logits, gather_log_probs(logits, ids, target=torch.arange(rows) if target else None)


def fields(one):
    names = ("indices", "log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob")
    return {name: getattr(one, name) for name in names if getattr(one, name) is not None}


def same(one, other):
    assert fields(one).keys() == fields(other).keys()
    for name, value in fields(one).items():
        torch.testing.assert_close(value, getattr(other, name), rtol=0, atol=0, equal_nan=True)


def test_absent_rows_hold_no_id_and_all_mass_in_the_tail():
    rows = TokenScores.absent(2, 3, dtype=torch.float64, has_target=True)
    assert (rows.indices == -1).all() and (rows.log_probs == -math.inf).all() and rows.log_probs.shape == (2, 3)
    assert (rows.tail_log_prob == 0).all() and rows.lse.isnan().all() and rows.entropy.isnan().all()
    assert (rows.target_log_prob == -math.inf).all() and rows.target_log_prob.dtype == torch.float64
    assert TokenScores.absent(2, 3).target_log_prob is None
    known = torch.tensor([[4, 1], [0, -1]], dtype=torch.int32)
    assert TokenScores.absent(2, 2, indices=known).indices is known
    with pytest.raises(ValueError, match=r"log_probs: wanted shape \(2, 2\) to match indices, got \(2, 3\)"):
        TokenScores.absent(2, 3, indices=known)


def test_wider_rows_mean_the_same():
    _, narrow = scores(4, 2, target=True)
    wide = narrow.widen(5)
    assert wide.k == 5 and (wide.indices[:, 2:] == -1).all() and (wide.log_probs[:, 2:] == -math.inf).all()
    same(TokenScores(**{**fields(wide), "indices": wide.indices[:, :2], "log_probs": wide.log_probs[:, :2]}), narrow)
    assert narrow.widen(2) is narrow
    with pytest.raises(ValueError, match="k: wanted at least the 2 ids that a row has, got 1"):
        narrow.widen(1)


def test_one_after_the_other():
    parts = [scores(rows, k, target=True, seed=rows)[1] for rows, k in ((3, 2), (1, 4), (2, 0))]
    whole = TokenScores.cat(parts)
    assert whole.indices.shape == (6, 4)
    start = 0
    for part in parts:
        same(whole.select(torch.arange(start, start + len(part.indices))), part.widen(4))
        start += len(part.indices)
    assert TokenScores.cat([parts[0], scores(2, 2)[1]]).target_log_prob is None
    with pytest.raises(ValueError, match="parts: wanted at least one, got none"):
        TokenScores.cat([])


@pytest.mark.parametrize("known", [False, True])
def test_rows_in_their_places(known):
    """-1 has none; value and gradient are those of the rows themselves."""
    logits, some = scores(4, 3, target=True, requires_grad=True)
    rows = torch.tensor([5, -1, 0, 2])
    ids = torch.full((6, 3), 7)
    whole = some.place(rows, 6, indices=ids if known else None)
    expected = TokenScores.absent(6, 3, dtype=torch.float64, has_target=True)
    for here, place in ((0, 5), (2, 0), (3, 2)):
        for name, value in fields(expected).items():
            value[place] = getattr(some, name).detach()[here]
    same(whole.detach(), TokenScores(**{**fields(expected), "indices": ids}) if known else expected)
    weights = torch.arange(1.0, 7.0)
    total = (whole.tail_log_prob * weights).sum() + whole.log_probs[rows[rows >= 0]].sum()
    (got,) = torch.autograd.grad(total, logits, retain_graph=True)
    real = torch.tensor([0, 2, 3])
    direct = (some.tail_log_prob[real] * weights[rows[real]]).sum() + some.log_probs[real].sum()
    torch.testing.assert_close(got, torch.autograd.grad(direct, logits)[0], rtol=0, atol=0)
    assert not got[1].any()


def test_no_rows_at_all():
    _, some = scores(2, 3)
    same(some.place(torch.tensor([-1, -1]), 2).detach(), TokenScores.absent(2, 3, dtype=torch.float64))
    assert TokenScores.absent(0, 3).place(torch.empty(0, dtype=torch.int64), 1).log_probs.shape == (1, 3)
