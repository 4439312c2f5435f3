"""TeacherSpec: the name of a teacher, where its weights or its server are, and how it is used. Plain data."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """One teacher.

    name: unique in its pool; samples name it
    checkpoint: directory of its weights, or None
    server: address of a server that scores, or None; a teacher given as an object needs neither
    temperature: divides its logits; None takes the student's
    weight: its share where several teachers score one sample; >= 0, only the proportions count
    teacher_tokens: it sees the batch's `teacher_prompts` in place of the student's prompts
    """

    name: str
    checkpoint: str | None = None
    server: str | None = None
    temperature: float | None = None
    weight: float = 1.0
    teacher_tokens: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name: wanted a non-empty teacher name, got {self.name!r}")
        if self.checkpoint is not None and self.server is not None:
            raise ValueError(f"teacher {self.name!r}: wanted a checkpoint or a server, got both")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"teacher {self.name!r}: temperature: wanted a finite number > 0, got {self.temperature}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"teacher {self.name!r}: weight: wanted a finite number >= 0, got {self.weight}")
