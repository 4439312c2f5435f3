"""transformers students: an actor for one process, and for FSDP2 and a shared LM head over many."""

from __future__ import annotations

from opd_engine.integrations.fsdp.actor import CAPABILITIES, FSDPActor

__all__ = ["CAPABILITIES", "FSDPActor"]
