"""Whether Megatron computes what transformers computes: every row's logits of one random sequence, in float32.

Each in its turn, so that one copy of the model is in memory at a time, split over the ranks in Megatron's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.hf.models import load_model
from opd_engine.integrations.megatron import BatchLayout, MegatronScorer
from opd_engine.integrations.megatron.gpt import build_gpt
from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.loading import check_checkpoint, load_module
from opd_engine.integrations.megatron.training import start_megatron, stop_megatron
from opd_engine.parallel.launch import join_world

LIMIT = 1e-5
"""Of the largest logit: what float32 sums in another order differ by, and no mistake in a weight's place does."""


@dataclass(frozen=True)
class Comparison:
    """difference: largest absolute one; largest: largest absolute logit."""

    difference: float
    largest: float
    rows: int
    vocab_size: int

    @property
    def relative(self) -> float:
        """NaN where either side is."""
        return self.difference / max(self.largest, 1e-30)


def compare_logits(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    device: str = "cpu",
    num_tokens: int = 48,
) -> Comparison | None:
    """Starts Megatron over the ranks of the world and compares.

    megatron_folder: a distributed checkpoint, or a Hugging Face folder that ranks load directly

    Returns: the comparison on the first rank, None on the others.
    Raises: ValueError for folders that do not load.
    """
    shape = GPTShape.read(hf_folder, argument="source")
    check_checkpoint(megatron_folder, argument="target")
    with join_world(device, timeout_s=3600.0, group_when_alone=True) as world:
        tokens = torch.randint(shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
        wanted = transformers_logits(hf_folder, tokens) if world.is_main else None
        groups = start_megatron(tp, pp)
        try:
            found = megatron_logits(megatron_folder, shape, tokens, groups, world.device)
        finally:
            stop_megatron()
        return None if wanted is None else compared(found, wanted)


def compared(found: Tensor, wanted: Tensor) -> Comparison:
    """Of two [rows, vocab_size]."""
    return Comparison(float((found - wanted).abs().max()), float(wanted.abs().max()), *wanted.shape)


def transformers_logits(folder: str | Path, tokens: Tensor) -> Tensor:
    """[num_tokens, vocab_size] float32, on the host."""
    model = load_model(folder, argument="source")
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits[0].float()


def megatron_logits(
    folder: str | Path, shape: GPTShape, tokens: Tensor, groups: MegatronGroups, device: torch.device
) -> Tensor:
    """The same through Megatron's schedule, on every rank: the last row of each of the sequence's beginnings."""
    module = build_gpt(shape, groups)
    load_module(module, folder, groups, argument="target")
    layout = BatchLayout(packed=False, max_tokens=4096)
    scorer = MegatronScorer(module.to(device), vocab_size=shape.vocab_size, groups=groups, layout=layout)
    ids = tokens.tolist()
    batch = pack_rollouts([ids[:end] for end in range(1, len(ids) + 1)], [[] for _ in ids])
    return scorer.next_token_logits(batch).float().cpu()
