"""OPDConfig: every option of one distillation step, and the refusal, before anything runs, of what cannot distil.

Each field's metadata holds the sentence a command line shows for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_engine.choices import DIVERGENCES, TAIL_MODES

SUPPORTS = ("student", "teacher", "union", "rollout")
REDUCTIONS = ("token_mean", "sample_mean", "rollout_mean")
MIXTURES = ("route", "arithmetic", "geometric", "loss_sum")
LOSS_TYPES = ("distill", "advantage")


def _help(text: str, *, rare: bool = False) -> dict[str, Any]:
    """rare: a command line takes it without showing it."""
    return {"help": text, "rare": rare}


@dataclass
class OPDConfig:
    """Options of a distillation step; `validate()` refuses what cannot work, with the reason."""

    divergence: str | Callable[..., Any] = field(
        default="reverse_kl", metadata=_help(f"divergence between teacher and student: {', '.join(DIVERGENCES)}")
    )
    beta: float = field(
        default=0.5, metadata=_help("jsd only: weight of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl")
    )
    alpha: float = field(
        default=0.1,
        metadata=_help("skew divergences only: how much of the first distribution is mixed into the second"),
    )
    tail: str = field(
        default="bucket", metadata=_help(f"what happens to the mass outside the support: {', '.join(TAIL_MODES)}")
    )
    k: int = field(
        default=64, metadata=_help("tokens taken from each model's top-k; the support is at most k wide (union: wider)")
    )
    support: str = field(
        default="student",
        metadata=_help(
            f"whose tokens are compared: {', '.join(SUPPORTS)} (the engine's top-k where it gives one, else the "
            "sampled token)"
        ),
    )
    union_cap: int | None = field(
        default=None, metadata=_help("widest union support; the ids of lowest mass are dropped first and counted")
    )
    temperature: float = field(
        default=1.0, metadata=_help("divides the student's logits, and the teachers' unless they have their own")
    )
    teacher_log_prob_min: float | None = field(
        default=None, metadata=_help("floor of the teacher's log-probs; off by default")
    )
    reduction: str = field(default="token_mean", metadata=_help(f"mean over the global batch: {', '.join(REDUCTIONS)}"))
    coefficient: float = field(
        default=1.0, metadata=_help("multiplies the loss; 0 computes everything and trains nothing")
    )
    policy_coefficient: float = field(
        default=0.0, metadata=_help("adds the clipped policy gradient of the samples' advantages, times this; 0 is off")
    )
    clip_low: float = field(
        default=0.2, metadata=_help("policy gradient: the ratio counts down to 1 less this where the advantage is < 0")
    )
    clip_high: float = field(
        default=0.2, metadata=_help("policy gradient: the ratio counts up to 1 plus this where the advantage is > 0")
    )
    reward_beta: float | None = field(
        default=None,
        metadata=_help(
            "weights samples by softmax(reward / reward_beta) x samples over the global batch; off by default"
        ),
    )
    state_weight_cap: float | None = field(
        default=None,
        metadata=_help(
            "weights a row by the student/rollout probability ratio of the tokens before it, cut at this; off"
        ),
    )
    mixture: str = field(
        default="route", metadata=_help(f"several teachers: one a sample, or combined: {', '.join(MIXTURES)}")
    )
    loss_type: str = field(
        default="distill", metadata=_help("distill: the divergence itself; advantage: sampled-token policy gradient")
    )
    optimizer_steps_per_rollout: int = field(
        default=1, metadata=_help("optimizer steps that use each sample; its scores are freed after")
    )
    score_batch_tokens: int = field(
        default=8192,
        metadata=_help("tokens in one scoring forward; bounds the [rows, vocab] that exist at once", rare=True),
    )
    tasks: tuple[str, ...] = field(
        default=(), metadata=_help("tasks whose metrics are kept apart, by the samples' task names")
    )
    measure_overlap: bool = field(
        default=False,
        metadata=_help("measure how much of the student's and the teachers' top-k is shared; free with support union"),
    )
    check_teachers: bool = field(
        default=True,
        metadata=_help("end the run where a teacher's scores are NaN, no distribution, or all the same", rare=True),
    )
    keep_teacher_hidden: bool = field(
        default=False,
        metadata=_help(
            "keep the teachers' hidden states, not scores, and choose the student's top-k in the training forward: "
            "saves the old policy's pass, for hidden_size x 2 bytes a token; one optimizer step a rollout",
            rare=True,
        ),
    )
    inplace_backward: bool = field(
        default=False, metadata=_help("overwrite the student's logits with their gradient in the backward", rare=True)
    )

    @property
    def needs_student_target(self) -> bool:
        """Whether the loss needs the student's log-prob of the sampled token."""
        return self.state_weight_cap is not None or self.loss_type == "advantage" or self.policy_coefficient > 0

    def validate(self, vocab_size: int | None = None) -> None:
        """Refuse what cannot work or cannot distil.

        vocab_size: the student's, where it is known

        Raises:
            ValueError: naming the option, what was wanted, what came, and why.
        """
        if not callable(self.divergence):
            _choice("divergence", self.divergence, DIVERGENCES)
        _choice("tail", self.tail, TAIL_MODES)
        _choice("support", self.support, SUPPORTS)
        _choice("reduction", self.reduction, REDUCTIONS)
        _choice("mixture", self.mixture, MIXTURES)
        _choice("loss_type", self.loss_type, LOSS_TYPES)
        for name in ("k", "optimizer_steps_per_rollout", "score_batch_tokens"):
            _whole(name, getattr(self, name))
        if vocab_size is not None and self.support != "rollout" and self.k > vocab_size:
            raise ValueError(f"k: wanted at most the student's vocabulary of {vocab_size}, got {self.k}")
        for name in ("temperature", "reward_beta", "state_weight_cap"):
            value = getattr(self, name)
            if value is not None:
                _number(name, value, "a finite number > 0", lambda v: v > 0)
        if self.temperature is None:
            raise ValueError("temperature: wanted a finite number > 0, got None")
        if self.divergence == "jsd":
            _number("beta", self.beta, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        if self.divergence in ("skew_forward_kl", "skew_reverse_kl"):
            _number("alpha", self.alpha, "a number in [0, 1)", lambda v: 0 <= v < 1)
        if self.teacher_log_prob_min is not None:
            _number("teacher_log_prob_min", self.teacher_log_prob_min, "a finite number < 0", lambda v: v < 0)
        _number(
            "coefficient",
            self.coefficient,
            "a finite number >= 0 (below 0 drives away from the teacher)",
            _not_negative,
        )
        _number("policy_coefficient", self.policy_coefficient, "a finite number >= 0", _not_negative)
        _number("clip_low", self.clip_low, "a number in [0, 1)", lambda v: 0 <= v < 1)
        _number("clip_high", self.clip_high, "a finite number >= 0", _not_negative)
        if self.policy_coefficient > 0 and self.reward_beta is not None:
            raise ValueError(
                f"reward_beta={self.reward_beta} with policy_coefficient={self.policy_coefficient}: the rewards would "
                "count twice, in the advantages and as weights; use one of the two"
            )
        if self.union_cap is not None:
            _whole("union_cap", self.union_cap)
            if self.support not in ("union", "teacher"):
                raise ValueError(f"union_cap: needs support 'union' or 'teacher', got support {self.support!r}")
        self._refuse_what_cannot_distil()

        if self.keep_teacher_hidden:
            for name, wanted in (
                ("support", "student"),
                ("optimizer_steps_per_rollout", 1),
                ("measure_overlap", False),
            ):
                if getattr(self, name) != wanted:
                    raise ValueError(f"keep_teacher_hidden: needs {name} {wanted!r}, got {getattr(self, name)!r}")

    def _refuse_what_cannot_distil(self) -> None:
        if self.loss_type == "advantage":
            if self.support != "rollout":
                raise ValueError(
                    f"loss_type 'advantage' with support {self.support!r} cannot distil: a divergence over a set of "
                    "tokens does not depend on the sampled one, so used as its advantage it has an expected gradient "
                    "of zero; use support 'rollout', or loss_type 'distill'"
                )
            if self.divergence != "reverse_kl":
                raise ValueError(
                    "loss_type 'advantage' is the policy gradient of reverse_kl and of nothing else, "
                    f"got divergence {self.divergence!r}"
                )
            if self.mixture == "loss_sum":
                raise ValueError(
                    "mixture 'loss_sum' adds losses, which loss_type 'advantage' has not; the same weighted sum of "
                    "log-ratios is mixture 'geometric' up to its normalisation: use loss_type 'distill' or 'route'"
                )
            if self.mixture == "geometric":
                raise ValueError(
                    "mixture 'geometric' has no log-prob of the sampled token, which loss_type 'advantage' needs; "
                    "use 'route' or 'arithmetic'"
                )
            return
        if self.tail == "truncate" and self.divergence != "forward_kl" and not callable(self.divergence):
            raise ValueError(
                f"tail 'truncate' with divergence {self.divergence!r} cannot distil: without the tail the sum is "
                "minimised by shrinking the student's mass on the support; use tail 'bucket', or forward_kl"
            )
        if self.tail == "truncate" and self.support == "rollout":
            raise ValueError(
                "tail 'truncate' with support 'rollout' cannot distil: where the engine gives no top-k, its expected "
                "gradient maximises the chance of agreeing with the teacher, which puts all mass on the teacher's most "
                "likely token; use tail 'bucket'"
            )
        if self.tail == "renormalize" and (self.k == 1 or self.support == "rollout"):
            width = "support 'rollout'" if self.support == "rollout" else "k=1"
            raise ValueError(
                f"tail 'renormalize' with {width} cannot distil: one token (the sampled one, where an engine gives no "
                "top-k) renormalised has probability 1 on both sides, so the loss is always zero; use tail 'bucket', "
                "or k >= 2"
            )


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: wanted one of {', '.join(known)}, got {value!r}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: wanted a whole number >= 1, got {value!r}")


def _number(name: str, value: object, wanted: str, accept: Callable[[float], bool]) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not accept(value):
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _not_negative(value: float) -> bool:
    return value >= 0
