"""Log-probs at given ids, lse, entropy and tail, in one read of the logits. tp_size > 1: one rank's shard and merge."""

from __future__ import annotations

import dataclasses

import torch

from opd_engine import gather_log_probs, topk_log_probs
from opd_engine.bench.cases import competitors, eager, sharded
from opd_engine.bench.cases.workload import (
    STATS_FLOPS,
    Workload,
    float64_rows,
    gather_error,
    one_thread,
    twin,
)
from opd_engine.bench.logits import cold_copies, make_logits
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours, QuACK, and torch, eager and compiled: with the exact tail as ours has it, and with the cheap one."""
    bytes_moved = shape.logits_bytes + shape.num_tokens * ((8 + 4) * shape.k + 12)
    flops = STATS_FLOPS * shape.elements
    if shape.tp_size > 1:
        return sharded.gather_workload(shape, device, bytes_moved, flops)
    logits = make_logits(shape, device)
    copies = cold_copies(logits).copies
    indices = topk_log_probs(logits, shape.k).indices  # the ids that a distillation step gathers
    flat = indices.reshape(shape.num_tokens, shape.k)

    ours = Impl("opd_engine", lambda z: gather_log_probs(z, indices), prepare=copies.__getitem__)
    impls, absent = [ours], {}
    if shape.num_tokens == 1:
        impls.append(one_thread(ours))
    if shape.pattern != "random":
        random = dataclasses.replace(shape, pattern="random", baselines=False)
        impls.append(twin("opd_ablation_random_rows", build(random, device)))
    if shape.baselines:
        for name, formula in (
            ("torch_eager", eager.gather_scores),
            ("torch_compile", torch.compile(eager.gather_scores, dynamic=False)),
            ("torch_eager_cheap_tail", eager.gather_scores_cheap_tail),
            ("torch_compile_cheap_tail", torch.compile(eager.gather_scores_cheap_tail, dynamic=False)),
        ):
            impls.append(Impl(name, lambda z, formula=formula: formula(z, indices), prepare=copies.__getitem__))
        more, absent = competitors.gather(shape, device, copies, flat)
        impls += more
    error = gather_error(shape, float64_rows(logits, shape), flat)
    return Workload(impls, error, bytes_moved, flops, len(copies), absent)
