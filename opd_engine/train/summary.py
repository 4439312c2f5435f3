"""summary.json: what a run began with, what it ended with, and what its teachers can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_engine.train.config import TrainConfig

SUMMARY_FILE = "summary.json"


def _by_name(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {key[len(prefix) :]: float(value) for key, value in record.items() if key.startswith(prefix)}


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def gap_closed(before: float, after: float, teacher: float) -> float | None:
    """The fraction of the distance to the teacher that was covered; None where there was none."""
    return (after - before) / (teacher - before) if teacher != before else None


def make_summary(
    config: TrainConfig,
    records: Sequence[Mapping[str, Any]],
    teacher_values: Mapping[str, Mapping[str, float]],
    seconds: float,
) -> dict[str, Any]:
    """The summary from the first and the last evaluation.

    records: of metrics.jsonl.  teacher_values: {"accuracy": {task: value}, "perplexity": {name: value}}.
    Returns: accuracy_before, accuracy_after, accuracy_teacher (means over tasks; None without labels), the same by task
        under `tasks`; forward_kl and perplexity before and after, by teacher; divergence, k, steps, seconds.
    """
    evaluations = [record for record in records if record["kind"] == "eval"]
    first, last = evaluations[0], evaluations[-1]
    before, after = _by_name(first, "accuracy/"), _by_name(last, "accuracy/")
    teacher = {task: float(value) for task, value in teacher_values.get("accuracy", {}).items()}
    summary: dict[str, Any] = {
        "accuracy_before": _mean(before),
        "accuracy_after": _mean(after),
        "accuracy_teacher": _mean(teacher),
        "tasks": {
            task: {
                "accuracy_before": before[task],
                "accuracy_after": after[task],
                "accuracy_teacher": teacher.get(task),
                "gap_closed": gap_closed(before[task], after[task], teacher[task]) if task in teacher else None,
            }
            for task in before
        },
        "divergence": config.opd.divergence,
        "k": config.opd.k,
        "steps": last["step"],
        "seconds": round(seconds, 2),
    }
    for key in ("forward_kl", "perplexity"):
        starts, ends = _by_name(first, f"{key}/"), _by_name(last, f"{key}/")
        if starts:
            summary[key] = {name: {"before": starts[name], "after": ends[name]} for name in starts}
    for name, value in teacher_values.get("perplexity", {}).items():
        summary["perplexity"][name]["teacher"] = float(value)
    return summary


def describe(summary: Mapping[str, Any], directory: str) -> str:
    """The summary in a few lines, for a terminal."""
    lines = []
    for task, values in summary["tasks"].items():
        teacher = values["accuracy_teacher"]
        lines.append(
            f"{task}: accuracy {values['accuracy_before']:.3f} -> {values['accuracy_after']:.3f}"
            + (f" (teacher {teacher:.3f})" if teacher is not None else "")
        )
    for key in ("forward_kl", "perplexity"):
        for name, values in summary.get(key, {}).items():
            teacher = f" (teacher {values['teacher']:.3f})" if "teacher" in values else ""
            lines.append(f"{name}: {key} {values['before']:.4g} -> {values['after']:.4g}{teacher}")
    fullest = max(summary.get("memory", ()), key=lambda rank: rank["measured_bytes"], default=None)
    if fullest is not None and fullest["measured_bytes"] >= 2**28:  # of less, the libraries' own share is most
        planned, measured = fullest["planned_bytes"] / 2**30, fullest["measured_bytes"] / 2**30
        lines.append(
            f"memory of the fullest rank while training: {measured:.2f} GiB measured, {planned:.2f} planned "
            f"({planned / measured - 1:+.0%})"
        )
    lines.append(
        f"{summary['steps']} steps, {summary['seconds']:.0f} s; {directory}/{SUMMARY_FILE} and plots beside it"
    )
    return "\n".join(lines)
