"""What a model can be given: ids below its vocabulary, and sequences no longer than the positions it has learned.

Compared on the host before any model runs: the embedding's own answer is an IndexError in mid-run, or a device assert.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine.teachers.protocols import ModelBackend, ScoringBatch, Teacher


def max_positions(model: ModelBackend | Teacher) -> int | None:
    """The longest sequence the model can be given; None where it has no limit, or does not say."""
    return getattr(model, "max_positions", None)


def check_given(
    batch: ScoringBatch, *, model: str, vocab_size: int, max_positions: int | None = None, prompts_only: bool = False
) -> None:
    """Refuse what the model has no row for.

    model: what to call it, "student" or "teacher 'math'"
    vocab_size: its real vocabulary
    max_positions: its longest sequence, None without a limit
    prompts_only: ids of the rollout may lie beyond the vocabulary; the rows after them do not count (`unread_rows`)

    Raises: ValueError with the sample, the position, what was wanted and what came.
    """
    lengths = batch.cu_seqlens.diff()
    if max_positions is not None and bool((too_long := lengths > max_positions).any()):
        sequence = int(too_long.nonzero()[0])
        raise ValueError(
            f"{model}: sample {int(batch.sample_ids[sequence])} has {int(lengths[sequence])} tokens, prompt and answer "
            f"together; wanted at most {max_positions}, the positions it has learned"
        )
    if batch.num_tokens == 0 or int(batch.tokens.max()) < vocab_size:
        return
    foreign = batch.tokens >= vocab_size
    answer = _in_answer(batch)
    wrong = (foreign & ~answer if prompts_only else foreign).nonzero().flatten()
    if wrong.numel():
        token = int(wrong[0])
        sequence = int(batch.row_sequence()[token])
        raise ValueError(
            f"{model}: sample {int(batch.sample_ids[sequence])}, position {token - int(batch.cu_seqlens[sequence])}: "
            f"wanted ids below its vocabulary of {vocab_size}, got {int(batch.tokens[token])} in the "
            f"{'answer' if bool(answer[token]) else 'prompt'}"
        )


def unread_rows(batch: ScoringBatch, vocab_size: int) -> Tensor:
    """Rows of which a model says nothing, since an id before them in the rollout is not in its vocabulary.

    Equation: docs/math.md, "Vocabularies"

    Returns: [num_tokens] bool. The row that predicts such an id is not among them: there the id has probability 0.
    """
    if batch.tokens.device.type == "cpu" and (batch.num_tokens == 0 or int(batch.tokens.max()) < vocab_size):
        return torch.zeros_like(batch.loss_mask)
    foreign = (batch.tokens >= vocab_size) & _in_answer(batch)
    return (_earlier_in_sequence(batch, foreign) > 0) | foreign


def readable(batch: ScoringBatch, vocab_size: int) -> ScoringBatch:
    """The batch with id 0 in the place of every id the model lacks; what it says after them is not used."""
    if batch.tokens.device.type == "cpu" and (batch.num_tokens == 0 or int(batch.tokens.max()) < vocab_size):
        return batch
    return dataclasses.replace(batch, tokens=batch.tokens.masked_fill(batch.tokens >= vocab_size, 0))


def _in_answer(batch: ScoringBatch) -> Tensor:
    """Tokens after the first that a counting row of their sequence predicts, that one included: [num_tokens] bool."""
    return _earlier_in_sequence(batch, batch.loss_mask) > 0


def _earlier_in_sequence(batch: ScoringBatch, flags: Tensor) -> Tensor:
    """How many rows before each in its sequence are flagged: [num_tokens] int64."""
    before = flags.long().cumsum(0) - flags.long()
    return before - before[batch.cu_seqlens[:-1].long()][batch.row_sequence()]
