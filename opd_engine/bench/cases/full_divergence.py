"""reverse_kl over the whole vocabulary, forward and backward: both logits read, the student's gradient written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_engine import full_distill_loss
from opd_engine.bench import reference
from opd_engine.bench.cases import competitors, eager
from opd_engine.bench.cases.loss_fwd_bwd import gradient, leaf
from opd_engine.bench.cases.workload import DIVERGENCE_FLOPS, STATS_FLOPS, Workload, float64_rows
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours, eager torch, torch.compile, Liger."""
    student, teacher = make_logits(shape, device), make_logits(shape, device, seed=1)
    copies, teachers = cold_copies(student).copies, cold_copies(teacher).copies

    def prepare(number: int) -> tuple[Tensor, Tensor]:
        return leaf(copies[number]), teachers[number]

    def forward(formula: Any) -> Any:
        def run(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            losses = formula(*both)
            return losses.sum(), losses, both[0]

        return run

    impls = [Impl("opd_engine", forward(full_distill_loss), gradient, prepare)]
    absent: dict[str, str] = {}
    if shape.baselines:
        compiled = torch.compile(eager.full_losses, dynamic=False)
        impls.append(Impl("torch_eager", forward(eager.full_losses), gradient, prepare))
        impls.append(Impl("torch_compile", forward(compiled), gradient, prepare))
        more, absent = competitors.full_divergence(shape, device, lambda i: leaf(copies[i]), gradient, teacher)
        impls += more
    # Each model's statistics need its whole row before a gradient exists: two reads of both, one write.
    bytes_moved = 5 * shape.logits_bytes
    flops = (2 * STATS_FLOPS + DIVERGENCE_FLOPS) * shape.elements
    return Workload(impls, _error(shape, student, teacher), bytes_moved, flops, len(copies), absent)


def _error(shape: Shape, student: Tensor, teacher: Tensor) -> Any:
    rows = checked_rows(shape)
    z = float64_rows(student, shape).requires_grad_()
    losses = reference.full_loss(z, float64_rows(teacher, shape))
    (truth,) = torch.autograd.grad(losses.sum(), z)
    losses = losses.detach()

    def error(got: tuple[Tensor | None, Tensor]) -> float:
        worst = reference.max_abs_err(take_rows(got[1], rows), truth)
        if got[0] is not None:
            worst = max(worst, reference.max_abs_err(got[0].detach().reshape(-1).cpu()[rows], losses))
        return worst

    return error
