"""What a backend puts together for the loop: a student that trains, teachers that score, engines that write.

The loop knows these parts by their protocols alone. Adding a backend is one module in opd_engine/train/backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opd_engine.distillation.actor import Actor
from opd_engine.distillation.rollout_engine import RolloutEngine
from opd_engine.parallel.shares import Shares
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import Teacher
from opd_engine.teachers.spec import TeacherSpec
from opd_engine.train.teacher_settings import settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opd_engine.train.config import TrainConfig
    from opd_engine.train.memory import RunMemory


def pooled(config: TrainConfig, teachers: Mapping[str, Teacher]) -> TeacherPool:
    """The run's teachers with what its settings say of each."""
    pairs = []
    for name, teacher in teachers.items():
        own = settings_of(config.teachers.get(name, ""))
        spec = TeacherSpec(name, temperature=own.temperature, weight=own.weight, teacher_tokens=bool(own.prompt_prefix))
        pairs.append((spec, teacher))
    return TeacherPool(pairs)


@dataclass(kw_only=True)
class Assembly:
    """The parts of one run on one rank.

    actor: the student and its optimizer
    teachers: who scores
    engine: writes the student's rollouts
    tokenizer: the student's
    end_ids: what ends a completion
    teacher_engines: name -> an engine that writes with a teacher's weights, of those that can; for evaluation
    shares: how prompts are dealt to data-parallel indices
    memory: a plan to hold the run to, where the backend makes one
    """

    actor: Actor
    teachers: TeacherPool
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    teacher_engines: Mapping[str, RolloutEngine] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)
    memory: RunMemory | None = None
