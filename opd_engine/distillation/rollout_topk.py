"""A rollout engine's own top-k at each token it generated, as it answers them, made into row-aligned tensors.

SGLang's schema (`meta_info["output_top_logprobs"]`, slime keeps it) is the format: per response token a list of
(log-prob, token id, text or nothing), or None where the position has no values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.distillation.engine_numbers import ROUNDING, is_none

TopLogProbs = Sequence[Sequence[Sequence] | None]
"""Of one sequence: per response token (log-prob, token id, ...) likeliest first, or None."""

_MASS_ERROR = 0.02
_SAME = 1e-3
"""How far the two log-probs of an id that an engine gives twice may lie apart."""


def pack_top_logprobs(answers: Sequence[TopLogProbs], first_rows: Sequence[int], num_tokens: int) -> tuple[Tensor, ...]:
    """The ids [num_tokens, k] int64 (-1 where the engine gave fewer than the widest) and their log-probs, float32.

    first_rows: per sequence the packed row that predicts its first response token

    Entries without a log-prob (None, NaN, the lowest float) are absent, and an id given twice counts once.

    Raises: ValueError naming the sequence and the token whose entries are not (log-prob, id), or are two for one id.
    """
    rows, columns, ids, log_probs = [], [], [], []
    for sequence, answer in enumerate(answers):
        for place, entries in enumerate(answer):
            where, column, seen = f"response_top_logprobs[{sequence}][{place}]", 0, {}
            for entry in entries or ():
                if len(entry) < 2 or isinstance(entry[1], bool) or not isinstance(entry[1], int):
                    raise ValueError(f"{where}: wanted (log-prob, token id), got {entry!r}")
                if entry[0] is not None and not isinstance(entry[0], (int, float)):
                    raise ValueError(f"{where}: wanted a number for the log-prob, got {entry!r}")
                if is_none(entry[0]):
                    continue
                if entry[1] in seen:  # engines put the sampled token in front of its own place among the likeliest
                    if abs(seen[entry[1]] - entry[0]) > _SAME:
                        raise ValueError(
                            f"{where}: token {entry[1]} has two log-probs, {seen[entry[1]]} and {entry[0]}"
                        )
                    continue
                seen[entry[1]] = entry[0]
                rows.append(first_rows[sequence] + place)
                columns.append(column)
                log_probs.append(min(float(entry[0]), 0.0) if entry[0] <= ROUNDING else float(entry[0]))
                ids.append(entry[1])
                column += 1
    width = max(columns, default=0) + 1
    packed = torch.full((num_tokens, width), -1, dtype=torch.int64)
    packed_log_probs = torch.full((num_tokens, width), -torch.inf)
    packed[rows, columns] = torch.tensor(ids, dtype=torch.int64)
    packed_log_probs[rows, columns] = torch.tensor(log_probs, dtype=torch.float32)
    return packed, packed_log_probs


def check_topk_shapes(ids: Tensor | None, log_probs: Tensor | None, num_tokens: int) -> None:
    """Raises: ValueError for one without the other, or of another shape or dtype. Reads no value."""
    if (ids is None) != (log_probs is None):
        given, missing = ("ids", "log_probs") if log_probs is None else ("log_probs", "ids")
        raise ValueError(f"rollout_topk_{missing}: wanted beside rollout_topk_{given}, got None")
    if ids is None:
        return
    fits = isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64 and ids.shape[0] == num_tokens
    if not fits or ids.shape[1] < 1:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"rollout_topk_ids: wanted int64 [num_tokens={num_tokens}, k >= 1], got {got}")
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point() or log_probs.shape != ids.shape:
        got = (
            f"{log_probs.dtype} {list(log_probs.shape)}" if isinstance(log_probs, Tensor) else type(log_probs).__name__
        )
        raise ValueError(f"rollout_topk_log_probs: wanted floating-point {list(ids.shape)}, as the ids, got {got}")


def check_topk(ids: Tensor, log_probs: Tensor, rows: Tensor) -> None:
    """Check what an engine gave at these rows; other rows are not read.

    Raises: ValueError naming the row: an id below -1 or twice in a row, a log-prob above 0 or NaN, or more mass than 1.
    """
    ids, log_probs = ids[rows], log_probs[rows]
    present = ids != -1

    def first(wrong: Tensor) -> int | None:
        bad = wrong.nonzero().flatten()
        return None if bad.numel() == 0 else int(bad[0])

    if (bad := first((ids < -1).any(1))) is not None:
        raise ValueError(
            f"rollout_topk_ids: wanted ids >= 0, or -1 for none, got {int(ids[bad].min())} at row {int(rows[bad])}"
        )
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)
    if (bad := first(twice.any(1))) is not None:
        token = int(ordered[bad][1:][twice[bad]][0])
        raise ValueError(f"rollout_topk_ids: wanted distinct ids in a row, got {token} twice at row {int(rows[bad])}")
    if (bad := first((present & ~(log_probs <= 0)).any(1))) is not None:
        wrong = log_probs[bad][present[bad] & ~(log_probs[bad] <= 0)]
        raise ValueError(
            f"rollout_topk_log_probs: wanted log-probs <= 0, got {float(wrong[0])} at row {int(rows[bad])}"
        )
    mass = log_probs.double().exp().where(present, 0.0).sum(1)
    if (bad := first(mass > 1 + _MASS_ERROR)) is not None:
        raise ValueError(
            f"rollout_topk_log_probs: wanted a mass of at most 1 in a row, got {float(mass[bad]):.4g} at row "
            f"{int(rows[bad])}: these are no log-probs of one distribution"
        )


def likeliest(ids: Tensor, log_probs: Tensor, k: int) -> Tensor:
    """The k ids of most mass in each row, likeliest first, the lower id among equals: [num_tokens, min(k, width)]."""
    if ids.shape[1] <= k:
        return ids
    by_id = ids.argsort(dim=1, stable=True)
    ids, log_probs = ids.gather(1, by_id), log_probs.gather(1, by_id)
    order = log_probs.masked_fill(ids == -1, -math.inf).argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order)


def rollout_support(
    ids: Tensor, log_probs: Tensor, k: int, *, rows: Tensor, samples: Tensor, vocab_size: int
) -> Tensor:
    """The engine's ids as a support, at most k a row.

    rows: those that count; samples: [num_tokens] the sample of each row, for the messages

    Raises: ValueError for a row that counts and has no id, or one that is not in the student's vocabulary.
    """
    support = likeliest(ids, log_probs, k)
    chosen = support[rows]
    empty = (chosen == -1).all(1).nonzero().flatten()
    if empty.numel():
        row = int(rows[empty[0]])
        raise ValueError(
            f"rollout_topk_ids: sample {int(samples[row])}, row {row} counts, but the rollout engine gave no id there; "
            f"so do {empty.numel() - 1} other rows: ask it for top log-probs at every generated token, or mask them"
        )
    outside = (chosen >= vocab_size).any(1).nonzero().flatten()
    if outside.numel():
        row = int(rows[outside[0]])
        raise ValueError(
            f"rollout_topk_ids: wanted ids below the student's vocabulary of {vocab_size}, got {int(chosen.max())} "
            f"(first in sample {int(samples[row])}, row {row})"
        )
    return support
