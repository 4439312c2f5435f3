"""reverse_kl on k + 1 buckets, forward and backward on logits: two reads, and one write of a fresh gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from opd_engine import TokenScores, distill_loss, gather_log_probs, topk_log_probs
from opd_engine.bench import reference
from opd_engine.bench.cases import eager
from opd_engine.bench.cases.workload import (
    GRADIENT_FLOPS,
    STATS_FLOPS,
    Workload,
    float64_rows,
    loss_mask,
)
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


@dataclasses.dataclass
class LossInputs:
    """What every implementation is given besides the logits; teacher_buckets [*, k + 1] has the tail last."""

    indices: Tensor
    teacher: TokenScores
    teacher_buckets: Tensor
    mask: Tensor


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours out of place, eager torch, torch.compile: each gives the loss and d loss / d logits."""
    logits = make_logits(shape, device)
    copies = cold_copies(logits).copies
    inputs = make_inputs(logits, shape)
    impls = [Impl("opd_engine", lambda z: ours(z, inputs), gradient, lambda i: leaf(copies[i]))]
    if shape.baselines:
        impls += baselines(inputs, lambda i: leaf(copies[i]))
    return Workload(impls, loss_error(shape, logits, inputs), *least_work(shape), len(copies))


def ours(logits: Tensor, inputs: LossInputs, *, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(sum over rows that count, loss per row, logits)."""
    student = gather_log_probs(logits, inputs.indices, inplace_backward=inplace)
    losses = distill_loss(student, inputs.teacher)
    return torch.where(inputs.mask, losses, 0).sum(), losses, logits


def baselines(inputs: LossInputs, prepare: Any) -> list[Impl]:
    """The same loss in torch, and compiled."""
    compiled = torch.compile(eager.bucket_losses, dynamic=False)

    def forward(formula: Any) -> Any:
        def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            losses = formula(logits, inputs.indices, inputs.teacher_buckets)
            return torch.where(inputs.mask, losses, 0).sum(), losses, logits

        return run

    return [
        Impl("torch_eager", forward(eager.bucket_losses), gradient, prepare),
        Impl("torch_compile", forward(compiled), gradient, prepare),
    ]


def gradient(forwarded: tuple[Tensor, Tensor | None, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Backward of the sum; the gradient is handed over, not accumulated."""
    total, losses, logits = forwarded
    return losses, torch.autograd.grad(total, logits)[0]


def leaf(buffer: Tensor) -> Tensor:
    """The buffer itself as a leaf that requires grad."""
    return buffer.detach().requires_grad_()


def make_inputs(logits: Tensor, shape: Shape) -> LossInputs:
    """The student's own top-k as the support, and a teacher that differs by noise of 0.5 nat in every bucket."""
    scores = topk_log_probs(logits, shape.k)
    buckets = torch.cat([scores.log_probs, scores.tail_log_prob.unsqueeze(-1)], -1)
    noise = torch.randn(buckets.shape, generator=torch.Generator().manual_seed(1), dtype=buckets.dtype)
    buckets = torch.log_softmax(buckets + 0.5 * noise.to(buckets.device), -1)
    log_probs, tail = buckets[..., :-1].contiguous(), buckets[..., -1].contiguous()
    teacher = TokenScores(indices=scores.indices, log_probs=log_probs, tail_log_prob=tail)
    return LossInputs(scores.indices, teacher, buckets, loss_mask(shape, logits.device).view(scores.leading_shape))


def least_work(shape: Shape, reads: int = 2) -> tuple[int, int]:
    """Rows that count are read twice, because their gradient needs the whole row's sums; every row is written.

    reads: 1 where the weights of the rows are known before the forward, so that a row is left with its gradient
    """
    live = max(1, round(shape.num_tokens * shape.mask_density)) / shape.num_tokens
    bytes_moved = round(shape.logits_bytes * (reads * live + 1)) + shape.num_tokens * 24 * shape.k
    return bytes_moved, round(shape.elements * live * (STATS_FLOPS + GRADIENT_FLOPS))


def loss_error(shape: Shape, logits: Tensor, inputs: LossInputs) -> Any:
    """Losses of the checked rows (where given) and the gradient in them, against autograd on the definition."""
    rows = checked_rows(shape)
    k = shape.k
    z = float64_rows(logits, shape).requires_grad_()
    buckets = inputs.teacher_buckets.reshape(-1, k + 1).cpu()[rows].double()
    mask = inputs.mask.reshape(-1).cpu()[rows]
    student = reference.scores(z, inputs.indices.reshape(-1, k).cpu()[rows])
    losses = reference.bucket_loss(student, {"log_probs": buckets[:, :k], "tail_log_prob": buckets[:, k]})
    (truth,) = torch.autograd.grad(torch.where(mask, losses, 0).sum(), z)
    losses = losses.detach()

    def error(got: tuple[Tensor | None, Tensor]) -> float:
        worst = reference.max_abs_err(take_rows(got[1], rows), truth)
        if got[0] is not None:
            ours = got[0].detach().reshape(-1).cpu()[rows]
            worst = max(worst, reference.max_abs_err(ours[mask], losses[mask]))
        return worst

    return error
