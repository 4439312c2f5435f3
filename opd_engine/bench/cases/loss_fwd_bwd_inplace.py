"""The same loss with the gradient written over the logits: nothing of their size is allocated.

The baselines cannot do that and are the same as out of place; at k = 1 there are cross entropies that can, each checked
against a definition of its own: -log q(target), what a teacher sure of one id asks for. Logits are put back between
samples, untimed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd_engine.bench import reference
from opd_engine.bench.cases import competitors
from opd_engine.bench.cases.loss_fwd_bwd import (
    baselines,
    gradient,
    leaf,
    least_work,
    loss_error,
    make_inputs,
    ours,
)
from opd_engine.bench.cases.workload import Produced, Workload, float64_rows
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
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

    def produced(number: int) -> Tensor:
        return Produced.apply(anchor, cold.copies[number])

    once = {"least_work": least_work(shape, reads=1)}
    impls = [
        Impl("opd_engine", lambda z: ours(z, inputs, inplace=True), gradient, produced, cold.restore),
        Impl("opd_ablation_one_pass", one_pass, None, cold.copies.__getitem__, cold.restore, **once),
    ]
    absent: dict[str, str] = {}
    if shape.baselines:
        impls += baselines(inputs, lambda i: leaf(cold.copies[i]))
        if k == 1 and shape.layout == "rows":
            target = indices[:, 0].masked_fill(~inputs.mask.reshape(-1), -100)
            error = cross_entropy_error(shape, logits, target)
            more, absent = competitors.cross_entropy(device, produced, cold.restore, gradient, target, error)
            impls += more
    return Workload(impls, loss_error(shape, logits, inputs), *least_work(shape), len(cold.copies), absent)


def cross_entropy_error(shape: Shape, logits: Tensor, target: Tensor) -> Callable[[tuple[None, Tensor]], float]:
    """The check of (None, gradient) of the sum of -log q(target) over rows whose target is not -100."""
    rows = checked_rows(shape)
    z = float64_rows(logits, shape).requires_grad_()
    asked = target.cpu()[rows]
    log_q = z.log_softmax(-1).gather(-1, asked.clamp(min=0)[:, None])[:, 0]
    (truth,) = torch.autograd.grad(-log_q[asked >= 0].sum(), z)
    return lambda got: reference.max_abs_err(take_rows(got[1], rows), truth)
