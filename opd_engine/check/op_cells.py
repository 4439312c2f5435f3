"""Cells of the ops themselves, `torch.ops.opd_engine.*`, on whole rows or on two shards merged by hand.

The functions reach them too, but not all under every layout: these do not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.check.cells import Called, Cell
from opd_engine.check.inputs import TEMPERATURE, VOCAB_SIZE, Inputs, K, Leaf
from opd_engine.check.loss_cells import ALPHA, BETA, TEACHER_LOG_PROB_MIN, BucketCell, FullCell
from opd_engine.check.score_cells import FIELDS, GatherCell, TopkCell
from opd_engine.check.sources import FromLogits

CUT = 517  # where the second of the two shards begins


@dataclass(frozen=True)
class WholeLogits(FromLogits):
    """All columns on every rank."""

    def leaves(self, inputs):
        return {"logits": Leaf(inputs.student, "all")}


def halves(logits: Tensor) -> list[tuple[int, Tensor]]:
    """(the first column's id, columns) of two uneven shards."""
    return [(0, logits[:, :CUT].contiguous()), (CUT, logits[:, CUT:].contiguous())]


def targets(inputs: Inputs) -> Tensor:
    """[T]: to the ops an absent one is -1; -100 is the functions' affair."""
    return inputs.target.clamp_min(-1)


def by_field(scores: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """An op's five row outputs."""
    return dict(zip(FIELDS, scores[: len(FIELDS)], strict=True))


def topk_whole(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    place = (targets(inputs), VOCAB_SIZE, 1.0, inputs.row_temperature)
    indices, *scores = torch.ops.opd_engine.topk_log_probs(leaves["logits"].detach(), K, *place)
    return Called({"indices": indices, **by_field(scores)})


def topk_merged(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    place = (VOCAB_SIZE, 1.0, inputs.row_temperature)
    packed = [
        torch.ops.opd_engine.topk_partials(part, K, targets(inputs), start, *place)
        for start, part in halves(leaves["logits"].detach())
    ]
    indices, *scores = torch.ops.opd_engine.merge_topk(torch.stack(packed), K, targets(inputs), *place)
    return Called({"indices": indices, **by_field(scores)})


def gather_whole(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    place = (inputs.mixed_ids, targets(inputs), VOCAB_SIZE, 1.0, inputs.row_temperature)
    return Called(by_field(torch.ops.opd_engine.gather_log_probs(leaves["logits"], *place)[:-1]))


def gather_merged(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    """Partials, merge, and the backward of each shard: one returned, one written over the logits."""
    ids, rest = inputs.mixed_ids, (VOCAB_SIZE, 1.0, inputs.row_temperature)
    ops, parts = torch.ops.opd_engine, halves(leaves["logits"].detach())
    stats, support = zip(*(ops.gather_partials(part, ids, targets(inputs), start, *rest) for start, part in parts))
    *scores, merged = ops.merge_gather(torch.stack(stats), sum(support), ids, targets(inputs), *rest)
    outputs = by_field(scores)
    columns = [inputs.upstream(name, output).to(merged.dtype) for name, output in outputs.items()]
    upstream = torch.cat([column.view(inputs.num_rows, -1) for column in columns], 1)
    places = [(ids, targets(inputs), merged, upstream, start, *rest) for start, _ in parts]
    returned = [ops.scores_backward(part, *place) for (_, part), place in zip(parts, places)]
    for (_, part), place in zip(parts, places):
        ops.scores_backward_(part, *place)
    written = torch.cat([part for _, part in parts], 1)
    return Called(outputs, {"d logits": lambda: torch.cat(returned, 1), "d logits, written over them": lambda: written})


def fused_loss(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    """distill_loss_, which has no shards: a row's loss and its gradient over the logits in one pass."""
    logits, loss_like = leaves["logits"].detach().clone(), inputs.row_temperature
    log_probs, tail = inputs.kept(("whole teacher",), lambda: _whole_teacher(inputs))
    loss = torch.ops.opd_engine.distill_loss_(
        *(logits, inputs.mixed_ids, log_probs, tail, inputs.upstream("loss", loss_like).to(loss_like.dtype)),
        *("jsd", BETA, 0.0, "bucket", TEACHER_LOG_PROB_MIN, VOCAB_SIZE, TEMPERATURE, None),
    )
    return Called({"loss": loss}, {"d logits, written over them": lambda: logits})


def bucket_loss(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    ids, teacher = inputs.mixed_ids, inputs.kept(("whole teacher",), lambda: _whole_teacher(inputs))
    gathered = torch.ops.opd_engine.gather_log_probs(leaves["logits"], ids, None, VOCAB_SIZE, TEMPERATURE, None)
    setting = ("skew_reverse_kl", 0.5, ALPHA, "renormalize", TEACHER_LOG_PROB_MIN)
    return Called({"loss": torch.ops.opd_engine.bucket_divergence(ids, *gathered[:2], *teacher, *setting)[0]})


def _whole_teacher(inputs: Inputs) -> tuple[Tensor, Tensor]:
    place = (inputs.mixed_ids, None, VOCAB_SIZE, TEMPERATURE, None)
    return torch.ops.opd_engine.gather_log_probs(inputs.teacher, *place)[:2]


def full_merged(inputs: Inputs, leaves: dict[str, Tensor]) -> Called:
    """Statistics of two shards merged, their sums added, and both backwards of each."""
    ops, rest = torch.ops.opd_engine, (1.0, inputs.row_temperature)
    no_ids = inputs.mixed_ids[:, :0].contiguous()
    sides = [halves(leaves["logits"].detach()), halves(inputs.teacher)]
    merged = []
    for side in sides:
        found = [ops.gather_partials(part, no_ids, None, start, VOCAB_SIZE, *rest) for start, part in side]
        stats, support = torch.stack([stats for stats, _ in found]), found[0][1]
        merged.append(ops.merge_gather(stats, support, no_ids, None, VOCAB_SIZE, *rest)[-1])
    pairs = [
        (student, (teacher, *merged, start, VOCAB_SIZE, VOCAB_SIZE, "skew_forward_kl", 0.5, ALPHA, *rest))
        for (start, student), (_, teacher) in zip(*sides)
    ]
    sums = sum(ops.full_divergence(student, *place) for student, place in pairs)
    upstream = inputs.upstream("loss", sums[:, 0]).to(sums.dtype)
    returned = [ops.full_divergence_backward(student, *place, sums, upstream) for student, place in pairs]
    for student, place in pairs:
        ops.full_divergence_backward_(student, *place, sums, upstream)
    written = torch.cat([student for student, _ in pairs], 1)
    outputs = {"loss": sums[:, 0].clone()}
    return Called(outputs, {"d logits": lambda: torch.cat(returned, 1), "d logits, written over them": lambda: written})


@dataclass(frozen=True, kw_only=True)
class OpCell(Cell):
    """One or more ops called directly; `like` is the cell whose definition and gradients they share."""

    ops: Callable[[Inputs, dict[str, Tensor]], Called]
    like: Cell
    names: tuple[str, ...] = ("d logits",)
    communicates = False

    def leaves(self, inputs):
        return self.like.leaves(inputs)

    def least_allowed(self, inputs, *, is_gradient):
        return self.like.least_allowed(inputs, is_gradient=is_gradient)

    def gradients(self, inputs):
        return dict.fromkeys(self.names, "logits")

    def call(self, inputs, leaves, options):
        return self.ops(inputs, leaves)

    def define(self, inputs, leaves, compute):
        return self.like.define(inputs, leaves, compute)


def op_cells() -> Iterator[Cell]:
    """Every op at least once."""
    whole = {"function": "", "line": "", "source": WholeLogits()}
    topk, gather = TopkCell(**whole, row_temperature=True), GatherCell(**whole, row_temperature=True)
    fused = BucketCell(**whole, divergence="jsd", floor=True)
    bucket = BucketCell(**whole, divergence="skew_reverse_kl", tail="renormalize", floor=True)
    full = FullCell(**whole, divergence="skew_forward_kl", row_temperature=True)
    returned, over = "d logits", "d logits, written over them"
    for line, ops, like, names in (
        ("topk_log_probs", topk_whole, topk, ()),
        ("topk_partials, merge_topk", topk_merged, topk, ()),
        ("gather_log_probs", gather_whole, gather, (returned,)),
        ("gather_partials, merge_gather, backward", gather_merged, gather, (returned, over)),
        ("bucket_divergence", bucket_loss, bucket, (returned,)),
        ("distill_loss_", fused_loss, fused, (over,)),
        ("full_divergence, backward", full_merged, full, (returned, over)),
    ):
        yield OpCell(function="torch.ops.opd_engine", line=line, ops=ops, like=like, names=names)
