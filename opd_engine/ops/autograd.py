"""Backward formulas of the two ops that are differentiable by themselves; the rest are differentiated one floor up.

All give first derivatives only: a second one would be incomplete, so asking for it raises (differentiable_once).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import register_autograd


def pack_upstream(
    like: Tensor,
    rows: int,
    k: int,
    d_log_probs: Tensor | None,
    d_tail: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    d_target: Tensor | None,
) -> Tensor:
    """Upstream gradients side by side, `[T, k + 4]` in `like`'s dtype; what did not flow is 0."""
    upstream = like.new_zeros((rows, k + 4))
    if d_log_probs is not None:
        upstream[:, :k] = d_log_probs.reshape(rows, k)
    for column, gradient in enumerate((d_tail, d_lse, d_entropy, d_target), start=k):
        if gradient is not None and gradient.numel() == rows:
            upstream[:, column] = gradient.reshape(rows)
    return upstream


class _DifferentiableOnce(torch.autograd.Function):
    """Hands a gradient on unchanged; differentiating it again raises, also where it depends on nothing recorded."""

    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.op}: differentiable once; its gradient was differentiated again")


def differentiable_once(op: str) -> Callable[[Callable], Callable]:
    """For the backward of an autograd.Function: its gradients raise, by the op's name, where they are differentiated.

    torch's once_differentiable drops a second derivative without a word where no upstream gradient requires grad.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            # Grad mode is on in a backward under create_graph alone. The anchor ties what has no graph to the error.
            if not torch.is_grad_enabled():
                return gradients
            anchor = torch.empty(0, requires_grad=True)
            several = gradients if isinstance(gradients, tuple) else (gradients,)
            return tuple(None if one is None else _DifferentiableOnce.apply(one, anchor, op) for one in several)

        return once

    return decorate


def _gather_setup(ctx, inputs, output):
    logits, indices, target, ctx.vocab_size, ctx.temperature, row_temperature = inputs
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(logits, indices, target, row_temperature, output[5])


@differentiable_once("gather_log_probs")
def _gather_backward(ctx, d_log_probs, d_tail, d_lse, d_entropy, d_target, _d_stats):
    logits, indices, target, row_temperature, stats = ctx.saved_tensors
    rows, k = indices.shape
    d_target = d_target if target is not None else None
    upstream = pack_upstream(stats, rows, k, d_log_probs, d_tail, d_lse, d_entropy, d_target)
    gradient = torch.ops.opd_engine.scores_backward(
        logits, indices, target, stats, upstream, 0, ctx.vocab_size, ctx.temperature, row_temperature
    )
    return gradient, None, None, None, None, None


register_autograd("opd_engine::gather_log_probs", _gather_backward, setup_context=_gather_setup)


def _bucket_setup(ctx, inputs, output):
    _, grad_log_probs, grad_tail = output
    ctx.mark_non_differentiable(grad_log_probs, grad_tail)
    ctx.save_for_backward(grad_log_probs, grad_tail)


@differentiable_once("bucket_divergence")
def _bucket_backward(ctx, d_loss, _d_grad_log_probs, _d_grad_tail):
    grad_log_probs, grad_tail = ctx.saved_tensors
    # A row the caller masked has a zero upstream gradient and may have an infinite derivative: 0 x inf is not 0.
    masked = d_loss == 0
    d_log_probs = torch.where(masked[:, None], 0, grad_log_probs * d_loss[:, None])
    d_tail = torch.where(masked, 0, grad_tail * d_loss)
    return None, d_log_probs, d_tail, None, None, None, None, None, None, None


register_autograd("opd_engine::bucket_divergence", _bucket_backward, setup_context=_bucket_setup)
