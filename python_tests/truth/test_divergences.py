"""distill_loss (docs/math.md (16) to (32)) against the oracle: divergences, tails, supports, dtypes, and the edges."""

import math

import pytest
import torch

import opd_engine
import oracles
from opd_engine import TokenScores, VocabShard
from tolerances import DTYPES, NAMES, check
from truth import shapes
from truth.compare import check_loss, mixed_support

CASES = ["k_1", "k_vocab", "ragged", "temperatures", "cold", "padded", "masked", "few_finite", "transposed"]
CASES += ["peaked", "one_hot_teacher", "one_hot_student", "finfo_min", "empty"]
TEACHER_SUPPORT = ["ragged", "masked", "padded", "one_hot_teacher"]  # where it differs from the student's in kind
PARAMETERS = {"jsd": [{"beta": b} for b in (0.5, 0.1, 0.0, 1.0)], "skew_forward_kl": [{"alpha": a} for a in (0.1, 0.0)]}
PARAMETERS["skew_reverse_kl"] = [{"alpha": a} for a in (0.1, 0.7)]


def every_setting():
    for divergence in oracles.DIVERGENCES:
        for parameters in PARAMETERS.get(divergence, [{}]):
            for tail in oracles.TAIL_MODES:
                yield {"divergence": divergence, "tail": tail, **parameters}


def support_of(which, case, logits, teacher_logits):
    if which == "mixed":
        return mixed_support(min(case.k + 2, case.vocab_size), case.vocab_size, tuple(logits.shape[:-1]))
    return oracles.topk_ids(logits if which == "student" else teacher_logits, case.k, case.vocab_size)


def as_token_scores(scores, dtype):
    """The oracle's scores, rounded once, as an input of the engine."""
    return TokenScores(
        indices=scores.indices,
        log_probs=scores.log_probs.detach().to(dtype),
        tail_log_prob=scores.tail_log_prob.detach().to(dtype),
    )


EVERY_SUPPORT = [(name, support) for name in CASES for support in ("student", "mixed")]
EVERY_SUPPORT += [(name, "teacher") for name in TEACHER_SUPPORT]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name, support", EVERY_SUPPORT)
def test_every_divergence_and_tail(name, dtype, support):
    case = shapes.CASES[name]
    logits, teacher_logits = shapes.in_dtype(case, dtype)
    ids = support_of(support, case, logits, teacher_logits)
    shard = VocabShard(0, case.logits.shape[-1], case.vocab_size)
    teacher = opd_engine.gather_log_probs(teacher_logits, ids, temperature=case.temperature, shard=shard)
    for floor in (None, -8.0) if support == "mixed" else (None,):
        for setting in every_setting():

            def ours(z, setting=setting, floor=floor):
                student = opd_engine.gather_log_probs(z, ids, temperature=case.temperature, shard=shard)
                return opd_engine.distill_loss(student, teacher, teacher_log_prob_min=floor, **setting)

            def definition(z, compute, setting=setting, floor=floor):
                rest = (None, case.vocab_size, case.temperature, compute)
                student = oracles.gather_scores(z, ids, *rest)
                constant = oracles.gather_scores(teacher_logits, ids, *rest)
                return oracles.distill(student, constant, teacher_log_prob_min=floor, **setting)

            check_loss(f"{name} {support} floor={floor} {setting}", logits, ours, definition)


@pytest.mark.parametrize("setting", list(every_setting()), ids=lambda s: "-".join(map(str, s.values())))
def test_non_negative_and_accurate_near_the_teacher(setting):
    """Logits that differ by 1e-4, float32: the plain formula is noise there, the non-negative one is not."""
    if setting["tail"] == "truncate":
        pytest.skip("truncate keeps the plain form: it is not non-negative")
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(256, 512, generator=generator) * 3
    teacher_logits = logits + 1e-4 * torch.randn(logits.shape, generator=generator)
    ids = oracles.topk_ids(logits, 16)
    # The rounding of the log-probs is not the divergence's error: both sides start from the same float32 numbers.
    student, teacher = (as_token_scores(oracles.gather_scores(z, ids), torch.float32) for z in (logits, teacher_logits))
    ours = opd_engine.distill_loss(student, teacher, **setting)
    assert (ours >= 0).all()
    assert not opd_engine.distill_loss(student, student, **setting).any(), "p = q must give exactly 0"
    full = {key: value for key, value in setting.items() if key != "tail"}
    pairs = [
        (
            opd_engine.full_distill_loss(logits, teacher_logits, **full),
            oracles.full_distill(logits, teacher_logits, **full),
        )
    ]
    from_logits = [opd_engine.gather_log_probs(z, ids) for z in (logits, teacher_logits)]
    true_scores = [oracles.gather_scores(z, ids) for z in (logits, teacher_logits)]
    pairs.append((opd_engine.distill_loss(*from_logits, **setting), oracles.distill(*true_scores, **setting)))
    for got, true in pairs:
        assert (got >= 0).all()
        relative = (got.double() - true).abs() / true
        assert relative.median() < 1e-2, f"median relative error {relative.median():.2e}"


@pytest.mark.parametrize("gap", [80.0, 88.5, 90.0, 95.0, 103.0, 104.0, 150.0, 800.0])
@pytest.mark.parametrize("divergence", oracles.DIVERGENCES)
def test_terms_where_an_exponential_overflows_or_underflows(divergence, gap):
    """a expm1(r) with a near the smallest float32 and r above 88.7 is b - a, not inf and not NaN."""
    for student_gap, teacher_gap in ((gap, 0.5), (0.5, gap), (gap, gap - 1)):
        log_q = torch.tensor([[-student_gap, -1.0]], dtype=torch.float64)
        log_p = torch.tensor([[-teacher_gap, -2.0]], dtype=torch.float64)
        tails = [torch.log1p(-scores.exp().sum(-1)) for scores in (log_q, log_p)]
        ids = torch.tensor([[3, 5]])
        student, teacher = oracles.Scores(ids, log_q, tails[0]), oracles.Scores(ids, log_p, tails[1])
        for dtype in (torch.float32, torch.float64):
            ours_student = as_token_scores(student, dtype)
            ours_student.log_probs.requires_grad_()
            loss = opd_engine.distill_loss(ours_student, as_token_scores(teacher, dtype), divergence=divergence)
            true = oracles.distill(student, teacher, divergence)
            torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
            (grad,) = torch.autograd.grad(loss.sum(), ours_student.log_probs)
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("setting", list(every_setting()), ids=lambda s: "-".join(map(str, s.values())))
def test_infinite_rows_stay_alone(setting, dtype):
    """Zeros of one side: the value is honestly infinite where the definition is, in its own row."""
    log_q = torch.tensor([[-1.0, -math.inf], [-1.0, -2.0], [-math.inf, -1.0], [-0.7, -0.9]], dtype=torch.float64)
    log_p = torch.tensor([[-1.5, -1.0], [-math.inf, -0.4], [-math.inf, -0.5], [-1.0, -0.8]], dtype=torch.float64)
    tails = [torch.log1p(-scores.exp().sum(-1)) for scores in (log_q, log_p)]
    ids = torch.tensor([[3, 5]]).expand(4, 2).contiguous()
    student, teacher = oracles.Scores(ids, log_q, tails[0]), oracles.Scores(ids, log_p, tails[1])
    inputs = as_token_scores(student, dtype)
    inputs.log_probs.requires_grad_()
    loss = opd_engine.distill_loss(inputs, as_token_scores(teacher, dtype), **setting)
    true = oracles.distill(student, teacher, **setting)
    check("loss", dtype, loss, true, oracles.distill(student, teacher, **setting), f"infinite rows {setting}")
    (grad,) = torch.autograd.grad(loss.sum(), inputs.log_probs)
    assert grad[true.isfinite()].isfinite().all()


@pytest.mark.parametrize("tail", oracles.TAIL_MODES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_tail_makes_the_row_nan_in_every_mode(tail, side):
    logits = [shapes.quantised(3, 20, seed).float() for seed in (1, 2)]
    logits[side == "teacher"][1, 4] = math.nan
    ids = torch.tensor([[0, 1, 2]]).expand(3, 3).contiguous()
    student, teacher = (opd_engine.gather_log_probs(z, ids) for z in logits)
    loss = opd_engine.distill_loss(student, teacher, tail=tail)
    assert loss.isnan().tolist() == [False, True, False]


def test_renormalize_of_fewer_than_two_ids_is_zero_in_value_and_gradient():
    logits = shapes.quantised(3, 20, 1).requires_grad_()
    ids = torch.tensor([[4, -1, -1], [-1, -1, -1], [3, 5, -1]])
    teacher = opd_engine.gather_log_probs(shapes.quantised(3, 20, 2), ids)
    for divergence in oracles.DIVERGENCES:
        student = opd_engine.gather_log_probs(logits, ids)
        loss = opd_engine.distill_loss(student, teacher, divergence=divergence, tail="renormalize")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss[:2].tolist() == [0.0, 0.0] and loss[2] > 0
        assert not grad[:2].any() and grad[2].any()


@pytest.mark.parametrize("tail", oracles.TAIL_MODES)
@pytest.mark.parametrize("divergence", oracles.DIVERGENCES)
def test_gradcheck(divergence, tail):
    """Finite differences through gather and loss, float64."""
    logits = shapes.quantised(3, 17, 1).requires_grad_()
    ids = mixed_support(5, 17, (3,))[:2].repeat(2, 1)[:3]
    teacher = opd_engine.gather_log_probs(shapes.quantised(3, 17, 2), ids)

    def loss(z):
        student = opd_engine.gather_log_probs(z, ids, temperature=1.3)
        return opd_engine.distill_loss(student, teacher, divergence=divergence, tail=tail)

    assert torch.autograd.gradcheck(loss, logits)


def test_jsd_ends_are_the_two_kls():
    logits, teacher_logits = shapes.quantised(4, 30, 1), shapes.quantised(4, 30, 2)
    ids = oracles.topk_ids(logits, 6)
    student, teacher = (opd_engine.gather_log_probs(z, ids) for z in (logits, teacher_logits))
    for beta, same in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        jsd = opd_engine.distill_loss(student, teacher, divergence="jsd", beta=beta)
        assert torch.equal(jsd, opd_engine.distill_loss(student, teacher, divergence=same))
        jsd = opd_engine.full_distill_loss(logits, teacher_logits, divergence="jsd", beta=beta)
        assert torch.equal(jsd, opd_engine.full_distill_loss(logits, teacher_logits, divergence=same))


def test_bucket_is_a_lower_bound_of_the_full_vocabulary():
    logits, teacher_logits = shapes.quantised(64, 100, 1), shapes.quantised(64, 100, 2)
    ids = oracles.topk_ids(logits, 10)
    student, teacher = (opd_engine.gather_log_probs(z, ids) for z in (logits, teacher_logits))
    for divergence in oracles.DIVERGENCES:
        bucket = opd_engine.distill_loss(student, teacher, divergence=divergence)
        full = opd_engine.full_distill_loss(logits, teacher_logits, divergence=divergence)
        assert (bucket <= full + 1e-12).all() and (bucket < full).any()
