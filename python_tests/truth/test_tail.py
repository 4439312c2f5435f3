"""The tail's promise: within 4 ulp of max(1, |log q_tail|), whatever the mass."""

import math

import pytest
import torch

import opd_engine
import oracles
from tolerances import DTYPES, NAMES, Mismatch, check


def tails(logits, ids, temperature=1.0):
    ours = opd_engine.gather_log_probs(logits, ids, temperature=temperature).tail_log_prob
    oracle = oracles.gather_scores(logits, ids, temperature=temperature).tail_log_prob
    return ours, oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("vocab_size", [70, 1000, 50257])
@pytest.mark.parametrize("target_mass", [0.99, 0.5, 1e-3, 1e-7, 1e-11, 1e-20, 1e-40])
def test_every_mass_down_to_below_the_smallest_float32(vocab_size, target_mass, dtype):
    """The off-support logits lie so far below the support's that 1 - sum would hold no digit, or be negative."""
    generator = torch.Generator().manual_seed(vocab_size)
    k, rows = 16, 8
    logits = torch.randn(rows, vocab_size, generator=generator)
    spread = torch.logsumexp(logits[:, k:].double(), -1) - torch.logsumexp(logits[:, :k].double(), -1)
    logits[:, :k] += (spread - math.log(target_mass) + math.log1p(-target_mass)).float()[:, None]
    logits = logits.to(dtype)
    ids = torch.arange(k).expand(rows, k).contiguous()
    ours, oracle = tails(logits, ids)
    assert (oracle - math.log(target_mass)).abs().max() < 1.5, "the inputs do not have the mass this test is about"
    check("tail", dtype, ours, oracle, oracle, f"mass {target_mass:g} V={vocab_size}")
    by_topk = opd_engine.topk_log_probs(logits, k)
    again = oracles.topk_scores(logits, k).tail_log_prob
    check("tail", dtype, by_topk.tail_log_prob, again, again, f"top-k mass {target_mass:g} V={vocab_size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("vocab_size", [1000, 50257, 151936])
def test_flat_rows(vocab_size, dtype):
    """log s_tail and log s are near 12 while log q_tail is near 0: combined in float32 they would cost 8 ulp."""
    logits = torch.zeros(3, vocab_size, dtype=dtype)
    logits[1] = torch.linspace(-0.5, 0.5, vocab_size).to(dtype)
    logits[2, : vocab_size // 2] = -9.0
    for k in (1, 64, vocab_size // 3):
        ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(k))[:k].expand(3, k).contiguous()
        ours, oracle = tails(logits, ids)
        check("tail", dtype, ours, oracle, oracle, f"flat V={vocab_size} k={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 3.0])
def test_temperatures(temperature, dtype):
    logits = (torch.randn(16, 5000, generator=torch.Generator().manual_seed(7)) * 4).to(dtype)
    ids = oracles.topk_ids(logits, 32)
    ours, oracle = tails(logits, ids, temperature)
    check("tail", dtype, ours, oracle, oracle, f"t={temperature}")


def test_the_comparison_sees_one_minus_sum():
    """Control: the usual formula is red at a mass of 1e-7."""
    logits = torch.zeros(4, 500)
    logits[:, :4] = 19.0 + torch.arange(4) / 7
    ids = torch.arange(4).expand(4, 4).contiguous()
    ours, oracle = tails(logits, ids)
    check("tail", torch.float32, ours, oracle, oracle, "control's control")
    by_difference = torch.log1p(-torch.softmax(logits, -1)[:, :4].sum(-1))
    with pytest.raises(Mismatch):
        check("tail", torch.float32, by_difference, oracle, oracle, "1 - sum")
