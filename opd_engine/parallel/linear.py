"""The vocab-parallel LM head: each rank multiplies the whole hidden states with its rows of the weight.

Bound: arithmetic (one GEMM forward, two backward), and one all-reduce of the hidden gradient. It holds no loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.ops.autograd import differentiable_once
from opd_engine.parallel.collectives import all_reduce_sum_
from opd_engine.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def vocab_parallel_lm_head(
    hidden: Tensor, weight_shard: Tensor, shard: VocabShard | None, bias: Tensor | None = None
) -> Tensor:
    """This rank's columns of `hidden @ weight^T + bias`.

    hidden: [*, hidden_size], floating, the same on every rank of shard.tp_group
    weight_shard: [vocab_shard_size, hidden_size], the rows [vocab_start_index, vocab_end_index) of the LM head
    shard: which rows these are; None means the whole vocabulary
    bias: [vocab_shard_size] or None, the same rows
    Returns: [*, vocab_shard_size] logits.
    Raises: ValueError where a shape does not fit the shard or the hidden size.
    Communicates: backward, one SUM all-reduce of the hidden gradient over shard.tp_group (4 bytes an element for bf16
        and fp16, else the dtype's own); forward nothing.
    Precision: the hidden gradient of low-precision inputs is accumulated and summed in float32 and rounded once, last.
    Grad: for hidden, weight_shard and bias; each rank's weight gradient is its rows of the one-process gradient.
        Once differentiable.
    """
    if weight_shard.dim() != 2:
        raise ValueError(f"weight_shard: wanted [vocab_shard_size, hidden_size], got shape {tuple(weight_shard.shape)}")
    if hidden.dim() < 1 or hidden.size(-1) != weight_shard.size(1):
        raise ValueError(f"hidden: wanted [*, hidden_size = {weight_shard.size(1)}], got shape {tuple(hidden.shape)}")
    if shard is not None and weight_shard.size(0) != shard.local_vocab_size:
        raise ValueError(
            f"weight_shard: wanted {shard.local_vocab_size} rows for the shard "
            f"[{shard.vocab_start_index}, {shard.vocab_end_index}), got {weight_shard.size(0)}"
        )
    if bias is not None and bias.shape != weight_shard.shape[:1]:
        raise ValueError(f"bias: wanted [vocab_shard_size = {weight_shard.size(0)}], got shape {tuple(bias.shape)}")
    if shard is None or shard.merge_group is None:
        return torch.nn.functional.linear(hidden, weight_shard, bias)
    return _VocabParallelLinear.apply(hidden, weight_shard, bias, shard.merge_group)


def _accumulate_wide(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 result for low-precision inputs (float64 stays float64)."""
    if left.dtype == right.dtype == torch.float64:
        return left @ right
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _VocabParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.nn.functional.linear(hidden, weight, bias)

    @staticmethod
    @differentiable_once("vocab_parallel_lm_head")
    def backward(ctx, grad_logits: Tensor):
        hidden, weight = ctx.saved_tensors
        num_rows = math.prod(hidden.shape[:-1])  # spelled out: a shard of zero width leaves nothing to infer it from
        grad_rows = grad_logits.reshape(num_rows, weight.size(0))
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            partial = _accumulate_wide(grad_rows, weight)
            grad_hidden = all_reduce_sum_(partial, ctx.group).to(hidden.dtype).view(hidden.shape)
        if ctx.needs_input_grad[1]:
            rows = hidden.reshape(num_rows, weight.size(1)).to(grad_rows.dtype)
            grad_weight = (grad_rows.t() @ rows).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None
