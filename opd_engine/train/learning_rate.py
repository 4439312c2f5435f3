"""The learning rate over a run."""

from __future__ import annotations


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then linear decay to 0 after the last of total_steps; step counts from 0."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    return warmup * max(0.0, 1.0 - step / max(1, total_steps))
