"""Shapes and dtypes shared by the fakes, the autograd formulas and the collectives' messages."""

import math

import torch
from torch import Tensor

NUM_STATS = 5


def score_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits_dtype == torch.float64 else torch.float32


def num_rows(logits: Tensor) -> int:
    return math.prod(logits.shape[:-1])


def packed_words(k: int, has_target: bool, dtype: torch.dtype) -> int:
    """int32 words of one row of a top-k message whose scores have `dtype`."""
    return (k + NUM_STATS + has_target) * (2 if dtype == torch.float64 else 1) + k


def is_float64_message(words: int, k: int, has_target: bool) -> bool:
    return words == packed_words(k, has_target, torch.float64)
