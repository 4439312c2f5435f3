"""FSDPActor: one on-policy distillation step for a transformers student, in one process or over many.

scored = actor.score_rollouts(batch, teachers)      # old policy and teachers, once per rollout
for part in the optimizer steps of this rollout:
    report = actor.train_step(part, scored)         # micro-batches whose gradients add up, clip, step, release

Gradients are sums: over micro-batches, and over the ranks of the mesh, which all walk the same number of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opd_engine.distillation.actor import Capabilities, PendingSave, StepReport
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.metrics import MetricSums, add_metrics
from opd_engine.distillation.micro_loss import RowsHere, micro_loss
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.step import ScoredRollouts, row_divergences, score_rollouts
from opd_engine.integrations.fsdp.adapters import adapted_model, base_content, check_targets
from opd_engine.integrations.fsdp.checkpoint import load_checkpoint, save_checkpoint
from opd_engine.integrations.fsdp.forward import AtHead, CausalForward
from opd_engine.integrations.fsdp.precision import LossScale, MasterWeights
from opd_engine.integrations.fsdp.scorer import ModelScorer, agreed, idle_batch
from opd_engine.integrations.fsdp.sharding import shard_model
from opd_engine.integrations.hf.models import token_to_id
from opd_engine.parallel.collectives import all_gather_stacked, all_reduce_sum_, group_size
from opd_engine.parallel.meshes import mesh_group
from opd_engine.parallel.sharded_files import FileWriter
from opd_engine.parallel.sharded_modules import is_sharded, reduce_gradients
from opd_engine.parallel.tensors import whole_tensor
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.turns import Turns
from opd_engine.teachers.weight_store import WeightStore

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opd_engine.parallel.meshes import DeviceMesh

CAPABILITIES = Capabilities(
    actor="transformers",
    axes=("dp", "tp"),
    dtypes=("float32", "float64", "bfloat16", "float16"),
    recompute=("none", "full"),
    teacher_weights=("auto", "staged", "resident"),
    chunked_head=True,
    lora=True,
    offload=True,
    two_phase=True,
    why={
        "pp": 'it does not split layers; run.backend = "megatron" does',
        "cp": "it does not split sequences; a megatron actor can, with a model that does",
        "teacher_weights": "teachers are modules of their own",
        "recompute": "it computes whole layers again, or nothing",
    },
)


class FSDPActor:
    """Implements Actor for a transformers causal LM.

    model: on its device; in half precision, or with a half `dtype`, it computes so and learns in float32. A PeftModel's
        adapter alone trains and is saved
    optimizer: over all parameters to train, before its first step; it is handed what stands for them
    config: of the loss
    mesh: one dimension, the data-parallel ranks; the model is sharded over them, here unless it is. None: one process
    tp_mesh: one dimension; its ranks hold the same weights and rollouts, and split the LM head and the loss
    dtype: in which it computes; None is the model's own
    offload: shards and optimizer states lie on the host
    two_phase: while a teacher made by `teacher` scores, nothing of the student is on the device (in memory, where the
        device is the host), and nothing of a teacher while the student is
    workspace_bytes: of logits at a time; None: those of a micro-batch's rows
    packed: True packs sequences without padding, False pads, None packs where the attention gains by it
    recompute: "full" computes each layer again in the backward, "none" keeps what it reads
    max_tokens, max_seqs: of a micro-batch, padding not counted; None: no limit
    clip: largest gradient norm; 0 is off
    tokenizer: to compare vocabularies, and kept in checkpoints; None where there is none

    Raises: ValueError for a config that cannot distil, a model whose head cannot be split where it is to be, or
        packed sequences that see each other.
    Communicates: passes of a few tokens, on every rank of both meshes.
    """

    capabilities = CAPABILITIES

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        config: OPDConfig,
        *,
        mesh: DeviceMesh | None = None,
        tp_mesh: DeviceMesh | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        two_phase: bool = False,
        workspace_bytes: int | None = None,
        packed: bool | None = None,
        recompute: str = "none",
        max_tokens: int | None = 8192,
        max_seqs: int | None = None,
        clip: float = 0.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.adapted = adapted_model(model)
        if self.adapted is not None:
            check_targets(model.get_base_model(), *_targets_of(self.adapted))
            model = model.get_base_model()
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        config.validate(vocab_size=self.vocab_size)
        _check_optimizer(model, optimizer)
        if recompute not in CAPABILITIES.recompute:
            raise ValueError(f"recompute: wanted one of {', '.join(CAPABILITIES.recompute)}, got {recompute!r}")
        if not (isinstance(clip, (int, float)) and clip >= 0):
            raise ValueError(f"clip: wanted a number >= 0, got {clip!r}")
        if offload and mesh is None:
            raise ValueError(
                "offload: wanted a mesh, over which (one rank is enough) the parts on the host are brought"
            )
        self.model, self.optimizer, self.config = model, optimizer, config
        self.max_tokens, self.max_seqs, self.clip, self.tokenizer = max_tokens, max_seqs, clip, tokenizer
        self.mesh = mesh
        self.group, self.tp_group = mesh_group(mesh), mesh_group(tp_mesh)
        self.device = next(model.parameters()).device if mesh is None or mesh.device_type == "cpu" else _current(mesh)
        if recompute == "full":
            _compute_again(model)
        computes = model.dtype if dtype is None else dtype
        self.base = None if self.adapted is None else base_content(model)
        if mesh is None:
            self.masters = MasterWeights(model, optimizer, computes)
        else:
            if not is_sharded(model):
                shard_model(model, mesh, dtype=computes, offload=offload, optimizer=optimizer)
            self.masters = None
        self.scale = LossScale(computes)
        self.skipped_steps, self.steps = 0, 0
        self.forward = CausalForward(
            model, self.device, tp_group=self.tp_group, workspace_bytes=workspace_bytes, packed=packed
        )
        self.writer = FileWriter(self.group, replicas=self.tp_group)
        self._token_map = None if tokenizer is None else token_to_id(tokenizer)
        self.student = self._scorer(self.forward, self._token_map, scoring=self._own_turn)
        self._weights = WeightStore(model, trainable="student")
        self.turns = Turns() if two_phase else None
        self._member = None if self.turns is None else self.turns.add(self._held, changes=True)

    @property
    def weights(self) -> WeightStore:
        """The one way to the live weights, which are brought where they are away."""
        self._come()
        return self._weights

    def teacher(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelScorer:
        """A model as a teacher beside this student: sharded over the same mesh, in turns with it under two_phase.

        model: on the device, frozen here; tokenizer: to compare vocabularies; dtype: in which it computes, else its own
        Mutates: the model.
        """
        model.requires_grad_(False).eval()
        if self.mesh is not None:
            shard_model(model, self.mesh, dtype=dtype)
        elif dtype is not None:
            model.to(dtype)
        forward = CausalForward(model, self.device, tp_group=self.tp_group)
        scoring = contextlib.nullcontext
        if self.turns is not None:
            member = self.turns.add(lambda: (*model.parameters(), *model.buffers()), changes=False)
            scoring = functools.partial(self.turns.turn, member, leaves=True)
        token_map = None if tokenizer is None else token_to_id(tokenizer)
        return self._scorer(forward, token_map, scoring=scoring)

    def base_teacher(self) -> ModelScorer:
        """The student without its adapter, as a teacher: no second copy of the weights.

        Raises: ValueError where the student has no adapter.
        """
        if self.adapted is None:
            raise ValueError("base_teacher: wanted a student with an adapter (a PeftModel), got one without")

        @contextlib.contextmanager
        def without_adapter() -> Iterator[None]:
            with self._own_turn(), self.adapted.disable_adapter():
                yield

        return self._scorer(self.forward, self._token_map, scoring=without_adapter)

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map; None without a tokenizer."""
        return self._token_map

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps on, by the model's names: float32 for a half model; this rank's shards."""
        masters = {} if self.masters is None else self.masters.of
        named = self.model.named_parameters()
        return {name: masters.get(parameter, parameter) for name, parameter in named if parameter.requires_grad}

    # ---- a step ------------------------------------------------------------------------------------------------------
    def score_rollouts(self, batch: RolloutBatch, teachers: TeacherPool) -> ScoredRollouts:
        """The old policy's support where the config needs it, then every teacher's scores: see `score_rollouts`."""
        self._weights.check_trainable("score_rollouts")
        if self.turns is not None:
            _check_movable(teachers)
        return score_rollouts(batch, self.student, teachers, self.config)

    def row_divergences(self, batch: RolloutBatch, scored: ScoredRollouts) -> Tensor:
        """How far the student is from its teachers, row by row: see opd_engine.distillation.row_divergences."""
        return row_divergences(self.student, batch, scored, self.config)

    def train_step(self, batch: RolloutBatch, scored: ScoredRollouts, *, lr: float | None = None) -> StepReport:
        """One optimizer step on these samples, in micro-batches whose gradients add up.

        batch: this rank's share of the step's global batch, any selection of what was scored; it may be empty on some
        lr: of this step; None leaves the optimizer's

        A step on a gradient that is not finite would destroy the weights: it is left out, counted and reported.
        Communicates: as `accumulate`. Mutates: weights, optimizer, loss scale; the model is left in eval mode.
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with self.weights.training():
            metrics = self.accumulate(batch, scored)
            updated, norm = self.apply()
        if self.turns is not None:
            self.optimizer.zero_grad(set_to_none=True)
        scored.release(batch)
        return StepReport(metrics, updated, norm)

    def accumulate(self, batch: RolloutBatch, scored: ScoredRollouts) -> MetricSums:
        """The gradient of the global batch's loss, times the loss scale, on this rank's parts; no optimizer step.

        Communicates: a micro-batch's gathers; once, the sum of the gradients, 40 bytes a sequence, and the metrics.
        Mutates: the gradients, which it clears first.
        """
        self._come()
        scored.require(batch)
        denominators = Denominators.of(batch, self.config, self._stack)
        micros = batch.micro_batches(max_tokens=self.max_tokens, max_seqs=self.max_seqs) if batch.num_seqs else []
        passes = max(1, agreed(len(micros), self.group, self.device))
        parts = [MetricSums.of({}, scored.metric_groups, self.device)]
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        try:
            for index in range(passes):
                reduce_gradients(self.model, index + 1 == passes)
                if index < len(micros):
                    loss, metrics = self._loss(micros[index], scored, denominators)
                    parts.append(metrics)
                else:
                    loss = self.forward.at_head(idle_batch(), _no_loss)
                (loss * self.scale.value).backward()
        finally:
            self.model.eval()
        total = add_metrics(parts)
        return MetricSums(total.names, all_reduce_sum_(total.values.clone(), self.group))

    def apply(self) -> tuple[bool, float]:
        """Unscale, clip and step. Returns: whether the step was taken, and the gradient's norm before clipping."""
        trained = list(self.trained.values())
        if self.scale.value != 1.0:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale.value)
        norm = float(whole_tensor(nn.utils.clip_grad_norm_(trained, self.clip or math.inf)))
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
            if self.masters is not None:
                self.masters.write()
        self.scale.update(finite)
        self.steps += 1
        self.skipped_steps += not finite
        return finite, norm

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradients by name, as accumulated, to look at. Communicates: an all-gather of each, if sharded."""
        found = {name: parameter.grad for name, parameter in self.trained.items()}
        return {name: whole_tensor(gradient) for name, gradient in found.items() if gradient is not None}

    def _loss(self, micro: RolloutBatch, scored: ScoredRollouts, denominators: Denominators):
        def loss_at(at_head: AtHead, exchange: RowsHere) -> tuple[Tensor, MetricSums]:
            return micro_loss(micro, at_head, exchange, scored, self.config, denominators)

        return self.forward.at_head(micro, loss_at)

    def _scorer(self, forward: CausalForward, token_map: Mapping[str, int] | None, *, scoring) -> ModelScorer:
        options = {"max_tokens": self.config.score_batch_tokens, "group": self.group}
        return ModelScorer(forward, token_map=token_map, scoring=scoring, **options)

    def _held(self) -> list[Tensor]:
        """All that the student has on the device between steps."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        found = [*self.model.parameters(), *self.model.buffers(), *self.trained.values(), *states]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def _come(self) -> None:
        if self.turns is not None:
            self.turns.bring(self._member)

    def _own_turn(self) -> contextlib.AbstractContextManager[None]:
        """The student here; it stays until another model comes."""
        return contextlib.nullcontext() if self.turns is None else self.turns.turn(self._member, leaves=False)

    def _stack(self, tensor: Tensor) -> Tensor:
        group = self.group if group_size(self.group) > 1 else None
        return all_gather_stacked(tensor.to(self.device), group).to(tensor.device)

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> PendingSave:
        """Begins to write a folder that transformers loads, its weights as they are trained, and what training needs.

        folder: empty, there on every rank; it is whole when the answer is done. Every rank calls.
        Raises: WrongWeightsError where the live weights are not the student's; ValueError where one is not finite, by
            its name and the step.
        """
        self._come()
        return save_checkpoint(self, Path(folder))

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote: on the same ranks bit for bit, on others to rounding.

        Raises: ValueError for a folder that is not whole, or of another model. Mutates: all that a step does.
        """
        self._come()
        load_checkpoint(self, Path(folder))


def _check_movable(teachers: TeacherPool) -> None:
    for name in teachers.names:
        teacher = teachers[name]
        own = getattr(teacher, "module", None) or getattr(teacher, "backend", None)
        if own is not None and not getattr(teacher, "leaves", False):
            raise ValueError(
                f"two_phase: teacher {name!r} stays on the device, a {type(teacher).__name__}; wanted one of "
                "actor.teacher(model), or one elsewhere"
            )


def _targets_of(adapted: PeftModel) -> tuple[Any, str]:
    targets = adapted.peft_config[adapted.active_adapter].target_modules
    return (targets if isinstance(targets, str) else sorted(targets or ())), "model: target_modules"


def _no_loss(at_head: AtHead, exchange: RowsHere) -> Tensor:
    """Zero, with zero gradients for everything."""
    rows = at_head.gather(torch.zeros_like(exchange.own_rows())[:, None]).log_probs
    return rows.double().masked_fill(torch.ones_like(rows, dtype=torch.bool), 0.0).sum()


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """It must step on everything that trains, and on nothing else."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not own:
        raise ValueError("model: wanted a parameter that requires grad, got none")
    if missing := [name for key, name in own.items() if key not in stepped]:
        raise ValueError(
            f"optimizer: wanted every parameter that requires grad, lacks {missing[0]} and {len(missing) - 1} more; "
            "set requires_grad=False on what is not to be trained"
        )
    if len(stepped - set(own)):
        raise ValueError(f"optimizer: wanted the model's parameters alone, got {len(stepped - set(own))} others")


def _compute_again(model: PreTrainedModel) -> None:
    # transformers 5.24 renamed it and warns about the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _current(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
