"""full_distill_loss (docs/math.md (38) to (40)) against the oracle, unequal vocabularies included."""

import math

import pytest
import torch

import opd_engine
import oracles
from opd_engine import VocabShard
from tolerances import DTYPES, NAMES
from truth import shapes
from truth.compare import check_loss
from truth.test_divergences import PARAMETERS

CASES = ["ragged", "temperatures", "cold", "padded", "masked", "misaligned", "transposed", "flat", "peaked", "gpt2"]
CASES += ["one_hot_teacher", "one_hot_student", "finfo_min", "empty", "vocab_1", "offset"]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_every_divergence(name, dtype):
    case = shapes.CASES[name]
    logits, teacher_logits = shapes.in_dtype(case, dtype)
    shard = VocabShard(0, case.logits.shape[-1], case.vocab_size)
    for divergence in oracles.DIVERGENCES:
        for parameters in PARAMETERS.get(divergence, [{}]):
            setting = {"divergence": divergence, "temperature": case.temperature, **parameters}
            check_loss(
                f"full {name} {parameters}",
                logits,
                lambda z, setting=setting: opd_engine.full_distill_loss(z, teacher_logits, shard=shard, **setting),
                lambda z, compute, setting=setting: oracles.full_distill(
                    z, teacher_logits, vocab_size=case.vocab_size, dtype=compute, **setting
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("vocab_size, teacher_vocab_size", [(40, 33), (33, 40), (40, 40), (1, 40)])
def test_unequal_vocabularies(vocab_size, teacher_vocab_size, dtype):
    """Ids only the teacher has are excluded and its rest renormalised; ids only the student has get p = 0."""
    width = 44
    logits, teacher_logits = shapes.quantised(6, width, 1).to(dtype), shapes.quantised(6, width, 2).to(dtype)
    logits[:, vocab_size:] = math.nan
    teacher_logits[:, teacher_vocab_size:] = math.inf
    shard = VocabShard(0, width, vocab_size)
    for divergence in oracles.DIVERGENCES:
        for parameters in PARAMETERS.get(divergence, [{}]):
            setting = {"divergence": divergence, "teacher_vocab_size": teacher_vocab_size, **parameters}
            check_loss(
                f"unequal vocabularies {vocab_size} {teacher_vocab_size} {divergence} {parameters}",
                logits,
                lambda z, setting=setting: opd_engine.full_distill_loss(z, teacher_logits, shard=shard, **setting),
                lambda z, compute, setting=setting: oracles.full_distill(
                    z, teacher_logits, vocab_size=vocab_size, dtype=compute, **setting
                ),
            )


@pytest.mark.parametrize("divergence", oracles.DIVERGENCES)
def test_gradcheck(divergence):
    """Finite differences, float64."""
    logits, teacher_logits = shapes.quantised(3, 17, 1).requires_grad_(), shapes.quantised(3, 17, 2)
    setting = {"divergence": divergence, "temperature": 1.3}
    assert torch.autograd.gradcheck(lambda z: opd_engine.full_distill_loss(z, teacher_logits, **setting), logits)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_probabilities_that_underflow(divergence, dtype):
    """q of e^-95 and e^-110 under p near 1, and the reverse: finite wherever the definition is."""
    logits, teacher_logits = torch.zeros(4, 12), torch.zeros(4, 12)
    logits[0, 3], logits[1, 3], teacher_logits[2, 3], teacher_logits[3, 3] = -95.0, -110.0, -95.0, -110.0
    teacher_logits[:2, 3] += 4.0
    logits, teacher_logits = logits.to(dtype), teacher_logits.to(dtype)
    check_loss(
        f"full underflow {divergence}",
        logits,
        lambda z: opd_engine.full_distill_loss(z, teacher_logits, divergence=divergence),
        lambda z, compute: oracles.full_distill(z, teacher_logits, divergence, dtype=compute),
    )


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_teacher_near_the_student_costs_no_digit(divergence, offset):
    """A loss of 5e-7, eight digits below its terms, and a gradient of 1e-3 of them: relative errors, not absolute."""
    torch.manual_seed(0)
    logits = torch.randn(4, 20_000) * 3
    teacher = logits + 1e-3 * torch.randn(4, 20_000) + offset
    results = []
    for dtype in (torch.float32, torch.float64):
        z = logits.detach().to(dtype).requires_grad_()
        loss = opd_engine.full_distill_loss(z, teacher.to(dtype), divergence=divergence)
        loss.sum().backward()
        results.append((loss.detach().double(), z.grad.double()))
    (loss, grad), (true_loss, true_grad) = results
    assert ((loss - true_loss) / true_loss).abs().max() < 1e-6
    assert (grad - true_grad).norm() < 1e-6 * true_grad.norm()
