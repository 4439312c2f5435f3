"""How many bytes a distillation step moves, sends and holds, per token and per rank, at any layout.

`python -m opd_engine.scaling` writes docs/scaling.md and its plots from this model. What the model says of collectives
is checked, byte for byte, against what small runs hand to torch.distributed.
"""

from __future__ import annotations

from opd_engine.scaling.model import Layout, Pass, Traffic, held_bytes, moved_bytes, step_traffic

__all__ = ["Layout", "Pass", "Traffic", "held_bytes", "moved_bytes", "step_traffic"]
