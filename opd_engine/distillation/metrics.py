"""Sums over loss rows that add up over micro-batches and ranks, and the means they give.

One float64 vector with a fixed order of names, the same on every rank and micro-batch: adding two batches' metrics, or
all-reducing the vector, is exact up to rounding. Nothing here reads a value on the hot path; `means` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores

PER_SCORED_ROW = (
    "student_support_mass",
    "student_tail_mass",
    "teacher_support_mass",
    "teacher_tail_mass",
    "student_entropy",
    "support_size",
    "coverage",
    "state_weight",
)
"""Summed over rows without NaN; `coverage` counts rows whose sampled token lies in the support."""

COUNTS = ("rows", "nan_rows", "infinite_rows", "short_support_rows", "union_dropped")
"""`short_support_rows`: fewer than two ids present, where `renormalize` gives zero."""

NAMES = (*COUNTS, "loss", "divergence", "teacher_entropy", "teacher_entropy_rows", *PER_SCORED_ROW)


@dataclasses.dataclass
class MetricSums:
    """Named float64 sums.

    names: their order
    values: [len(names)] float64
    """

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, sums: dict[str, Tensor | float], teachers: Sequence[str], device: torch.device) -> MetricSums:
        """Put sums in the fixed order for a pool of teachers; what is not given is 0."""
        names = metric_names(teachers)
        unknown = set(sums) - set(names)
        assert not unknown, f"metrics without a place: {sorted(unknown)}"
        values = [torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in names]
        return cls(names, torch.stack(values))

    def __add__(self, other: MetricSums) -> MetricSums:
        if self.names != other.names:
            raise ValueError(f"metrics: wanted the names {self.names}, got {other.names}")
        return MetricSums(self.names, self.values + other.values)

    def summed(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> MetricSums:
        """Over data-parallel ranks; `sum_over_ranks` all-reduces a tensor and returns it."""
        return MetricSums(self.names, sum_over_ranks(self.values.clone()))

    def means(self) -> dict[str, float]:
        """What to log. Synchronises with the device.

        Means are over rows: `divergence` (and `divergence/NAME`) over finite ones, masses and entropies over rows
        without NaN. Counts and `loss`, which is weighted already, stay sums.
        """
        sums = dict(zip(self.names, self.values.tolist()))
        scored = sums["rows"] - sums["nan_rows"]
        result = {name: sums[name] for name in (*COUNTS, "loss")}
        result["divergence"] = _ratio(sums["divergence"], scored - sums["infinite_rows"])
        result["teacher_entropy"] = _ratio(sums["teacher_entropy"], sums["teacher_entropy_rows"])
        result.update({name: _ratio(sums[name], scored) for name in PER_SCORED_ROW})
        for name in self.names:
            if name.startswith("rows/"):
                teacher = name.removeprefix("rows/")
                result[name] = sums[name]
                result[f"divergence/{teacher}"] = _ratio(sums[f"divergence/{teacher}"], sums[f"finite_rows/{teacher}"])
        return result


def metric_names(teachers: Sequence[str]) -> tuple[str, ...]:
    """The order of the sums for a pool of teachers."""
    kinds = ("rows", "finite_rows", "divergence")
    return (*NAMES, *(f"{kind}/{teacher}" for teacher in teachers for kind in kinds))


def row_sums(
    divergences: Tensor, student: TokenScores, teacher: TokenScores, live: Tensor, next_tokens: Tensor, reached: Tensor
) -> dict[str, Tensor | float]:
    """The sums over the rows of one micro-batch that count.

    divergences: [rows], unweighted; student, teacher: scores of the same ids
    live, next_tokens, reached: [rows], which rows count, the token each predicts, the visited-state weight
    """
    nan = live & divergences.isnan()
    scored = live & ~nan
    infinite = live & divergences.isinf()
    present = student.indices != -1
    sizes = present.sum(1)

    def total(values: Tensor, rows: Tensor = scored) -> Tensor:
        return values.double().where(rows, 0.0).sum()

    sums: dict[str, Tensor | float] = {
        "rows": live.sum(),
        "nan_rows": nan.sum(),
        "infinite_rows": infinite.sum(),
        "short_support_rows": (live & (sizes < 2)).sum(),
        "divergence": total(divergences, scored & ~infinite),
        "student_support_mass": total(student.log_probs.double().exp().sum(1)),
        "student_tail_mass": total(student.tail_log_prob.double().exp()),
        "teacher_support_mass": total(teacher.log_probs.double().exp().sum(1)),
        "teacher_tail_mass": total(teacher.tail_log_prob.double().exp()),
        "support_size": total(sizes),
        "coverage": total((student.indices == next_tokens.unsqueeze(1)).any(1)),
        "state_weight": total(reached),
    }
    if student.entropy is not None:
        sums["student_entropy"] = total(student.entropy)
    if teacher.entropy is not None:
        known = scored & ~teacher.entropy.isnan()
        sums["teacher_entropy"] = total(teacher.entropy, known)
        sums["teacher_entropy_rows"] = known.sum()
    return sums


def add_metrics(parts: Iterable[MetricSums]) -> MetricSums:
    """The sum of several micro-batches' metrics."""
    total: MetricSums | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise ValueError("parts: wanted the metrics of at least one micro-batch, got none")
    return total


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
