"""full_distill_loss: the exact divergence over the whole vocabulary, from both models' logits.

Bound: memory; the statistics read both logits once, the loss a second time, the backward a third and
writes the gradient (over the student's logits with inplace_backward). Two collectives forward, of
[T, 10] and [T, 2]; none backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine import ops  # noqa: F401  (registers torch.ops.opd_engine)
from opd_engine.functional.agreement import check_together, check_upstream, describe_rows
from opd_engine.functional.arguments import (
    LogitRows,
    check_device,
    check_divergence,
    check_inplace_backward,
    check_logits,
    check_rows,
    debugging,
    shape_choice,
)
from opd_engine.ops.autograd import differentiable_once
from opd_engine.parallel.collectives import all_gather_stacked
from opd_engine.parallel.vocab import VocabShard, find_tiling_fault


def full_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    shard: VocabShard | None = None,
    teacher_vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """The divergence between student and teacher over the whole vocabulary, exact, in every row.

    Equation: docs/math.md (38), (39), its gradient (40)
    student_logits: [*, vocab_shard_size], float64, float32, bfloat16 or float16, any leading strides, final
    teacher_logits: [*, width] or flat [T, width], floating, no grad: the columns of the same shard. The vocabularies
        may differ: ids that only the teacher has are left out and its rest renormalised; ids that only the student
        has get p = 0. Column j is the same id on both sides
    divergence: "forward_kl", "reverse_kl", "jsd", "skew_forward_kl" or "skew_reverse_kl"
    beta: 0 <= beta <= 1, for jsd: 0 is forward_kl and 1 is reverse_kl by convention
    alpha: 0 <= alpha < 1, for the skewed ones
    temperature: float, or [*] or [T], finite and > 0; applied to both sides
    shard: which columns these are, of both models, and the student's vocab_size; None means the whole vocabulary
    teacher_vocab_size: the teacher's real vocabulary; None means shard.vocab_size, or the teacher's width where
        there is no shard
    inplace_backward: as in gather_log_probs, for the student's logits
    Returns: [*], float64 for float64 student logits, else float32.
    Raises: ValueError where an argument is not as above, the teacher requires grad, or the two are sharded at
        different boundaries (on every rank of the group for CPU tensors and under debug); for inplace_backward as in
        gather_log_probs; under debug, on every rank, for what is wrong or different on any.
    Communicates: forward, over shard.tp_group, an all-gather of both models' statistics, 40 T x tp_size bytes (and
        20 x tp_size for the shard bounds, where they are compared), and one of the partial sums, 8 T x tp_size bytes;
        float64 doubles both. Backward: nothing.
    Mutates: with inplace_backward the student's logits, in backward; their version counter says so to autograd.
    Precision: float64 for float64 student logits, else float32; a teacher of another precision is cast (a copy) only
        where exactly one of the two is float64.
    Grad: for student_logits, once differentiable; each shard receives its columns of the one-process gradient. A row
        whose upstream gradient is zero gets zeros, whatever it holds.
    """

    def check() -> tuple[LogitRows, Tensor, int, bool]:
        rows = check_rows(student_logits, temperature, shard, name="student_logits")
        teacher, vocab_size = _check_teacher(
            teacher_logits, student_logits, rows, teacher_vocab_size, shard is not None
        )
        if callable(divergence):
            raise ValueError("divergence: wanted the name of one; functions of TokenScores are for distill_loss")
        check_divergence(divergence, beta, alpha)
        inplace = bool(inplace_backward) and check_inplace_backward(student_logits, "student_logits")
        return rows, teacher, vocab_size, inplace

    device = student_logits.device if isinstance(student_logits, Tensor) else torch.device("cpu")
    rows, teacher, teacher_vocab, inplace = check_together(
        shard,
        device,
        check,
        lambda checked: {
            "divergence": divergence,
            "beta": beta if divergence == "jsd" else None,
            "alpha": alpha if divergence.startswith("skew_") else None,
            "teacher_vocab_size": checked[2],
            **describe_rows(checked[0]),
        },
    )
    loss = _FullDivergence.apply(
        rows.logits,
        teacher,
        rows.row_temperature,
        rows.temperature,
        rows.shard,
        teacher_vocab,
        (
            divergence,
            float(beta) if divergence == "jsd" else 0.5,
            float(alpha) if divergence.startswith("skew_") else 0.0,
        ),
        inplace,
    )
    return loss.view(rows.leading_shape)


def _check_teacher(
    teacher_logits: Tensor, student_logits: Tensor, rows: LogitRows, teacher_vocab_size: int | None, sharded: bool
) -> tuple[Tensor, int]:
    check_logits(teacher_logits, "teacher_logits")
    if teacher_logits.requires_grad:
        raise ValueError("teacher_logits: wanted constant logits, got a tensor that requires grad; use .detach()")
    check_device(teacher_logits, "teacher_logits", student_logits, "student_logits")
    if teacher_logits.shape[:-1] not in (rows.leading_shape, (rows.num_rows,)):
        wanted = shape_choice(rows.leading_shape, rows.num_rows, "vocab")
        raise ValueError(f"teacher_logits: wanted shape {wanted}, got {list(teacher_logits.shape)}")
    width = teacher_logits.size(-1)
    if teacher_vocab_size is None:
        vocab_size = rows.shard.vocab_size if sharded else width
    elif isinstance(teacher_vocab_size, bool) or not isinstance(teacher_vocab_size, int):
        raise ValueError(f"teacher_vocab_size: wanted an int or None, got {teacher_vocab_size!r}")
    else:
        vocab_size = teacher_vocab_size
    if vocab_size < 1:
        raise ValueError(f"teacher_vocab_size: wanted >= 1, got {vocab_size}")
    if rows.shard.merge_group is None:
        if width < vocab_size:
            raise ValueError(f"teacher_logits: wanted at least teacher_vocab_size = {vocab_size} columns, got {width}")
    elif not _reads_tilings(teacher_logits):
        # What this rank can tell alone; _FullDivergence compares all ranks where that costs no synchronisation.
        shared = min(rows.shard.vocab_size, vocab_size)
        local = rows.shard.local_vocab_size
        needed = min(max(shared - rows.shard.vocab_start_index, 0), local)
        if width < needed or (width != local and rows.shard.vocab_end_index < shared):
            raise ValueError(
                "teacher_logits: wanted the student's shard boundaries, "
                f"[{rows.shard.vocab_start_index}, {rows.shard.vocab_end_index}), got {width} columns"
            )
    rows_2d = teacher_logits if teacher_logits.dim() >= 2 else teacher_logits.unsqueeze(0)
    if (rows_2d.dtype == torch.float64) != (rows.score_dtype == torch.float64):
        rows_2d = rows_2d.to(rows.score_dtype)
    return rows_2d, vocab_size


def _reads_tilings(logits: Tensor) -> bool:
    """Whether the ranks' bounds are compared: on a GPU it would synchronise, and break the capture of a CUDA graph."""
    return logits.device.type == "cpu" or debugging()


def _merge_statistics(
    student: Tensor,
    teacher: Tensor,
    shard: VocabShard,
    teacher_vocab_size: int,
    temperature: float,
    row_temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both models' [T, 5] over the vocabulary: the teacher's over the ids that the two share."""
    shared = min(shard.vocab_size, teacher_vocab_size)
    sides = ((student, shard.vocab_size), (teacher, shared))
    empty = torch.empty((student.shape[:-1].numel(), 0), dtype=torch.int64, device=student.device)
    local, none = zip(
        *(
            torch.ops.opd_engine.gather_partials(
                logits, empty, None, shard.vocab_start_index, vocab_size, temperature, row_temperature
            )
            for logits, vocab_size in sides
        ),
        strict=True,
    )
    stacked = tuple(stats.unsqueeze(0) for stats in local)
    if (group := shard.merge_group) is not None:
        num_rows = empty.size(0)
        parts = list(local)
        if _reads_tilings(student):
            # Five numbers beside [2 T, 5]: both tilings cross with the statistics. float32 is exact below 2^24 ids.
            bounds = (shard.vocab_start_index, shard.vocab_end_index, teacher.size(-1), shard.vocab_size)
            parts.append(torch.tensor([(*bounds, teacher_vocab_size)], dtype=local[0].dtype, device=student.device))
        gathered = all_gather_stacked(torch.cat(parts), group)
        if _reads_tilings(student):
            check_tilings(gathered[:, -1].long().tolist())
        stacked = (gathered[:, :num_rows], gathered[:, num_rows : 2 * num_rows])
    merged = [
        torch.ops.opd_engine.merge_gather(
            stats.contiguous(), support, empty, None, vocab_size, temperature, row_temperature
        )[-1]
        for stats, support, (_, vocab_size) in zip(stacked, none, sides, strict=True)
    ]
    return merged[0], merged[1]


def check_tilings(bounds: list[list[int]], name: str = "teacher_logits") -> None:
    """Raise the same ValueError on every rank where the two models are not sharded at the same boundaries.

    bounds: (vocab_start_index, vocab_end_index, the teacher's width, vocab_size, teacher_vocab_size) in rank order
    """
    if (fault := find_tiling_fault([(start, end, size) for start, end, _, size, _ in bounds])) is not None:
        raise ValueError(fault)
    teachers = [(start, start + width, min(size, theirs)) for start, _, width, size, theirs in bounds]
    if (fault := find_tiling_fault(teachers)) is not None:
        student = ", ".join(f"[{start}, {end})" for start, end, *_ in bounds)
        raise ValueError(f"{name}: wanted the student's shard boundaries, {student} in rank order; {fault}")


class _FullDivergence(torch.autograd.Function):
    """Statistics, collective, sums, collective. Saves both logits, the merged statistics [T, 5] and the sums [T, 2]."""

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        shard: VocabShard,
        teacher_vocab_size: int,
        divergence: tuple[str, float, float],
        inplace: bool,
    ) -> Tensor:
        student_stats, teacher_stats = _merge_statistics(
            student, teacher, shard, teacher_vocab_size, temperature, row_temperature
        )
        scalars = (shard.vocab_start_index, shard.vocab_size, teacher_vocab_size, *divergence, temperature)
        stacked = all_gather_stacked(
            torch.ops.opd_engine.full_divergence(
                student, teacher, student_stats, teacher_stats, *scalars, row_temperature
            ),
            shard.merge_group,
        )
        sums = stacked[0]
        for other in stacked[1:].unbind(0):  # in rank order: the same bits on every rank
            sums = sums + other
        ctx.save_for_backward(student, teacher, student_stats, teacher_stats, row_temperature, sums)
        ctx.shard, ctx.scalars, ctx.inplace = shard, scalars, inplace
        ctx.debug = debugging()
        ctx.consumed = False
        return sums[:, 0].clone()

    @staticmethod
    @differentiable_once("full_distill_loss")
    def backward(ctx, grad_loss: Tensor):
        if ctx.consumed:
            raise RuntimeError(
                "full_distill_loss: a second backward through logits that inplace_backward has overwritten with "
                "their gradient"
            )
        student, teacher, student_stats, teacher_stats, row_temperature, sums = ctx.saved_tensors
        if ctx.debug:
            check_upstream(grad_loss.unsqueeze(1), ctx.shard, "full_distill_loss")
        arguments = (teacher, student_stats, teacher_stats, *ctx.scalars, row_temperature, sums, grad_loss.contiguous())
        if ctx.inplace:
            torch.ops.opd_engine.full_divergence_backward_(student, *arguments)
            # A raw op tells autograd nothing: without this, whoever else saved the logits would read the gradient.
            torch.autograd.graph.increment_version(student)
            ctx.consumed = True
            grad_student = student.detach()
        else:
            grad_student = torch.ops.opd_engine.full_divergence_backward(student, *arguments)
        return grad_student, None, None, None, None, None, None, None
