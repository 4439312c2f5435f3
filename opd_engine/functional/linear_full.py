"""linear_full_distill_loss: the exact divergence over the whole vocabulary, from both models' last hidden states.

Bound: arithmetic, three GEMMs of the student's head and one of the teacher's. What crosses from the teacher is its
hidden state, 2 bytes a channel in half precision, instead of 2 bytes a vocabulary entry. Two collectives a chunk under
tensor parallelism, of [n, 10] and [n, 2], while another chunk is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine import ops  # noqa: F401  (registers torch.ops.opd_engine)
from opd_engine.functional.arguments import check_divergence, debugging
from opd_engine.functional.full import check_tilings
from opd_engine.functional.linear_arguments import (
    Head,
    LinearRows,
    LossRows,
    agree_on_rows,
    check_grad_scale,
    check_head,
    check_linear_rows,
    check_loss_rows,
    flat_rows,
)
from opd_engine.functional.linear_chunks import ChunkLogits
from opd_engine.functional.linear_losses import LinearJob, LinearLoss, apply_linear_loss
from opd_engine.ops import NUM_STATS
from opd_engine.parallel.collectives import all_gather_json, start_all_gather_stacked
from opd_engine.parallel.vocab import VocabShard


def linear_full_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weights: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_softcap: float | None = None,
    teacher_vocab_size: int | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    loss_rows: Tensor | None = None,
    grad_scale: Tensor | None = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
) -> LinearLoss:
    """full_distill_loss of both models' LM heads, summed with weights, without any logits.

    A teacher's hidden states of 4,096 channels are 8 KB a token in bfloat16; its logits over 151,936 ids are 304 KB.

    Equation: docs/math.md (53), (54) for both models' logits, then (38), (39); gradients (40), (55) to (58)
    hidden: [*, hidden_size], float64, float32, bfloat16 or float16; the same on every rank of tp_group, or, with
        sequence_parallel, this rank's block of dim 0
    weight: [vocab_shard_size, hidden_size] of hidden's dtype: the LM head's rows of this shard (a tied embedding's too)
    teacher_hidden: [*, teacher_hidden_size] or flat, floating, no grad: the teacher's last hidden states of the same
        rows, split like hidden with sequence_parallel. Its width and its dtype are its own
    teacher_weight: [width, teacher_hidden_size] of teacher_hidden's dtype, no grad: the rows of the same shard of the
        teacher's head. The vocabularies may differ as in full_distill_loss; row j is the same id on both sides
    token_weights: [*] or flat [T], finite and >= 0, or bool, constant; None: ones. A row of weight 0 adds exactly 0
    teacher_bias: [width] of teacher_hidden's dtype, no grad, or None
    teacher_logit_softcap: the teacher's, as logit_softcap
    teacher_vocab_size: the teacher's real vocabulary; None means shard.vocab_size, or the teacher's width where there
        is no shard
    divergence: "forward_kl", "reverse_kl", "jsd", "skew_forward_kl" or "skew_reverse_kl"
    beta: 0 <= beta <= 1, for jsd: 0 is forward_kl and 1 is reverse_kl by convention
    alpha: 0 <= alpha < 1, for the skewed ones
    temperature: float, or [*] or [T], finite and > 0, a constant; applied to both sides
    bias: [vocab_shard_size] of hidden's dtype, or None
    logit_softcap: c > 0 for logits of c tanh(z / c), or None
    loss_rows: [n] int64, distinct row numbers in [0, T): the rows to compute at all, None for all. Build it on the
        host, so that its length is known; every other argument keeps its T rows
    grad_scale: [] floating, on hidden's device: as in linear_distill_loss
    shard: which rows of the heads these are, and the student's vocab_size; None means the whole vocabulary
    sequence_parallel: both models' hidden states are split over tp_group on dim 0; weights and token_losses have all
        T rows
    workspace_bytes: of both models' logits that exist at a time, None for 64 MiB on a CPU and 1.25 GiB / tp_size on a
        GPU; rows a chunk as in docs/math.md (59), the same on every rank. The weight's float32 gradient comes on top
    Returns: LinearLoss; float64 for float64 hidden states, else float32.
    Raises: ValueError where an argument is not as above, shapes or devices differ, something of the teacher requires
        grad, or the two heads are sharded at different boundaries (on every rank of the group for CPU tensors and under
        debug); otherwise as in linear_distill_loss.
    Communicates: forward, a chunk at a time, one all-gather of both models' statistics, 40 x tp_size bytes a row, and
        one of the partial sums, 8 x tp_size (float64: twice); where the boundaries are compared two small ones; with
        sequence_parallel first both models' hidden states. Backward: as in linear_distill_loss.
    Mutates: as in linear_distill_loss.
    Precision: as in linear_distill_loss, each head in its own dtype; a teacher of another precision is cast (a copy of
        a chunk) only where exactly one of the two is float64.
    Grad: as in linear_distill_loss.
    """

    def check() -> tuple[LinearRows, tuple[LossRows, Head, int]]:
        rows = check_linear_rows(
            hidden, weight, bias, logit_softcap, temperature, shard, sequence_parallel, workspace_bytes
        )
        chosen = check_loss_rows(rows, hidden, token_weights, loss_rows)
        check_grad_scale(grad_scale, hidden, weight)
        if callable(divergence):
            raise ValueError("divergence: wanted the name of one; functions of TokenScores are for buckets")
        check_divergence(divergence, beta, alpha)
        head = check_head(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_softcap, "teacher_")
        vocab_size = _check_teacher(teacher_hidden, head, hidden, rows, teacher_vocab_size, shard is not None)
        return rows, (chosen, head, vocab_size)

    rows, (chosen, teacher_head, vocab_size) = agree_on_rows(
        shard,
        hidden,
        check,
        lambda rows, checked: {
            **checked[0].description(),
            "teacher_vocab_size": checked[2],
            "teacher_logit_softcap": checked[1].softcap,
            "divergence": f"{divergence} {beta} {alpha}",
        },
    )
    if rows.shard.merge_group is not None and (hidden.device.type == "cpu" or debugging()):
        place = (rows.shard.vocab_start_index, rows.shard.vocab_end_index, teacher_weight.size(0))
        bounds = (*place, rows.shard.vocab_size, vocab_size)
        everybody = all_gather_json(bounds, rows.shard.merge_group, hidden.device, op="debug_all_gather")
        check_tilings(everybody, "teacher_weight")
    parameters = (
        float(beta) if divergence == "jsd" else 0.5,
        float(alpha) if divergence.startswith("skew_") else 0.0,
    )
    job = _FullJob(
        rows,
        chosen,
        teacher_hidden=rows.gather_hidden(flat_rows(teacher_hidden)),
        teacher_head=teacher_head,
        teacher_vocab_size=vocab_size,
        divergence=(divergence, *parameters),
    )
    return apply_linear_loss(job, flat_rows(hidden), weight, bias, grad_scale)


def _check_teacher(
    teacher_hidden: Tensor, head: Head, hidden: Tensor, rows: LinearRows, vocab_size: int | None, sharded: bool
) -> int:
    """The teacher's real vocabulary; raises ValueError for what this rank can tell alone."""
    for name, tensor in (
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", head.weight),
        ("teacher_bias", head.bias),
    ):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: wanted a constant, got a tensor that requires grad; use .detach()")
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden: wanted hidden's device, {hidden.device}, got {teacher_hidden.device}")
    here = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] not in (here, (here.numel(),)):
        raise ValueError(
            f"teacher_hidden: wanted the rows of hidden, {list(here)} or flat, got {list(teacher_hidden.shape[:-1])}"
        )
    width = head.weight.size(0)
    if vocab_size is None:
        vocab_size = rows.shard.vocab_size if sharded else width
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"teacher_vocab_size: wanted an int >= 1 or None, got {vocab_size!r}")
    if rows.shard.merge_group is None:
        if width < vocab_size:
            raise ValueError(f"teacher_weight: wanted at least teacher_vocab_size = {vocab_size} rows, got {width}")
        return vocab_size
    local, shared = rows.shard.local_vocab_size, min(rows.shard.vocab_size, vocab_size)
    needed = min(max(shared - rows.shard.vocab_start_index, 0), local)
    if not (hidden.device.type == "cpu" or debugging()) and (
        width < needed or (width != local and rows.shard.vocab_end_index < shared)
    ):
        raise ValueError(
            "teacher_weight: wanted the student's shard boundaries, "
            f"[{rows.shard.vocab_start_index}, {rows.shard.vocab_end_index}), got {width} rows"
        )
    return vocab_size


@dataclass(frozen=True)
class _FullJob(LinearJob):
    teacher_hidden: Tensor  # [T, teacher_hidden_size]
    teacher_head: Head
    teacher_vocab_size: int
    divergence: tuple[str, float, float]

    def row_bytes(self) -> int:
        tp_size = self.rows.shard.tp_size
        theirs = self.teacher_head.row_bytes(self.teacher_vocab_size, tp_size, with_gradient=False)
        return super().row_bytes() + theirs * self.chunks_in_flight()

    def buffers(self, head, max_rows, *, with_gradient):
        ours = ChunkLogits(head, max_rows, with_gradient=with_gradient)
        return ours, ChunkLogits(self.teacher_head, max_rows, with_gradient=False)

    def chunk(self, part, hidden, weights, buffers, losses, gradients):
        shard, temperature = self.rows.shard, self.row_temperature(part)
        shared = min(shard.vocab_size, self.teacher_vocab_size)
        student = buffers[0].compute(hidden)
        teacher = buffers[1].compute(self.chosen.take(self.teacher_hidden, part))
        if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
            teacher = teacher.to(self.rows.score_dtype)
        no_ids = torch.empty((student.size(0), 0), dtype=torch.int64, device=student.device)
        local = [
            torch.ops.opd_engine.gather_partials(
                logits, no_ids, None, shard.vocab_start_index, vocab_size, *temperature
            )
            for logits, vocab_size in ((student, shard.vocab_size), (teacher, shared))
        ]
        pending = start_all_gather_stacked(torch.cat([local[0][0], local[1][0]], 1), shard.merge_group)
        if pending.work is not None:
            yield
        statistics = [
            torch.ops.opd_engine.merge_gather(stats.contiguous(), local[0][1], no_ids, None, vocab_size, *temperature)[
                -1
            ]
            for stats, vocab_size in zip(pending.wait().split(NUM_STATS, -1), (shard.vocab_size, shared), strict=True)
        ]
        arguments = (teacher, *statistics, shard.vocab_start_index, shard.vocab_size, self.teacher_vocab_size)
        arguments = (*arguments, *self.divergence, *temperature)
        pending = start_all_gather_stacked(torch.ops.opd_engine.full_divergence(student, *arguments), shard.merge_group)
        if pending.work is not None:
            yield
        sums, *others = pending.wait().unbind(0)
        for other in others:  # in rank order: the same bits on every rank
            sums = sums + other
        losses[part] = sums[:, 0]
        if gradients is None:
            return
        torch.ops.opd_engine.full_divergence_backward_(student, *arguments, sums, weights)
        buffers[0].uncap_(student)
        gradients.add(part, student, hidden)
