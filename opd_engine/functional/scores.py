"""topk_log_probs and gather_log_probs: a support's log-probabilities under the whole vocabulary, sharded or not.

Bound: memory; each reads the logits once (gather's backward reads them a second time and writes the gradient).
Under tensor parallelism: partials on the shard, one packed all-gather, a merge in rank order, the same bits everywhere.
Nothing of the logits' size is created but the gradient, and with inplace_backward not even that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine import ops  # noqa: F401  (registers torch.ops.opd_engine)
from opd_engine.functional.agreement import check_together, check_upstream, describe_rows
from opd_engine.functional.arguments import (
    LogitRows,
    check_ids,
    check_inplace_backward,
    check_rows,
    debugging,
)
from opd_engine.functional.token_scores import TokenScores
from opd_engine.ops.autograd import differentiable_once
from opd_engine.parallel.collectives import all_gather_stacked, all_reduce_sum_
from opd_engine.parallel.vocab import VocabShard

LOSS_REDUCTIONS = ("replicated", "partial")


def topk_log_probs(
    logits: Tensor,
    k: int,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    shard: VocabShard | None = None,
) -> TokenScores:
    """The k most likely ids of every row, with their log-probabilities and the mass of all others.

    Order: value descending, then global id ascending; -0.0 equals +0.0.
    Equation: docs/math.md (6) to (9), order and merge (10) to (15)
    logits: [*, vocab_shard_size], float64, float32, bfloat16 or float16, any leading strides, final (soft-capped)
    k: 1 <= k <= vocab_size
    target: [*] or flat [T], integer or None: one further id a row to score; -1 or -100 means absent
    temperature: float, or [*] or [T], finite and > 0
    shard: which columns these are; None means the whole vocabulary
    Returns: TokenScores with every field but, without a target, target_log_prob. A row with fewer than k finite
        columns has ids of -1 behind them; a row with NaN or +inf, or with no finite one, NaN and ids of -1.
    Raises: ValueError where an argument is not as above; under debug also for target ids out of range, and on every
        rank of the group for what is wrong or different on any.
    Communicates: one packed all-gather over shard.tp_group: (8 k + 20) x tp_size bytes a row, 4 x tp_size more with a
        target; float64 doubles all but the k int32 ids.
    Mutates: nothing.
    Precision: scores in float64 for float64 logits, else float32, accumulated in that.
    Grad: none.
    Source: the total order and the shard merge are this project's; the one-pass statistics are the online softmax
        (Milakov and Gimelshein, 2018).
    """

    def check() -> tuple[LogitRows, Tensor | None]:
        rows = check_rows(logits, temperature, shard)
        if isinstance(k, bool) or not isinstance(k, int):
            raise ValueError(f"k: wanted an int, got {k!r} ({type(k).__name__})")
        if not 1 <= k <= rows.shard.vocab_size:
            raise ValueError(f"k: wanted 1 <= k <= vocab_size = {rows.shard.vocab_size}, got {k}")
        return rows, None if target is None else check_ids(target, "target", logits, rows, per_row=False)

    rows, flat_target = check_together(
        shard, _device(logits), check, lambda checked: {"k": k, **describe_rows(checked[0], target=checked[1])}
    )
    values = rows.logits.detach() if rows.logits.requires_grad else rows.logits
    group, vocab_size = rows.shard.merge_group, rows.shard.vocab_size
    rest = (rows.temperature, rows.row_temperature)
    if group is None:
        indices, *row_scores = torch.ops.opd_engine.topk_log_probs(values, k, flat_target, vocab_size, *rest)
    else:
        packed = torch.ops.opd_engine.topk_partials(
            values, k, flat_target, rows.shard.vocab_start_index, vocab_size, *rest
        )
        stacked = all_gather_stacked(packed, group)
        indices, *row_scores = torch.ops.opd_engine.merge_topk(stacked, k, flat_target, vocab_size, *rest)
    return _token_scores(rows, indices, row_scores, has_target=flat_target is not None)


def gather_log_probs(
    logits: Tensor,
    indices: Tensor,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    loss_reduction: str = "replicated",
) -> TokenScores:
    """The log-probabilities of given ids, and the mass of all others, differentiable with respect to the logits.

    Equation: docs/math.md (6) to (13), backward (36), (37), shards (49), (50)
    logits: [*, vocab_shard_size], float64, float32, bfloat16 or float16, any leading strides, final (soft-capped)
    indices: [*, k] or flat [T, k], integer, global ids, distinct in a row (of an id given twice the row's scores are
        NaN); -1 means absent; k = 0 is legal
    target: [*] or flat [T], integer or None: one further id a row to score, in the support or not; -1 or -100: absent
    temperature: float, or [*] or [T], finite and > 0, a constant
    shard: which columns these are; None means the whole vocabulary
    inplace_backward: the backward writes the gradient over the logits. For logits that an operation computed and
        that nobody reads after backward; ignored where they do not require grad and under torch.compile, which
        plans the memory itself
    loss_reduction: "replicated" where every rank of tp_group computes the same loss from these scores; "partial"
        where each holds a part of the sum (as under sequence parallelism)
    Returns: TokenScores with every field but, without a target, target_log_prob.
    Raises: ValueError where an argument is not as above, and for inplace_backward on a leaf, a view of a leaf, or
        logits with two elements at one address; under debug also for ids out of range or twice in a row, and on every
        rank of the group for what is wrong or different on any, upstream gradients included. RuntimeError for a second
        backward through overwritten logits.
    Communicates: forward, one packed all-gather of 20 x tp_size bytes a row and one SUM all-reduce of 4 k bytes a row
        over shard.tp_group, 4 more with a target; float64 doubles both. Backward: nothing when "replicated"; when
        "partial" one SUM all-reduce of the [T, k + 4] upstream gradients, so every rank must call backward.
    Mutates: with inplace_backward the logits, in backward; their version counter says so to autograd.
    Precision: scores in float64 for float64 logits, else float32; the gradient is computed in that and rounded to the
        logits' dtype once, last.
    Grad: for logits, once differentiable; each shard receives its columns of the one-process gradient. A row whose
        upstream gradients are all zero gets zeros, whatever it holds.
    """

    def check() -> tuple[LogitRows, Tensor, Tensor | None, bool]:
        rows = check_rows(logits, temperature, shard)
        flat_indices = check_ids(indices, "indices", logits, rows, per_row=True, distinct=True)
        flat_target = None if target is None else check_ids(target, "target", logits, rows, per_row=False)
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction: wanted one of {', '.join(LOSS_REDUCTIONS)}, got {loss_reduction!r}")
        inplace = bool(inplace_backward) and check_inplace_backward(logits, "logits")
        return rows, flat_indices, flat_target, inplace

    rows, flat_indices, flat_target, inplace = check_together(
        shard,
        _device(logits),
        check,
        lambda checked: {
            "loss_reduction": loss_reduction,
            **describe_rows(checked[0], indices=checked[1], target=checked[2]),
        },
    )
    row_scores = _GatherScores.apply(
        rows.logits,
        flat_indices,
        flat_target,
        rows.row_temperature,
        rows.temperature,
        rows.shard,
        inplace,
        loss_reduction == "partial",
    )
    return _token_scores(rows, flat_indices, row_scores, has_target=flat_target is not None)


def _device(logits: object) -> torch.device:
    return logits.device if isinstance(logits, Tensor) else torch.device("cpu")


def _token_scores(rows: LogitRows, indices: Tensor, row_scores: tuple[Tensor, ...], *, has_target: bool) -> TokenScores:
    """The merge's flat outputs, under the logits' leading shape."""
    log_probs, tail_log_prob, lse, entropy, target_log_prob = row_scores
    if len(rows.leading_shape) != 1:
        k = indices.size(-1)
        indices, log_probs = (value.view(*rows.leading_shape, k) for value in (indices, log_probs))
        tail_log_prob, lse, entropy = (value.view(rows.leading_shape) for value in (tail_log_prob, lse, entropy))
        target_log_prob = target_log_prob.view(rows.leading_shape) if has_target else None
    return TokenScores.of_checked(
        indices=indices,
        log_probs=log_probs,
        tail_log_prob=tail_log_prob,
        lse=lse,
        entropy=entropy,
        target_log_prob=target_log_prob if has_target else None,
    )


class _GatherScores(torch.autograd.Function):
    """Partials, collective, merge; and the one backward for all scores. Saves the logits themselves, ids and [T, 5]."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        indices: Tensor,
        target: Tensor | None,
        row_temperature: Tensor | None,
        temperature: float,
        shard: VocabShard,
        inplace: bool,
        partial: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        group, vocab_size = shard.merge_group, shard.vocab_size
        rest = (temperature, row_temperature)
        if group is None:
            *row_scores, merged = torch.ops.opd_engine.gather_log_probs(logits, indices, target, vocab_size, *rest)
        else:
            stats, support_logits = torch.ops.opd_engine.gather_partials(
                logits, indices, target, shard.vocab_start_index, vocab_size, *rest
            )
            stacked = all_gather_stacked(stats, group)
            # Each id has one owner and is 0 elsewhere: the sum is exact, in any order.
            all_reduce_sum_(support_logits, group)
            *row_scores, merged = torch.ops.opd_engine.merge_gather(
                stacked, support_logits, indices, target, vocab_size, *rest
            )
        ctx.save_for_backward(logits, indices, target, row_temperature, merged)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.shard, ctx.inplace, ctx.partial = temperature, shard, inplace, partial
        ctx.debug = debugging()
        ctx.consumed = False
        return tuple(row_scores)

    @staticmethod
    @differentiable_once("gather_log_probs")
    def backward(ctx, d_log_probs, d_tail, d_lse, d_entropy, d_target):
        if ctx.consumed:
            raise RuntimeError(
                "gather_log_probs: a second backward through logits that inplace_backward has overwritten with "
                "their gradient"
            )
        logits, indices, target, row_temperature, stats = ctx.saved_tensors
        num_rows, k = indices.shape
        # [T, k + 4]: one tensor for the kernel, and the unit of communication when "partial".
        upstream = stats.new_zeros((num_rows, k + 4))
        if d_log_probs is not None:
            upstream[:, :k] = d_log_probs
        for column, grad in enumerate((d_tail, d_lse, d_entropy, d_target if target is not None else None), start=k):
            if grad is not None:
                upstream[:, column] = grad
        shard = ctx.shard
        if ctx.partial:
            all_reduce_sum_(upstream, shard.merge_group)
        elif ctx.debug:
            check_upstream(upstream, shard, "gather_log_probs")
        rest = (upstream, shard.vocab_start_index, shard.vocab_size, ctx.temperature, row_temperature)
        if ctx.inplace:
            torch.ops.opd_engine.scores_backward_(logits, indices, target, stats, *rest)
            # A raw op tells autograd nothing: without this, whoever else saved the logits would read the gradient.
            torch.autograd.graph.increment_version(logits)
            ctx.consumed = True
            grad_logits = logits.detach()
        else:
            grad_logits = torch.ops.opd_engine.scores_backward(logits, indices, target, stats, *rest)
        return grad_logits, None, None, None, None, None, None, None
