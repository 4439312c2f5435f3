"""linear_distill_loss: the bucket loss and its gradients from hidden states and the LM head, in one pass over chunks.

Bound: arithmetic, three GEMMs: the gradient is computed in the forward, while a chunk's logits are there, and scaled in
the backward. On one shard a chunk costs one read and one write of its logits besides; under tensor parallelism one
packed collective, on the wire while the next chunk is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_engine import ops  # noqa: F401  (registers torch.ops.opd_engine)
from opd_engine.functional.agreement import check_upstream
from opd_engine.functional.arguments import check_divergence, check_ids, check_tail_mode, debugging, shape_choice
from opd_engine.functional.linear_arguments import (
    Head,
    LinearRows,
    LossRows,
    agree_on_rows,
    check_grad_scale,
    check_linear_rows,
    check_loss_rows,
    describe_tensor,
    flat_rows,
)
from opd_engine.functional.linear_chunks import (
    ChunkLogits,
    HeadGradients,
    chunks_of,
    outside_graphs,
    rows_a_chunk,
    take_turns,
)
from opd_engine.functional.linear_gradients import (
    deliver_hidden_gradient,
    deliver_weight_gradient,
    is_recomputing,
    weight_accumulator,
    within_range,
)
from opd_engine.functional.linear_scores import unpack_gather
from opd_engine.functional.losses import Divergence, distill_loss
from opd_engine.functional.token_scores import TokenScores
from opd_engine.ops.autograd import differentiable_once
from opd_engine.parallel.collectives import start_all_gather_stacked
from opd_engine.parallel.vocab import VocabShard


class LinearLoss(NamedTuple):
    """What linear_distill_loss and linear_full_distill_loss return.

    loss: [], the sum of token_weights x token loss over the rows that are computed; the one that is differentiable
    token_losses: [*], detached and unweighted; 0 in rows that loss_rows leaves out
    """

    loss: Tensor
    token_losses: Tensor


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: TokenScores,
    *,
    token_weights: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    teacher_log_prob_min: float | None = None,
    loss_rows: Tensor | None = None,
    grad_scale: Tensor | None = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
) -> LinearLoss:
    """distill_loss of the LM head's log-probs at the teacher's ids, summed with weights, without the logits.

    Equation: docs/math.md (53), (54) for the logits, then (16) to (32); gradients (36), (55) to (58)
    hidden: [*, hidden_size], float64, float32, bfloat16 or float16; the same on every rank of tp_group, or, with
        sequence_parallel, this rank's block of dim 0
    weight: [vocab_shard_size, hidden_size] of hidden's dtype: the LM head's rows of this shard (a tied embedding's too)
    teacher: TokenScores [*, k] or flat [T, k], no grad, cast to the score dtype; its ids are the support
    token_weights: [*] or flat [T], finite and >= 0, or bool, constant; None: ones. A row of weight 0 adds exactly 0
    divergence: as in distill_loss; a function of the two TokenScores is called once a chunk and must treat rows alike
    beta: 0 <= beta <= 1, for jsd: 0 is forward_kl and 1 is reverse_kl by convention
    alpha: 0 <= alpha < 1, for the skewed ones
    tail: "bucket", "truncate" or "renormalize", as in distill_loss
    temperature: float, or [*] or [T], finite and > 0, a constant; of the student, the teacher's is in its scores
    bias: [vocab_shard_size] of hidden's dtype, or None
    logit_softcap: c > 0 for logits of c tanh(z / c), or None
    teacher_log_prob_min: floor of the teacher's log-probs, <= 0, or None for off
    loss_rows: [n] int64, distinct row numbers in [0, T): the rows to compute at all, None for all. Build it on the
        host, so that its length is known; every other argument keeps its T rows
    grad_scale: [] floating, on hidden's device: the gradient that `loss` is going to receive in backward. With it a
        weight's main_grad is accumulated in the forward, chunk by chunk, and no accumulator of its own is needed
    shard: which rows of the head these are; None means the whole vocabulary
    sequence_parallel: hidden states are split over tp_group on dim 0; teacher, weights and token_losses have all T rows
    workspace_bytes: of logits that exist at a time, None for 64 MiB on a CPU and 1.25 GiB / tp_size on a GPU. A chunk
        has max(1, workspace_bytes // (ceil(vocab_size / tp_size) x itemsize)) rows, half with a soft-cap and half where
        tp_size > 1, the same on every rank. The weight's float32 gradient comes on top: it is accumulated in a
        [vocab_shard_size, hidden_size] tensor, or in main_grad; the backward, where the workspace is free again, rounds
        the former to a half-precision weight's dtype, beside it
    Returns: LinearLoss; float64 for float64 hidden states, else float32.
    Raises: ValueError where an argument is not as above, shapes or devices differ, the teacher, token_weights or
        temperature requires grad, or grad_scale comes without a main_grad to scale; under debug also for ids out of
        range or twice in a row, for loss_rows on a GPU out of range or not distinct, where the upstream gradient is not
        grad_scale, and on every rank of the group for what is wrong or different on any. RuntimeError for a second
        backward with grad_scale.
    Communicates: forward, a chunk at a time and overlapped with the next chunk's product, one all-gather of
        (20 + 4 k) x tp_size bytes a row (float64: twice), and with sequence_parallel first one of the hidden states.
        Backward: one SUM all-reduce of the hidden gradient of the rows computed, 4 bytes an element (float64: 8); with
        sequence_parallel one SUM reduce-scatter of all T rows. Every rank must compute the same loss and call backward.
    Mutates: weight.main_grad, where the weight carries one and requires grad: in backward, or in the forward with
        grad_scale, but never without grad and never in a recomputed forward. weight.grad_added_to_main_grad, where it
        exists, is set in backward, and autograd sees zeros; else it sees None.
    Precision: as in linear_gather_log_probs; the upstream gradient multiplies the accumulated gradients before they are
        rounded.
    Grad: of `loss`, for hidden, weight and bias, once differentiable; each rank's weight and bias gradients are its
        rows of the one-process gradient, its hidden gradient is the whole one (its block under sequence_parallel).
        Computed in the forward where grad is enabled; a second backward of one forward computes them again.
    """

    def check() -> tuple[LinearRows, tuple[LossRows, Tensor, TokenScores]]:
        rows = check_linear_rows(
            hidden, weight, bias, logit_softcap, temperature, shard, sequence_parallel, workspace_bytes
        )
        chosen = check_loss_rows(rows, hidden, token_weights, loss_rows)
        check_grad_scale(grad_scale, hidden, weight)
        if not callable(divergence):
            check_divergence(divergence, beta, alpha)
            check_tail_mode(tail, teacher_log_prob_min)
        indices, constant = _check_teacher(teacher, hidden, rows)
        return rows, (chosen, indices, constant)

    rows, (chosen, indices, constant) = agree_on_rows(
        shard,
        hidden,
        check,
        lambda rows, checked: {
            **checked[0].description(),
            "teacher": f"{describe_tensor(checked[1])} {describe_tensor(checked[2].log_probs)}",
            "divergence": f"{_name_of(divergence)} {tail} {beta} {alpha} {teacher_log_prob_min}",
        },
    )
    setting = {"divergence": divergence, "beta": beta, "alpha": alpha, "tail": tail}
    setting["teacher_log_prob_min"] = teacher_log_prob_min
    job = _BucketJob(rows, chosen, indices=indices, teacher=constant, setting=setting)
    return apply_linear_loss(job, flat_rows(hidden), weight, bias, grad_scale)


def _name_of(divergence: Divergence) -> str:
    return getattr(divergence, "__qualname__", "a function") if callable(divergence) else divergence


def _check_teacher(teacher: TokenScores, hidden: Tensor, rows: LinearRows) -> tuple[Tensor, TokenScores]:
    """(ids [T, k] int64, the scores flat and in the score dtype)."""
    if not isinstance(teacher, TokenScores):
        raise ValueError(f"teacher: wanted TokenScores, got {type(teacher).__name__}")
    if teacher.requires_grad:
        raise ValueError("teacher: wanted constant scores, got some that require grad; use .detach()")
    if teacher.leading_shape not in (rows.leading_shape, (rows.num_rows,)):
        wanted = shape_choice(rows.leading_shape, rows.num_rows, "k")
        raise ValueError(f"teacher: wanted scores of {wanted}, got {list(teacher.indices.shape)}")
    indices = check_ids(teacher.indices, "teacher.indices", hidden, rows, per_row=True, distinct=True)
    flat = teacher.reshape(rows.num_rows)
    constant = TokenScores(
        indices=indices,
        log_probs=flat.log_probs.to(rows.score_dtype).contiguous(),
        tail_log_prob=flat.tail_log_prob.to(rows.score_dtype).contiguous(),
        **{name: getattr(flat, name) for name in ("lse", "entropy", "target_log_prob")},
    )
    return indices, constant


@dataclass(frozen=True)
class LinearJob:
    """All that is constant in one call of a linear loss; subclasses say how a chunk of rows is computed."""

    rows: LinearRows
    chosen: LossRows

    def row_bytes(self) -> int:
        """Of the workspace, all its tensors of logits together (docs/math.md (59))."""
        shard = self.rows.shard
        one = self.rows.head.row_bytes(shard.vocab_size, shard.tp_size, with_gradient=True)
        return one * self.chunks_in_flight()

    def chunks_in_flight(self) -> int:
        """Two where one can be on the wire while the other computes."""
        return 1 if self.rows.shard.merge_group is None else 2

    def buffers(self, head: Head, max_rows: int, *, with_gradient: bool) -> Any:
        """What one chunk in flight computes in."""
        return ChunkLogits(head, max_rows, with_gradient=with_gradient)

    def chunk(
        self,
        part: slice,
        hidden: Tensor,
        weights: Tensor,
        buffers: Any,
        losses: Tensor,
        gradients: HeadGradients | None,
    ) -> Iterator[None]:
        """Write losses[part] and add to the gradients; yields after starting each collective.

        part: of the rows that are computed; hidden, weights: [n, hidden_size] and [n], theirs
        buffers: what self.buffers made
        """
        raise NotImplementedError

    def solve(self, hidden: Tensor, head: Head, weights: Tensor, gradients: HeadGradients | None) -> Tensor:
        """Unweighted losses [n] of the rows that are computed; gradients of the sum of weights x loss are added."""
        everything = self.rows.gather_hidden(hidden)
        count = self.chosen.count
        losses = torch.empty((count,), dtype=self.rows.score_dtype, device=hidden.device)
        size = rows_a_chunk(self.rows.workspace_bytes, self.row_bytes())
        parts = chunks_of(count, size)
        in_flight = min(self.chunks_in_flight(), len(parts))
        pool = [self.buffers(head, min(size, count), with_gradient=gradients is not None) for _ in range(in_flight)]

        def chunks() -> Iterator[Iterator[None]]:
            for number, part in enumerate(parts):
                rows = self.chosen.take(everything, part)
                yield self.chunk(part, rows, weights[part], pool[number % in_flight], losses, gradients)

        take_turns(chunks(), max(in_flight, 1))
        if gradients is not None:
            gradients.finish()
        return losses

    def row_temperature(self, part: slice) -> tuple[float, Tensor | None]:
        """The ops' two arguments."""
        per_row = self.rows.row_temperature
        return self.rows.temperature, None if per_row is None else self.chosen.take(per_row, part)


@dataclass(frozen=True)
class _BucketJob(LinearJob):
    indices: Tensor  # [T, k]
    teacher: TokenScores  # [T, k], flat, in the score dtype
    setting: dict

    def chunk(self, part, hidden, weights, buffers, losses, gradients):
        indices = self.chosen.take(self.indices, part)
        teacher = self.teacher.select(self.chosen.where(part))
        shard, temperature = self.rows.shard, self.row_temperature(part)
        logits = buffers.compute(hidden)
        setting = self.setting
        if shard.merge_group is None and gradients is not None and not callable(setting["divergence"]):
            # One shard: a row's statistics, loss and gradient while it is in cache.
            is_skewed = setting["divergence"].startswith("skew_")
            losses[part] = torch.ops.opd_engine.distill_loss_(
                *(logits, indices, teacher.log_probs, teacher.tail_log_prob, weights),
                setting["divergence"],
                float(setting["beta"]) if setting["divergence"] == "jsd" else 0.5,
                float(setting["alpha"]) if is_skewed else 0.0,
                setting["tail"],
                setting["teacher_log_prob_min"],
                shard.vocab_size,
                *temperature,
            )
        else:
            place = (shard.vocab_start_index, shard.vocab_size, *temperature)
            stats, support_logits = torch.ops.opd_engine.gather_partials(logits, indices, None, *place)
            if shard.merge_group is None:
                stats = stats.unsqueeze(0)
            else:
                pending = start_all_gather_stacked(torch.cat([stats, support_logits], 1), shard.merge_group)
                yield
                stats, support_logits = unpack_gather(pending.wait())
            *scores, merged = torch.ops.opd_engine.merge_gather(
                stats, support_logits, indices, None, shard.vocab_size, *temperature
            )
            losses[part], upstream = _bucket_losses(indices, scores, teacher, weights, setting, gradients is not None)
            if gradients is None:
                return
            torch.ops.opd_engine.scores_backward_(logits, indices, None, merged, upstream, *place)
        buffers.uncap_(logits)
        gradients.add(part, logits, hidden)


def _bucket_losses(
    indices: Tensor, scores: list[Tensor], teacher: TokenScores, weights: Tensor, setting: dict, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(losses [n], gradients [n, k + 4] of the sum of weights x loss with respect to the scores)."""
    values = [score.requires_grad_(with_gradient) for score in scores[:4]]
    with torch.set_grad_enabled(with_gradient):
        student = TokenScores(
            indices=indices, log_probs=values[0], tail_log_prob=values[1], lse=values[2], entropy=values[3]
        )
        losses = distill_loss(student, teacher, **setting)
        if not with_gradient:
            return losses, None
        total = torch.where(weights == 0, 0, losses * weights).sum()
        found = torch.autograd.grad(total, values, allow_unused=True)
    upstream = weights.new_zeros((indices.size(0), indices.size(1) + 4))
    upstream[:, : indices.size(1)] = 0 if found[0] is None else found[0]
    for column, grad in enumerate(found[1:], start=indices.size(1)):
        if grad is not None:
            upstream[:, column] = grad
    return losses.detach(), upstream


@outside_graphs
def apply_linear_loss(
    job: LinearJob, hidden: Tensor, weight: Tensor, bias: Tensor | None, grad_scale: Tensor | None
) -> LinearLoss:
    """The job's loss with its gradients attached, where autograd is recording."""
    has_grad = torch.is_grad_enabled()
    if not has_grad or is_recomputing() or not weight.requires_grad:
        grad_scale = None
    loss, token_losses = _LossAndGradients.apply(hidden, weight, bias, job, grad_scale, has_grad)
    return LinearLoss(loss, token_losses.view(job.rows.leading_shape))


class _LossAndGradients(torch.autograd.Function):
    """Gradients in the forward, scaled in the backward; hidden states and head are saved for a second one alone."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: LinearJob,
        grad_scale: Tensor | None,
        has_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = job.chosen.weights
        needs = ctx.needs_input_grad[:3]
        ctx.job, ctx.grad_scale, ctx.debug = job, grad_scale, debugging()
        ctx.gradients = None
        if has_grad and any(needs):
            into, final = None, weights
            if grad_scale is not None:
                into, final = weight_accumulator(job.rows.head.weight), weights * grad_scale.to(weights.dtype)
            scaled, ctx.magnitude = within_range(final, hidden.dtype)
            # With grad_scale nothing is scaled later: the magnitude is put back here.
            now = None if grad_scale is None else ctx.magnitude
            head = Head(weight, bias, job.rows.head.softcap)
            ctx.gradients = HeadGradients(head, job.chosen.count, needs, into, now)
            losses = job.solve(hidden, ctx.gradients.head, scaled, ctx.gradients)
            ctx.save_for_backward(hidden, weight, bias)
        else:
            losses = job.solve(hidden, Head(weight, bias, job.rows.head.softcap), weights, None)
        # At once over all rows: the sum does not depend on how they were cut.
        loss = torch.where(weights == 0, 0, losses * weights).sum()
        token_losses = job.chosen.spread(losses)
        ctx.mark_non_differentiable(token_losses)
        return loss, token_losses

    @staticmethod
    @differentiable_once("linear loss")
    def backward(ctx, upstream: Tensor, _: Tensor):
        job, grad_scale = ctx.job, ctx.grad_scale
        rows, weight = job.rows, job.rows.head.weight
        if ctx.debug:
            check_upstream(upstream.reshape(1, 1), rows.shard, "linear loss")
            if grad_scale is not None and not torch.isclose(upstream, grad_scale.to(upstream.dtype), rtol=1e-6):
                raise ValueError(
                    f"grad_scale: wanted the gradient that loss receives in backward, {float(upstream)}, "
                    f"got {float(grad_scale)}"
                )
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not copied: autograd keeps what nobody else holds
        if gradients is None:
            if grad_scale is not None:
                raise RuntimeError("linear loss: a second backward with grad_scale would add to main_grad twice")
            hidden, saved_weight, saved_bias = ctx.saved_tensors
            head = Head(saved_weight, saved_bias, rows.head.softcap)
            gradients = HeadGradients(head, job.chosen.count, ctx.needs_input_grad[:3], None)
            job.solve(hidden, head, within_range(job.chosen.weights, hidden.dtype)[0], gradients)
        if grad_scale is None:
            scale = upstream if ctx.magnitude is None else upstream * ctx.magnitude
            for grad in (gradients.hidden, gradients.weight, gradients.bias):
                if grad is not None:
                    grad.mul_(scale).masked_fill_(scale == 0, 0)  # 0 x NaN: a caller that masks the loss means 0
        return (
            deliver_hidden_gradient(gradients.hidden, rows, weight.dtype, job.chosen.index),
            deliver_weight_gradient(gradients.weight, weight, is_added=gradients.is_added),
            None if gradients.bias is None else gradients.bias.to(weight.dtype),
            *(None, None, None),
        )
