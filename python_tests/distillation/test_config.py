"""Settings that cannot work, or cannot distil, are refused before anything runs, with the reason."""

import dataclasses
import itertools
import math

import pytest

from opd_engine.distillation import OPDConfig
from opd_engine.distillation.config import MIXTURES, REDUCTIONS, SUPPORTS
from opd_engine.ops import DIVERGENCES, TAIL_MODES

REFUSED = [
    ({"divergence": "kl"}, "divergence: wanted one of forward_kl, reverse_kl"),
    ({"tail": "drop"}, "tail: wanted one of bucket, truncate, renormalize, got 'drop'"),
    ({"support": "overlap"}, "support: wanted one of student, teacher, union, rollout"),
    ({"reduction": "mean"}, "reduction: wanted one of token_mean, sample_mean, rollout_mean"),
    ({"mixture": "sum"}, "mixture: wanted one of route, arithmetic, geometric, loss_sum"),
    ({"loss_type": "ppo"}, "loss_type: wanted one of distill, advantage"),
    ({"k": 0}, "k: wanted a whole number >= 1, got 0"),
    ({"k": 2.5}, "k: wanted a whole number >= 1, got 2.5"),
    ({"optimizer_steps_per_rollout": 0}, "optimizer_steps_per_rollout: wanted a whole number"),
    ({"score_batch_tokens": True}, "score_batch_tokens: wanted a whole number"),
    ({"temperature": 0.0}, "temperature: wanted a finite number > 0, got 0.0"),
    ({"temperature": math.inf}, "temperature: wanted a finite number > 0, got inf"),
    ({"temperature": None}, "temperature: wanted a finite number > 0, got None"),
    ({"divergence": "jsd", "beta": 1.5}, r"beta: wanted a number in \[0, 1\], got 1.5"),
    ({"divergence": "skew_forward_kl", "alpha": 1.0}, r"alpha: wanted a number in \[0, 1\), got 1.0"),
    ({"teacher_log_prob_min": 0.5}, "teacher_log_prob_min: wanted a finite number < 0"),
    ({"coefficient": -1.0}, "coefficient: wanted a finite number >= 0 .below 0 drives away"),
    ({"coefficient": math.nan}, "coefficient: wanted a finite number"),
    ({"reward_beta": 0.0}, "reward_beta: wanted a finite number > 0"),
    ({"state_weight_cap": -1.0}, "state_weight_cap: wanted a finite number > 0"),
    ({"union_cap": 0, "support": "union"}, "union_cap: wanted a whole number >= 1"),
    ({"union_cap": 9}, "union_cap: needs support 'union' or 'teacher', got support 'student'"),
    ({"tail": "renormalize", "k": 1}, "with k=1 cannot distil: .* the loss is always zero"),
    ({"tail": "renormalize", "support": "rollout"}, "with support 'rollout' cannot distil: .* always zero"),
    (
        {"tail": "truncate", "support": "rollout", "divergence": "forward_kl"},
        "tail 'truncate' with support 'rollout' cannot distil",
    ),
    ({"loss_type": "advantage"}, "with support 'student' cannot distil: .* expected gradient of zero"),
    ({"loss_type": "advantage", "support": "rollout", "divergence": "jsd"}, "policy gradient of reverse_kl"),
    ({"loss_type": "advantage", "support": "rollout", "mixture": "geometric"}, "has no log-prob of the sampled token"),
    ({"loss_type": "advantage", "support": "rollout", "mixture": "loss_sum"}, "adds losses"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_refused_with_the_reason(options, words):
    with pytest.raises(ValueError, match=words):
        OPDConfig(**options).validate()


def test_truncate_distils_with_forward_kl_alone():
    for divergence in DIVERGENCES:
        config = OPDConfig(divergence=divergence, tail="truncate")
        if divergence == "forward_kl":
            config.validate()
            continue
        with pytest.raises(ValueError, match="minimised by shrinking the student's mass on the support"):
            config.validate()


def test_everything_else_is_accepted():
    accepted = 0
    for divergence, tail, support, reduction, mixture in itertools.product(
        DIVERGENCES, TAIL_MODES, SUPPORTS, REDUCTIONS, MIXTURES
    ):
        config = OPDConfig(divergence=divergence, tail=tail, support=support, reduction=reduction, mixture=mixture)
        refused = (tail == "truncate" and divergence != "forward_kl") or (support == "rollout" and tail != "bucket")
        if refused:
            with pytest.raises(ValueError):
                config.validate()
        else:
            config.validate(vocab_size=64)
            accepted += 1
    assert accepted == 12 * (5 * 4 + 5 * 3 + 1 * 3)
    OPDConfig(beta=7.0, alpha=3.0).validate()  # not used by reverse_kl, not looked at
    OPDConfig(divergence=lambda student, teacher: student.tail_log_prob).validate()
    OPDConfig(loss_type="advantage", support="rollout").validate()
    OPDConfig(support="rollout").validate(vocab_size=8)  # k is not used
    with pytest.raises(ValueError, match="k: wanted at most the student's vocabulary of 63, got 64"):
        OPDConfig().validate(vocab_size=63)


def test_every_option_explains_itself():
    for field in dataclasses.fields(OPDConfig):
        assert len(field.metadata["help"]) > 10, field.name
