"""Rollouts by a transformers model in the trainer's own process: the live one, or a replica of one that is sharded.

Bound by latency, as opd_engine.integrations.hf.rollout. Ranks that hold parts of one student write once: the first of
them draws, the others are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout_engine import Completions, EngineState, Publication, Sampling
from opd_engine.distillation.sampling import uniform_rows
from opd_engine.integrations.hf.rollout import generate
from opd_engine.parallel.collectives import broadcast_, group_rank
from opd_engine.parallel.tensors import whole_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from opd_engine.parallel.collectives import ProcessGroup


class InlineEngine:
    """Implements RolloutEngine.

    module: what writes. Where a publication brings other tensors than the module's own they are copied into it,
        gathered whole where they are sharded: a replica costs the model's whole weights on this rank
    pad_id: fills padded positions; never attended to
    batch_size: completions written at a time
    group: ranks that share this engine's answers: the first writes; None for this process alone
    """

    def __init__(
        self, module: PreTrainedModel, *, pad_id: int, batch_size: int = 512, group: ProcessGroup | None = None
    ) -> None:
        self.module, self._pad_id, self._batch_size, self._group = module, pad_id, batch_size, group
        self._state = EngineState.NONE

    @property
    def state(self) -> EngineState:
        return self._state

    @torch.no_grad()
    def publish(self, publication: Publication) -> None:
        """Write with these weights from now on. Communicates: an all-gather of each tensor that is sharded."""
        self._state = EngineState.NONE  # until all of them are here
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, tensor in publication.tensors.items():
            if name not in own:
                continue  # a tied weight's second name
            if own[name].data_ptr() != tensor.data_ptr() or own[name].shape != tensor.shape:
                own[name].copy_(whole_tensor(tensor))
        self._state = EngineState.FULL(publication.version)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: Sequence[int]) -> Completions:
        """One completion a prompt, drawn with its own seed.

        Communicates: one broadcast of 12 bytes x max_new_tokens a prompt over the group, and with top_logprobs another
            of 8 bytes x top_logprobs x max_new_tokens.
        """
        written = self._write(prompts, sampling, seed) if group_rank(self._group) == 0 else None
        if self._group is not None:
            written = _shared(written, len(prompts), sampling, self._group)
        version = self._state.version
        return replace(written, weight_version=None if version is None else [version] * len(prompts))

    def sleep(self) -> None:
        """Has nothing of its own to give back."""

    def wake(self) -> None:
        """Is always there."""

    def _write(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]) -> Completions:
        drawn = uniform_rows(seed, sampling.max_new_tokens) if sampling.temperature > 0 else None
        names = ("max_new_tokens", "end_ids", "temperature", "top_k", "top_p", "top_logprobs")
        options = {name: getattr(sampling, name) for name in names}
        tokens, log_probs, finished, tops = [], [], [], []
        for start in range(0, len(prompts), self._batch_size):
            rows = slice(start, start + self._batch_size)
            numbers = None if drawn is None else drawn[rows]
            part = generate(self.module, prompts[rows], pad_id=self._pad_id, uniforms=numbers, **options)
            tokens += part.tokens
            log_probs += part.log_probs
            finished += part.finished
            tops += part.top_logprobs or []
        return Completions(tokens=tokens, log_probs=log_probs, finished=finished, top_logprobs=tops or None)


def _shared(written: Completions | None, count: int, sampling: Sampling, group: ProcessGroup) -> Completions:
    """The first rank's completions on every rank: ids, log-probs as bits and the flag in one int32 table."""
    width = sampling.max_new_tokens
    table = torch.full((count, 2 * width + 1), -1, dtype=torch.int32)
    if written is not None:
        for row, (tokens, log_probs) in enumerate(zip(written.tokens, written.log_probs, strict=True)):
            table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            table[row, width : width + len(tokens)] = _bits(log_probs)
        table[:, -1] = torch.tensor(written.finished, dtype=torch.int32)
    broadcast_(table, group)
    lengths = (table[:, :width] >= 0).sum(1).tolist()
    values = table[:, width : 2 * width].contiguous().view(torch.float32)
    return Completions(
        tokens=[row[:n] for row, n in zip(table[:, :width].tolist(), lengths, strict=True)],
        log_probs=[row[:n] for row, n in zip(values.tolist(), lengths, strict=True)],
        finished=[bool(flag) for flag in table[:, -1].tolist()],
        top_logprobs=_shared_tops(written, lengths, sampling, group) if sampling.top_logprobs else None,
    )


def _shared_tops(written: Completions | None, lengths: list[int], sampling: Sampling, group: ProcessGroup) -> list:
    """The same of each token's likeliest ids, -1 where the vocabulary has fewer."""
    ids = torch.full((len(lengths), sampling.max_new_tokens, sampling.top_logprobs), -1, dtype=torch.int32)
    bits = torch.zeros_like(ids)
    if written is not None:
        for row, tops in enumerate(written.top_logprobs):
            for place, top in enumerate(tops):
                ids[row, place, : len(top)] = torch.tensor([token for _, token in top], dtype=torch.int32)
                bits[row, place, : len(top)] = _bits([value for value, _ in top])
    both = broadcast_(torch.stack([ids, bits]), group)
    values = both[1].contiguous().view(torch.float32).tolist()
    return [
        [
            [(value, token) for value, token in zip(*entries, strict=True) if token >= 0]
            for entries in zip(row_values[:n], row_ids[:n], strict=True)
        ]
        for row_values, row_ids, n in zip(values, both[0].tolist(), lengths, strict=True)
    ]


def _bits(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)
