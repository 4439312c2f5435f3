"""A transformers model as something that scores, whole or sharded: the old policy, or a teacher.

Ranks of a sharded model walk the same number of passes: one that has fewer micro-batches goes along with a token that
counts nowhere. No row of logits is kept; with `workspace_bytes` they exist a chunk at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.head import HiddenRows
from opd_engine.distillation.micro_loss import RowsHere
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.token_scores import TokenScores
from opd_engine.integrations.fsdp.forward import AtHead, CausalForward
from opd_engine.integrations.hf.models import max_positions
from opd_engine.parallel.collectives import all_reduce_max_
from opd_engine.parallel.sequences import take_rows
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers.local import scoring_mode
from opd_engine.teachers.protocols import ChooseIds

if TYPE_CHECKING:
    from opd_engine.parallel.collectives import ProcessGroup

_ScoreMicro = Callable[[AtHead, RowsHere, RolloutBatch, slice], TokenScores]


class ModelScorer:
    """Implements Teacher, and what a choosing one has besides.

    forward: the model. max_tokens: of a pass
    group: ranks that shard the model; all of them make the same calls, with batches of their own, also with empty ones
    token_map: the tokenizer's, or None
    scoring: entered around every call: what brings the weights and takes them away again
    prefetch: called while the teacher before is scoring
    """

    splits_itself = True

    def __init__(
        self,
        forward: CausalForward,
        *,
        max_tokens: int = 8192,
        group: ProcessGroup | None = None,
        token_map: Mapping[str, int] | None = None,
        scoring: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        prefetch: Callable[[], None] = lambda: None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: wanted at least 1, got {max_tokens}")
        self.forward, self.max_tokens, self.group = forward, max_tokens, group
        self.prefetch = prefetch
        self._token_map, self._scoring = token_map, scoring

    @property
    def module(self) -> torch.nn.Module:
        return self.forward.model

    @property
    def vocab_size(self) -> int:
        return self.forward.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Of the model, where its positions are learned."""
        return max_positions(self.forward.model)

    @property
    def leaves(self) -> bool:
        """Whether its weights come for its turns and are away between them."""
        return self._scoring is not contextlib.nullcontext

    @property
    def asked_together(self) -> bool:
        """Whether ranks without a row to score must ask too: they hold parts of the model."""
        return self.group is not None

    def token_to_id(self) -> Mapping[str, int] | None:
        return self._token_map

    def score(
        self, batch: RolloutBatch, indices: Tensor, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """Log-probs at given ids, on the host, defined where `loss_mask` is True.

        indices: [num_tokens, k] int64, -1 absent; target: [num_tokens] int64 or None
        Communicates: a sharded model's gathers; over a split head as gather_log_probs.
        """
        if indices.dim() != 2 or indices.shape[0] != batch.num_tokens:
            raise ValueError(f"indices: wanted [num_tokens={batch.num_tokens}, k], got {list(indices.shape)}")

        def at_rows(at_head: AtHead, exchange: RowsHere, _: RolloutBatch, place: slice) -> TokenScores:
            return self._gathered(at_head, exchange, indices[place], target, place, temperature)

        return self._walk(batch, indices.shape[1], at_rows)

    def topk(
        self, batch: RolloutBatch, k: int, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """The model's own top-k; otherwise as `score`."""

        def at_rows(at_head: AtHead, exchange: RowsHere, _: RolloutBatch, place: slice) -> TokenScores:
            own = _at(target, place, exchange)
            return exchange.whole_scores(at_head.topk(k, target=own, temperature=temperature))

        return self._walk(batch, k, at_rows)

    def score_chosen(
        self,
        batch: RolloutBatch,
        k: int,
        choose: ChooseIds,
        *,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Own top-k, then the scores at the ids `choose` makes of it, from one forward; otherwise as `score`."""

        def at_rows(at_head: AtHead, exchange: RowsHere, micro: RolloutBatch, place: slice) -> TokenScores:
            own = exchange.whole_scores(at_head.topk(k, temperature=temperature))
            here = micro.loss_mask.nonzero().flatten()
            chosen = choose(own.select(here.to(own.indices.device)), here + place.start)
            ids = chosen.new_full((micro.num_tokens, chosen.shape[1]), -1)
            ids[here.to(ids.device)] = chosen
            return self._gathered(at_head, exchange, ids, target, place, temperature)

        return self._walk(batch, k, at_rows)

    def full_rows(self, batch: RolloutBatch) -> FullLogits:
        """The rows that count over the whole vocabulary: [rows, vocab_shard_size] of memory, for evaluation."""
        parts: list[Tensor] = []

        def keep(at_head: AtHead, exchange: RowsHere, *_: object) -> None:
            parts.append(_logits(at_head)[exchange.rows >= 0])

        self._walk(batch, 1, keep)
        shard = self.forward.shard
        return FullLogits(torch.cat(parts) if parts else torch.empty(0, shard.local_vocab_size), shard)

    def _gathered(
        self,
        at_head: AtHead,
        exchange: RowsHere,
        indices: Tensor,
        target: Tensor | None,
        place: slice,
        temperature: float,
    ) -> TokenScores:
        indices = indices.to(exchange.device)
        own = take_rows(indices, exchange.own_rows(), fill=-1)
        scores = at_head.gather(own, target=_at(target, place, exchange), temperature=temperature)
        return exchange.whole_scores(scores, indices)

    def _walk(self, batch: RolloutBatch, width: int, at_rows: _ScoreMicro) -> TokenScores:
        """Every micro-batch's scores, one after the other, on the host."""
        micros = list(batch.micro_batches(max_tokens=self.max_tokens)) if batch.num_seqs else []
        parts: list[TokenScores] = []
        with self._scoring(), torch.no_grad(), scoring_mode(self):
            start = 0
            for index in range(agreed(len(micros), self.group, self.forward.device)):
                if index >= len(micros):
                    self.forward.at_head(idle_batch(), lambda at_head, _: at_head.topk(1))
                    continue
                micro = micros[index]
                place = slice(start, start + micro.num_tokens)
                start = place.stop

                def scored(at_head: AtHead, exchange: RowsHere, micro=micro, place=place) -> TokenScores | None:
                    return at_rows(at_head, exchange, micro, place)

                scores = self.forward.at_head(micro, scored)
                if scores is not None:
                    parts.append(scores.to("cpu"))
            self.forward.reshard()
        if not parts:
            return TokenScores.absent(batch.num_tokens, width, has_target=True)
        return TokenScores.cat(parts)


@dataclass(frozen=True)
class FullLogits:
    """Implements FullRows. whole: [rows, vocab_shard_size]; shard: which columns"""

    whole: Tensor
    shard: VocabShard

    @property
    def num_rows(self) -> int:
        return self.whole.shape[0]

    def logits(self, rows: slice) -> Tensor:
        return self.whole[rows]


def _logits(at_head: AtHead) -> Tensor:
    if isinstance(at_head, HiddenRows):
        return torch.nn.functional.linear(at_head.hidden, at_head.weight, at_head.bias)
    return at_head.logits


def _at(values: Tensor | None, place: slice, exchange: RowsHere) -> Tensor | None:
    return None if values is None else take_rows(values[place].to(exchange.device), exchange.own_rows(), fill=-1)


def agreed(count: int, group: ProcessGroup | None, device: torch.device) -> int:
    """The largest count of all ranks. Communicates: 8 bytes."""
    return int(all_reduce_max_(torch.tensor([count], device=device), group)) if group is not None else count


def idle_batch() -> RolloutBatch:
    """One token that counts nowhere."""
    one = torch.zeros(1, dtype=torch.int64)
    return RolloutBatch(
        tokens=one,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        loss_mask=torch.zeros(1, dtype=torch.bool),
        sample_ids=one - 1,
        rollout_ids=one - 1,
        teacher_names=[""],
    )
