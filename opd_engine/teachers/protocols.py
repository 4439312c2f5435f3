"""What the teachers' floor asks of others: a batch to score, a model to run, and what a teacher itself promises.

Structural types only. RolloutBatch (opd_engine.distillation) is the batch; frameworks implement ModelBackend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.vocab import VocabShard


class ScoringBatch(Protocol):
    """Packed sequences: what RolloutBatch has that scoring needs. Row i predicts packed token i + 1."""

    tokens: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    teacher_names: list
    teacher_weights: Mapping[str, Tensor] | None
    teacher_prompts: list[Tensor | None] | None

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_seqs(self) -> int: ...

    def row_sequence(self) -> Tensor: ...

    def micro_batches(self, max_tokens: int | None = None, max_seqs: int | None = None) -> Sequence[ScoringBatch]: ...

    def teacher_view(self) -> tuple[ScoringBatch, Tensor]: ...


@runtime_checkable
class ModelBackend(Protocol):
    """A model that turns a packed batch into logits.

    vocab_size: the real vocabulary; padding columns of the logits lie at or above it
    shard: the columns of the vocabulary that this process holds, or None for all of them, padding included

    A backend may also have `module` (a torch.nn.Module): it is then put in eval mode while it scores and left as it was
    found; and `max_positions`, the longest sequence it can be given, or None without a limit. Under tensor parallelism
    every rank of the shard's group makes the same calls in the same order.
    """

    vocab_size: int
    shard: VocabShard | None

    def logits(self, batch: ScoringBatch) -> Tensor:
        """Logits [num_tokens, vocab_shard_size], row-aligned: row i predicts packed token i + 1."""
        ...

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map, or None where there is no tokenizer to compare."""
        ...


@runtime_checkable
class ProjectingBackend(ModelBackend, Protocol):
    """A backend that can stop before the LM head, so that scoring projects only the rows it needs, in chunks."""

    def hidden(self, batch: ScoringBatch) -> Tensor:
        """Hidden states before the LM head [num_tokens, hidden_size], row-aligned."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_shard_size] of those rows, soft-cap applied."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Anything that can score rollouts. Results are flat [num_tokens, ...] and defined where `loss_mask` is True.

    vocab_size: the teacher's own real vocabulary, over which it normalises

    It may also have `max_positions`, the longest sequence it can be given, or None without a limit.
    """

    vocab_size: int

    def score(
        self, batch: ScoringBatch, indices: Tensor, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """Log-probs at `indices` [num_tokens, k] (-1 absent) and, if given, of `target` [num_tokens]; no gradient."""
        ...

    def topk(
        self, batch: ScoringBatch, k: int, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """The teacher's own top-k; no gradient."""
        ...

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map, or None where there is none to compare."""
        ...


ChooseIds = Callable[[TokenScores, Tensor], Tensor]
"""(a model's top-k in some rows, which rows of the batch [n]) -> the ids [n, width] to score there, -1 absent."""


@runtime_checkable
class ChoosingTeacher(Teacher, Protocol):
    """A teacher that can score ids which depend on its own top-k in the same forward; others need a second one."""

    def score_chosen(
        self,
        batch: ScoringBatch,
        k: int,
        choose: ChooseIds,
        *,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Log-probs at the ids that `choose` makes of the own top-k; `choose` may be called several times."""
        ...


def holds_scores(teacher: Teacher) -> bool:
    """Whether what it answers on this rank is real: on a pipeline, only the last stage's is."""
    return getattr(teacher, "holds_scores", True)


def asked_together(teacher: Teacher) -> bool:
    """Whether ranks without a row to score must ask it too: they hold parts of its weights."""
    return getattr(teacher, "asked_together", False)


class FullRows(Protocol):
    """Some rows of a model over its whole vocabulary, or this rank's shard of it.

    num_rows: how many; 0 on a pipeline stage that has no head
    shard: the columns of this rank, None for all of them
    """

    num_rows: int
    shard: VocabShard | None

    def logits(self, rows: slice) -> Tensor:
        """[rows, vocab_shard_size]; no gradient."""
        ...


@runtime_checkable
class FullTeacher(Teacher, Protocol):
    """A teacher whose whole distributions can be looked at, for evaluation."""

    def full_rows(self, batch: ScoringBatch) -> FullRows:
        """The rows that count, in order; they stay when another model takes this one's place."""
        ...


class TeacherHead(Protocol):
    """A teacher's LM head on a device; it holds that memory for as long as it lives."""

    def score(self, hidden: Tensor, indices: Tensor, *, temperature: float = 1.0) -> TokenScores:
        """Log-probs at `indices` [rows, k] of rows of the teacher's hidden states, on the device; no gradient."""
        ...


@runtime_checkable
class HiddenTeacher(Teacher, Protocol):
    """A teacher whose hidden states can be kept and scored later, at ids that nobody knew when it ran."""

    def hidden(self, batch: ScoringBatch) -> Tensor:
        """Hidden states before the LM head of the rows that count, in order: [rows, width], in the model's dtype.

        A rank may hold a part of each row, or nothing: what its own `head_on` understands.
        """
        ...

    def head_on(self, device: torch.device | None) -> TeacherHead:
        """The LM head as it was when `hidden` was asked last; None: on the device where that ran."""
        ...
