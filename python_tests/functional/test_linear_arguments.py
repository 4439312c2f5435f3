"""What the linear functions refuse: every message names the argument, what was wanted and what came."""

import pytest
import torch

import opd_engine
from opd_engine import TokenScores, VocabShard

ROWS, HIDDEN, VOCAB, K = 4, 8, 20, 3


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    return hidden, weight


def teacher(**changes):
    fields = {
        "indices": torch.arange(K).repeat(ROWS, 1),
        "log_probs": torch.full((ROWS, K), -2.0),
        "tail_log_prob": torch.full((ROWS,), -1.0),
    }
    return TokenScores(**{**fields, **changes})


CALLS = {
    "topk": lambda h, w, **kw: opd_engine.linear_topk_log_probs(h, w, K, **kw),
    "gather": lambda h, w, **kw: opd_engine.linear_gather_log_probs(h, w, torch.arange(K).repeat(len(h), 1), **kw),
    "distill": lambda h, w, **kw: opd_engine.linear_distill_loss(h, w, teacher(), **kw),
    "full": lambda h, w, **kw: opd_engine.linear_full_distill_loss(
        h, w, torch.zeros(ROWS, 5), torch.zeros(VOCAB, 5), **kw
    ),
}

SHARED = [  # (what is wrong, message)
    ({"hidden": "text"}, "hidden: wanted a tensor, got str"),
    ({"hidden": torch.zeros(ROWS, HIDDEN, dtype=torch.int64)}, "hidden: wanted float64, .* got torch.int64"),
    ({"hidden": torch.zeros(ROWS, HIDDEN + 1)}, r"hidden: wanted \[\*, hidden_size = 8\], got shape \(4, 9\)"),
    ({"weight": torch.zeros(VOCAB)}, r"weight: wanted \[vocab_shard_size, hidden_size\], got shape \(20,\)"),
    ({"weight": torch.zeros(VOCAB, HIDDEN).bfloat16()}, "weight: wanted hidden's dtype, torch.float32 .*bfloat16"),
    ({"weight": torch.zeros(0, HIDDEN)}, "weight: wanted at least one row"),
    ({"bias": torch.zeros(VOCAB + 1)}, r"bias: wanted \[vocab_shard_size = 20\], got shape \(21,\)"),
    ({"bias": torch.zeros(VOCAB).double()}, "bias: wanted hidden's dtype"),
    ({"logit_softcap": 0.0}, "logit_softcap: wanted a finite number > 0 or None, got 0.0"),
    ({"logit_softcap": True}, "logit_softcap: wanted a finite number"),
    ({"logit_softcap": float("inf")}, "logit_softcap: wanted a finite number"),
    ({"temperature": 0.0}, "temperature: wanted finite and > 0, got 0.0"),
    ({"temperature": 1e-320}, "temperature: wanted within"),
    ({"temperature": torch.ones(ROWS + 1)}, "temperature: wanted a number or one per row"),
    ({"shard": "all"}, "shard: wanted a VocabShard or None, got str"),
    ({"shard": VocabShard(0, VOCAB + 1, VOCAB)}, r"weight: wanted 21 rows for the shard \[0, 21\), got 20"),
    ({"sequence_parallel": 1}, "sequence_parallel: wanted a bool, got 1"),
    ({"hidden": torch.zeros(HIDDEN), "sequence_parallel": True}, "hidden: wanted .* to split on dim 0"),
    ({"workspace_bytes": 0}, "workspace_bytes: wanted an int >= 1 or None, got 0"),
    ({"workspace_bytes": 1e6}, "workspace_bytes: wanted an int >= 1 or None"),
]
LOSSES = [
    ({"token_weights": 1.0}, "token_weights: wanted a tensor or None, got float"),
    ({"token_weights": torch.ones(ROWS, dtype=torch.int64)}, "token_weights: wanted a floating or bool tensor"),
    ({"token_weights": torch.ones(ROWS, requires_grad=True)}, "token_weights: wanted constants"),
    ({"token_weights": torch.ones(ROWS + 1)}, r"token_weights: wanted shape \[4\], got \(5,\)"),
    (
        {"token_weights": torch.tensor([1, 1, 0, float("nan")])},
        "token_weights: wanted finite and >= 0, got nan in row 3",
    ),
    ({"token_weights": torch.tensor([1, -0.5, 0, 1])}, "token_weights: wanted finite and >= 0, got -0.5 in row 1"),
    (
        {"token_weights": torch.tensor([float("inf"), 1, 1, 1])},
        "token_weights: wanted finite and >= 0, got inf in row 0",
    ),
    ({"loss_rows": [0, 1]}, "loss_rows: wanted int64 row numbers .* got list"),
    ({"loss_rows": torch.ones(ROWS, dtype=torch.bool)}, "loss_rows: wanted int64 row numbers .* got torch.bool"),
    ({"loss_rows": torch.tensor([0, ROWS])}, r"loss_rows: wanted rows in \[0, T = 4\), got 4"),
    ({"loss_rows": torch.tensor([0, -1])}, "loss_rows: wanted rows in .* got -1"),
    ({"loss_rows": torch.tensor([2, 2])}, "loss_rows: wanted distinct rows"),
    ({"grad_scale": 1.0}, r"grad_scale: wanted a floating tensor of shape \[\] or None, got 1.0"),
    ({"grad_scale": torch.ones(1)}, r"grad_scale: wanted .* of shape \[\]"),
    ({"grad_scale": torch.ones((), requires_grad=True)}, "grad_scale: wanted a constant"),
    ({"grad_scale": torch.ones(())}, "grad_scale: wanted a weight with a main_grad"),
    ({"divergence": "kl"}, "divergence: wanted one of"),
    ({"divergence": "jsd", "beta": 2.0}, "beta: wanted 0 <= beta <= 1"),
    ({"divergence": "skew_forward_kl", "alpha": 1.0}, "alpha: wanted 0 <= alpha < 1"),
]


@pytest.mark.parametrize(
    ("call", "wrong", "message"),
    [
        (call, wrong, message)
        for call in CALLS
        for wrong, message in SHARED + (LOSSES if call in ("distill", "full") else [])
    ],
)
def test_bad_arguments_raise_with_their_names(call, wrong, message):
    hidden, weight = inputs()
    given = {"hidden": hidden, "weight": weight, **wrong}
    with pytest.raises(ValueError, match=message):
        CALLS[call](given.pop("hidden"), given.pop("weight"), **given)


def test_ids_and_targets():
    hidden, weight = inputs()
    for k in (0, VOCAB + 1, 2.0, True):
        with pytest.raises(ValueError, match="k: wanted"):
            opd_engine.linear_topk_log_probs(hidden, weight, k)
    with pytest.raises(ValueError, match=r"indices: wanted shape \[4, k\], got \(3, 2\)"):
        opd_engine.linear_gather_log_probs(hidden, weight, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="target: wanted an integer dtype"):
        opd_engine.linear_topk_log_probs(hidden, weight, K, target=torch.zeros(ROWS))
    ids = torch.tensor([[0, 1], [2, 2], [3, 4], [5, 6]])
    with opd_engine.debug(), pytest.raises(ValueError, match="indices: wanted distinct ids"):
        opd_engine.linear_gather_log_probs(hidden, weight, ids)
    with opd_engine.debug(), pytest.raises(ValueError, match=r"teacher.indices: wanted ids in \[0, vocab_size = 20\)"):
        opd_engine.linear_distill_loss(hidden, weight, teacher(indices=torch.arange(K).repeat(ROWS, 1) + VOCAB - 1))


def test_teachers_of_the_bucket_loss():
    hidden, weight = inputs()
    with pytest.raises(ValueError, match="teacher: wanted TokenScores, got Tensor"):
        opd_engine.linear_distill_loss(hidden, weight, torch.zeros(ROWS, K))
    with pytest.raises(ValueError, match="teacher: wanted constant scores"):
        scores = teacher(tail_log_prob=torch.zeros(ROWS, requires_grad=True))
        opd_engine.linear_distill_loss(hidden, weight, scores)
    with pytest.raises(ValueError, match=r"teacher: wanted scores of \[4, k\], got \[3, 3\]"):
        opd_engine.linear_distill_loss(hidden, weight, teacher().select(torch.arange(3)))
    with pytest.raises(ValueError, match="tail: wanted one of"):
        opd_engine.linear_distill_loss(hidden, weight, teacher(), tail="none")
    with pytest.raises(ValueError, match="teacher_log_prob_min: wanted a log-probability"):
        opd_engine.linear_distill_loss(hidden, weight, teacher(), teacher_log_prob_min=1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher_hidden": torch.zeros(ROWS, 5, requires_grad=True)}, "teacher_hidden: wanted a constant"),
        ({"teacher_weight": torch.zeros(VOCAB, 5, requires_grad=True)}, "teacher_weight: wanted a constant"),
        ({"teacher_hidden": torch.zeros(ROWS, 6)}, r"teacher_hidden: wanted \[\*, hidden_size = 5\]"),
        ({"teacher_hidden": torch.zeros(ROWS + 1, 5)}, r"teacher_hidden: wanted the rows of hidden, \[4\] or flat"),
        ({"teacher_weight": torch.zeros(VOCAB, 5).double()}, "teacher_weight: wanted teacher_hidden's dtype"),
        ({"teacher_bias": torch.zeros(3)}, r"teacher_bias: wanted \[vocab_shard_size = 20\]"),
        ({"teacher_logit_softcap": -1.0}, "teacher_logit_softcap: wanted a finite number"),
        ({"teacher_vocab_size": 0}, "teacher_vocab_size: wanted an int >= 1 or None, got 0"),
        ({"teacher_vocab_size": VOCAB + 1}, "teacher_weight: wanted at least teacher_vocab_size = 21 rows, got 20"),
        ({"divergence": lambda student, teacher: None}, "divergence: wanted the name of one"),
    ],
)
def test_teachers_of_the_whole_vocabulary(wrong, message):
    given = {"teacher_hidden": torch.zeros(ROWS, 5), "teacher_weight": torch.zeros(VOCAB, 5), **wrong}
    with pytest.raises(ValueError, match=message):
        opd_engine.linear_full_distill_loss(
            *inputs(), given.pop("teacher_hidden"), given.pop("teacher_weight"), **given
        )


def test_a_narrow_main_grad_cannot_take_grad_scale():
    hidden, weight = inputs()
    weight = weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"grad_scale: wanted a main_grad of torch\.float32"):
        opd_engine.linear_distill_loss(hidden, weight, teacher(), grad_scale=torch.ones(()))
