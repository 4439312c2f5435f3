"""Megatron teachers that only look: the student's module in other weights, or a module of their own off the device.

Neither has a data-parallel wrapper, gradient buffers, an optimizer or a graph. What a teacher costs is its weights, on
the host while it is idle.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from opd_engine.integrations.megatron.batches import BatchLayout
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.scorer import MegatronScorer
from opd_engine.teachers.staging import StagedWeights
from opd_engine.teachers.weight_store import WeightStore


def switched_teacher(
    model: torch.nn.Module,
    weights: WeightStore,
    tag: str,
    *,
    vocab_size: int,
    groups: MegatronGroups | None = None,
    layout: BatchLayout | None = None,
    token_map: Mapping[str, int] | None = None,
    workspace_bytes: int | None = None,
) -> MegatronScorer:
    """A teacher of the student's shape: the student's own model, wearing the tag's weights for the length of a pass.

    model: as the student's actor has it; weights: over its language model. Otherwise as MegatronScorer.
    """
    if tag not in weights.tags or tag == weights.trainable:
        raise ValueError(f"tag: wanted a set other than {weights.trainable!r}, got {tag!r}; known: {weights.tags}")
    scoring = functools.partial(weights.active, tag)
    return MegatronScorer(
        model,
        vocab_size=vocab_size,
        groups=groups,
        layout=layout,
        token_map=token_map,
        workspace_bytes=workspace_bytes,
        scoring=scoring,
    )


def own_teacher(
    module: torch.nn.Module,
    device: torch.device | str,
    *,
    vocab_size: int,
    resident: bool = False,
    groups: MegatronGroups | None = None,
    layout: BatchLayout | None = None,
    token_map: Mapping[str, int] | None = None,
    workspace_bytes: int | None = None,
) -> MegatronScorer:
    """A teacher of any shape as a module of its own: inference-only, on the host between its turns unless resident.

    module: bare, its weights loaded; made inference-only here. Otherwise as MegatronScorer.
    """
    staged = StagedWeights(module, device, resident=resident)
    scorer = MegatronScorer(
        module,
        vocab_size=vocab_size,
        groups=groups,
        layout=layout,
        token_map=token_map,
        workspace_bytes=workspace_bytes,
        scoring=staged.on_device,
        keep_eval=True,
    )
    scorer.prefetch = staged.prefetch
    return scorer
