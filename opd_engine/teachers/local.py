"""A teacher in this process: any ModelBackend, run without gradient, in eval mode, a bounded number of rows at a time.

At most `max_tokens` rows of logits exist at once (a single longer sequence excepted, unless the backend can project
rows by itself). Under tensor parallelism every rank makes the same calls and gets the same scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.functional.scores import gather_log_probs, topk_log_probs
from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers.limits import max_positions
from opd_engine.teachers.protocols import ChooseIds, ModelBackend, ProjectingBackend, ScoringBatch

ScoreRows = Callable[[Tensor, Tensor], TokenScores]


class LocalTeacher:
    """A teacher that wraps a model backend.

    backend: the model; its `module`, if it has one, is put in eval mode while it scores and left as it was found
    max_tokens: rows of logits at once, [max_tokens, vocab_shard_size]
    scoring: entered around every pass: what brings this teacher's weights where they are needed and takes them away
        again, `lambda: weights.active("teacher:math")` or the `on_device` of its StagedWeights. Its whole share is then
        scored in one pass, and its scores wait on the host.
    prefetch: called while the teacher before it is scoring, to start bringing the weights
    """

    def __init__(
        self,
        backend: ModelBackend,
        *,
        max_tokens: int = 8192,
        scoring: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
        prefetch: Callable[[], None] | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: wanted at least 1, got {max_tokens}")
        self.backend = backend
        self.max_tokens = max_tokens
        self.splits_itself = scoring is not None
        self._scoring = scoring or contextlib.nullcontext
        self._prefetch = prefetch

    def prefetch(self) -> None:
        """Start bringing the weights; does not wait."""
        if self._prefetch is not None:
            self._prefetch()

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Of the backend, where it says."""
        return max_positions(self.backend)

    def token_to_id(self) -> Mapping[str, int] | None:
        return self.backend.token_to_id()

    def score(
        self, batch: ScoringBatch, indices: Tensor, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """Log-probs at given ids.

        indices: [num_tokens, k] int64, -1 absent
        target: [num_tokens] int64 or None

        Returns:
            flat TokenScores on the logits' device, defined where `loss_mask` is True.
        Communicates: as gather_log_probs, over the backend's shard.
        """
        if indices.dim() != 2 or indices.shape[0] != batch.num_tokens:
            raise ValueError(f"indices: wanted [num_tokens={batch.num_tokens}, k], got {list(indices.shape)}")

        def score_rows(logits: Tensor, rows: Tensor) -> TokenScores:
            return gather_log_probs(
                logits,
                _at(indices, rows, logits.device),
                target=None if target is None else _at(target, rows, logits.device),
                temperature=temperature,
                shard=self._shard(logits),
            )

        return self._walk(batch, score_rows, indices.shape[1])

    def topk(
        self, batch: ScoringBatch, k: int, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """The model's own top-k; otherwise as `score`."""

        def score_rows(logits: Tensor, rows: Tensor) -> TokenScores:
            return topk_log_probs(
                logits,
                k,
                target=None if target is None else _at(target, rows, logits.device),
                temperature=temperature,
                shard=self._shard(logits),
            )

        return self._walk(batch, score_rows, k)

    def score_chosen(
        self,
        batch: ScoringBatch,
        k: int,
        choose: ChooseIds,
        *,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Own top-k, then the scores at the ids `choose` makes of it, from one forward; otherwise as `score`."""

        def score_rows(logits: Tensor, rows: Tensor) -> TokenScores:
            shard = self._shard(logits)
            own = topk_log_probs(logits, k, temperature=temperature, shard=shard)
            return gather_log_probs(
                logits,
                choose(own, rows),
                target=None if target is None else _at(target, rows, logits.device),
                temperature=temperature,
                shard=shard,
            )

        return self._walk(batch, score_rows, k)

    def hidden(self, batch: ScoringBatch) -> Tensor:
        """Hidden states of the rows that count: [rows, hidden_size].

        Raises: ValueError where the backend has no hidden states to give, or its weights do not stay.
        """
        if not isinstance(self.backend, ProjectingBackend) or self.splits_itself:
            reason = "its weights are not there between its turns" if self.splits_itself else "its head is not apart"
            raise ValueError(f"hidden: wanted a resident backend with hidden and project, but {reason}")
        parts = []
        with torch.no_grad(), scoring_mode(self.backend):
            for micro in batch.micro_batches(max_tokens=self.max_tokens):
                hidden = self.backend.hidden(micro)
                parts.append(hidden[micro.loss_mask.nonzero().flatten().to(hidden.device)])
        return torch.cat(parts)

    def full_rows(self, batch: ScoringBatch) -> _Logits:
        """Logits of the rows that count: [rows, vocab_shard_size] of memory, for batches of evaluation's size."""
        parts = []
        with self._scoring(), torch.no_grad(), scoring_mode(self.backend):
            for micro in batch.micro_batches(max_tokens=self.max_tokens):
                logits = self.backend.logits(micro)
                parts.append(logits[micro.loss_mask.nonzero().flatten().to(logits.device)])
        whole = torch.cat(parts) if parts else torch.empty(0, self.vocab_size)
        return _Logits(whole, None if not parts else self._shard(whole))

    def head_on(self, device: torch.device | None) -> _LocalHead:
        """The backend's own head, where it is."""
        return _LocalHead(self)

    def _shard(self, logits: Tensor) -> VocabShard:
        return self.backend.shard or VocabShard(0, logits.shape[-1], self.vocab_size)

    def _walk(self, batch: ScoringBatch, score_rows: ScoreRows, width: int) -> TokenScores:
        """Run the model over micro-batches and put the rows' scores in their places."""
        parts, places, start = [], [], 0
        with self._scoring(), torch.no_grad(), scoring_mode(self.backend):
            for micro in batch.micro_batches(max_tokens=self.max_tokens):
                for rows, logits in self._logits(micro):
                    scores = score_rows(logits, rows + start)
                    parts.append(scores.to("cpu") if self.splits_itself else scores)
                    places.append(rows + start)
                    # Free this chunk before the next one is made: two would double the bound.
                    del logits, scores
                start += micro.num_tokens
        if not parts:
            return TokenScores.absent(batch.num_tokens, width, device=batch.tokens.device, has_target=True)
        return TokenScores.cat(parts).place(torch.cat(places), batch.num_tokens)

    def _logits(self, micro: ScoringBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of (rows of the micro-batch, their logits)."""
        if not isinstance(self.backend, ProjectingBackend):
            logits = self.backend.logits(micro)
            if logits.dim() != 2 or logits.shape[0] != micro.num_tokens:
                raise ValueError(
                    f"logits: wanted [num_tokens={micro.num_tokens}, vocab] of the backend, got {list(logits.shape)}"
                )
            yield torch.arange(micro.num_tokens), logits
            return
        hidden = self.backend.hidden(micro)
        wanted = micro.loss_mask.nonzero().flatten().cpu()
        for rows in wanted.split(self.max_tokens):
            if rows.numel():
                yield rows, self.backend.project(hidden[rows.to(hidden.device)])


@dataclass(frozen=True)
class _Logits:
    """Implements FullRows."""

    whole: Tensor
    shard: VocabShard | None

    @property
    def num_rows(self) -> int:
        return self.whole.shape[0]

    def logits(self, rows: slice) -> Tensor:
        return self.whole[rows]


@dataclass(frozen=True)
class _LocalHead:
    teacher: LocalTeacher

    def score(self, hidden: Tensor, indices: Tensor, *, temperature: float = 1.0) -> TokenScores:
        """Log-probs at `indices`, at most max_tokens rows of logits at a time."""
        backend, parts = self.teacher.backend, []
        with torch.no_grad(), scoring_mode(backend):
            for start in range(0, max(hidden.shape[0], 1), self.teacher.max_tokens):
                rows = slice(start, start + self.teacher.max_tokens)
                logits = backend.project(hidden[rows])
                shard = self.teacher._shard(logits)
                parts.append(gather_log_probs(logits, indices[rows], temperature=temperature, shard=shard))
        return TokenScores.cat(parts)


@contextlib.contextmanager
def scoring_mode(backend: ModelBackend) -> Iterator[None]:
    """Eval mode for the backend's module; every submodule's own mode is restored, also after an exception."""
    module = getattr(backend, "module", None)
    modes = [] if module is None else [(m, m.training) for m in module.modules()]
    try:
        if module is not None:
            module.eval()
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def _at(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return values[rows.to(values.device)].to(device)
