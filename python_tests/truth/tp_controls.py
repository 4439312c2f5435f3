"""Planted errors under tensor parallelism, of the kinds that shipped in real libraries; each must be seen.

Every control runs the comparison of the conformance on a gradient or value that one mistake has spoilt.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import opd_engine
import oracles
from tolerances import DTYPES, NAMES, Mismatch, check
from truth import shapes
from truth.tp_checks import LAYOUTS, assembled, finite_weight, on_rank_0, own_columns, own_shard


def seen(quantity: str, dtype: torch.dtype, spoilt: Tensor, truth: Tensor, eager: Tensor) -> bool:
    try:
        check(quantity, dtype, spoilt, truth, eager, "control")
    except Mismatch:
        return True
    return False


class _SummedBackward(torch.autograd.Function):
    """An all-gather whose backward sums the identical gradients of every rank: TP times too large."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def missing_reduction(local: Tensor, ids: Tensor, shard, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs without the SUM all-reduce of the support logits, log-probs without merging the statistics)."""
    ops = torch.ops.opd_engine
    place = (shard.vocab_size, 1.0, None)
    stats, support = ops.gather_partials(local.detach(), ids, target, shard.vocab_start_index, *place)
    everyone = [torch.empty_like(stats) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, stats)
    unreduced = ops.merge_gather(torch.stack(everyone), support, ids, target, *place)[0]
    summed = support.clone()
    dist.all_reduce(summed)
    own_statistics = ops.merge_gather(stats[None], summed, ids, target, *place)[0]
    return unreduced, own_statistics


def controls() -> dict[str, bool]:
    """name of control and dtype -> whether the comparison was red. Also checks that the unspoilt one is green."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case, bounds = shapes.CASES["ragged"], LAYOUTS["uneven"][1][world]
    found: dict[str, bool] = {}
    for dtype in DTYPES:
        logits, teacher_logits = shapes.in_dtype(case, dtype)
        shard = own_shard(case, bounds)
        local, teacher_local = own_columns(logits, shard, case), own_columns(teacher_logits, shard, case).detach()
        ids = oracles.topk_ids(logits, case.k)
        teacher = opd_engine.gather_log_probs(teacher_local, ids, shard=shard)
        elsewhere = teacher_local.roll(1, 0)
        shifted = opd_engine.gather_log_probs(elsewhere, ids, shard=shard)

        def gradient(spoil_loss=None, spoil_scores=None, reduction="replicated", of=teacher):
            scores = opd_engine.gather_log_probs(local, ids, shard=shard, loss_reduction=reduction)  # noqa: B023
            if spoil_scores is not None:
                scores = spoil_scores(scores)
            loss = opd_engine.distill_loss(scores, of, divergence="jsd")
            total = (loss * finite_weight(loss)).sum()
            total = total if spoil_loss is None else spoil_loss(total)
            return torch.autograd.grad(total, local)[0]  # noqa: B023

        def summed_backward(scores):
            scores.log_probs = _SummedBackward.apply(scores.log_probs)
            return scores

        unreduced, own_statistics = missing_reduction(local, ids, shard, case.target)
        honest = gradient()
        planted = {
            "nothing": honest,
            "loss / tp": gradient(lambda loss: loss / world),
            "loss x tp": gradient(lambda loss: loss * world),
            "loss on rank 0 only": gradient(lambda loss: loss if rank == 0 else loss * 0),
            "partial losses without their reduction": gradient(lambda loss: loss / world if rank else loss),
            "replicated losses reduced as if partial": gradient(reduction="partial"),
            "all-gather with a summing backward": gradient(spoil_scores=summed_backward),
            "1% gradient error": (honest.double() * 1.01).to(dtype),
            "teacher off by one row": gradient(of=shifted),
            "gradient off by one row": honest.roll(1, 0),
            "shards in reverse order": honest,
        }
        everyone = on_rank_0([unreduced, own_statistics, *planted.values()])
        if everyone is None:
            continue
        results = []
        for compute in (torch.float64, oracles.score_dtype(dtype)):
            at = logits.detach().to(torch.float64 if compute == torch.float64 else dtype).requires_grad_()
            scores = oracles.gather_scores(at, ids, dtype=compute)
            constant = oracles.gather_scores(teacher_logits, ids, dtype=compute)
            loss = oracles.distill(scores, constant, "jsd")
            weight = finite_weight(loss).to(compute)
            results.append((scores.log_probs, torch.autograd.grad((loss * weight).sum(), at)[0]))
        (true_scores, true_grad), (eager_scores, eager_grad) = results
        for number, name in enumerate(planted):
            spoilt = assembled(everyone if name != "shards in reverse order" else everyone[::-1], number + 2)
            red = seen("gradient", dtype, spoilt, true_grad, eager_grad)
            found[f"{name} {NAMES[dtype]}"] = red if name != "nothing" else not red
        for number, name in enumerate(("support logits not reduced", "statistics not merged")):
            spoilt = everyone[0][number]
            found[f"{name} {NAMES[dtype]}"] = seen("score", dtype, spoilt, true_scores, eager_scores)
    return found
