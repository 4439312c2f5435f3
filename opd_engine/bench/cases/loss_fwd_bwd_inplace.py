"""The same loss with the gradient written over the logits: nothing of their size is allocated.

The baselines cannot do that and are the same as out of place. Logits are put back between samples, untimed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.bench.cases.loss_fwd_bwd import (
    baselines,
    gradient,
    leaf,
    least_work,
    loss_error,
    make_inputs,
    ours,
)
from opd_engine.bench.cases.workload import Produced, Workload
from opd_engine.bench.logits import cold_copies, make_logits
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours in place; the op that needs one read and one write, its upstream weights known; the baselines."""
    logits = make_logits(shape, device)
    cold = cold_copies(logits, overwritten=True)
    inputs = make_inputs(logits, shape)
    anchor = torch.zeros((), device=device, requires_grad=True)
    k = shape.k
    indices = inputs.indices.reshape(-1, k)
    teacher = inputs.teacher.reshape(-1)
    weights = inputs.mask.reshape(-1).to(teacher.tail_log_prob.dtype)

    def one_pass(z: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.ops.opd_engine.distill_loss_(
            *(z, indices, teacher.log_probs, teacher.tail_log_prob, weights, "reverse_kl", 0.5, 0.0, "bucket"),
            *(None, shape.vocab_size, 1.0, None),
        )
        return losses, z

    impls = [
        Impl(
            "opd_engine",
            lambda z: ours(z, inputs, inplace=True),
            gradient,
            lambda i: Produced.apply(anchor, cold.copies[i]),
            cold.restore,
        ),
        Impl("opd_ablation_one_pass", one_pass, None, cold.copies.__getitem__, cold.restore),
    ]
    if shape.baselines:
        impls += baselines(inputs, lambda i: leaf(cold.copies[i]))
    return Workload(impls, loss_error(shape, logits, inputs), *least_work(shape), len(cold.copies))
