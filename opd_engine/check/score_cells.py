"""Cells of the scores: top-k and gather, from logits and from hidden states, every statistic with its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import opd_engine
from opd_engine.check import reference
from opd_engine.check.cells import Called, Cell, Options
from opd_engine.check.inputs import TEMPERATURE, VOCAB_SIZE, Inputs, K
from opd_engine.check.sources import FromHidden, FromLogits

SUPPORTS = ("student", "teacher", "mixed")
BUCKETS = ("log_probs", "tail_log_prob")
FIELDS = (*BUCKETS, "lse", "entropy", "target_log_prob")


@dataclass(frozen=True, kw_only=True)
class GatherCell(Cell):
    """gather_log_probs and linear_gather_log_probs: the fields asked for, each differentiated."""

    source: FromLogits | FromHidden = field(default_factory=FromLogits)
    fields: tuple[str, ...] = FIELDS
    support: str = "mixed"
    row_temperature: bool = False
    partial: bool = False  # this rank's loss is of its own rows alone
    debug: bool = False
    leading: bool = False  # rows under two dimensions, laid out again by TokenScores

    def leaves(self, inputs):
        return self.source.leaves(inputs)

    def gradients(self, inputs):
        return self.source.gradients(inputs)

    def options(self, inputs: Inputs) -> Options:
        options: Options = {"temperature": inputs.row_temperature if self.row_temperature else TEMPERATURE}
        if "target_log_prob" in self.fields:
            options["target"] = inputs.target
        if self.partial:
            options["loss_reduction"] = "partial"
        return {**options, **self.source.options(inputs)}

    def upstream(self, inputs, name, output):
        whole = inputs.upstream(name, output)
        if not self.partial:
            return whole
        rows = torch.arange(output.shape[0], device=output.device) % inputs.world.world_size == inputs.world.rank
        return torch.where(rows.view(-1, *[1] * (output.dim() - 1)), whole, 0.0)

    def call(self, inputs, leaves, options):
        arguments, written = self.source.arguments(inputs, leaves, options)
        if self.leading:
            arguments = (arguments[0].unsqueeze(0), *arguments[1:])
        function = getattr(opd_engine, self.function)
        with opd_engine.debug(self.debug):
            scores = function(*arguments, inputs.ids(self.support), shard=inputs.shard, **options)
        if self.leading:
            scores = scores.reshape(-1).select(torch.arange(inputs.num_rows, device=inputs.world.device))
        return Called({name: getattr(scores, name) for name in self.fields}, written)

    def define(self, inputs, leaves, compute):
        logits = self.source.logits(inputs, leaves, compute)
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        ids = inputs.ids(self.support)
        return reference.scores(logits, ids, inputs.target, VOCAB_SIZE, temperature, compute, self.fields)


@dataclass(frozen=True, kw_only=True)
class TopkCell(Cell):
    """topk_log_probs and linear_topk_log_probs: ids and every field; there is no gradient."""

    source: FromLogits | FromHidden = field(default_factory=FromLogits)
    row_temperature: bool = False

    def leaves(self, inputs):
        return self.source.leaves(inputs)

    def gradients(self, inputs):
        return {}

    def options(self, inputs: Inputs) -> Options:
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        return {"temperature": temperature, "target": inputs.target, **self.source.options(inputs)}

    def call(self, inputs, leaves, options):
        arguments, _ = self.source.arguments(inputs, leaves, options)
        function = getattr(opd_engine, self.function)
        scores = function(*arguments, K, shard=inputs.shard, **options)
        return Called({name: getattr(scores, name) for name in ("indices", *FIELDS)})

    def define(self, inputs, leaves, compute):
        logits = self.source.logits(inputs, {name: leaf.detach() for name, leaf in leaves.items()}, compute)
        ids = reference.top_ids(logits, K, VOCAB_SIZE)
        temperature = inputs.row_temperature if self.row_temperature else TEMPERATURE
        found = reference.scores(logits, ids, inputs.target, VOCAB_SIZE, temperature, compute, FIELDS)
        return {"indices": ids, **found}


@dataclass(frozen=True, kw_only=True)
class MixtureCell(Cell):
    """mix_teachers: two members, one of them given twice in other words, and one of weight 0 that holds NaN."""

    mode: str
    per_row: bool
    communicates = False

    def leaves(self, inputs):
        return {}

    def _members(self, inputs: Inputs, compute: torch.dtype | None) -> list[dict[str, Tensor]]:
        """The scores in the inputs' dtype; compute=None leaves them there."""

        def make() -> list[dict[str, Tensor]]:
            ids = inputs.mixed_ids
            return [
                {
                    name: value.to(inputs.dtype)
                    for name, value in reference.scores(
                        logits,
                        ids,
                        inputs.target,
                        VOCAB_SIZE,
                        TEMPERATURE,
                        torch.float64,
                        (*BUCKETS, "target_log_prob"),
                    ).items()
                }
                for logits in (inputs.student, inputs.teacher)
            ]

        members = inputs.kept(("members",), make)
        if compute is None:
            return members
        return [{name: value.to(compute) for name, value in member.items()} for member in members]

    def _weights(self, inputs: Inputs) -> Tensor:
        weights = torch.tensor([3.0, 1.0], dtype=torch.float64, device=inputs.world.device)
        if not self.per_row:
            return weights
        return weights[:, None] * torch.stack(
            [inputs.row_temperature.double(), torch.ones_like(inputs.row_temperature)]
        )

    def options(self, inputs: Inputs) -> Options:
        return {"mode": self.mode}

    def call(self, inputs, leaves, options):
        members = [opd_engine.TokenScores(indices=inputs.mixed_ids, **one) for one in self._members(inputs, None)]
        nothing = torch.full_like(members[0].tail_log_prob, torch.nan)
        dead = opd_engine.TokenScores(
            indices=inputs.mixed_ids,
            log_probs=torch.full_like(members[0].log_probs, torch.nan),
            tail_log_prob=nothing,
            target_log_prob=nothing,
        )
        weights = self._weights(inputs)
        weights = torch.cat([weights, torch.zeros_like(weights[:1])])
        mixed = opd_engine.mix_teachers([*members, dead], weights, **options)
        outputs = {name: getattr(mixed, name) for name in BUCKETS}
        if self.mode == "arithmetic":
            outputs["target_log_prob"] = mixed.target_log_prob
        return Called(outputs)

    def define(self, inputs, leaves, compute):
        members, weights = self._members(inputs, compute), self._weights(inputs)
        pairs = [(one["log_probs"], one["tail_log_prob"]) for one in members]
        log_probs, tail = reference.mixture(pairs, weights, self.mode, inputs.mixed_ids)
        outputs = {"log_probs": log_probs, "tail_log_prob": tail}
        if self.mode == "arithmetic":
            share = (weights / weights.sum(0)).to(compute).reshape(2, -1)
            targets = torch.stack([one["target_log_prob"] for one in members])
            outputs["target_log_prob"] = (share * targets.exp()).sum(0).log()
        return outputs


def score_cells() -> Iterator[Cell]:
    """From logits."""
    yield TopkCell(function="topk_log_probs", line="ids and scores")
    yield TopkCell(function="topk_log_probs", line="row temperatures", row_temperature=True)
    yield TopkCell(function="topk_log_probs", line="edge rows", source=FromLogits(edges=True))
    for support in SUPPORTS:
        yield GatherCell(
            function="gather_log_probs", line="log-probs and tail", setting=support, fields=BUCKETS, support=support
        )
    for name in FIELDS[2:]:
        yield GatherCell(function="gather_log_probs", line=name, fields=(name,))
    yield GatherCell(function="gather_log_probs", line="row temperatures", row_temperature=True)
    yield GatherCell(function="gather_log_probs", line="in place", source=FromLogits(inplace=True))
    yield GatherCell(function="gather_log_probs", line="edge rows", source=FromLogits(edges=True))
    yield GatherCell(function="gather_log_probs", line="repeated ids", support="repeated")
    yield GatherCell(function="gather_log_probs", line="partial losses", partial=True)
    yield GatherCell(function="gather_log_probs", line="under debug", debug=True)
    yield GatherCell(function="gather_log_probs", line="leading dimensions", leading=True)


def mixture_cells() -> Iterator[Cell]:
    """Both modes, weights for the call and for each row."""
    for mode in ("arithmetic", "geometric"):
        for per_row in (False, True):
            setting = "weights a row" if per_row else "weights"
            yield MixtureCell(function="mix_teachers", line=mode, setting=setting, mode=mode, per_row=per_row)
