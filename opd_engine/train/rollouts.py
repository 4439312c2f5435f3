"""The student's rollouts for a step: written once, by the first rank, and the same on every rank of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from opd_engine.integrations.hf.rollout import Completions, generate
from opd_engine.parallel.collectives import broadcast_
from opd_engine.parallel.launch import World
from opd_engine.train.config import RolloutConfig
from opd_engine.train.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Writer:
    """How completions are written: the settings, what ends and pads a sequence, and the ranks that share the result.

    world: the ranks; None for this process alone.
    """

    config: RolloutConfig
    end_ids: tuple[int, ...]
    pad_id: int
    world: World | None = None

    def write(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        generator: torch.Generator | None = None,
        *,
        greedy: bool = False,
    ) -> Completions:
        """One completion a prompt, in order.

        generator: advanced on the first rank alone.  greedy: the likeliest ids instead of samples.
        Communicates: one broadcast of 12 bytes x max_new_tokens a prompt, with a group; with top_logprobs another of
            8 bytes x top_logprobs x max_new_tokens.
        """
        is_main = self.world is None or self.world.is_main
        written = self._write_here(model, prompts, generator, greedy) if is_main else None
        shared = self.world is not None and self.world.group is not None
        return self._share(written, len(prompts), 0 if greedy else self.config.top_logprobs) if shared else written

    def _write_here(self, model, prompts, generator, greedy) -> Completions:
        config = self.config
        tokens, log_probs, finished, tops = [], [], [], []
        for start in range(0, len(prompts), config.batch_size):
            part = generate(
                model,
                [prompt.token_ids for prompt in prompts[start : start + config.batch_size]],
                max_new_tokens=config.max_new_tokens,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                temperature=0.0 if greedy else config.temperature,
                top_k=0 if greedy else config.top_k,
                top_p=1.0 if greedy else config.top_p,
                generator=generator,
                top_logprobs=0 if greedy else config.top_logprobs,
            )
            tokens += part.tokens
            log_probs += part.log_probs
            finished += part.finished
            tops += part.top_log_probs or []
        return Completions(tokens=tokens, log_probs=log_probs, finished=finished, top_log_probs=tops or None)

    def _share(self, written: Completions | None, count: int, top_logprobs: int) -> Completions:
        """The first rank's completions on every rank: ids, log-probs as bits and the flag in one int32 table."""
        width = self.config.max_new_tokens
        table = torch.full((count, 2 * width + 1), -1, dtype=torch.int32)
        if written is not None:
            for row, (tokens, log_probs) in enumerate(zip(written.tokens, written.log_probs, strict=True)):
                table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
                bits = torch.tensor(log_probs, dtype=torch.float32).view(torch.int32)
                table[row, width : width + len(tokens)] = bits
            table[:, -1] = torch.tensor(written.finished, dtype=torch.int32)
        broadcast_(table, self.world.group)
        lengths = (table[:, :width] >= 0).sum(1).tolist()
        values = table[:, width : 2 * width].contiguous().view(torch.float32)
        return Completions(
            tokens=[row[:n] for row, n in zip(table[:, :width].tolist(), lengths, strict=True)],
            log_probs=[row[:n] for row, n in zip(values.tolist(), lengths, strict=True)],
            finished=[bool(flag) for flag in table[:, -1].tolist()],
            top_log_probs=self._share_tops(written, lengths, top_logprobs) if top_logprobs else None,
        )

    def _share_tops(self, written: Completions | None, lengths: list[int], top_logprobs: int) -> list:
        """The same of each token's likeliest ids, -1 where the vocabulary has fewer."""
        ids = torch.full((len(lengths), self.config.max_new_tokens, top_logprobs), -1, dtype=torch.int32)
        bits = torch.zeros_like(ids)
        if written is not None:
            for row, tops in enumerate(written.top_log_probs):
                for place, top in enumerate(tops):
                    ids[row, place, : len(top)] = torch.tensor([token for _, token in top], dtype=torch.int32)
                    values = torch.tensor([value for value, _ in top], dtype=torch.float32)
                    bits[row, place, : len(top)] = values.view(torch.int32)
        both = broadcast_(torch.stack([ids, bits]), self.world.group)
        values = both[1].contiguous().view(torch.float32).tolist()
        return [
            [
                [(value, token) for value, token in zip(*entries, strict=True) if token >= 0]
                for entries in zip(row_values[:n], row_ids[:n], strict=True)
            ]
            for row_values, row_ids, n in zip(values, both[0].tolist(), lengths, strict=True)
        ]
