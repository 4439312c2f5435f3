"""One on-policy distillation step as an algorithm: rollouts, supports, scores, losses, reductions, metrics."""

from __future__ import annotations

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
