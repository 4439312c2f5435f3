"""Cells of the losses from logits: on the buckets of a support, and over the full vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

import opd_engine
from opd_engine.check import reference
from opd_engine.check.cells import Called, Cell, Options
from opd_engine.check.inputs import NARROW_VOCAB_SIZE, TEMPERATURE, VOCAB_SIZE, WIDE_VOCAB_SIZE, Inputs
from opd_engine.check.judge import FLOOR
from opd_engine.check.reference import DIVERGENCES, TAIL_MODES
from opd_engine.check.score_cells import SUPPORTS
from opd_engine.check.sources import FromLogits

# Neither is a default of the engine's: a call that ignores them is seen.
BETA, ALPHA = 0.3, 0.2
TEACHER_LOG_PROB_MIN = -5.0


def of_divergence(name: str) -> Options:
    """The options that the divergence reads."""
    options: Options = {"divergence": name}
    if name == "jsd":
        options["beta"] = BETA
    elif name.startswith("skew_"):
        options["alpha"] = ALPHA
    return options


def half_squares(student: opd_engine.TokenScores, teacher: opd_engine.TokenScores) -> Tensor:
    """A user's divergence: half the squared differences of the log-probs, the tail's included."""
    present = student.indices >= 0
    off = torch.where(present, student.log_probs - torch.where(present, teacher.log_probs, 0.0), 0.0)
    return (off.square().sum(-1) + (student.tail_log_prob - teacher.tail_log_prob).square()) / 2


def bucket_definition(
    name: str, student: reference.Buckets, teacher: reference.Buckets, ids: Tensor, tail: str, floor: float | None
) -> Tensor:
    """The loss of every row; name: a divergence of the engine's, or "user" for half_squares."""
    if name != "user":
        return reference.distill_loss(student, teacher, ids, tail, name, BETA, ALPHA, floor)
    off = torch.where(ids >= 0, student[0] - torch.where(ids >= 0, teacher[0], 0.0), 0.0)
    return (off.square().sum(-1) + (student[1] - teacher[1]).square()) / 2


@dataclass(frozen=True, kw_only=True)
class BucketCell(Cell):
    """gather_log_probs and distill_loss, differentiated to the logits."""

    divergence: str
    tail: str = "bucket"
    support: str = "mixed"
    floor: bool = False
    source: FromLogits = field(default_factory=FromLogits)

    def leaves(self, inputs):
        return self.source.leaves(inputs)

    def gradients(self, inputs):
        return self.source.gradients(inputs)

    def options(self, inputs: Inputs) -> Options:
        options = {"divergence": half_squares} if self.divergence == "user" else of_divergence(self.divergence)
        options["tail"] = self.tail
        if self.floor:
            options["teacher_log_prob_min"] = TEACHER_LOG_PROB_MIN
        return options

    def call(self, inputs, leaves, options):
        (logits,), written = self.source.arguments(inputs, leaves, options)
        student = opd_engine.gather_log_probs(
            logits,
            inputs.ids(self.support),
            temperature=TEMPERATURE,
            shard=inputs.shard,
            **self.source.options(inputs),
        )
        return Called(
            {"loss": opd_engine.distill_loss(student, inputs.teacher_scores(self.support), **options)}, written
        )

    def define(self, inputs, leaves, compute):
        log_q = reference.log_probabilities(
            self.source.logits(inputs, leaves, compute), VOCAB_SIZE, TEMPERATURE, compute
        )
        ids = inputs.ids(self.support)
        student, teacher = reference.buckets(log_q, ids), inputs.teacher_buckets(self.support, compute)
        floor = TEACHER_LOG_PROB_MIN if self.floor else None
        return {"loss": bucket_definition(self.divergence, student, teacher, ids, self.tail, floor)}


def least_allowed_of_full(divergence: str, inputs: Inputs, *, is_gradient: bool) -> float:
    """Of a full-vocabulary loss. The ops hand the sum over u in docs/math.md (40) on in the scores' dtype.

    Where p and q lie apart, all that is left of skew_forward_kl's gradient is the difference of that sum and a term of
    its size: float32 then loses what plain torch, which forms it otherwise, does not.
    """
    if is_gradient and divergence == "skew_forward_kl" and inputs.dtype == torch.float32:
        return 1e-4
    return FLOOR[inputs.dtype if is_gradient else inputs.score_dtype]


@dataclass(frozen=True, kw_only=True)
class FullCell(Cell):
    """full_distill_loss; teacher_vocab_size: the student's, more or fewer."""

    divergence: str
    row_temperature: bool = False
    teacher_vocab_size: int = VOCAB_SIZE
    source: FromLogits = field(default_factory=FromLogits)

    def leaves(self, inputs):
        return self.source.leaves(inputs)

    def gradients(self, inputs):
        return self.source.gradients(inputs)

    def least_allowed(self, inputs, *, is_gradient):
        return least_allowed_of_full(self.divergence, inputs, is_gradient=is_gradient)

    def options(self, inputs: Inputs) -> Options:
        options = of_divergence(self.divergence)
        options["temperature"] = inputs.row_temperature if self.row_temperature else TEMPERATURE
        if self.teacher_vocab_size != VOCAB_SIZE:
            options["teacher_vocab_size"] = self.teacher_vocab_size
        return {**options, **self.source.options(inputs)}

    def call(self, inputs, leaves, options):
        (logits,), written = self.source.arguments(inputs, leaves, options)
        teacher = inputs.own(inputs.teacher, "columns")
        return Called({"loss": opd_engine.full_distill_loss(logits, teacher, shard=inputs.shard, **options)}, written)

    def define(self, inputs, leaves, compute):
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        logits = self.source.logits(inputs, leaves, compute)
        log_q = reference.log_probabilities(logits, VOCAB_SIZE, temperature, compute)
        shared = min(VOCAB_SIZE, self.teacher_vocab_size)
        log_p = inputs.teacher_log_probs(compute, shared, temperature)
        return {"loss": reference.full_loss(log_q, log_p, self.divergence, BETA, ALPHA)}


def pairs(*lists: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Combinations in which every two values meet: all of the first two lists, the third's in turn."""
    first, second, third = lists
    for i, j in product(range(len(first)), range(len(second))):
        yield first[i], second[j], third[(i + j) % len(third)]


def bucket_cells(full: bool) -> Iterator[Cell]:
    """Every divergence x tail mode; with `full` also x support, and the floor in every tail mode."""
    combine = product if full else pairs
    plain = BucketCell(function="distill_loss", line="bucket", divergence="reverse_kl")
    for name, tail, support in combine(DIVERGENCES, TAIL_MODES, SUPPORTS):
        yield replace(plain, line=tail, setting=f"{name}, {support}", divergence=name, tail=tail, support=support)
    # The bucket's correction for the floor depends on the divergence; the other modes have none.
    floored = [("bucket", name) for name in DIVERGENCES] + [("truncate", "jsd"), ("renormalize", "skew_reverse_kl")]
    for tail, name in product(TAIL_MODES, DIVERGENCES) if full else floored:
        yield replace(plain, line="floor", setting=f"{tail}, {name}", divergence=name, tail=tail, floor=True)
    for name in DIVERGENCES if full else ("jsd",):
        yield replace(plain, line="in place", setting=name, divergence=name, source=FromLogits(inplace=True))
    yield replace(plain, line="a user's divergence", divergence="user")


def full_cells(full: bool) -> Iterator[Cell]:
    """Every divergence; unequal vocabularies, row temperatures and in place, with `full` for every divergence too."""
    finite_at_edges = tuple(name for name in DIVERGENCES if name != "forward_kl")  # infinite where the student has none
    finite = tuple(name for name in DIVERGENCES if name != "reverse_kl")  # infinite where the teacher has no mass
    plain = FullCell(function="full_distill_loss", line="equal vocabularies", divergence="reverse_kl")
    narrow = replace(plain, line="teacher knows less", teacher_vocab_size=NARROW_VOCAB_SIZE)
    wide = replace(plain, line="teacher knows more", teacher_vocab_size=WIDE_VOCAB_SIZE)
    per_row = replace(plain, line="row temperatures", row_temperature=True)
    inplace = replace(plain, line="in place", source=FromLogits(inplace=True))
    edges = replace(plain, line="edge rows", source=FromLogits(edges=True))
    for cell, names in (
        (plain, DIVERGENCES),
        (narrow, finite if full else ("forward_kl", "skew_reverse_kl")),
        (wide, DIVERGENCES if full else ("reverse_kl", "jsd")),
        (per_row, DIVERGENCES if full else ("reverse_kl", "skew_forward_kl")),
        (inplace, DIVERGENCES if full else ("forward_kl", "jsd")),
        (edges, finite_at_edges if full else ("jsd",)),
    ):
        for name in names:
            yield replace(cell, setting=name, divergence=name)
