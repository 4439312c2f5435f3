"""FSDPActor: one on-policy distillation step for a transformers student, in one process or over many.

scored = actor.score_rollouts(batch, teachers)      # old policy and teachers, once per rollout
for part in the optimizer steps of this rollout:
    report = actor.train_step(part, scored)         # micro-batches whose gradients add up, clip, step, release
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_engine.distillation.actor import Capabilities, PendingSave, Saved, StepReport
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.metrics import add_metrics
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.step import ScoredRollouts, distillation_loss, row_divergences, score_rollouts
from opd_engine.integrations.fsdp.precision import MasterWeights
from opd_engine.integrations.hf.backend import even_shard, make_backend
from opd_engine.integrations.hf.models import save_model
from opd_engine.parallel.collectives import all_gather_json, group_rank, group_size
from opd_engine.parallel.meshes import mesh_group
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.weight_store import WeightStore

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CAPABILITIES = Capabilities(
    actor="transformers",
    axes=("tp",),
    dtypes=("float32", "float64", "bfloat16", "float16"),
    teacher_weights=("auto", "staged", "resident"),
    why={
        "dp": "its weights are whole on every rank",
        "pp": 'it does not split layers; run.backend = "megatron" does',
        "cp": 'it does not split sequences; run.backend = "megatron" can, with a model that does',
        "recompute": "it keeps what its backward reads",
        "chunked_head": "it makes the logits of a micro-batch",
        "teacher_weights": "teachers are modules of their own",
    },
)
_STATE_FILE = "actor.pt"


class FSDPActor:
    """Implements Actor for a transformers causal LM.

    model: on its device; in half precision it computes so, and learns in float32 (`MasterWeights`)
    optimizer: over the parameters to train, before its first step
    config: of the loss
    tp_mesh: one dimension; its ranks hold the same weights and rollouts, and share the LM head and the loss
    tokenizer: to compare vocabularies, and kept in checkpoints; None where there is none
    max_seqs, max_tokens: of a micro-batch
    clip: largest gradient norm; 0 is off

    Raises: ValueError for a config that cannot distil, and for a model whose head cannot be shared where it is to be.
    """

    capabilities = CAPABILITIES

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        config: OPDConfig,
        *,
        tp_mesh: DeviceMesh | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_seqs: int | None = None,
        max_tokens: int | None = None,
        clip: float = 1.0,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.tokenizer, self.max_seqs, self.max_tokens, self.clip = tokenizer, max_seqs, max_tokens, clip
        self._tp = mesh_group(tp_mesh)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        config.validate(vocab_size=self.vocab_size)
        shard = even_shard(self.vocab_size, self._tp, group_size(self._tp), group_rank(self._tp))
        self.backend = make_backend(model, tokenizer, shard=shard)
        self.student = LocalTeacher(self.backend, max_tokens=config.score_batch_tokens)
        self.weights = WeightStore(model, trainable="student")
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._masters = MasterWeights(self._parameters, optimizer)
        self._trained = [self._masters.of.get(parameter, parameter) for parameter in self._parameters]
        half = any(parameter.dtype == torch.float16 for parameter in self._parameters)
        self._scaler = torch.amp.GradScaler(self.backend.device.type, enabled=half)

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map; None without a tokenizer."""
        return self.backend.token_to_id()

    # ---- a step ------------------------------------------------------------------------------------------------------
    def score_rollouts(self, batch: RolloutBatch, teachers: TeacherPool) -> ScoredRollouts:
        """The old policy's support where the config needs it, then every teacher's scores: see `score_rollouts`."""
        self.weights.check_trainable("score_rollouts")
        return score_rollouts(batch, self.student, teachers, self.config)

    def row_divergences(self, batch: RolloutBatch, scored: ScoredRollouts) -> Tensor:
        """How far the student is from its teachers, row by row: see opd_engine.distillation.row_divergences."""
        return row_divergences(self.student, batch, scored, self.config)

    def train_step(self, batch: RolloutBatch, scored: ScoredRollouts, *, lr: float | None = None) -> StepReport:
        """One optimizer step on these samples, in micro-batches whose gradients add up.

        batch: any selection of what was scored
        lr: of this step; None leaves the optimizer's

        A step on a gradient that is not finite would destroy the weights; it is left out and reported.
        Communicates: as the loss, over the tensor-parallel group.
        Mutates: the weights and the optimizer; the model is left in eval mode.
        """
        scored.require(batch)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with self.weights.training():
            self.optimizer.zero_grad(set_to_none=True)
            self.model.train()
            try:
                metrics = self._accumulate(batch, scored)
            finally:
                self.model.eval()
            norm = self._apply()
        scored.release(batch)
        return StepReport(metrics, math.isfinite(norm), norm)

    def _accumulate(self, batch: RolloutBatch, scored: ScoredRollouts):
        denominators, parts = Denominators.of(batch, self.config), []
        for micro in batch.micro_batches(max_seqs=self.max_seqs, max_tokens=self.max_tokens):
            logits = self.backend.logits(micro)
            loss, metrics = distillation_loss(logits, micro, scored, self.config, self.backend.shard, denominators)
            self._scaler.scale(loss).backward()
            parts.append(metrics)
        return add_metrics(parts)

    def _apply(self) -> float:
        """Clip and step. Returns: the gradient's norm before clipping; the step was taken where it is finite."""
        self._scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.clip or math.inf))
        if math.isfinite(norm):
            self.optimizer.step()
            self._masters.write()
        self._scaler.update()
        return norm

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> PendingSave:
        """Writes a folder that transformers loads, and beside it what training needs: see `opd_engine.distillation`.

        Every rank calls. The ranks of a tensor-parallel group prove that their weights are the same.
        """
        with self.weights.saving() as tensors:
            total = sum(float(tensor.detach().double().sum()) for tensor in tensors.values())
            totals = all_gather_json(total.hex(), self._tp, torch.device("cpu"))
            assert len(set(totals)) == 1, f"the ranks' replicated weights differ: sums {totals}"
            if group_rank(self._tp) == 0:
                save_model(self.model, self.tokenizer, folder)
                # A file of ours: given a path, torch's writer reports a full disk as a wrong position and no more.
                with open(folder / _STATE_FILE, "wb") as file:
                    torch.save(self._state(), file)
        return Saved()

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote. Mutates: weights, optimizer, scaler, torch's generator."""
        from safetensors.torch import load_model

        device = self.backend.device
        state: dict[str, Any] = torch.load(folder / _STATE_FILE, map_location=device, weights_only=True)
        load_model(self.model, folder / "model.safetensors", device=str(device))
        self._masters.take(state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generator"].cpu())
        self.weights.accept_live()
        self.weights.publications = state["publications"]

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "masters": [master.detach() for master in self._masters.of.values()],
            "scaler": self._scaler.state_dict(),
            "generator": torch.get_rng_state(),
            "publications": self.weights.publications,
        }
