"""Top-k, lse, entropy and tail of every row, in one read of the logits. tp_size > 1: one rank's shard and its merge."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine import TokenScores, topk_log_probs
from opd_engine.bench.cases import competitors, eager, sharded
from opd_engine.bench.cases.workload import (
    STATS_FLOPS,
    Workload,
    float64_rows,
    one_thread,
    support_error,
    topk_error,
    twin,
)
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.reference import max_abs_err
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours, the copy that bounds it, eager torch, torch.compile, FlashInfer."""
    outputs = shape.num_tokens * ((8 + 4) * shape.k + 12)  # int64 ids, float32 log-probs, three scores
    bytes_moved, flops = shape.logits_bytes + outputs, STATS_FLOPS * shape.elements
    if shape.tp_size > 1:
        return sharded.topk_workload(shape, device, bytes_moved, flops)
    logits = make_logits(shape, device)
    copies = cold_copies(logits).copies
    rows = checked_rows(shape)
    exact = float64_rows(logits, shape)
    truth = topk_error(shape, exact)
    warm = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device).copy_(logits)
    ours = Impl("opd_engine", lambda z: topk_log_probs(z, shape.k), prepare=copies.__getitem__)
    copy = Impl("torch_copy", warm.copy_, prepare=copies.__getitem__, least_work=(2 * shape.logits_bytes, 0))
    impls, absent = [ours, copy], {}
    if shape.num_tokens == 1:
        impls.append(one_thread(ours))
        # The op by itself: what a thread more brings to the kernel, without the checks in Python before it.
        op = Impl("opd_ablation_op", lambda z: _by_op(z, shape), prepare=copies.__getitem__)
        impls += [op, dataclasses.replace(one_thread(op), name="opd_ablation_op_one_thread")]
    if shape.pattern != "random":
        random = dataclasses.replace(shape, pattern="random", baselines=False)
        impls.append(twin("opd_ablation_random_rows", build(random, device)))
    elif shape.k > 64:
        narrow = dataclasses.replace(shape, k=64, baselines=False)
        impls.append(twin("opd_ablation_k64", build(narrow, device)))
    if shape.baselines:
        compiled = torch.compile(eager.topk_scores, dynamic=False)
        impls.append(Impl("torch_eager", lambda z: eager.topk_scores(z, shape.k), prepare=copies.__getitem__))
        impls.append(Impl("torch_compile", lambda z: compiled(z, shape.k), prepare=copies.__getitem__))
        more, absent = competitors.topk(shape, device, copies, support_error(shape, exact))
        impls += more

    def error(got: TokenScores | dict[str, Tensor] | tuple[Tensor, ...] | Tensor) -> float:
        # The copy is checked on the same rows: in float64 all of them would not fit beside 1e9 logits.
        if isinstance(got, Tensor):
            return max_abs_err(take_rows(got, rows), take_rows(logits, rows))
        if isinstance(got, tuple):
            got = dict(zip(("indices", "log_probs", "tail_log_prob", "lse", "entropy"), got))
        return truth(got)

    return Workload(impls, error, bytes_moved, flops, len(copies), absent)


def _by_op(logits: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    return torch.ops.opd_engine.topk_log_probs(logits, shape.k, None, shape.vocab_size, 1.0, None)
