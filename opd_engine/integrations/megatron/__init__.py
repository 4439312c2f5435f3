"""Megatron-core: a student that trains through forward_backward_func, and teachers that only score."""

from __future__ import annotations

from opd_engine.integrations.megatron.actor import MegatronActor, StepReport
from opd_engine.integrations.megatron.batches import BatchLayout
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.scorer import MegatronScorer

__all__ = ["BatchLayout", "MegatronActor", "MegatronGroups", "MegatronScorer", "StepReport"]
