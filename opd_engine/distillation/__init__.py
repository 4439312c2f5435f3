"""One on-policy distillation step as an algorithm: rollouts, supports, scores, losses, reductions, metrics.

Names are imported when they are used: the command line reads OPDConfig without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd_engine.distillation.backend import ModelBackend, ProjectingBackend
    from opd_engine.distillation.cache import ScoreCache
    from opd_engine.distillation.concat import concat_rollouts
    from opd_engine.distillation.config import OPDConfig
    from opd_engine.distillation.metrics import MetricSums, add_metrics
    from opd_engine.distillation.off_policy import state_weights
    from opd_engine.distillation.policy import group_advantages, policy_losses
    from opd_engine.distillation.reductions import Denominators
    from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
    from opd_engine.distillation.step import (
        ScoredRollouts,
        distillation_loss,
        distillation_loss_of_scores,
        row_divergences,
        score_rollouts,
    )

__all__ = [
    "Denominators",
    "MetricSums",
    "ModelBackend",
    "OPDConfig",
    "ProjectingBackend",
    "RolloutBatch",
    "ScoreCache",
    "ScoredRollouts",
    "add_metrics",
    "concat_rollouts",
    "distillation_loss",
    "distillation_loss_of_scores",
    "group_advantages",
    "pack_rollouts",
    "policy_losses",
    "row_divergences",
    "score_rollouts",
    "state_weights",
]

_HOMES = {
    "backend": "ModelBackend ProjectingBackend",
    "cache": "ScoreCache",
    "concat": "concat_rollouts",
    "config": "OPDConfig",
    "metrics": "MetricSums add_metrics",
    "off_policy": "state_weights",
    "policy": "group_advantages policy_losses",
    "reductions": "Denominators",
    "rollout": "RolloutBatch pack_rollouts",
    "step": "ScoredRollouts distillation_loss distillation_loss_of_scores row_divergences score_rollouts",
}


def __getattr__(name: str):
    home = next((home for home, names in _HOMES.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
