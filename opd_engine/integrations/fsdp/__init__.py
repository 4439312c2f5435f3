"""The transformers actor: plain in one process, FSDP2 over many. Read actor.py, then forward.py and sharding.py."""

from __future__ import annotations

from opd_engine.integrations.fsdp.actor import CAPABILITIES, FSDPActor
from opd_engine.integrations.fsdp.adapters import add_adapter, base_of, load_adapter, merged
from opd_engine.integrations.fsdp.scorer import ModelScorer
from opd_engine.integrations.fsdp.sharding import shard_model

__all__ = [
    "CAPABILITIES",
    "FSDPActor",
    "ModelScorer",
    "add_adapter",
    "base_of",
    "load_adapter",
    "merged",
    "shard_model",
]
