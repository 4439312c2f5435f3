"""linear_topk_log_probs and linear_gather_log_probs: scores from hidden states and the LM head, without [T, V].

Bound: arithmetic, one GEMM (gather's backward: three, for the logits are computed again). Chunks of logits live in a
workspace; what stays of them is [T, k]. A backward cuts tiles: of the weight's size it makes the gradient and no more.
Under tensor parallelism each chunk's packed partials travel while the next chunk is multiplied, and the hidden gradient
is summed over ranks once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine import ops  # noqa: F401  (registers torch.ops.opd_engine)
from opd_engine.functional.agreement import check_upstream
from opd_engine.functional.arguments import check_ids, debugging
from opd_engine.functional.linear_arguments import (
    Head,
    LinearRows,
    agree_on_rows,
    check_linear_rows,
    describe_tensor,
    flat_rows,
)
from opd_engine.functional.linear_chunks import (
    ChunkLogits,
    TileGradients,
    chunks_of,
    outside_graphs,
    rows_a_chunk,
    take_turns,
    tiles_of,
)
from opd_engine.functional.linear_gradients import deliver_hidden_gradient, deliver_weight_gradient, weight_accumulator
from opd_engine.functional.token_scores import TokenScores
from opd_engine.ops import NUM_STATS
from opd_engine.ops.autograd import differentiable_once
from opd_engine.parallel.collectives import start_all_gather_stacked
from opd_engine.parallel.vocab import VocabShard


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
) -> TokenScores:
    """topk_log_probs of the LM head's logits, without the logits.

    Equation: docs/math.md (53), (54) for the logits; then (6) to (15)
    hidden: [*, hidden_size], float64, float32, bfloat16 or float16; the same on every rank of tp_group, or, with
        sequence_parallel, this rank's block of dim 0
    weight: [vocab_shard_size, hidden_size] of hidden's dtype: the LM head's rows of this shard (a tied embedding's too)
    k: 1 <= k <= vocab_size
    target: [*] or flat [T], integer or None: one further id a row to score; -1 or -100 means absent
    temperature: float, or [*] or [T], finite and > 0
    bias: [vocab_shard_size] of hidden's dtype, or None
    logit_softcap: c > 0 for logits of c tanh(z / c), or None
    shard: which rows of the head these are; None means the whole vocabulary
    sequence_parallel: hidden states are split over tp_group on dim 0; every output has all T rows
    workspace_bytes: of logits that exist at a time, None for 64 MiB on a CPU and 1.25 GiB / tp_size on a GPU. A chunk
        has max(1, workspace_bytes // (ceil(vocab_size / tp_size) x itemsize)) rows, the same on every rank
    Returns: TokenScores as of topk_log_probs, [*, k]. Ids depend on the order in which the product accumulates: they
        travel with the scores and are not to be computed again.
    Raises: ValueError where an argument is not as above; under debug as in topk_log_probs.
    Communicates: a chunk at a time, overlapped with the next chunk's product: what topk_log_probs does. With
        sequence_parallel first one all-gather of the hidden states.
    Mutates: nothing.
    Precision: the product accumulates in float32 and is rounded once to hidden's dtype, the soft-cap is computed in
        float32 and rounded once more (float64 stays float64); scores as in topk_log_probs. On a GPU the settings of
        torch.backends.cuda.matmul apply.
    Grad: none.
    """

    def check() -> tuple[LinearRows, Tensor | None]:
        rows = check_linear_rows(
            hidden, weight, bias, logit_softcap, temperature, shard, sequence_parallel, workspace_bytes
        )
        if isinstance(k, bool) or not isinstance(k, int):
            raise ValueError(f"k: wanted an int, got {k!r} ({type(k).__name__})")
        if not 1 <= k <= rows.shard.vocab_size:
            raise ValueError(f"k: wanted 1 <= k <= vocab_size = {rows.shard.vocab_size}, got {k}")
        return rows, None if target is None else check_ids(target, "target", hidden, rows, per_row=False)

    rows, flat_target = agree_on_rows(
        shard, hidden, check, lambda _, target: {"k": k, "target": describe_tensor(target)}
    )
    with torch.no_grad():
        outputs = _topk_chunks(rows, flat_rows(hidden.detach()), k, flat_target)
    return _token_scores(rows, outputs[0], outputs[1:], has_target=flat_target is not None)


@outside_graphs
def _topk_chunks(rows: LinearRows, hidden: Tensor, k: int, target: Tensor | None) -> list[Tensor]:
    """(indices, log_probs, tail_log_prob, lse, entropy, target_log_prob) of all rows."""
    shard, head = rows.shard, _detached(rows.head)
    hidden = rows.gather_hidden(hidden)
    size = rows_a_chunk(rows.workspace_bytes, head.row_bytes(shard.vocab_size, shard.tp_size, with_gradient=False))
    buffer = ChunkLogits(head, min(size, rows.num_rows), with_gradient=False)
    parts: list[tuple[Tensor, ...]] = []

    def chunk(part: slice) -> Iterator[None]:
        chunk_target = None if target is None else target[part]
        temperature = rows.temperature, None if rows.row_temperature is None else rows.row_temperature[part]
        packed = torch.ops.opd_engine.topk_partials(
            buffer.compute(hidden[part]), k, chunk_target, shard.vocab_start_index, shard.vocab_size, *temperature
        )
        pending = start_all_gather_stacked(packed, shard.merge_group)
        if pending.work is not None:
            yield
        parts.append(torch.ops.opd_engine.merge_topk(pending.wait(), k, chunk_target, shard.vocab_size, *temperature))

    # The partials hold all that a chunk leaves, so the chunk on the wire and the next one share the buffer.
    take_turns((chunk(part) for part in chunks_of(rows.num_rows, size) or [slice(0, 0)]), in_flight=2)
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def linear_gather_log_probs(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
) -> TokenScores:
    """gather_log_probs of the LM head's logits, without the logits: the backward computes them again, tile by tile.

    Equation: docs/math.md (53), (54) for the logits, then (6) to (13); backward (36), (55), (56), (60), shards (57)
    hidden: [*, hidden_size], float64, float32, bfloat16 or float16; the same on every rank of tp_group, or, with
        sequence_parallel, this rank's block of dim 0
    weight: [vocab_shard_size, hidden_size] of hidden's dtype: the LM head's rows of this shard (a tied embedding's too)
    indices: [*, k] or flat [T, k], integer, global ids, distinct in a row (of an id given twice the row's scores are
        NaN); -1 means absent; k = 0 is legal
    target: [*] or flat [T], integer or None: one further id a row to score, in the support or not; -1 or -100: absent
    temperature: float, or [*] or [T], finite and > 0, a constant
    bias: [vocab_shard_size] of hidden's dtype, or None
    logit_softcap: c > 0 for logits of c tanh(z / c), or None
    shard: which rows of the head these are; None means the whole vocabulary
    sequence_parallel: hidden states are split over tp_group on dim 0; every output has all T rows
    workspace_bytes: as in linear_topk_log_probs; the backward's tiles fit in it, a row's logits at least, two buffers
        of them with a soft-cap. The weight's gradient needs no wider copy of itself
    Returns: TokenScores as of gather_log_probs, [*, k].
    Raises: ValueError where an argument is not as above; under debug as in gather_log_probs.
    Communicates: forward, a chunk at a time and overlapped with the next chunk's product, one all-gather of
        (20 + 4 k) x tp_size bytes a row, 4 x tp_size more with a target (float64: twice); with sequence_parallel first
        one of the hidden states. Backward: one SUM all-reduce of the hidden gradient, 4 bytes an element (float64: 8);
        with sequence_parallel an all-gather of the hidden states and one SUM reduce-scatter instead. Every rank must
        compute the same loss from the scores and call backward.
    Mutates: weight.main_grad, in backward, where the weight carries one: the gradient is added there, then
        weight.grad_added_to_main_grad is set where it exists, and autograd sees zeros (None where it does not exist).
    Precision: as in linear_topk_log_probs; the gradient of the logits is rounded to their dtype, its products
        accumulate in float32 (float64 for float64) over all tiles, and are rounded last.
    Grad: for hidden, weight and bias, once differentiable; each rank's weight and bias gradients are its rows of the
        one-process gradient, its hidden gradient is the whole one (its block under sequence_parallel).
    """

    def check() -> tuple[LinearRows, tuple[Tensor, Tensor | None]]:
        rows = check_linear_rows(
            hidden, weight, bias, logit_softcap, temperature, shard, sequence_parallel, workspace_bytes
        )
        flat_indices = check_ids(indices, "indices", hidden, rows, per_row=True, distinct=True)
        flat_target = None if target is None else check_ids(target, "target", hidden, rows, per_row=False)
        return rows, (flat_indices, flat_target)

    rows, (flat_indices, flat_target) = agree_on_rows(
        shard,
        hidden,
        check,
        lambda _, ids: {"indices": describe_tensor(ids[0]), "target": describe_tensor(ids[1])},
    )
    row_scores = _gather(flat_rows(hidden), _GatherJob(rows, flat_indices, flat_target))
    return _token_scores(rows, flat_indices, row_scores, has_target=flat_target is not None)


@outside_graphs
def _gather(hidden: Tensor, job: _GatherJob) -> tuple[Tensor, ...]:
    return _LinearGather.apply(hidden, job.rows.head.weight, job.rows.head.bias, job)


@dataclass(frozen=True)
class _GatherJob:
    """All that is constant in one call: chunks of rows in its forward, tiles in its backward, which knows lse.

    Both put their logits together of the same products, a chunk's rows and a block's columns each, so that the
    backward's are those that made the statistics, bit for bit. Were they off by a rounding, so would be a sure row's
    q - 1, whose own value may be far smaller.
    """

    rows: LinearRows
    indices: Tensor  # [T, k]
    target: Tensor | None  # [T]

    def cut(self, head: Head) -> tuple[int, list[slice], list[slice]]:
        """(rows a chunk, a tile's rows, a block's columns); chunks are cut alike on every rank."""
        shard = self.rows.shard
        one_row = -(-shard.vocab_size // shard.tp_size)
        row_bytes = head.row_bytes(shard.vocab_size, shard.tp_size, with_gradient=True)
        size = min(rows_a_chunk(self.rows.workspace_bytes, row_bytes), max(self.rows.num_rows, 1))
        num_logits = max(one_row, self.rows.workspace_bytes * one_row // row_bytes)
        return size, *tiles_of(self.rows.num_rows, head.weight.size(0), num_logits, size)

    def row_arguments(self, part: slice) -> tuple[Tensor, Tensor | None, tuple[float, Tensor | None]]:
        rows = self.rows
        target = None if self.target is None else self.target[part]
        return (
            self.indices[part],
            target,
            (rows.temperature, None if rows.row_temperature is None else rows.row_temperature[part]),
        )

    def scores(self, hidden: Tensor, head: Head) -> list[Tensor]:
        """(log_probs, tail_log_prob, lse, entropy, target_log_prob, statistics) of all rows."""
        shard = self.rows.shard
        size, _, blocks = self.cut(head)
        buffer = ChunkLogits(head, min(size, hidden.size(0)), with_gradient=False)
        parts: list[tuple[Tensor, ...]] = []

        def chunk(part: slice) -> Iterator[None]:
            indices, target, temperature = self.row_arguments(part)
            stats, support_logits = torch.ops.opd_engine.gather_partials(
                *(buffer.compute(hidden[part], blocks=blocks), indices, target, shard.vocab_start_index),
                *(shard.vocab_size, *temperature),
            )
            if shard.merge_group is None:
                stats = stats.unsqueeze(0)
            else:
                pending = start_all_gather_stacked(torch.cat([stats, support_logits], 1), shard.merge_group)
                yield
                stats, support_logits = unpack_gather(pending.wait())
            parts.append(
                torch.ops.opd_engine.merge_gather(
                    stats, support_logits, indices, target, shard.vocab_size, *temperature
                )
            )

        take_turns((chunk(part) for part in chunks_of(hidden.size(0), size) or [slice(0, 0)]), in_flight=2)
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def gradients(
        self, hidden: Tensor, head: Head, stats: Tensor, upstream: Tensor, gradients: TileGradients
    ) -> TileGradients:
        """Every tile's logits again, their gradient over them, its products. To the kernel a block is a shard."""
        shard = self.rows.shard
        size, tiles, blocks = self.cut(head)
        widest = max((block.stop - block.start for block in blocks), default=0)
        buffer = ChunkLogits(head, tiles[0].stop, with_gradient=True, max_columns=widest)
        for block in blocks:
            for part in tiles:
                indices, target, temperature = self.row_arguments(part)
                logits = buffer.compute(hidden[part], chunks=chunks_of(part.stop - part.start, size), blocks=[block])
                place = (shard.vocab_start_index + block.start, shard.vocab_size, *temperature)
                torch.ops.opd_engine.scores_backward_(logits, indices, target, stats[part], upstream[part], *place)
                buffer.uncap_(logits)
                gradients.add(part, block, logits, hidden[part])
        return gradients


def unpack_gather(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """(statistics [tp_size, T, 5], support logits [T, k]) of all ranks' packed [T, 5 + k].

    Each id has one owner and is 0 elsewhere: the sum is exact, in any order.
    """
    return gathered[..., :NUM_STATS].contiguous(), gathered[..., NUM_STATS:].sum(0)


class _LinearGather(torch.autograd.Function):
    """Saves the hidden states, the head's own tensors and [T, 5]; ids and temperatures are the job's."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _GatherJob) -> tuple[Tensor, ...]:
        head = Head(weight, bias, job.rows.head.softcap)
        *row_scores, stats = job.scores(job.rows.gather_hidden(hidden), head)
        ctx.save_for_backward(hidden, weight, bias, stats)
        ctx.set_materialize_grads(False)
        ctx.job = job
        ctx.debug = debugging()
        return tuple(row_scores)

    @staticmethod
    @differentiable_once("linear_gather_log_probs")
    def backward(ctx, d_log_probs, d_tail, d_lse, d_entropy, d_target):
        hidden, weight, bias, stats = ctx.saved_tensors
        job, rows = ctx.job, ctx.job.rows
        num_rows, k = job.indices.shape
        upstream = stats.new_zeros((num_rows, k + 4))
        if d_log_probs is not None:
            upstream[:, :k] = d_log_probs
        for column, grad in enumerate((d_tail, d_lse, d_entropy, d_target if job.target is not None else None), k):
            if grad is not None:
                upstream[:, column] = grad
        if ctx.debug:
            check_upstream(upstream, rows.shard, "linear_gather_log_probs")
        head = Head(weight, bias, rows.head.softcap)
        needs = ctx.needs_input_grad[:3]
        everything = rows.gather_hidden(hidden)
        into = weight_accumulator(rows.head.weight) if needs[1] else None
        gradients = TileGradients(head, num_rows, needs, into)
        job.gradients(everything, head, stats, upstream, gradients)
        return (
            deliver_hidden_gradient(gradients.hidden, rows, hidden.dtype),
            deliver_weight_gradient(gradients.weight, rows.head.weight, is_added=into is not None),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            None,
        )


def _detached(head: Head) -> Head:
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.softcap)


def _token_scores(
    rows: LinearRows, indices: Tensor, row_scores: tuple[Tensor, ...] | list[Tensor], *, has_target: bool
) -> TokenScores:
    """The flat outputs, under the hidden states' leading shape."""
    log_probs, tail_log_prob, lse, entropy, target_log_prob = row_scores
    k = indices.size(-1)
    return TokenScores(
        indices=indices.view(*rows.leading_shape, k),
        log_probs=log_probs.view(*rows.leading_shape, k),
        tail_log_prob=tail_log_prob.view(rows.leading_shape),
        lse=lse.view(rows.leading_shape),
        entropy=entropy.view(rows.leading_shape),
        target_log_prob=target_log_prob.view(rows.leading_shape) if has_target else None,
    )
