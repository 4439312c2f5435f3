"""What a trainable student is to the loop above it: an Actor, and what it says of itself before anything is loaded.

Structural types only: one actor a framework (transformers and FSDP2, Megatron, a user's own), one loop for all of them.
Each rank of a data-parallel index makes the same calls in the same order with that index's share of the rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from opd_engine.distillation.metrics import MetricSums
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.step import ScoredRollouts
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import Teacher
from opd_engine.teachers.weight_store import WeightStore


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an actor can do; a setting that it lacks is refused from this, by name, before a model is loaded.

    actor: its name, as messages give it
    axes: of "dp", "tp", "pp", "cp", those along which it splits over ranks
    dtypes: in which it computes
    recompute: what its backward can compute again instead of keeping
    teacher_weights: where its teachers' weights can wait between their turns
    chunked_head: whether the loss can come from hidden states, `workspace_bytes` of logits at a time
    lora: whether it trains adapters beside frozen weights
    offload: whether parameters and optimizer can lie on the host
    two_phase: whether teachers and student can take turns on the device
    mixture_of_experts: whether students with experts are trained with their balancing loss
    why: field -> why it is no wider, for the message
    """

    actor: str
    axes: tuple[str, ...] = ("dp",)
    dtypes: tuple[str, ...] = ("float32",)
    recompute: tuple[str, ...] = ("none",)
    teacher_weights: tuple[str, ...] = ("resident",)
    chunked_head: bool = False
    lora: bool = False
    offload: bool = False
    two_phase: bool = False
    mixture_of_experts: bool = False
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    metrics: sums over the global batch, the same on every rank
    update_successful: False where a gradient was not finite, or the loss scaler skipped the step
    grad_norm: before clipping, of the whole model; None where the optimizer does not give one
    """

    metrics: MetricSums
    update_successful: bool
    grad_norm: float | None


class PendingSave(Protocol):
    """A checkpoint that is being written. Every rank makes the same calls."""

    def is_done(self) -> bool:
        """Whether every rank's part is on disk, the same answer everywhere; does not wait.

        Raises: what writing raised.
        """
        ...

    def wait(self) -> None:
        """Until it is. Raises: what writing raised."""
        ...


class Saved:
    """A PendingSave of an actor that writes before it returns."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


@runtime_checkable
class Actor(Protocol):
    """A student, its optimizer, and the options of its loss, however they are split over ranks.

    capabilities: as declared before it was built
    vocab_size: the student's real vocabulary
    student: the student as it is now, as something that scores
    weights: the one way to its live weights; a train step, a publish and a save go through it and are refused while it
        wears a teacher's
    """

    capabilities: Capabilities
    vocab_size: int
    student: Teacher
    weights: WeightStore

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map, or None where there is no tokenizer to compare."""
        ...

    def score_rollouts(self, batch: RolloutBatch, teachers: TeacherPool) -> ScoredRollouts:
        """Supports of the student as it is, then the teachers' scores; no gradient. See `score_rollouts`.

        batch: this data-parallel rank's share; it may be empty on some ranks
        """
        ...

    def train_step(self, batch: RolloutBatch, scored: ScoredRollouts, *, lr: float | None = None) -> StepReport:
        """One optimizer step on these samples; scores that no later step uses are freed.

        lr: learning rate of this step; None leaves the optimizer's
        Mutates: the weights, unless the gradient is not finite: the step is then left out and reported.
        """
        ...

    def row_divergences(self, batch: RolloutBatch, scored: ScoredRollouts) -> Tensor:
        """[num_tokens] float64 on the host: see `row_divergences`; the same on every rank of the share."""
        ...

    def save(self, folder: Path) -> PendingSave:
        """Begins to write everything that `load` needs: weights, optimizer, scaler, the ranks' random states.

        folder: empty, there on every rank; it is not whole before the answer is done
        Raises: WrongWeightsError where the live weights are not the student's; ValueError where they are not finite.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote, on the same ranks bit for bit, on other layouts to rounding."""
        ...
