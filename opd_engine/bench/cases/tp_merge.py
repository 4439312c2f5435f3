"""The merge alone: tp_size packed top-k messages become one. What every rank computes after the all-gather."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.bench.cases import eager
from opd_engine.bench.cases.sharded import shard_messages, unpack
from opd_engine.bench.cases.workload import EXP_FLOPS, Workload, topk_error
from opd_engine.bench.logits import cold_copies
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """merge_topk against the same in torch, from messages already unpacked."""
    logits, packed, rows = shard_messages(shape, device)
    k = shape.k
    copies = cold_copies(packed).copies
    unpacked = [unpack(copy, k, logits.dtype) for copy in copies]

    def ours(message: Tensor) -> dict[str, Tensor]:
        merged = torch.ops.opd_engine.merge_topk(message, k, None, shape.vocab_size, 1.0, None)
        return dict(zip(("indices", "log_probs", "tail_log_prob", "lse", "entropy"), merged))

    impls = [Impl("opd_engine", ours, prepare=copies.__getitem__, graph=True)]
    if shape.baselines:
        impls.append(Impl("torch_eager", lambda parts: eager.merge_topk(*parts, k), prepare=unpacked.__getitem__))
    bytes_moved = packed.nbytes + shape.num_tokens * ((8 + 4) * k + 12)
    flops = shape.num_tokens * shape.tp_size * (k + 5) * EXP_FLOPS  # losing candidates' mass goes to the tail
    return Workload(impls, topk_error(shape, rows), bytes_moved, flops, len(copies))
