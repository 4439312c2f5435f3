"""A model small enough to check by hand, and rollouts to score: what the tests of teachers and distillation share.

The toy's logits depend on a row's token, on the one before it in the same sequence and on the position, so that a row
off by one, a row of another sequence or a wrong order of rows all change what comes out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from opd_engine.distillation import RolloutBatch, pack_rollouts
from opd_engine.parallel.vocab import VocabShard


class ToyModel(nn.Module):
    """Logits [num_tokens, padded] = own[token] + before[previous token] + place[position]; padding columns hold 9."""

    def __init__(self, vocab_size: int, seed: int, dtype=torch.float64, padding: int = 0, scale: float = 1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, vocab_size, generator=generator) * scale).to(dtype))

        self.own, self.before, self.place = table(64), table(64), table(32)
        self.dropout = nn.Dropout(0.5)
        self.padding = padding

    def forward(self, batch: RolloutBatch) -> Tensor:
        position = batch.row_positions()
        previous = batch.tokens.roll(1).where(position > 0, 0)
        logits = self.own[batch.tokens] + self.before[previous] + self.place[position]
        return nn.functional.pad(self.dropout(logits), (0, self.padding), value=9.0)


class ToyBackend:
    """ModelBackend around a ToyModel; keeps the rows of every forward, to show that they are bounded."""

    def __init__(self, vocab_size: int = 29, seed: int = 1, *, tokens: dict[str, int] | None = None, **options):
        self.module = ToyModel(vocab_size, seed, **options).eval()
        self.vocab_size = vocab_size
        self.shard: VocabShard | None = None
        self.tokens = tokens
        self.forward_rows: list[int] = []
        self.modes: list[bool] = []

    def logits(self, batch: RolloutBatch) -> Tensor:
        self.forward_rows.append(batch.num_tokens)
        self.modes.append(self.module.training)
        return self.module(batch)

    def token_to_id(self) -> dict[str, int] | None:
        return self.tokens


class ProjectingToy(ToyBackend):
    """The same model, stopping before a `head` of ones: hidden states are the logits themselves."""

    def hidden(self, batch: RolloutBatch) -> Tensor:
        return self.module(batch)

    def project(self, hidden: Tensor) -> Tensor:
        self.forward_rows.append(hidden.shape[0])
        return hidden


def toy_batch(num_seqs: int = 6, seed: int = 0, vocab: int = 29, tool_tokens: bool = True, **fields) -> RolloutBatch:
    """Rollouts of unequal length; some response tokens came from a tool and do not count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    prompts = [[draw(0, vocab) for _ in range(draw(1, 5))] for _ in range(num_seqs)]
    responses = [[draw(0, vocab) for _ in range(draw(2, 9))] for _ in range(num_seqs)]
    masks = [[not tool_tokens or draw(0, 4) > 0 for _ in response] for response in responses]
    return pack_rollouts(prompts, responses, response_masks=masks, **fields)


def pad_sequences(batch: RolloutBatch, length: int) -> RolloutBatch:
    """Every sequence padded at its end with tokens that do not count."""
    bounds = batch.cu_seqlens.tolist()

    def stretch(values: Tensor | None, fill) -> Tensor | None:
        if values is None:
            return None
        pieces = [values[a:b] for a, b in pairwise(bounds)]
        return torch.cat([torch.cat([p, p.new_full((length - p.numel(),), fill)]) for p in pieces])

    return RolloutBatch(
        tokens=stretch(batch.tokens, 3),
        cu_seqlens=torch.arange(0, length * batch.num_seqs + 1, length, dtype=torch.int32),
        loss_mask=stretch(batch.loss_mask, False),
        sample_ids=batch.sample_ids,
        rollout_ids=batch.rollout_ids,
        teacher_names=batch.teacher_names,
        rewards=batch.rewards,
        rollout_log_probs=stretch(batch.rollout_log_probs, 0.0),
    )
