"""What can train a student: each backend declares what its actor can do, and assembles a run.

A module here has CAPABILITIES (read before anything is loaded), NEEDS_GROUP (whether one process alone wants a process
group) and `assemble`, a context in which the run's parts live.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from opd_engine.distillation.actor import Capabilities
from opd_engine.train.settings import ConfigError

if TYPE_CHECKING:
    from opd_engine.train.config import TrainConfig

BACKENDS = ("hf", "megatron")


def backend(name: str) -> ModuleType:
    """The module of run.backend."""
    return importlib.import_module(f"opd_engine.train.backends.{name}")


def check_capabilities(config: TrainConfig, can: Capabilities) -> None:
    """Refuses the settings that an actor lacks, from what it declares.

    Raises: ConfigError with the key, what was wanted, what came and which actor says so.
    """
    run = config.run
    for axis in ("tp", "pp", "cp"):
        if axis not in can.axes:
            _require(can, f"run.{axis}", getattr(run, axis), (1,), axis)
    _require(can, "run.dtype", run.dtype, can.dtypes, "dtypes")
    _require(can, "run.recompute", run.recompute, can.recompute, "recompute")
    _require(can, "run.teacher_weights", run.teacher_weights, can.teacher_weights, "teacher_weights")
    for name in ("offload", "two_phase"):
        if not getattr(can, name):
            _require(can, f"run.{name}", getattr(run, name), (False,), name)
    if not can.lora:
        _require(can, "student.lora_rank", config.student.lora_rank, (0,), "lora")
    if not can.chunked_head:
        _require(can, "run.workspace_bytes", run.workspace_bytes, (0,), "chunked_head")


def _require(can: Capabilities, key: str, value: object, allowed: tuple, field: str) -> None:
    if value in allowed:
        return
    field = field if field in can.why or field not in ("dp", "tp", "pp", "cp") else "axes"
    why = f": {can.why[field]}" if field in can.why else ""
    wanted = " or ".join(map(str, allowed))
    raise ConfigError(f"{key}: wanted {wanted} for the {can.actor} actor, got {value}{why}")
