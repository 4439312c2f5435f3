"""A rollout engine's log-probs as engines give them: numbers that mean "none" never enter a product.

Engines answer None, -inf, the lowest finite float (a mask that was applied before the log), or a rounding above 0.
Where a token does not count any of these is harmless; where it counts there is no ratio to be had from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST = -1e30
"""Log-probs below this are masks, not measurements: the log-prob of a token that was drawn is above -104 in float32."""

ROUNDING = 1e-3
"""How far above 0 a log-prob may lie for its rounding: half precision's at a probability of 1."""

MAX_LOG_RATIO = 40.0
"""Of the student's probability of a token over the engine's, where nothing cuts it off: its square is a float32."""


def given_log_prob(value: float | None, counts: bool, sample: int, place: int) -> float:
    """The log-prob of a response token as a number at most 0; 0 where the token does not count.

    Raises: ValueError with the sample and the token where it counts and the engine gave no log-prob.
    """
    if not counts:
        return 0.0
    if value is None or not LOWEST < value <= ROUNDING:
        raise ValueError(
            f"response_log_probs: wanted the log-prob of a token that was drawn (finite, <= 0), got {value} for sample "
            f"{sample}, response token {place}; leave the token out of the loss with response_masks, or ask the engine "
            "for log-probs before its sampling masks"
        )
    return min(float(value), 0.0)


def is_none(value: float | None) -> bool:
    """Whether an entry among an engine's top log-probs says that there is nothing: the id is then absent."""
    return value is None or (isinstance(value, (int, float)) and (math.isnan(value) or value <= LOWEST))


def check_log_probs(log_probs: Tensor, mask: Tensor, samples: Tensor, cu_seqlens: Tensor) -> None:
    """Raises: ValueError with the sample and the position of the first row that counts without a log-prob."""
    wrong = (mask & ~((log_probs > LOWEST) & (log_probs <= ROUNDING))).nonzero().flatten()
    if wrong.numel():
        row = int(wrong[0])
        sequence = int(torch.searchsorted(cu_seqlens.long(), row, right=True)) - 1
        where = f"row {row} (sample {int(samples[sequence])}, position {row - int(cu_seqlens[sequence])})"
        raise ValueError(
            "rollout_log_probs: wanted log-probs <= 0, and finite, on the rows that count, got "
            f"{float(log_probs[row])} at {where}"
        )


def check_ids(where: str, ids: Sequence[int]) -> None:
    """Raises: ValueError with the position of what is no token id."""
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ValueError(f"{where}[{place}]: wanted a token id, got {token!r}")


def numbers(name: str, values: Sequence[float]) -> Tensor:
    """[len(values)] float64. Raises: ValueError with the sequence whose value is no number."""
    for sequence, value in enumerate(values):
        if value is None or isinstance(value, str):
            raise ValueError(f"{name}[{sequence}]: wanted a number, got {value!r}")
    return torch.tensor(list(values), dtype=torch.float64)
