"""Hidden states and LM heads of the linear_* cases, their float64 truth, and the least work.

tp_size > 1 measures one rank's products and kernels on its share of the vocabulary; no message is sent. Gradients are
compared relative to the largest one, because those of a weight grow with the number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_engine import TokenScores, linear_topk_log_probs
from opd_engine.bench import reference
from opd_engine.bench.cases.workload import loss_mask
from opd_engine.bench.logits import checked_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl
from opd_engine.functional.linear_arguments import default_workspace_bytes

WORKSPACES = (16 << 20, 256 << 20)  # beside the default, on a CPU
CUDA_WORKSPACES = (64 << 20, 256 << 20)
TEACHER_WIDTH = 2  # the teacher's hidden states are so many times as wide as the student's
_REFERENCE_ELEMENTS = 1 << 24  # float64 logits at a time
_CHECKED_COLUMNS = 64  # rows of the weight whose gradient is compared


@dataclasses.dataclass
class HeadInputs:
    """One rank's head. The teacher's scores are of the student's own top-k, with noise of 0.5 nat."""

    shape: Shape
    hidden: Tensor  # [T, hidden_size]
    weight: Tensor  # [shard_size, hidden_size]
    mask: Tensor  # [T] bool

    def leaves(self, _: int = 0) -> tuple[Tensor, Tensor]:
        """Fresh leaves on the same memory; nothing writes to it."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    @property
    def rows(self) -> Tensor | None:
        """loss_rows: the numbers of the rows that count, None for all of them."""
        return None if self.shape.mask_density == 1 else self.mask.nonzero().flatten().cpu()

    @property
    def workspace_bytes(self) -> int:
        """What the product takes by itself on one rank of tp_size; these calls have no shard to tell it from."""
        return default_workspace_bytes(self.hidden.device, self.shape.tp_size)

    def teacher(self) -> TokenScores:
        scores = linear_topk_log_probs(self.hidden, self.weight, self.shape.k)
        buckets = torch.cat([scores.log_probs, scores.tail_log_prob.unsqueeze(-1)], -1)
        noise = torch.randn(buckets.shape, generator=torch.Generator().manual_seed(1), dtype=buckets.dtype)
        buckets = torch.log_softmax(buckets + 0.5 * noise.to(buckets.device), -1)
        log_probs, tail = buckets[:, :-1].contiguous(), buckets[:, -1].contiguous()
        return TokenScores(indices=scores.indices, log_probs=log_probs, tail_log_prob=tail)


def make_inputs(shape: Shape, device: torch.device, *, width: int = 1, seed: int = 0) -> HeadInputs:
    """Logits of standard deviation 3; width times the shape's hidden size."""
    generator = torch.Generator().manual_seed(seed)
    size = shape.hidden_size * width
    hidden = torch.randn(shape.num_tokens, size, generator=generator)
    weight = torch.randn(shape.shard_size, size, generator=generator) * (3 / size**0.5)
    cast = [part.to(shape.torch_dtype).to(device) for part in (hidden, weight)]
    return HeadInputs(shape, *cast, loss_mask(shape, device))


def workspace_ablations(shape: Shape, device: torch.device, ours: Callable[[int], Impl]) -> list[Impl]:
    """Ours with other workspaces: what the size of a chunk costs or brings."""
    sizes = CUDA_WORKSPACES if device.type == "cuda" else WORKSPACES
    return [dataclasses.replace(ours(size), name=f"opd_ablation_workspace_{size >> 20}MiB") for size in sizes]


def least_work(shape: Shape, products: int, hidden_size: int | None = None) -> tuple[int, int]:
    """(bytes, flops): each factor and result of the products once; 2 flops a multiply-add, rows that count alone."""
    size = shape.hidden_size if hidden_size is None else hidden_size
    live = max(1, round(shape.num_tokens * shape.mask_density))
    head, states = shape.shard_size * size * shape.itemsize, live * size * shape.itemsize
    return products * (head + states), products * 2 * live * shape.shard_size * size


def float64_logits(inputs: HeadInputs, rows: slice | Tensor, weight: Tensor | None = None) -> Tensor:
    """The definition's logits of some rows: float64, rounded once to the model's dtype; weight: in float64 already."""
    exact = inputs.hidden[rows].double() @ (inputs.weight.double() if weight is None else weight).t()
    return exact.to(inputs.hidden.dtype).double()


@dataclasses.dataclass
class LossTruth:
    """What an answer is compared with; columns are the rows of the weight that are looked at."""

    losses: Tensor  # [T], 0 where a row does not count
    grad_hidden: Tensor  # [n, hidden_size], of the checked rows
    grad_weight: Tensor  # [columns, hidden_size]
    rows: Tensor
    columns: Tensor

    def error(self, got: tuple[Tensor | None, Tensor, Tensor]) -> float:
        """got: losses or None, then both gradients."""
        losses, grad_hidden, grad_weight = got
        pairs = [(grad_hidden[self.rows], self.grad_hidden), (grad_weight[self.columns], self.grad_weight)]
        worst = max(_relative(*pair) for pair in pairs)
        return worst if losses is None else max(worst, reference.max_abs_err(losses.detach().reshape(-1), self.losses))


def loss_truth(inputs: HeadInputs, loss_of: Callable[[Tensor, slice], Tensor]) -> LossTruth:
    """loss_of(float64 logits of some rows, which rows) -> losses; a part of the rows at a time, autograd on each."""
    shape, device = inputs.shape, inputs.hidden.device
    count = max(1, _REFERENCE_ELEMENTS // shape.shard_size)
    columns = torch.linspace(0, shape.shard_size - 1, min(_CHECKED_COLUMNS, shape.shard_size)).long().to(device)
    grad_weight = torch.zeros(len(columns), inputs.weight.size(1), dtype=torch.float64, device=device)
    losses, grad_hidden = [], []
    weight = inputs.weight.double()
    for start in range(0, shape.num_tokens, count):
        part = slice(start, min(start + count, shape.num_tokens))
        z = float64_logits(inputs, part, weight).requires_grad_()
        loss = torch.where(inputs.mask[part], loss_of(z, part), 0)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        losses.append(loss.detach())
        grad_hidden.append(grad @ weight)
        grad_weight += grad[:, columns].t() @ inputs.hidden[part].double()
    rows = checked_rows(shape, shape.hidden_size).to(device)
    return LossTruth(torch.cat(losses), torch.cat(grad_hidden)[rows], grad_weight, rows, columns)


def _relative(got: Tensor, truth: Tensor) -> float:
    scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
    return reference.max_abs_err(got.detach(), truth) / scale


def gradients(forwarded: tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]) -> tuple[Any, Tensor, Tensor]:
    """Backward of (sum of losses, losses, leaves): (losses, gradient of the hidden states, of the weight)."""
    total, losses, leaves = forwarded
    return (losses, *torch.autograd.grad(total, leaves))
