"""One distillation step from logits: the student's top-k, the teacher's scores of it, loss and gradient in place.

Through opd_engine.distillation, its host cache and its routing included; the models themselves are not run, but where
the shape has a hidden size: model_step.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_engine.bench import reference
from opd_engine.bench.cases import eager
from opd_engine.bench.cases.loss_fwd_bwd import leaf
from opd_engine.bench.cases.workload import GRADIENT_FLOPS, STATS_FLOPS, Produced, Workload, float64_rows, loss_mask
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl
from opd_engine.distillation import OPDConfig, RolloutBatch, distillation_loss, score_rollouts
from opd_engine.distillation.reductions import Denominators
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.pool import TeacherPool

_SEQUENCE = 64  # tokens


class _Logits:
    """A model whose logits are already there."""

    shard = None

    def __init__(self, logits: Tensor) -> None:
        self.held, self.vocab_size = logits, logits.size(-1)

    def logits(self, batch: RolloutBatch) -> Tensor:
        return self.held

    def token_to_id(self) -> None:
        return None


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours against the same step in eager torch."""
    if shape.hidden_size:
        from opd_engine.bench.cases import model_step

        return model_step.build(shape, device)
    logits, teacher_logits = make_logits(shape, device), make_logits(shape, device, seed=1)
    cold = cold_copies(logits, overwritten=True)
    batch = _batch(shape)
    config = OPDConfig(k=shape.k, inplace_backward=True, score_batch_tokens=shape.num_tokens)
    denominators = Denominators.of(batch, config)
    pool = TeacherPool([("teacher", LocalTeacher(_Logits(teacher_logits), max_tokens=shape.num_tokens))])
    anchor = torch.zeros((), device=device, requires_grad=True)
    live = batch.loss_mask.to(device)

    def ours(buffer: Tensor) -> tuple[Tensor, Tensor, Any]:
        scored = score_rollouts(batch, _Logits(buffer), pool, config)
        student = Produced.apply(anchor, buffer)
        loss, _ = distillation_loss(student, batch, scored, config, None, denominators)
        return loss, student, scored.support(batch, device)

    def by_torch(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            indices = torch.topk(student, shape.k, dim=-1).indices
            scores = eager.gather_scores(teacher_logits, indices)
            buckets = torch.cat([scores["log_probs"], scores["tail_log_prob"][:, None]], -1)
        losses = eager.bucket_losses(student, indices, buckets)
        return torch.where(live, losses, 0).sum() / live.sum(), student, indices

    def backward(forwarded: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, student, indices = forwarded
        return loss, torch.autograd.grad(loss, student)[0], indices

    impls = [Impl("opd_engine", ours, backward, cold.copies.__getitem__, cold.restore)]
    if shape.baselines:
        impls.append(Impl("torch_eager", by_torch, backward, lambda i: leaf(cold.copies[i])))
    share = live.float().mean().item()
    bytes_moved = round(shape.logits_bytes * (4 * share + 1))
    flops = round(shape.elements * share * (3 * STATS_FLOPS + GRADIENT_FLOPS))
    return Workload(impls, _error(shape, logits, teacher_logits, live), bytes_moved, flops, len(cold.copies))


def _batch(shape: Shape) -> RolloutBatch:
    """Sequences of 64 tokens whose last row predicts nothing; a sequence of one token would count nowhere."""
    rows = shape.num_tokens
    ends = torch.arange(_SEQUENCE, rows + _SEQUENCE, _SEQUENCE).clamp(max=rows)
    mask = loss_mask(shape, torch.device("cpu"))
    mask[ends - 1] = False
    if not bool(mask.any()):
        raise ValueError(f"step: wanted at least 2 tokens and one that counts, got {rows}")
    count = ends.numel()
    return RolloutBatch(
        tokens=torch.randint(shape.vocab_size, (rows,), generator=torch.Generator().manual_seed(2)),
        cu_seqlens=torch.cat([torch.zeros(1), ends]).to(torch.int32),
        loss_mask=mask,
        sample_ids=torch.arange(count),
        rollout_ids=torch.arange(count),
        teacher_names=[""] * count,
    )


def _error(shape: Shape, logits: Tensor, teacher_logits: Tensor, live: Tensor) -> Any:
    rows = checked_rows(shape)
    z, p = float64_rows(logits, shape), float64_rows(teacher_logits, shape)
    top = z.topk(shape.k, dim=-1).values
    mask, count = live.cpu()[rows], int(live.sum())

    def error(got: tuple[Tensor, Tensor, Tensor]) -> float:
        ids = got[2].cpu()[rows].clamp(min=0)  # rows that do not count have none
        worst = reference.max_abs_err(z.gather(-1, ids)[mask], top[mask])
        student = z.clone().requires_grad_()
        losses = reference.bucket_loss(reference.scores(student, ids), reference.scores(p, ids))
        (truth,) = torch.autograd.grad(torch.where(mask, losses, 0).sum(), student)
        # A mean over rows: its gradient is scaled back, or the error would shrink with the number of rows.
        worst = max(worst, reference.max_abs_err(take_rows(got[1], rows).double() * count, truth))
        if rows.numel() == shape.num_tokens:
            worst = max(worst, reference.max_abs_err(got[0].detach(), losses.detach()[mask].sum() / count))
        return worst

    return error
