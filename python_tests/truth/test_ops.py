"""Every registered op under opcheck (discovered, not listed), and the one op the functional API does not call."""

import pytest
import torch

import opd_engine  # noqa: F401  (registers the ops)
import oracles
from tolerances import DTYPES, NAMES, check
from truth import shapes
from truth.compare import mixed_support

ops = torch.ops.opd_engine
REGISTERED = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("opd_engine::")
)
ROWS, WIDTH, VOCAB, K = 5, 27, 25, 6


def sample_arguments(dtype, requires_grad=False):
    """op name -> one legal call. An op that is registered without an entry here fails its test."""
    score = oracles.score_dtype(dtype)
    logits = shapes.quantised(ROWS, WIDTH, 1).to(dtype)
    teacher_logits = shapes.quantised(ROWS, WIDTH, 2).to(dtype)
    ids, target = mixed_support(K, VOCAB, (ROWS,)), torch.tensor([0, -1, 3, 24, 5])
    place, temperature = (0, VOCAB, 0.7, None), torch.linspace(0.5, 2, ROWS, dtype=score)
    stats, support = ops.gather_partials(logits, ids, target, *place)
    merged = ops.merge_gather(stats[None], support, ids, target, VOCAB, 0.7, None)
    teacher_stats = ops.gather_partials(teacher_logits, ids[:, :0], None, *place)[0]
    upstream, row_weights = torch.randn(ROWS, K + 4, dtype=score), torch.randn(ROWS, dtype=score)
    teacher = ops.gather_log_probs(teacher_logits, ids, None, VOCAB, 0.7, None)
    divergence = ("jsd", 0.5, 0.1)
    full = (logits, teacher_logits, merged[5], teacher_stats, 0, VOCAB, VOCAB, *divergence, 0.7, None)
    sums = ops.full_divergence(*full)
    leaf = logits.clone().requires_grad_(requires_grad)
    student = [values.clone().requires_grad_(requires_grad) for values in merged[:2]]
    packed = ops.topk_partials(logits, K, target, 0, VOCAB, 1.0, temperature)
    return {
        "topk_partials": (logits, K, target, 0, VOCAB, 1.0, temperature),
        "merge_topk": (packed[None], K, target, VOCAB, 1.0, temperature),
        "gather_partials": (logits, ids, target, *place),
        "merge_gather": (stats[None], support, ids, target, VOCAB, 0.7, None),
        "scores_backward": (logits, ids, target, merged[5], upstream, *place),
        "scores_backward_": (logits.clone(), ids, target, merged[5], upstream, *place),
        "topk_log_probs": (logits, K, target, VOCAB, 1.0, temperature),
        "gather_log_probs": (leaf, ids, target, VOCAB, 0.7, None),
        "bucket_divergence": (ids, *student, *teacher[:2], *divergence, "bucket", None),
        "full_divergence": full,
        "full_divergence_backward": (*full, sums, row_weights),
        "full_divergence_backward_": (logits.clone(), *full[1:], sums, row_weights),
        "distill_loss_": (
            logits.clone(),
            ids,
            *teacher[:2],
            row_weights,
            *divergence,
            "bucket",
            None,
            VOCAB,
            0.7,
            None,
        ),
    }


def test_the_registry_was_found():
    assert len(REGISTERED) >= 12 and "gather_log_probs" in REGISTERED


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=NAMES.get)
def test_opcheck(name, dtype):
    """Schema, fake, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(ops, name).default, sample_arguments(dtype, requires_grad=True)[name])


@pytest.mark.parametrize("name", REGISTERED)
def test_no_rows_and_no_ids_are_legal(name):
    """T = 0, and k = 0 where ids are given."""
    for rows, k in ((0, K), (ROWS, 0), (0, 0)):
        if k == 0 and name in ("topk_partials", "merge_topk"):
            continue
        arguments = list(sample_arguments(torch.float32)[name])
        for position, value in enumerate(arguments):
            if not isinstance(value, torch.Tensor):
                continue
            lead = 1 if value.dim() == 3 or (name == "merge_gather" and position == 0) else 0
            value = value.narrow(lead, 0, rows)
            if k == 0 and value.dim() == 2 and value.shape[1] in (K, K + 1, K + 4):
                value = value[:, K:]
            arguments[position] = value.contiguous()
        results = getattr(ops, name)(*arguments)
        for result in results if isinstance(results, tuple) else [results]:
            assert result is None or result.numel() == 0 or rows in result.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", ["ragged", "temperatures", "masked", "padded", "misaligned", "gpt2", "peaked", "flat"])
def test_distill_loss_overwrites_the_logits_with_their_gradient(case, dtype):
    """Loss unweighted, gradient weighted; a row of weight 0 gets zeros."""
    case = shapes.CASES[case]
    logits, teacher_logits = shapes.in_dtype(case, dtype)
    rows, score = logits.shape[0], oracles.score_dtype(dtype)
    weights = torch.linspace(0, 1, rows, dtype=torch.float64).mul(16).round().div(16)
    per_row = case.temperature if isinstance(case.temperature, torch.Tensor) else None
    scalar = 1.0 if per_row is not None else case.temperature
    ids = mixed_support(case.k, case.vocab_size, (rows,))
    rest = (None, case.vocab_size, case.temperature)
    teacher = oracles.gather_scores(teacher_logits, ids, *rest)
    for divergence in oracles.DIVERGENCES:
        for tail in oracles.TAIL_MODES:
            owned = logits.clone() if case.layout is None else case.layout(logits.clone())
            teacher_inputs = (teacher.log_probs.to(score), teacher.tail_log_prob.to(score))
            settings = (divergence, 0.3, 0.2, tail, None, case.vocab_size, scalar)
            temperature = None if per_row is None else per_row.to(score)
            loss = ops.distill_loss_(owned, ids, *teacher_inputs, weights.to(score), *settings, temperature)
            truths = []
            for at, compute in ((logits.double(), torch.float64), (logits, score)):
                at = at.detach().clone().requires_grad_()
                student = oracles.gather_scores(at, ids, *rest, compute)
                true = oracles.distill(student, teacher, divergence, 0.3, 0.2, tail)
                finite = torch.where(true.isfinite(), weights, 0.0).to(compute)
                truths.append((true, torch.autograd.grad(true, at, finite)[0]))
            where = f"distill_loss_ {case.name} {divergence} {tail}"
            check("loss", dtype, loss, truths[0][0], truths[1][0], where)
            kept = truths[0][0].isfinite()
            check("gradient", dtype, owned[kept], truths[0][1][kept], truths[1][1][kept], where)
            assert not owned[(weights == 0)].any()
