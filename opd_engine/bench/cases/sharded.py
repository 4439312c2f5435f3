"""One rank's work under tensor parallelism: its shard, and the merge of every rank's message.

The other ranks' messages are made beforehand by the same ops; the collective is a copy into its place (top-k, gather's
statistics) or one addition (gather's logits), so what is measured is what one rank computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine.bench.cases import eager
from opd_engine.bench.cases.workload import Workload, float64_rows, gather_error, topk_error
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl

_SCORES = ("indices", "log_probs", "tail_log_prob", "lse", "entropy")


def topk_workload(shape: Shape, device: torch.device, bytes_moved: int, flops: int) -> Workload:
    """topk_partials on the first shard, its message among the others', merge_topk."""
    ops = torch.ops.opd_engine
    k, vocab_size = shape.k, shape.vocab_size
    logits, packed, rows = shard_messages(shape, device)
    copies = cold_copies(logits).copies

    def ours(z: Tensor) -> dict[str, Tensor]:
        packed[0] = ops.topk_partials(z, k, None, 0, vocab_size, 1.0, None)
        return dict(zip(_SCORES, ops.merge_topk(packed, k, None, vocab_size, 1.0, None)))

    values, ids, lses, means = unpack(packed, k, logits.dtype)

    def by_torch(z: Tensor) -> dict[str, Tensor]:
        values[0], ids[0], lses[0], means[0] = eager.shard_topk(z, min(k, z.size(-1)), 0)
        return eager.merge_topk(values, ids, lses, means, k)

    impls = [Impl("opd_engine", ours, prepare=copies.__getitem__, graph=True)]
    if shape.baselines and k <= shape.shard_size:
        impls.append(Impl("torch_eager", by_torch, prepare=copies.__getitem__))
    message = packed.nbytes // shape.tp_size
    return Workload(impls, topk_error(shape, rows), bytes_moved + message + packed.nbytes, flops, len(copies))


def gather_workload(shape: Shape, device: torch.device, bytes_moved: int, flops: int) -> Workload:
    """gather_partials on the first shard, merge_gather of all statistics."""
    ops = torch.ops.opd_engine
    vocab_size = shape.vocab_size
    logits, _, rows = shard_messages(shape, device)
    copies = cold_copies(logits).copies
    ids = torch.arange(shape.k, device=device) * (vocab_size // shape.k)
    indices = ids.expand(shape.num_tokens, -1).contiguous()
    parts = [
        ops.gather_partials(z, indices, None, rank * shape.shard_size, vocab_size, 1.0, None)
        for rank, z in enumerate(_shards(shape, device))
    ]
    stats = torch.stack([part[0] for part in parts])
    others = torch.stack([part[1] for part in parts[1:]]).sum(0)

    def ours(z: Tensor) -> dict[str, Tensor]:
        stats[0], support = ops.gather_partials(z, indices, None, 0, vocab_size, 1.0, None)
        support += others
        scores = ops.merge_gather(stats, support, indices, None, vocab_size, 1.0, None)[:4]
        return dict(zip(_SCORES[1:], scores))

    lses = stats[..., 0] + stats[..., 1].log()

    def by_torch(z: Tensor) -> dict[str, Tensor]:
        lses[0], support = eager.shard_gather(z, indices, 0)
        return eager.merge_gather(lses, support + others)

    impls = [Impl("opd_engine", ours, prepare=copies.__getitem__, graph=True)]
    if shape.baselines:
        impls.append(Impl("torch_eager_cheap_tail", by_torch, prepare=copies.__getitem__))
    error = gather_error(shape, rows, indices)
    return Workload(impls, error, bytes_moved + stats.nbytes, flops, len(copies))


def shard_messages(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(first shard's logits, all ranks' packed top-k messages [tp, T, W], checked rows of the whole vocabulary)."""
    op = torch.ops.opd_engine.topk_partials
    messages, rows, first = [], [], None
    for rank, logits in enumerate(_shards(shape, device)):
        first = logits if rank == 0 else first
        messages.append(op(logits, shape.k, None, rank * shape.shard_size, shape.vocab_size, 1.0, None))
        rows.append(take_rows(logits, checked_rows(shape)).double().cpu())
    assert first is not None
    return first, torch.stack(messages), torch.cat(rows, -1)[:, : shape.vocab_size]


def _shards(shape: Shape, device: torch.device):
    for rank in range(shape.tp_size):
        yield make_logits(shape, device, seed=rank)


def unpack(packed: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A packed message as the eager merge takes it: values, ids, lse and mean logit of each shard."""
    score = torch.float64 if dtype == torch.float64 else torch.float32
    words = 2 if score == torch.float64 else 1
    scores = packed[..., : (k + 5) * words].contiguous().view(score)
    m, s, w = scores[..., k], scores[..., k + 1], scores[..., k + 2]
    return scores[..., :k].contiguous(), packed[..., (k + 5) * words :].long(), m + s.log(), m + w / s


__all__ = ["float64_rows", "gather_workload", "shard_messages", "topk_workload", "unpack"]
