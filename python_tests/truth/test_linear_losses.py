"""linear_distill_loss and linear_full_distill_loss, docs/math.md (53) to (58), against the float64 oracle."""

from dataclasses import replace

import pytest
import torch

import opd_engine
import oracles
from opd_engine import TokenScores, VocabShard
from tolerances import DTYPES, INFINITE_LOSS, NAMES, check
from truth.compare import mixed_support
from truth.linear_cases import (
    CASES,
    HIDDEN,
    ROWS,
    WIDTH,
    K,
    check_gradients,
    distill_definition,
    eighths,
    full_definition,
    three_ways,
)
from truth.test_divergences import PARAMETERS, every_setting

FULL_SETTINGS = [{"divergence": d, **more} for d in oracles.DIVERGENCES for more in PARAMETERS.get(d, [{}])]


def common(case):
    return {
        "bias": case.bias,
        "logit_softcap": case.softcap,
        "temperature": case.temperature,
        "shard": VocabShard(0, WIDTH, case.vocab_size),
    }


def teacher_of(case, ids, dtype):
    """(as the engine takes it, as the oracle does): the same numbers, rounded once to the score dtype."""
    scores = oracles.gather_scores(
        case.teacher_logits(dtype), ids, None, case.vocab_size, case.temperature, dtype=torch.float64
    )
    rounded = {name: getattr(scores, name).to(oracles.score_dtype(dtype)) for name in ("log_probs", "tail_log_prob")}
    return TokenScores(indices=ids, **rounded), oracles.Scores(ids, rounded["log_probs"], rounded["tail_log_prob"])


def row_weights(true_losses):
    """Multiples of 1/16 with a zero among them, and wherever the loss is infinite."""
    weights = (torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) * 16).round() / 16 + 0.5
    weights[2] = 0.0
    return torch.where(true_losses.detach() < INFINITE_LOSS, weights, 0.0)


def compare(where, dtype, ours, mine, definitions, leaves):
    """ours(weights) -> LinearLoss; definitions and leaves of (oracle, eager torch)."""
    true_losses, plain_losses = (definition() for definition in definitions)
    weights = row_weights(true_losses)
    got = ours(weights)
    assert got.token_losses.dtype == oracles.score_dtype(dtype) and not got.token_losses.requires_grad
    check("loss", dtype, got.token_losses, true_losses, plain_losses, where)
    # Half precision rounds the logits' gradient before this scale here and after it in eager torch: a power of two lets
    # both round the same numbers, so that neither is judged by the other's luck.
    upstream = 0.5 if dtype.itemsize == 2 else 0.75
    grads, totals = [torch.autograd.grad(got.loss * upstream, mine)], []
    for losses, at in zip((true_losses, plain_losses), leaves, strict=True):
        total = torch.where(weights == 0, 0.0, losses * weights.to(losses.dtype)).sum()
        totals.append(total.reshape(1))
        grads.append(torch.autograd.grad(total * upstream, at))
    check("loss", dtype, got.loss.reshape(1), *totals, where)
    check_gradients(where, dtype, *grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_every_divergence_and_tail(name, dtype):
    true, eager = three_ways(CASES[name], dtype)
    mine = CASES[name].cast(dtype).require_grad()
    ids = mixed_support(K, mine.vocab_size, (ROWS,))
    teacher, constant = teacher_of(mine.cast(torch.float64), ids, dtype)
    for number, setting in enumerate(every_setting()):
        workspace_bytes = None if number % 2 else 5 * WIDTH * dtype.itemsize  # chunks of 5 rows; of 2 with a soft-cap
        compare(
            f"linear distill {name} {setting}",
            dtype,
            lambda weights, setting=setting, workspace_bytes=workspace_bytes: opd_engine.linear_distill_loss(
                *(mine.hidden, mine.weight, teacher),
                token_weights=weights,
                workspace_bytes=workspace_bytes,
                **common(mine),
                **setting,
            ),
            mine.leaves(),
            (
                distill_definition(true, ids, constant, dtype, **setting),
                distill_definition(eager, ids, constant, None, **setting),
            ),
            (true.leaves(), eager.leaves()),
        )


def full_loss(case, weights, setting, **more):
    teacher = case.teacher
    return opd_engine.linear_full_distill_loss(
        *(case.hidden, case.weight, teacher["hidden"], teacher["weight"]),
        token_weights=weights,
        teacher_bias=teacher["bias"],
        teacher_logit_softcap=teacher["softcap"],
        teacher_vocab_size=teacher["vocab_size"],
        **common(case),
        **setting,
        **more,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_every_divergence_over_the_whole_vocabulary(name, dtype):
    true, eager = three_ways(CASES[name], dtype)
    mine = CASES[name].cast(dtype).require_grad()
    for number, setting in enumerate(FULL_SETTINGS):
        workspace_bytes = None if number % 2 else 9 * WIDTH * dtype.itemsize
        compare(
            f"linear full {name} {setting}",
            dtype,
            lambda weights, setting=setting, workspace_bytes=workspace_bytes: full_loss(
                mine, weights, setting, workspace_bytes=workspace_bytes
            ),
            mine.leaves(),
            (full_definition(true, dtype, **setting), full_definition(eager, None, **setting)),
            (true.leaves(), eager.leaves()),
        )


@pytest.mark.parametrize("into", ["grad", "main_grad", "grad_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_two_teachers_whose_heads_differ_in_both_widths(dtype, into):
    """One student, one step: two losses, summed as (43), fill one weight's gradient or one float32 main_grad."""
    wide = {"hidden": eighths(ROWS, 7, seed=21), "weight": eighths(66, 7, seed=22), "bias": None, "softcap": 3.0}
    case, shares = CASES["bias"], (0.5, 0.25)  # powers of two: see compare
    other = replace(case, teacher={**wide, "vocab_size": 66})
    mine, weights = case.cast(dtype).require_grad(), row_weights(torch.zeros(ROWS))
    workspace_bytes = 7 * WIDTH * dtype.itemsize
    if into != "grad":
        mine.weight.main_grad = torch.ones(mine.weight.shape)
        mine.weight.grad_added_to_main_grad = False
    total = 0
    for of, share in zip((case.cast(dtype), other.cast(dtype)), shares, strict=True):
        scale = {"grad_scale": torch.tensor(share)} if into == "grad_scale" else {}
        total = (
            total
            + share
            * full_loss(
                *(replace(mine, teacher=of.teacher), weights, {}), workspace_bytes=workspace_bytes, **scale
            ).loss
        )
    total.backward()
    got = [part.grad for part in mine.leaves()]
    if into != "grad":
        assert mine.weight.grad_added_to_main_grad and not mine.weight.grad.any()
        got[1] = (mine.weight.main_grad - 1).to(dtype)
    wanted = []
    for at, model_dtype in zip(three_ways(case, dtype), (dtype, None), strict=True):
        cast = other.cast(dtype).cast(at.hidden.dtype)
        losses = [full_definition(of, model_dtype)() for of in (at, replace(at, teacher=cast.teacher))]
        loss = sum(share * (one * weights.to(one.dtype)).sum() for one, share in zip(losses, shares, strict=True))
        wanted.append(torch.autograd.grad(loss, at.leaves()))
    check_gradients(f"two teachers into {into}", dtype, got, *wanted)


def test_a_teacher_of_another_dtype():
    """A bfloat16 teacher of a float32 student, and a float32 teacher of a float64 one."""
    for dtype, teacher_dtype in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
        mine = CASES["bias"].cast(dtype).require_grad()
        teacher = CASES["bias"].cast(teacher_dtype).teacher
        got = opd_engine.linear_full_distill_loss(
            mine.hidden, mine.weight, teacher["hidden"], teacher["weight"], bias=mine.bias
        )
        z = oracles.linear_logits(teacher["hidden"].double(), teacher["weight"].double(), None, None, teacher_dtype)
        true = oracles.full_distill(mine.logits(None).double(), z)
        torch.testing.assert_close(got.token_losses.double(), true, rtol=1e-5, atol=1e-6)


def test_the_soft_caps_slope_is_taken_before_the_cap_rounds():
    """At u = 3 c the slope is 0.0099; taken at the logits after the cap, in bfloat16, it would be 0.0078."""
    hidden = torch.full((1, 1), 3.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[2.0], [-1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([[0]])
    teacher = TokenScores(indices=ids, log_probs=torch.full((1, 1), -3.0), tail_log_prob=torch.full((1,), -0.05))
    got = opd_engine.linear_distill_loss(hidden, weight, teacher, logit_softcap=2.0)
    true_weight = weight.detach().double().requires_grad_()
    z = oracles.linear_logits(hidden.detach().double(), true_weight, None, 2.0, torch.bfloat16)
    constant = oracles.Scores(ids, teacher.log_probs.double(), teacher.tail_log_prob.double())
    true = oracles.distill(oracles.gather_scores(z, ids), constant).sum()
    ours, wanted = torch.autograd.grad(got.loss, weight)[0], torch.autograd.grad(true, true_weight)[0]
    torch.testing.assert_close(ours.double(), wanted, rtol=1.2e-2, atol=0)  # three roundings to bfloat16


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_gradcheck(divergence):
    """torch's own finite differences, float64; it calls backward many times on one forward."""
    hidden, weight = eighths(3, 5, seed=1).requires_grad_(), eighths(17, 5, seed=2).requires_grad_()
    bias, ids = eighths(17, seed=3).requires_grad_(), mixed_support(4, 15, (3,))
    scores = oracles.gather_scores(eighths(3, 17, seed=4, spread=2.0), ids, None, 15)
    teacher = TokenScores(indices=ids, log_probs=scores.log_probs, tail_log_prob=scores.tail_log_prob)
    rest = {"divergence": divergence, "logit_softcap": 3.0, "temperature": 0.7, "workspace_bytes": 4 * 17 * 8}
    rest |= {"token_weights": torch.tensor([1.0, 0.5, 2.0]), "shard": VocabShard(0, 17, 15)}

    def bucket(hidden, weight, bias):
        return opd_engine.linear_distill_loss(hidden, weight, teacher, bias=bias, **rest).loss

    def full(hidden, weight, bias):
        theirs = eighths(3, 6, seed=5), eighths(17, 6, seed=6)
        return opd_engine.linear_full_distill_loss(hidden, weight, *theirs, bias=bias, **rest).loss

    for loss in (bucket, full):
        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_a_user_function_of_the_scores():
    """Anything of (log_probs, tail, lse, entropy) of a row: here an entropy bonus and lse^2."""

    def own(student, teacher):
        gap = torch.where(student.indices >= 0, student.log_probs - teacher.log_probs, 0.0)
        return gap.square().sum(-1) - 0.1 * student.entropy + 0.01 * student.lse.square()

    for name in ("plain", "softcap"):
        case = CASES[name].require_grad()
        ids = mixed_support(K, WIDTH, (ROWS,))
        teacher, _ = teacher_of(case, ids, torch.float64)
        got = opd_engine.linear_distill_loss(
            *(case.hidden, case.weight, teacher),
            divergence=own,
            logit_softcap=case.softcap,
            workspace_bytes=8 * 3 * WIDTH,
        )
        true = CASES[name].require_grad()
        losses = own(oracles.gather_scores(true.logits(torch.float64), ids), teacher)
        torch.testing.assert_close(got.token_losses, losses.detach(), rtol=1e-12, atol=1e-12)
        for ours, wanted in zip(
            torch.autograd.grad(got.loss, case.leaves()), torch.autograd.grad(losses.sum(), true.leaves()), strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_tiny_weights_and_a_large_scale_keep_float16_gradients():
    """A mean over many tokens, scaled up in the backward: 1e-7 x q underflows in float16."""
    case = CASES["plain"].cast(torch.float16).require_grad()
    ids = mixed_support(K, WIDTH, (ROWS,))
    teacher, _ = teacher_of(CASES["plain"], ids, torch.float16)

    def gradients(weight, scale):
        got = opd_engine.linear_distill_loss(
            case.hidden, case.weight, teacher, token_weights=torch.full((ROWS,), weight)
        )
        return torch.autograd.grad(got.loss * scale, case.leaves())

    for ours, wanted in zip(gradients(2.0**-26, 2.0**26), gradients(1.0, 1.0), strict=True):
        assert ours.shape[-1] == HIDDEN and torch.equal(ours, wanted)
