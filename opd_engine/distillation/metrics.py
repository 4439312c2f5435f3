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

COUNTS = ("rows", "unread_rows", "nan_rows", "infinite_rows", "short_support_rows", "union_dropped", "clipped_rows")
"""`unread_rows`: count, but no teacher has all the ids before them, and are not among `rows`; `short_support_rows`:
fewer than two ids present, where `renormalize` gives zero; `clipped_rows`: where the policy gradient is cut off."""

NAMES = (*COUNTS, "loss", "policy_loss", "divergence", "teacher_entropy", "teacher_entropy_rows", *PER_SCORED_ROW)

GROUP_COUNTS = ("rows", "infinite_rows")
GROUP_MEANS = {
    "divergence": "finite_rows",
    "student_support_mass": "scored_rows",
    "student_tail_mass": "scored_rows",
    "teacher_support_mass": "scored_rows",
    "teacher_tail_mass": "scored_rows",
    "student_entropy": "scored_rows",
    "teacher_entropy": "teacher_entropy_rows",
    "coverage": "scored_rows",
    "topk_overlap": "topk_overlap_rows",
}
"""What is kept apart by teacher and by task, and over which rows of the group it is a mean."""

GROUP_KINDS = (*GROUP_COUNTS, *dict.fromkeys(GROUP_MEANS.values()), *GROUP_MEANS)


@dataclasses.dataclass
class MetricSums:
    """Named float64 sums.

    names: their order
    values: [len(names)] float64
    """

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, sums: dict[str, Tensor | float], groups: Sequence[str], device: torch.device) -> MetricSums:
        """Put sums in the fixed order for these groups of rows; what is not given is 0."""
        names = metric_names(groups)
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
        without NaN. Counts, `loss` and `policy_loss`, which are weighted already, stay sums. NAME is a teacher, or
        task:TASK.
        """
        sums = dict(zip(self.names, self.values.tolist()))
        scored = sums["rows"] - sums["nan_rows"]
        result = {name: sums[name] for name in (*COUNTS, "loss", "policy_loss")}
        result["divergence"] = _ratio(sums["divergence"], scored - sums["infinite_rows"])
        result["teacher_entropy"] = _ratio(sums["teacher_entropy"], sums["teacher_entropy_rows"])
        result.update({name: _ratio(sums[name], scored) for name in PER_SCORED_ROW})
        for name in self.names:
            if name.startswith("rows/"):
                group = name.removeprefix("rows/")
                result.update({f"{kind}/{group}": sums[f"{kind}/{group}"] for kind in GROUP_COUNTS})
                for kind, rows in GROUP_MEANS.items():
                    result[f"{kind}/{group}"] = _ratio(sums[f"{kind}/{group}"], sums[f"{rows}/{group}"])
        return result


def metric_names(groups: Sequence[str]) -> tuple[str, ...]:
    """The order of the sums for these groups: teachers in pool order, then "task:TASK" in the config's."""
    return (*NAMES, *(f"{kind}/{group}" for group in groups for kind in GROUP_KINDS))


def row_sums(
    divergences: Tensor, student: TokenScores, teacher: TokenScores, live: Tensor, next_tokens: Tensor, reached: Tensor
) -> dict[str, Tensor | float]:
    """The sums over the rows of one micro-batch that count.

    divergences: [rows], unweighted; student, teacher: scores of the same ids
    live, next_tokens, reached: [rows], which rows count, the token each predicts, the visited-state weight
    """
    kept = _values(divergences, student, teacher, next_tokens)
    nan = live & divergences.isnan()
    sizes = (student.indices != -1).sum(1)

    def total(values: Tensor) -> Tensor:
        return values.double().where(live & ~nan, 0.0).sum()

    sums: dict[str, Tensor | float] = {
        "rows": live.sum(),
        "nan_rows": nan.sum(),
        "infinite_rows": (live & divergences.isinf()).sum(),
        "short_support_rows": (live & (sizes < 2)).sum(),
        "support_size": total(sizes),
        "state_weight": total(reached),
    }
    for name in ("divergence", "teacher_entropy", *PER_SCORED_ROW):
        if name in kept:
            values, rows = kept[name]
            sums[name] = values.where(live & rows, 0.0).sum()
    if "teacher_entropy" in kept:
        sums["teacher_entropy_rows"] = (live & kept["teacher_entropy"][1]).sum()
    return sums


def group_sums(
    groups: Sequence[str],
    rows: Tensor,
    divergences: Tensor,
    student: TokenScores,
    teacher: TokenScores,
    next_tokens: Tensor,
) -> dict[str, Tensor | float]:
    """The sums of each group of rows.

    groups: their names; rows: [groups, rows] bool, which rows each has; otherwise as `row_sums`
    """
    if not groups:
        return {}
    kept = _values(divergences, student, teacher, next_tokens)
    counts = {
        "rows": torch.ones_like(rows[0]),
        "infinite_rows": divergences.isinf(),
        "finite_rows": divergences.isfinite(),
        "scored_rows": ~divergences.isnan(),
    }
    if "teacher_entropy" in kept:
        counts["teacher_entropy_rows"] = kept["teacher_entropy"][1]
    columns = {name: flags.double() for name, flags in counts.items()}
    columns |= {name: values.where(flags, 0.0) for name, (values, flags) in kept.items() if name in GROUP_MEANS}
    table = rows.double() @ torch.stack(list(columns.values()), dim=1)
    return {f"{kind}/{group}": table[g, c] for g, group in enumerate(groups) for c, kind in enumerate(columns)}


def _values(
    divergences: Tensor, student: TokenScores, teacher: TokenScores, next_tokens: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> ([rows] float64, [rows] bool: where it is defined)."""
    scored = ~divergences.isnan()
    found = {
        "divergence": (divergences.double(), scored & ~divergences.isinf()),
        "student_support_mass": (student.log_probs.double().exp().sum(1), scored),
        "student_tail_mass": (student.tail_log_prob.double().exp(), scored),
        "teacher_support_mass": (teacher.log_probs.double().exp().sum(1), scored),
        "teacher_tail_mass": (teacher.tail_log_prob.double().exp(), scored),
        "coverage": ((student.indices == next_tokens.unsqueeze(1)).any(1).double(), scored),
    }
    if student.entropy is not None:
        found["student_entropy"] = (student.entropy.double(), scored)
    if teacher.entropy is not None:
        found["teacher_entropy"] = (teacher.entropy.double(), scored & ~teacher.entropy.isnan())
    return found


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
