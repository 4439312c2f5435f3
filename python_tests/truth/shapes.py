"""The rows every truth test runs on. Each case says why it is there.

Logits are multiples of 1/16 where nothing else is said: exact in every dtype, and full of ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = -math.inf


@dataclass
class Case:
    """Rows of one kind; `cast` gives them in a dtype (a case may also need its own memory layout)."""

    name: str
    why: str
    logits: Tensor  # [T, V] float64, V the padded width
    teacher_logits: Tensor  # [T, V]
    k: int
    vocab_size: int
    temperature: float | Tensor = 1.0
    target: Tensor | None = None
    layout: Callable[[Tensor], Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def cast(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        rows = logits.to(dtype)
        return rows if self.layout is None else self.layout(rows)


def quantised(rows: int, width: int, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spread
    return (logits * 16).round().clamp(-127, 127) / 16


def misaligned(rows: Tensor) -> Tensor:
    """Rows that start at odd elements of a wider buffer: no vector load is aligned."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 8), 77.0, dtype=rows.dtype)[:, : rows.shape[1] + 5]
    wide[:, 3 : 3 + rows.shape[1]] = rows
    return wide[:, 3 : 3 + rows.shape[1]]


def transposed(rows: Tensor) -> Tensor:
    """Megatron's [s, b, V] seen as [b, s, V]: leading strides no 2-D view can express."""
    batch = 2
    return rows.reshape(batch, -1, rows.shape[-1]).transpose(0, 1).contiguous().transpose(0, 1)


def _edit(logits: Tensor, *edits: tuple) -> Tensor:
    for index, value in edits:
        logits[index] = value
    return logits


def _plain(name: str, why: str, rows: int, width: int, k: int, **kwargs) -> Case:
    seed = sum(map(ord, name))
    target = torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(seed))
    if rows:
        target[0] = -1  # absent among present ones
    return Case(
        name, why, quantised(rows, width, seed), quantised(rows, width, seed + 1), k, width, target=target, **kwargs
    )


def _build() -> list[Case]:
    cases = [
        _plain("k_1", "the smallest support", 5, 40, 1),
        _plain("k_vocab_minus_1", "the tail is one column", 4, 24, 23),
        _plain("k_vocab", "the tail is empty: -inf, and its gradient counts as 0", 4, 24, 24),
        _plain("ragged", "V % 8 != 0 and more rows than a block", 37, 61, 8),
        _plain("vocab_1", "one token: log-prob 0, tail empty", 3, 1, 1),
        _plain("gpt2", "V = 50257, a real odd vocabulary", 3, 50257, 64),
        _plain("empty", "no row at all", 0, 40, 4),
        _plain("temperatures", "a temperature of its own in each row", 6, 90, 8),
        _plain("cold", "t = 0.05: exponents of -300", 4, 50, 6, temperature=0.05),
        _plain("misaligned", "rows at odd offsets of a wider buffer", 6, 67, 8, layout=misaligned),
        _plain("transposed", "Megatron's transposed [s, b, V]", 6, 40, 6, layout=transposed),
        _plain("padded", "padding columns hold NaN, inf and 1e30: masked by index", 5, 44, 6),
        _plain("masked", "-inf logits in and out of the support", 5, 40, 6),
        _plain("few_finite", "fewer than k finite columns: the rest is -1", 4, 40, 8),
        _plain("shard_unused", "a whole block of columns at -inf", 4, 64, 6),
        _plain("duplicate_maxima", "many columns tie for the maximum and at the k-th place", 5, 70, 8),
        _plain("flat", "every logit equal: the tail's three summands cancel", 3, 1000, 8),
        _plain("peaked", "one logit 60 above: the tail is far below the row's maximum", 4, 80, 8),
        _plain("one_hot_student", "q is 0 but at one id", 3, 30, 4),
        _plain("one_hot_teacher", "p is 0 but at one id", 3, 30, 4),
        _plain(
            "offset", "a large common offset: dividing before subtracting would lose it", 4, 200, 8, temperature=0.7
        ),
        _plain("finfo_min", "a mask of finfo.min at t < 1 overflows to -inf", 4, 40, 6, temperature=0.5),
    ]
    by_name = {case.name: case for case in cases}
    by_name["temperatures"].temperature = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 8.0])
    padded = by_name["padded"]
    padded.vocab_size = 39
    padded.target.clamp_(max=38)
    for logits in (padded.logits, padded.teacher_logits):
        _edit(logits, ((0, 39), math.nan), ((1, 40), math.inf), ((2, 41), 60000.0))
        logits[3, 39:] = 60000.0
    _edit(by_name["masked"].logits, ((slice(None), slice(0, None, 5)), NEG_INF), ((1, slice(10, None)), NEG_INF))
    _edit(by_name["masked"].teacher_logits, ((slice(None), slice(2, None, 7)), NEG_INF))
    _edit(by_name["few_finite"].logits, ((slice(None), slice(5, None)), NEG_INF), ((1, slice(1, None)), NEG_INF))
    _edit(by_name["shard_unused"].logits, ((slice(None), slice(16, 48)), NEG_INF))
    _edit(by_name["shard_unused"].teacher_logits, ((slice(None), slice(16, 48)), NEG_INF))
    ties = by_name["duplicate_maxima"].logits
    _edit(ties, ((0, slice(None)), 1.0), ((1, slice(3, 60, 3)), 7.0), ((2, slice(0, None, 2)), 0.0))
    _edit(ties, ((2, slice(1, None, 2)), -0.0), ((3, slice(20, 50)), 7.5), ((3, 60), 7.75))
    by_name["flat"].logits[:] = 0.5
    by_name["flat"].logits[1, 7] = 0.5625
    by_name["peaked"].logits[:, 11] = 60.0
    by_name["one_hot_student"].logits[:] = NEG_INF
    by_name["one_hot_student"].logits[:, 7] = 1.0
    by_name["one_hot_teacher"].teacher_logits[:] = NEG_INF
    by_name["one_hot_teacher"].teacher_logits[:, 7] = 1.0
    by_name["offset"].logits += 2048
    by_name["offset"].teacher_logits -= 2048
    by_name["offset"].logits[1] -= 4096
    return cases


def in_dtype(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of a case in a dtype; the case `finfo_min` masks with that dtype's own minimum."""
    student, teacher = case.cast(case.logits, dtype), case.cast(case.teacher_logits, dtype)
    if case.name == "finfo_min":
        student[:, 4::3] = torch.finfo(dtype).min
        teacher[:, 5::3] = torch.finfo(dtype).min
    return student, teacher


CASES = {case.name: case for case in _build()}
