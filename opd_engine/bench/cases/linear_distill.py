"""reverse_kl on k + 1 buckets from hidden states and the LM head, forward + backward: three products.

With fewer rows that count, ours leaves the others out of the products (loss_rows); whoever makes logits cannot.
"""

from __future__ import annotations

import torch

from opd_engine import distill_loss, gather_log_probs, linear_distill_loss
from opd_engine.bench import reference
from opd_engine.bench.cases import eager
from opd_engine.bench.cases.linear_inputs import gradients, least_work, loss_truth, make_inputs, workspace_ablations
from opd_engine.bench.cases.workload import Workload
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours at several workspaces, the engine on logits that exist, eager torch, torch.compile."""
    inputs = make_inputs(shape, device)
    teacher, mask = inputs.teacher(), inputs.mask
    buckets = torch.cat([teacher.log_probs, teacher.tail_log_prob.unsqueeze(-1)], -1)
    rows = inputs.rows

    def ours(workspace_bytes: int) -> Impl:
        def forward(leaves):
            got = linear_distill_loss(*leaves, teacher, loss_rows=rows, workspace_bytes=workspace_bytes)
            return got.loss, got.token_losses, leaves

        return Impl("opd_engine", forward, gradients, inputs.leaves)

    def through_logits(leaves):
        student = gather_log_probs(leaves[0] @ leaves[1].t(), teacher.indices, inplace_backward=True)
        losses = torch.where(mask, distill_loss(student, teacher), 0)
        return losses.sum(), losses, leaves

    def by_torch(formula):
        def forward(leaves):
            losses = torch.where(mask, formula(leaves[0] @ leaves[1].t(), teacher.indices, buckets), 0)
            return losses.sum(), losses, leaves

        return forward

    impls = [ours(inputs.workspace_bytes)]
    impls.append(Impl("opd_ablation_through_logits", through_logits, gradients, inputs.leaves))
    if shape.baselines:
        impls += workspace_ablations(shape, device, ours)
        compiled = torch.compile(eager.bucket_losses, dynamic=False)
        impls.append(Impl("torch_eager", by_torch(eager.bucket_losses), gradients, inputs.leaves))
        impls.append(Impl("torch_compile", by_torch(compiled), gradients, inputs.leaves))

    def definition(z, part):
        constant = {
            "log_probs": teacher.log_probs[part].double(),
            "tail_log_prob": teacher.tail_log_prob[part].double(),
        }
        return reference.bucket_loss(reference.scores(z, teacher.indices[part]), constant)

    return Workload(impls, loss_truth(inputs, definition).error, *least_work(shape, 3), 1)
