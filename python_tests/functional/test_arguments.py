"""Bad input: each argument of the functional API, with the name, what was wanted and what came."""

import math
import re

import pytest
import torch

import opd_engine
from opd_engine import TokenScores, VocabShard, distill_loss, full_distill_loss, gather_log_probs, topk_log_probs
from opd_engine.ops import DIVERGENCES, TAIL_MODES

ROWS, VOCAB, K = 4, 11, 3
LOGITS = torch.linspace(-2, 2, ROWS * VOCAB).view(ROWS, VOCAB)
INDICES = torch.arange(K).repeat(ROWS, 1)


def raises(message):
    return pytest.raises(ValueError, match=message)


BAD_LOGITS = [
    ([[1.0]], r"logits: wanted a tensor \[\*, vocab\], got list"),
    (LOGITS.long(), "logits: wanted float64, float32, bfloat16 or float16, got torch.int64"),
    (LOGITS.to(torch.complex64), "logits: wanted float64, .* got torch.complex64"),
    (torch.tensor(1.0), "logits: wanted rank >= 1"),
    (LOGITS.t().contiguous().t(), r"logits: wanted a last dimension of stride 1 .* got strides \(1, 4\)"),
    (LOGITS[:, :1].expand(ROWS, VOCAB), r"logits: wanted a last dimension of stride 1 .* got strides \(11, 0\)"),
    (LOGITS[:, :0], "logits: wanted at least one column"),
]


@pytest.mark.parametrize(("logits", "message"), BAD_LOGITS)
def test_logits(logits, message):
    with raises(message):
        topk_log_probs(logits, 1)
    with raises(message):
        gather_log_probs(logits, INDICES)
    with raises(message.replace("logits:", "student_logits:")):
        full_distill_loss(logits, LOGITS)
    if "at least one column" not in message:
        with raises(message.replace("logits:", "teacher_logits:")):
            full_distill_loss(LOGITS, logits)


BAD_TEMPERATURES = [
    (0, "temperature: wanted finite and > 0, got 0"),
    (-1.0, "temperature: wanted finite and > 0, got -1.0"),
    (math.nan, "temperature: wanted finite and > 0, got nan"),
    (math.inf, "temperature: wanted finite and > 0, got inf"),
    (1e-320, r"temperature: wanted within \[1.18e-38, 8.51e\+37\], .* torch.float32, got 1e-320"),
    (1e308, r"temperature: wanted within \[1.18e-38, 8.51e\+37\], .* got 1e\+308"),
    (torch.tensor([1.0, 1e-39, 1.0, 1.0]), r"temperature: wanted within .* in row 1"),
    (torch.tensor([1.0, 1.0, 1.0, 1e308], dtype=torch.float64), r"temperature: wanted within .* got 1e\+308 in row 3"),
    ("1", "temperature: wanted a float or a tensor, got str"),
    (True, "temperature: wanted a float or a tensor, got bool"),
    (None, "temperature: wanted a float or a tensor, got NoneType"),
    (torch.tensor([1.0, 1.0, 0.0, 1.0]), "temperature: wanted finite and > 0, got 0.0 in row 2"),
    (torch.tensor([1.0, math.nan, 1.0, 1.0]), "temperature: wanted finite and > 0, got nan in row 1"),
    (torch.tensor(-2.0), "temperature: wanted finite and > 0, got -2.0 in row 0"),
    (torch.ones(3), r"temperature: wanted a number or one per row, \[4\], got shape \(3,\)"),
    (torch.ones(ROWS, 1), r"temperature: wanted a number or one per row, \[4\], got shape \(4, 1\)"),
    (torch.ones(ROWS, dtype=torch.int64), "temperature: wanted a floating tensor, got torch.int64"),
    (torch.ones(ROWS, requires_grad=True), "temperature: wanted a constant, got a tensor that requires grad"),
    (torch.ones(ROWS, device="meta"), "temperature: wanted the device of the logits, cpu, got meta"),
]


@pytest.mark.parametrize(("temperature", "message"), BAD_TEMPERATURES)
def test_temperature(temperature, message):
    with raises(message):
        topk_log_probs(LOGITS, 1, temperature=temperature)
    with raises(message):
        gather_log_probs(LOGITS, INDICES, temperature=temperature)
    with raises(message):
        full_distill_loss(LOGITS, LOGITS, temperature=temperature)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k: wanted 1 <= k <= vocab_size = 11, got 0"),
        (-1, "k: wanted 1 <= k <= vocab_size = 11, got -1"),
        (12, "k: wanted 1 <= k <= vocab_size = 11, got 12"),
        (2.0, r"k: wanted an int, got 2.0 \(float\)"),
        (True, r"k: wanted an int, got True \(bool\)"),
    ],
)
def test_k(k, message):
    with raises(message):
        topk_log_probs(LOGITS, k)


def test_k_counts_real_ids_not_padding():
    shard = VocabShard(0, VOCAB, 9)
    assert topk_log_probs(LOGITS, 9, shard=shard).k == 9
    with raises("k: wanted 1 <= k <= vocab_size = 9, got 10"):
        topk_log_probs(LOGITS, 10, shard=shard)


BAD_SHARDS = [
    ((0, VOCAB), "shard: wanted a VocabShard or None, got tuple"),
    (VocabShard(0, 12, 12), r"logits: wanted 12 columns for the shard \[0, 12\), got 11"),
]


@pytest.mark.parametrize(("shard", "message"), BAD_SHARDS)
def test_shard(shard, message):
    with raises(message):
        topk_log_probs(LOGITS, 1, shard=shard)
    with raises(message):
        gather_log_probs(LOGITS, INDICES, shard=shard)
    with raises(message):
        full_distill_loss(LOGITS, LOGITS, shard=shard)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0]], "indices: wanted an integer tensor, got list"),
        (INDICES.float(), "indices: wanted an integer dtype, got torch.float32"),
        (INDICES.bool(), "indices: wanted an integer dtype, got torch.bool"),
        (INDICES[:3], r"indices: wanted shape \[4, k\], got \(3, 3\)"),
        (INDICES[0], r"indices: wanted shape \[4, k\], got \(3,\)"),
        (INDICES.unsqueeze(0), r"indices: wanted shape \[4, k\], got \(1, 4, 3\)"),
        (torch.tensor(1), r"indices: wanted shape \[4, k\], got \(\)"),
        (INDICES.to("meta"), "indices: wanted the device of the logits, cpu, got meta"),
    ],
)
def test_indices(ids, message):
    with raises(message):
        gather_log_probs(LOGITS, ids)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1, "target: wanted an integer tensor, got int"),
        (torch.zeros(ROWS), "target: wanted an integer dtype, got torch.float32"),
        (torch.zeros(ROWS, 1).long(), r"target: wanted shape \[4\], got \(4, 1\)"),
        (torch.zeros(3).long(), r"target: wanted shape \[4\], got \(3,\)"),
        (torch.zeros(ROWS, dtype=torch.int64, device="meta"), "target: wanted the device of the logits, cpu, got meta"),
    ],
)
def test_target(target, message):
    with raises(message):
        topk_log_probs(LOGITS, 1, target=target)
    with raises(message):
        gather_log_probs(LOGITS, INDICES, target=target)


def test_a_shaped_error_names_both_shapes():
    with raises(re.escape("indices: wanted shape [2, 2, k] or flat [4, k], got (5, 3)")):
        gather_log_probs(LOGITS.view(2, 2, VOCAB), torch.zeros(5, 3).long())


def test_loss_reduction():
    with raises("loss_reduction: wanted one of replicated, partial, got 'mean'"):
        gather_log_probs(LOGITS, INDICES, loss_reduction="mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(1, 2): VOCAB}, r"indices: wanted ids in \[0, vocab_size = 11\) or -1 .* got 11 in row 1"),
        ({(3, 0): -2}, "got -2 in row 3"),
        ({(2, 0): 1}, "indices: wanted distinct ids in a row, got 1 twice in row 2"),
    ],
)
def test_debug_looks_at_the_ids(change, message):
    ids = INDICES.clone()
    for place, value in change.items():
        ids[place] = value
    gather_log_probs(LOGITS, ids)
    with opd_engine.debug(), raises(message):
        gather_log_probs(LOGITS, ids)


def test_debug_lets_absent_ids_repeat():
    ids = INDICES.clone()
    ids[1] = -1
    with opd_engine.debug():
        gather_log_probs(LOGITS, ids, target=torch.tensor([0, -1, 2, 3]))


def test_debug_by_the_environment(monkeypatch):
    monkeypatch.setenv("OPD_DEBUG", "1")
    with raises(r"target: wanted ids in \[0, vocab_size = 11\) .* got 11 in row 0"):
        topk_log_probs(LOGITS, 1, target=torch.full((ROWS,), VOCAB))


def scores(**changes):
    values = {
        "indices": INDICES,
        "log_probs": torch.full((ROWS, K), -2.0),
        "tail_log_prob": torch.full((ROWS,), -1.0),
    }
    return TokenScores(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": INDICES.double()}, r"indices: wanted an integer tensor \[T, k\], got torch.float64"),
        ({"indices": None}, "indices: wanted an integer tensor .* got NoneType"),
        ({"log_probs": None}, "log_probs: wanted a floating tensor, got NoneType"),
        ({"log_probs": INDICES}, "log_probs: wanted a floating tensor, got torch.int64"),
        ({"log_probs": torch.zeros(ROWS, 2)}, r"log_probs: wanted shape \(4, 3\) to match indices, got \(4, 2\)"),
        ({"tail_log_prob": torch.zeros(ROWS, 1)}, r"tail_log_prob: wanted shape \(4,\) .* got \(4, 1\)"),
        ({"entropy": torch.zeros(3)}, r"entropy: wanted shape \(4,\) to match indices, got \(3,\)"),
        ({"lse": torch.zeros(ROWS, device="meta")}, "lse: wanted the device of indices, cpu, got meta"),
    ],
)
def test_token_scores(changes, message):
    with raises(message):
        scores(**changes)


def test_token_scores_are_built_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        TokenScores(INDICES, torch.zeros(ROWS, K), torch.zeros(ROWS))


BAD_DIVERGENCES = [
    ({"divergence": "kl"}, "divergence: wanted one of forward_kl, reverse_kl, jsd, .* got 'kl'"),
    ({"divergence": None}, "divergence: wanted one of .* got None"),
    ({"divergence": "jsd", "beta": 1.5}, "beta: wanted 0 <= beta <= 1 for jsd, got 1.5"),
    ({"divergence": "jsd", "beta": math.nan}, "beta: .* got nan"),
    ({"divergence": "jsd", "beta": "0.5"}, "beta: .* got '0.5'"),
    ({"divergence": "skew_forward_kl", "alpha": 1.0}, "alpha: wanted 0 <= alpha < 1 for skew_forward_kl, got 1.0"),
    ({"divergence": "skew_reverse_kl", "alpha": -0.1}, "alpha: wanted 0 <= alpha < 1 for skew_reverse_kl, got -0.1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_DIVERGENCES)
def test_divergence(arguments, message):
    with raises(message):
        distill_loss(scores(), scores(), **arguments)
    with raises(message):
        full_distill_loss(LOGITS, LOGITS, **arguments)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_what_a_divergence_does_not_use_is_ignored(divergence):
    distill_loss(scores(), scores(), divergence=divergence, beta=7, alpha="x")
    full_distill_loss(LOGITS, LOGITS, divergence=divergence, beta=None, alpha=2)
    distill_loss(scores(), scores(), divergence="jsd", alpha=9)
    distill_loss(scores(), scores(), divergence="skew_forward_kl", beta=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tail": "drop"}, "tail: wanted one of bucket, truncate, renormalize, got 'drop'"),
        ({"tail": None}, "tail: .* got None"),
        ({"teacher_log_prob_min": 0.5}, "teacher_log_prob_min: wanted a log-probability <= 0 or None, got 0.5"),
        ({"teacher_log_prob_min": math.nan}, "teacher_log_prob_min: .* got nan"),
        ({"teacher_log_prob_min": "low"}, "teacher_log_prob_min: .* got 'low'"),
    ],
)
def test_tail_and_floor(arguments, message):
    with raises(message):
        distill_loss(scores(), scores(), **arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (None, scores(), "student: wanted TokenScores, got NoneType"),
        (scores(), (1, 2), "teacher: wanted TokenScores, got tuple"),
        (
            scores(log_probs=torch.zeros(ROWS, K).half()),
            scores(),
            "student: wanted log_probs and tail_log_prob both float32 or both float64, got torch.float16",
        ),
        (scores(tail_log_prob=torch.zeros(ROWS).double()), scores(), "got torch.float32 and torch.float64"),
        (
            scores(),
            TokenScores(indices=INDICES[:3], log_probs=torch.zeros(3, K), tail_log_prob=torch.zeros(3)),
            r"teacher: wanted scores of the student's \[4, 3\], got \[3, 3\]",
        ),
        (
            scores(),
            TokenScores(indices=INDICES[:, :2], log_probs=torch.zeros(ROWS, 2), tail_log_prob=torch.zeros(ROWS)),
            r"teacher: wanted scores of the student's \[4, 3\], got \[4, 2\]",
        ),
        (scores(), scores().to("meta"), "teacher: wanted the device of the student, cpu, got meta"),
        (
            scores(),
            scores(tail_log_prob=torch.zeros(ROWS, requires_grad=True)),
            "teacher: wanted constant scores, got tail_log_prob that require grad",
        ),
        (
            scores(),
            scores(lse=torch.zeros(ROWS, requires_grad=True)),
            "teacher: wanted constant scores, got lse that require grad",
        ),
    ],
)
def test_both_sides_of_a_loss(student, teacher, message):
    for divergence in ("reverse_kl", lambda student, teacher: student.tail_log_prob):
        with raises(message):
            distill_loss(student, teacher, divergence=divergence)


def test_the_ids_of_both_sides_are_compared():
    other = INDICES.clone()
    other[2, 1] = 9
    for debug in (False, True):
        with opd_engine.debug(debug):
            distill_loss(scores(), scores(indices=INDICES.int()))
            with raises("teacher: wanted the student's ids in the same order, got 9 for 1 in row 2, column 1"):
                distill_loss(scores(), scores(indices=other))


@pytest.mark.parametrize("temperature", [1e-320, 1e308])
def test_a_temperature_that_float64_scores_cannot_divide_by(temperature):
    with raises(r"temperature: wanted within \[2.23e-308, 4.49e\+307\]"):
        gather_log_probs(LOGITS.double(), INDICES, temperature=temperature)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda student, teacher: 1.0, r"divergence: wanted a function that gives one floating loss per row, \[4\]"),
        (lambda student, teacher: student.log_probs, r"got torch.float32 \[4, 3\]"),
        (lambda student, teacher: student.log_probs.sum(), r"got torch.float32 \[\]"),
        (lambda student, teacher: student.indices[:, 0], r"got torch.int64 \[4\]"),
    ],
)
def test_a_users_divergence_that_gives_something_else(function, message):
    with raises(message):
        distill_loss(scores(), scores(), divergence=function)


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        (
            LOGITS.clone().requires_grad_(),
            {},
            "teacher_logits: wanted constant logits, got a tensor that requires grad",
        ),
        (LOGITS[:3], {}, r"teacher_logits: wanted shape \[4, vocab\], got \[3, 11\]"),
        (LOGITS.to("meta"), {}, "teacher_logits: wanted the device of student_logits, cpu, got meta"),
        (LOGITS, {"teacher_vocab_size": 12}, "teacher_logits: wanted at least teacher_vocab_size = 12 columns, got 11"),
        (LOGITS, {"teacher_vocab_size": 0}, "teacher_vocab_size: wanted >= 1, got 0"),
        (LOGITS, {"teacher_vocab_size": 2.5}, "teacher_vocab_size: wanted an int or None, got 2.5"),
        (LOGITS, {"divergence": lambda student, teacher: 0}, "divergence: wanted the name of one"),
    ],
)
def test_full_loss(teacher, arguments, message):
    with raises(message):
        full_distill_loss(LOGITS, teacher, **arguments)


def test_no_rows_are_legal_everywhere():
    for shape in ((0, VOCAB), (2, 0, VOCAB)):
        logits = torch.empty(shape, requires_grad=True)
        ids = torch.empty(*shape[:-1], K, dtype=torch.int64)
        top = topk_log_probs(logits, K, target=torch.empty(shape[:-1], dtype=torch.int64))
        assert top.indices.shape == ids.shape
        ours = gather_log_probs(logits, ids, temperature=torch.empty(shape[:-1]))
        for divergence in DIVERGENCES:
            for tail in TAIL_MODES:
                loss = distill_loss(ours, top.detach(), divergence=divergence, tail=tail)
                assert loss.shape == shape[:-1]
            full = full_distill_loss(logits, logits.detach(), divergence=divergence)
            assert full.shape == shape[:-1]
        (loss.sum() + full.sum()).backward()
        assert logits.grad.shape == shape


def test_no_ids_are_legal_in_gather():
    logits = LOGITS.clone().requires_grad_()
    scores = gather_log_probs(logits, torch.empty(ROWS, 0, dtype=torch.int64), target=torch.arange(ROWS))
    assert scores.log_probs.shape == (ROWS, 0)
    torch.testing.assert_close(scores.tail_log_prob, torch.zeros(ROWS), atol=1e-6, rtol=0)
    (scores.tail_log_prob + scores.entropy + scores.target_log_prob).sum().backward()
    wanted = LOGITS.clone().requires_grad_()
    log_probs = torch.log_softmax(wanted, -1)
    (log_probs.diagonal()[:ROWS].sum() - (log_probs.exp() * log_probs).sum()).backward()
    torch.testing.assert_close(logits.grad, wanted.grad, atol=1e-6, rtol=1e-5)
