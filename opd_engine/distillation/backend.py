"""ModelBackend: all that distillation asks of a model. One class per framework implements it (opd_engine.integrations).

The floor below (teachers) needs no more than this either, so the protocol stands there and is named here.
"""

from __future__ import annotations

from opd_engine.teachers.protocols import ModelBackend, ProjectingBackend

__all__ = ["ModelBackend", "ProjectingBackend"]
