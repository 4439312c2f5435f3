"""Where the gradients of a chunked LM head go: hidden states are summed over ranks once, a weight may have main_grad.

Bound: one collective of [T, hidden_size] under tensor parallelism. Nothing here multiplies matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.functional.linear_arguments import LinearRows
from opd_engine.functional.linear_chunks import wide_dtype
from opd_engine.parallel.collectives import all_reduce_sum_, reduce_scatter_sum


def deliver_hidden_gradient(
    partial: Tensor | None, rows: LinearRows, dtype: torch.dtype, loss_rows: Tensor | None = None
) -> Tensor | None:
    """This rank's hidden gradient: the one reduction (docs/math.md (57)), rounded last.

    partial: [n, hidden_size], wide, of this shard's columns alone, for the n rows of loss_rows or for all T
    Returns: [rows of this rank, hidden_size]; rows that are not in loss_rows are 0.
    Communicates: one SUM all-reduce of partial, or with sequence parallelism one SUM reduce-scatter of all T rows.
    """
    if partial is None:
        return None
    if not rows.sequence_parallel:
        total = all_reduce_sum_(partial, rows.shard.merge_group).to(dtype)
        return total if loss_rows is None else _spread(total, loss_rows, rows.num_rows)
    whole = partial if loss_rows is None else _spread(partial, loss_rows, rows.num_rows)
    return reduce_scatter_sum(whole, rows.shard.merge_group).to(dtype)


def _spread(compact: Tensor, loss_rows: Tensor, num_rows: int) -> Tensor:
    return compact.new_zeros((num_rows, compact.size(1))).index_copy_(0, loss_rows, compact)


def within_range(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weights / 2^n, 2^n) of order 1 for float16, else (weights, None).

    A mean over a million tokens has weights of 1e-6. Their product with a probability underflows in float16 logits'
    gradients, and a loss scale comes too late in the backward, or is no larger. A power of two rounds nothing.
    """
    if dtype != torch.float16:
        return weights, None
    largest = weights.abs().amax() if weights.numel() else weights.new_ones(())
    magnitude = torch.where(largest > 0, torch.exp2(torch.log2(largest).floor()), 1.0)
    return weights / magnitude, magnitude


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing recomputes it."""
    return torch._C._current_graph_task_id() != -1


def weight_accumulator(weight: Tensor) -> Tensor | None:
    """weight.main_grad where gradients can accumulate in it as they come; None where it is absent or too narrow."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == wide_dtype(weight.dtype) else None


def deliver_weight_gradient(accumulated: Tensor | None, weight: Tensor, *, is_added: bool) -> Tensor | None:
    """What autograd is to see of the weight's gradient, after main_grad had its share.

    accumulated: [vocab_shard_size, hidden_size], wide; is_added: it is main_grad itself
    weight: the tensor the caller passed, which carries main_grad or does not
    Returns: the gradient in the weight's dtype; zeros where main_grad took it and the weight says so to its data
        parallel wrapper (grad_added_to_main_grad), whose hooks must still run; None where nobody asks.
    Mutates: weight.main_grad and weight.grad_added_to_main_grad, where they exist.
    """
    if accumulated is None:
        return None
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return accumulated.to(weight.dtype)
    if not is_added:
        main_grad.add_(accumulated)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
