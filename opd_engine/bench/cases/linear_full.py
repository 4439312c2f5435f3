"""reverse_kl over the whole vocabulary from both models' hidden states, forward + backward: three products and one."""

from __future__ import annotations

import torch

from opd_engine import full_distill_loss, linear_full_distill_loss
from opd_engine.bench import reference
from opd_engine.bench.cases import competitors, eager
from opd_engine.bench.cases.linear_inputs import (
    TEACHER_WIDTH,
    float64_logits,
    gradients,
    least_work,
    loss_truth,
    make_inputs,
    workspace_ablations,
)
from opd_engine.bench.cases.workload import DIVERGENCE_FLOPS, STATS_FLOPS, Workload
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours at several workspaces, the engine on logits that exist, eager torch, torch.compile, Liger's fused JSD."""
    inputs, theirs = make_inputs(shape, device), make_inputs(shape, device, width=TEACHER_WIDTH, seed=1)
    mask, rows = inputs.mask, inputs.rows

    def ours(workspace_bytes: int) -> Impl:
        def forward(leaves):
            got = linear_full_distill_loss(
                *(*leaves, theirs.hidden, theirs.weight), loss_rows=rows, workspace_bytes=workspace_bytes
            )
            return got.loss, got.token_losses, leaves

        return Impl("opd_engine", forward, gradients, inputs.leaves)

    def through(formula, **more):
        def forward(leaves):
            losses = formula(leaves[0] @ leaves[1].t(), theirs.hidden @ theirs.weight.t(), **more)
            losses = torch.where(mask, losses, 0)
            return losses.sum(), losses, leaves

        return forward

    engine = through(full_distill_loss, inplace_backward=True)
    impls = [ours(inputs.workspace_bytes), Impl("opd_ablation_through_logits", engine, gradients, inputs.leaves)]
    absent: dict[str, str] = {}
    if shape.baselines:
        impls += workspace_ablations(shape, device, ours)
        compiled = torch.compile(eager.full_losses, dynamic=False)
        impls.append(Impl("torch_eager", through(eager.full_losses), gradients, inputs.leaves))
        impls.append(Impl("torch_compile", through(compiled), gradients, inputs.leaves))
        more, absent = competitors.linear_jsd(shape, device, inputs.leaves, gradients, theirs.hidden, theirs.weight)
        impls += more if shape.mask_density == 1 else []

    def definition(z, part):
        return reference.full_loss(z, float64_logits(theirs, part))

    bytes_moved, flops = least_work(shape, 3)
    more_bytes, more_flops = least_work(shape, 1, TEACHER_WIDTH * shape.hidden_size)
    kernels = round(shape.elements * shape.mask_density) * (2 * STATS_FLOPS + DIVERGENCE_FLOPS)
    work = bytes_moved + more_bytes, flops + more_flops + kernels
    return Workload(impls, loss_truth(inputs, definition).error, *work, 1, absent)
