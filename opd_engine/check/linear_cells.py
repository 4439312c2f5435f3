"""Cells of the functions from hidden states: the same scores and losses, differentiated to hidden states and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch

import opd_engine
from opd_engine.check import reference
from opd_engine.check.cells import Called, Cell, Options
from opd_engine.check.inputs import NARROW_VOCAB_SIZE, TEMPERATURE, VOCAB_SIZE, WIDE_VOCAB_SIZE, Inputs
from opd_engine.check.loss_cells import (
    ALPHA,
    BETA,
    TEACHER_LOG_PROB_MIN,
    bucket_definition,
    half_squares,
    least_allowed_of_full,
    of_divergence,
    pairs,
)
from opd_engine.check.reference import DIVERGENCES, TAIL_MODES
from opd_engine.check.score_cells import BUCKETS, FIELDS, SUPPORTS, GatherCell, TopkCell
from opd_engine.check.sources import SOFTCAP, FromHidden

# What the head and its layout may be; each function is called with each.
SOURCES = {
    "plain head": FromHidden(),
    "bias": FromHidden(bias=True),
    "soft-cap": FromHidden(softcap=True, bias=True),
    "sequence parallel": FromHidden(sequence_parallel=True),
    "main_grad": FromHidden(main_grad=True),
}


@dataclass(frozen=True, kw_only=True)
class LinearLossCell(Cell):
    """What the two linear losses share: weighted rows, some of which are left out."""

    divergence: str
    source: FromHidden = field(default_factory=FromHidden)
    row_temperature: bool = False
    some_rows: bool = False

    def leaves(self, inputs):
        return self.source.leaves(inputs)

    def gradients(self, inputs):
        return self.source.gradients(inputs)

    def options(self, inputs: Inputs) -> Options:
        options = {"divergence": half_squares} if self.divergence == "user" else of_divergence(self.divergence)
        options["temperature"] = inputs.row_temperature if self.row_temperature else TEMPERATURE
        options["token_weights"] = inputs.token_weights
        if self.some_rows:
            options["loss_rows"] = inputs.loss_rows
        return {**options, **self.source.options(inputs)}

    def log_q(self, inputs: Inputs, leaves: dict[str, torch.Tensor], compute: torch.dtype) -> torch.Tensor:
        """The student's, by definition, [T, vocab_size]."""
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        logits = self.source.logits(inputs, leaves, compute)
        return reference.log_probabilities(logits, VOCAB_SIZE, temperature, compute)

    def weighted(self, inputs: Inputs, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both outputs, from the loss of every row."""
        if self.some_rows:
            chosen = torch.zeros(inputs.num_rows, dtype=torch.bool, device=losses.device)
            chosen[inputs.loss_rows.to(losses.device)] = True
            losses = torch.where(chosen, losses, 0.0)
        weights = inputs.token_weights.to(losses.dtype)
        return {"loss": (losses * weights).sum(), "token_losses": losses.detach()}


@dataclass(frozen=True, kw_only=True)
class LinearBucketCell(LinearLossCell):
    """linear_distill_loss."""

    tail: str = "bucket"
    support: str = "mixed"
    floor: bool = False

    def options(self, inputs):
        options = {**super().options(inputs), "tail": self.tail}
        return {**options, "teacher_log_prob_min": TEACHER_LOG_PROB_MIN} if self.floor else options

    def call(self, inputs, leaves, options):
        arguments, written = self.source.arguments(inputs, leaves, options)
        teacher = inputs.teacher_scores(self.support)
        result = opd_engine.linear_distill_loss(*arguments, teacher, shard=inputs.shard, **options)
        return Called({"loss": result.loss, "token_losses": result.token_losses}, written)

    def define(self, inputs, leaves, compute):
        ids = inputs.ids(self.support)
        student = reference.buckets(self.log_q(inputs, leaves, compute), ids)
        teacher = inputs.teacher_buckets(self.support, compute)
        floor = TEACHER_LOG_PROB_MIN if self.floor else None
        return self.weighted(inputs, bucket_definition(self.divergence, student, teacher, ids, self.tail, floor))


@dataclass(frozen=True, kw_only=True)
class LinearFullCell(LinearLossCell):
    """linear_full_distill_loss: the teacher's head has another width, a bias and, where asked, a soft-cap."""

    teacher_vocab_size: int = VOCAB_SIZE
    teacher_bias: bool = False
    teacher_softcap: bool = False

    def least_allowed(self, inputs, *, is_gradient):
        return least_allowed_of_full(self.divergence, inputs, is_gradient=is_gradient)

    def options(self, inputs):
        options = super().options(inputs)
        if self.teacher_vocab_size != VOCAB_SIZE:
            options["teacher_vocab_size"] = self.teacher_vocab_size
        if self.teacher_bias:
            options["teacher_bias"] = inputs.own(inputs.teacher_bias, "rows")
        if self.teacher_softcap:
            options["teacher_logit_softcap"] = SOFTCAP
        return options

    def call(self, inputs, leaves, options):
        arguments, written = self.source.arguments(inputs, leaves, options)
        hidden = inputs.own(inputs.teacher_hidden, "tokens" if self.source.sequence_parallel else "all")
        weight = inputs.own(inputs.teacher_weight, "rows")
        result = opd_engine.linear_full_distill_loss(*arguments, hidden, weight, shard=inputs.shard, **options)
        return Called({"loss": result.loss, "token_losses": result.token_losses}, written)

    def define(self, inputs, leaves, compute):
        logits = reference.head_logits(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_bias if self.teacher_bias else None,
            SOFTCAP if self.teacher_softcap else None,
            inputs.dtype,
            compute,
        )
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        shared = min(VOCAB_SIZE, self.teacher_vocab_size)
        log_p = reference.log_probabilities(logits, shared, temperature, compute)
        log_q = self.log_q(inputs, leaves, compute)
        return self.weighted(inputs, reference.full_loss(log_q, log_p, self.divergence, BETA, ALPHA))


def linear_score_cells(full: bool) -> Iterator[Cell]:
    """Top-k and gather from hidden states, with every head."""
    for line in ("plain head", "soft-cap", "sequence parallel"):
        yield TopkCell(
            function="linear_topk_log_probs", line=line, source=SOURCES[line], row_temperature=line == "soft-cap"
        )
    for line, source in SOURCES.items():
        yield GatherCell(function="linear_gather_log_probs", line=line, source=source, fields=BUCKETS)
    for name in FIELDS[2:]:
        yield GatherCell(function="linear_gather_log_probs", line=name, source=FromHidden(), fields=(name,))
    yield GatherCell(
        function="linear_gather_log_probs", line="row temperatures", source=FromHidden(bias=True), row_temperature=True
    )
    for line, support in product(SOURCES, SUPPORTS) if full else ():
        yield GatherCell(
            function="linear_gather_log_probs",
            line="every statistic",
            setting=f"{line}, {support}",
            source=SOURCES[line],
            support=support,
        )


def linear_bucket_cells(full: bool) -> Iterator[Cell]:
    """Every divergence x tail mode; heads, temperatures, floors and rows in turn, with `full` each with each."""
    plain = LinearBucketCell(function="linear_distill_loss", line="plain head", divergence="reverse_kl")
    lines = [replace(plain, line=line, source=source) for line, source in SOURCES.items()]
    lines += [
        replace(plain, line="grad_scale", source=FromHidden(main_grad=True, grad_scale=True)),
        replace(plain, line="row temperatures", row_temperature=True),
        replace(plain, line="floor", floor=True),
        replace(plain, line="some rows", some_rows=True),
    ]
    names = tuple(cell.line for cell in lines)
    settings = list(pairs(DIVERGENCES, TAIL_MODES, SUPPORTS))
    if full:
        combinations = [(cell, *setting) for cell, setting in product(lines, settings)]
    else:
        combinations = [(lines[number % len(names)], *setting) for number, setting in enumerate(settings)]
    for cell, name, tail, support in combinations:
        yield replace(cell, setting=f"{tail}, {name}, {support}", divergence=name, tail=tail, support=support)
    yield replace(plain, line="a user's divergence", divergence="user")


def linear_full_cells(full: bool) -> Iterator[Cell]:
    """The full vocabulary from both models' hidden states; heads in turn, with `full` for every divergence."""
    plain = LinearFullCell(function="linear_full_distill_loss", line="plain head", divergence="reverse_kl")
    lines = [replace(plain, line=line, source=source) for line, source in SOURCES.items()]
    lines += [
        replace(plain, line="grad_scale", source=FromHidden(main_grad=True, grad_scale=True)),
        replace(plain, line="row temperatures", row_temperature=True),
        replace(plain, line="some rows", some_rows=True),
        replace(plain, line="teacher's bias and cap", teacher_bias=True, teacher_softcap=True),
        replace(plain, line="teacher knows less", teacher_vocab_size=NARROW_VOCAB_SIZE),
        replace(plain, line="teacher knows more", teacher_vocab_size=WIDE_VOCAB_SIZE),
    ]
    for number, cell in enumerate(lines):
        for name in DIVERGENCES if full else (DIVERGENCES[number % len(DIVERGENCES)],):
            if (cell.teacher_vocab_size, name) != (NARROW_VOCAB_SIZE, "reverse_kl"):  # infinite, rightly
                yield replace(cell, setting=name, divergence=name)
