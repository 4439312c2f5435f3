"""MegatronActor: one on-policy distillation step for a Megatron student, however it is split over ranks.

scored = actor.score_rollouts(batch, teachers)      # old policy and teachers, once per rollout
for part in the optimizer steps of this rollout:
    report = actor.train_step(part, scored)         # forward_backward_func, Megatron's reductions, optimizer, release
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_engine.distillation.actor import Capabilities, PendingSave, StepReport
from opd_engine.distillation.batch_fields import digest
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.metrics import MetricSums, add_metrics
from opd_engine.distillation.micro_loss import micro_loss
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.step import ScoredRollouts, row_divergences, score_rollouts
from opd_engine.integrations.megatron.batches import BatchLayout, MicroInput
from opd_engine.integrations.megatron.context_parallel import ContextExchange
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.limits import check_trainable
from opd_engine.integrations.megatron.scorer import MegatronScorer
from opd_engine.parallel.collectives import (
    all_gather_json,
    all_gather_stacked,
    all_reduce_max_,
    all_reduce_sum_,
    broadcast_,
)
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.sentinel import DeadTeacherError
from opd_engine.teachers.weight_store import WeightStore

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from opd_engine.integrations.megatron.checkpoint import CheckpointWriter
    from opd_engine.parallel.collectives import ProcessGroup


CAPABILITIES = Capabilities(
    actor="megatron",
    axes=("dp", "tp", "pp"),
    dtypes=("float32", "float64", "bfloat16", "float16"),
    recompute=("none", "selective", "full"),
    teacher_weights=("auto", "switch", "staged", "resident"),
    chunked_head=True,
    why={"cp": "its attention needs TransformerEngine; give MegatronActor a model that has it"},
)
"""Of the models that a run builds by itself; the actor also takes context parallelism, with a model that does."""


class MegatronActor:
    """Implements Actor: the student, its optimizer, and the options of the loss.

    model: DistributedDataParallel(Float16Module(language model)) or without the middle one; a list of one is fine
    optimizer: of megatron.core.optimizer.get_megatron_optimizer
    vocab_size: the real vocabulary; columns beyond it are padding
    scheduler: anything with step(increment), called with 1 after every successful update
    weights: over the language model; made where none is given and one is asked for. Given, a training step goes through
        it, and is refused while the model wears a teacher's
    guard: called before scoring and before every training step; raises where the live weights are not the student's
    The rest is as in MegatronScorer.

    Raises: ValueError for options of Megatron that are not supported, by name, and for a config that cannot distil.
    Mutates: of the model's config, where unset: finalize_model_grads_func, grad_scale_func, and, where gradients are
        reduced during the backward, no_sync_func.
    """

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        config: OPDConfig,
        *,
        vocab_size: int,
        groups: MegatronGroups | None = None,
        layout: BatchLayout | None = None,
        token_map: Mapping[str, int] | None = None,
        output_layer: torch.nn.Module | None = None,
        workspace_bytes: int | None = None,
        scheduler: Any | None = None,
        weights: WeightStore | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        from megatron.core.distributed import finalize_model_grads

        config.validate(vocab_size=vocab_size)
        self.student = MegatronScorer(
            model,
            vocab_size=vocab_size,
            groups=groups,
            layout=layout,
            token_map=token_map,
            output_layer=output_layer,
            workspace_bytes=workspace_bytes,
        )
        self.groups = self.student.groups
        self.walk = self.student.walk
        check_trainable(self.walk.model, self.groups)
        self.config, self.optimizer, self.scheduler = config, optimizer, scheduler
        self._weights, self._guard = weights, guard
        self._writer: CheckpointWriter | None = None
        model_config = self.walk.config
        if model_config.finalize_model_grads_func is None:
            model_config.finalize_model_grads_func = finalize_model_grads
        if model_config.grad_scale_func is None:
            model_config.grad_scale_func = optimizer.scale_loss
        if self.walk.model.ddp_config.overlap_grad_reduce and model_config.no_sync_func is None:
            model_config.no_sync_func = self.walk.model.no_sync

    def score_rollouts(self, batch: RolloutBatch, teachers: TeacherPool) -> ScoredRollouts:
        """The old policy's support where the config needs it, then every teacher's scores.

        batch: this data-parallel rank's share, the same on all its tensor, context and pipeline ranks

        Returns: scores on the host of the last pipeline stage; the other stages only keep count of them.
        Raises: ValueError as opd_engine.distillation.score_rollouts, and where ranks were given different batches;
            DeadTeacherError on every rank, in the words of one that found it; RuntimeError on the ranks of other
            samples where scoring failed.
        """
        self._begin(batch)
        failed = scored = None
        try:
            scored = score_rollouts(batch, self.student, teachers, self.config)
        except Exception as error:
            failed = error
        self._fail_together(failed)
        if not self.student.holds_scores:
            scored.cache.forget_values()
        return scored

    def _fail_together(self, failed: Exception | None) -> None:
        """Where this rank's scoring failed, or another's did, none goes on.

        Data-parallel ranks score different samples, so one may fail alone. The ranks that share samples fail alike, but
        for a dead teacher, which only those that hold its scores see.
        """
        dead = str(failed) if isinstance(failed, DeadTeacherError) else None
        of_others = self._first_of(None if failed is None else [str(failed), dead], self.groups.dp)
        if failed is not None and dead is None:
            raise failed
        if of_others is not None and of_others[1] is None:
            raise RuntimeError(f"scoring failed on another data-parallel rank: {of_others[0]}")
        dead = None if of_others is None else of_others[1]
        for group in (self.groups.tp, self.groups.cp, self.groups.pp):
            dead = self._first_of(dead, group)
        if dead is not None:
            raise DeadTeacherError(dead)

    def _first_of(self, value: Any, group: ProcessGroup) -> Any:
        """What the first rank that has something has; None where nobody has."""
        if group.size() == 1 or not bool(all_reduce_max_(self._flag(value is not None), group)):
            return value
        return next(found for found in all_gather_json(value, group, self.walk.device) if found is not None)

    def _flag(self, value: bool) -> Tensor:
        return torch.tensor([int(value)], dtype=torch.int64, device=self.walk.device)

    def train_step(self, batch: RolloutBatch, scored: ScoredRollouts, *, lr: float | None = None) -> StepReport:
        """One optimizer step on these samples; scores that no later step uses are freed.

        batch: this data-parallel rank's share of the step's global batch, any selection of what was scored; it may be
            empty on some ranks
        lr: of this step; None leaves the optimizer's
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with self._weights.training() if self._weights is not None else contextlib.nullcontext():
            metrics = self.accumulate(batch, scored)
            update_successful, grad_norm = self.apply()
        scored.release(batch)
        return StepReport(metrics, update_successful, grad_norm)

    def accumulate(self, batch: RolloutBatch, scored: ScoredRollouts) -> MetricSums:
        """The gradient of the global batch's loss, reduced by Megatron; no optimizer step.

        Communicates: the model's own, 40 bytes a sequence over the data-parallel ranks, one vector of metrics; under
            context parallel k + 4 floats a row that counts.
        Mutates: the gradient buffers, which it clears first.
        """
        self._begin(batch)
        scored.require(batch)  # on every stage: only the last would notice, and the others would wait for it
        denominators = Denominators.of(batch, self.config, self._stack_over_data_parallel)
        walk, groups = self.walk, self.groups
        idle = batch.num_seqs == 0  # this rank then walks one token that counts nowhere, so that nobody waits for it
        inputs = walk.micro_inputs(_idle_batch(scored) if idle else batch)
        per_token = walk.config.calculate_per_token_loss

        def loss_of(micro: MicroInput, hidden: Tensor) -> tuple[Tensor, Tensor, MetricSums]:
            if idle:
                loss, metrics = self._no_loss(micro, hidden), MetricSums.of({}, scored.metric_groups, hidden.device)
            else:
                loss, metrics = self._loss(micro, hidden, scored, denominators)
            # The loss is already this micro-batch's part of the global mean, and equal on context-parallel ranks;
            # what Megatron will divide by is multiplied in here: tokens, or micro-batches and ranks.
            if per_token:
                divisor, count = denominators.num_rows, micro.num_wanted[groups.cp_rank]
            else:
                divisor, count = len(inputs) * groups.dp_cp.size(), 1
            tokens = torch.tensor(count, dtype=torch.int, device=hidden.device)
            return loss * divisor, tokens, metrics

        walk.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = walk.forward_backward(inputs, loss_of)
        return self._everywhere(parts, scored)

    def apply(self) -> tuple[bool, float | None]:
        """The optimizer's step with the gradients as they are. Returns: whether it was taken, and the gradient norm."""
        self._check_guard()
        update_successful, grad_norm, _ = self.optimizer.step()
        if update_successful and self.scheduler is not None:
            self.scheduler.step(increment=1)
        return bool(update_successful), None if grad_norm is None else float(grad_norm)

    def row_divergences(self, batch: RolloutBatch, scored: ScoredRollouts) -> Tensor:
        """How far the student is from its teachers, row by row: see opd_engine.distillation.row_divergences.

        Communicates: the model's own forward, and one broadcast from the last pipeline stage.
        """
        groups = self.groups
        found = row_divergences(self.student, batch, scored, self.config).to(self.walk.device)
        return broadcast_(found, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1).cpu()

    @property
    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    @property
    def vocab_size(self) -> int:
        return self.student.vocab_size

    @property
    def weights(self) -> WeightStore:
        """Over the language model's tensors on this rank."""
        if self._weights is None:
            self._weights = WeightStore(self.student.module)
        return self._weights

    def token_to_id(self) -> Mapping[str, int] | None:
        return self.student.token_to_id()

    def save(self, folder: Path) -> PendingSave:
        """Begins a distributed checkpoint, written in processes of its own; see `opd_engine.distillation.actor.Actor`.

        The entry script must hold its work behind `if __name__ == "__main__"`: Megatron's writers start it once more.
        """
        from opd_engine.integrations.megatron.checkpoint import CheckpointWriter

        if self._writer is None:
            self._writer = CheckpointWriter()
        return self._writer.save(self, folder)

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote, at any layout."""
        from opd_engine.integrations.megatron.checkpoint import read_checkpoint

        read_checkpoint(self, folder)

    def _loss(
        self, micro: MicroInput, hidden: Tensor, scored: ScoredRollouts, denominators: Denominators
    ) -> tuple[Tensor, MetricSums]:
        at_head = self.walk.head.rows(hidden, micro.output_rows)
        exchange = ContextExchange(micro, self.groups, at_head.device)
        return micro_loss(micro.batch, at_head, exchange, scored, self.config, denominators)

    def _no_loss(self, micro: MicroInput, hidden: Tensor) -> Tensor:
        """Zero, with zero gradients for everything."""
        logits = self.walk.head.logits(hidden, micro.output_rows)
        return logits.double().masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum()

    def _everywhere(self, parts: list[MetricSums], scored: ScoredRollouts) -> MetricSums:
        """Summed over micro-batches and data-parallel ranks, brought from the last stage to all."""
        groups = self.groups
        nothing = MetricSums.of({}, scored.metric_groups, self.walk.device)
        total = add_metrics([nothing, *parts])
        values = all_reduce_sum_(total.values.clone(), groups.dp if groups.dp.size() > 1 else None)
        broadcast_(values, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
        return MetricSums(total.names, values)

    def _stack_over_data_parallel(self, tensor: Tensor) -> Tensor:
        group = self.groups.dp if self.groups.dp.size() > 1 else None
        return all_gather_stacked(tensor.to(self.walk.device), group).to(tensor.device)

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard()

    def _begin(self, batch: RolloutBatch) -> None:
        """Refuse what would train on the wrong weights, or hang, before anything is sent."""
        self._check_guard()
        if self._weights is not None:
            self._weights.check_trainable("MegatronActor")
        self._check_same(batch)

    def _check_same(self, batch: RolloutBatch) -> None:
        """Every tensor, context and pipeline rank of a share holds the same batch and options, or all of them raise.

        Communicates: 16 bytes over each of the three groups; where something differs, 16 bytes a field more.
        """
        names, numbers = zip(*(*batch.digests().items(), *self._config_digests().items()))
        groups = {name: group for name in ("tp", "cp", "pp") if (group := getattr(self.groups, name)).size() > 1}

        def spread(values: list[int], over: Iterable[str]) -> Tensor:
            """Largest less smallest, over the ranks of the groups, one group after the other: [len(values)]."""
            own = torch.tensor(values, dtype=torch.int64, device=self.walk.device)
            ends = torch.stack([own, -own])
            for name in over:
                all_reduce_max_(ends, groups[name])
            return ends.sum(0)

        if not groups or not bool(spread([digest(list(numbers))], groups).any()):
            return
        differing = [name for name, differs in zip(names, spread(list(numbers), groups).tolist()) if differs]
        axes = torch.stack([spread(list(numbers), [name]).any().long() for name in groups])
        for group in groups.values():
            all_reduce_max_(axes, group)
        where = " and ".join(name for name, differs in zip(groups, axes.tolist()) if differs)
        more = f"; so do {', '.join(differing[1:])}" if differing[1:] else ""
        raise ValueError(
            f"{differing[0]}: wanted the same on every {where} rank of a data-parallel rank, but its content differs"
            + more
        )

    def _config_digests(self) -> dict[str, int]:
        """Of the options of the loss, by name."""
        return {f"config.{f.name}": digest(getattr(self.config, f.name)) for f in dataclasses.fields(self.config)}


def _idle_batch(scored: ScoredRollouts) -> RolloutBatch:
    """One token that counts nowhere."""
    one = torch.zeros(1, dtype=torch.int64)
    return RolloutBatch(
        tokens=one,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        loss_mask=torch.zeros(1, dtype=torch.bool),
        sample_ids=one - 1,
        rollout_ids=one - 1,
        teacher_names=[scored.teachers.names[0]],
    )
