"""PNG plots of a run from its metrics.jsonl: accuracy by task, divergence, support and tail, rollouts, perplexity.

They are drawn from the file alone, so a resumed or finished run can be drawn again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_engine.train.journal import METRICS_FILE, read_metrics

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def _series(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    points = [
        (record["step"], float(record[key]))
        for record in records
        if record["kind"] == kind and isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _suffixes(records: Sequence[Mapping[str, Any]], kind: str, prefix: str) -> list[str]:
    names = {
        key[len(prefix) :] for record in records if record["kind"] == kind for key in record if key.startswith(prefix)
    }
    return sorted(names)


def _axes(title: str, y_label: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes, points: tuple[list[int], list[float]], label: str, color: str, **style: Any) -> bool:
    if points[0]:
        axes.plot(
            *points, label=label, color=color, marker="o" if len(points[0]) <= 30 else None, markersize=4, **style
        )
    return bool(points[0])


def _save(figure, axes, path: Path) -> Path:
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _plot_accuracy(records, teachers: Mapping[str, float], path: Path) -> Path | None:
    tasks = _suffixes(records, "eval", "accuracy/")
    if not tasks:
        return None
    figure, axes = _axes("Held-out accuracy by task, greedy", "fraction of problems right")
    for task, color in zip(tasks, _COLORS * len(tasks)):
        _line(axes, _series(records, "eval", f"accuracy/{task}"), f"student, {task}", color)
        if task in teachers:
            axes.axhline(teachers[task], color=color, linestyle="--", alpha=0.6, label=f"teacher, {task}")
    axes.set_ylim(-0.03, 1.05)
    return _save(figure, axes, path)


def _plot_divergence(records, name: str, path: Path) -> Path | None:
    figure, axes = _axes(f"Divergence to the teachers ({name})", "nats a token")
    drawn = _line(axes, _series(records, "train", "loss"), f"{name} on the support, rollouts", "#bbbbbb")
    for task, color in zip(_suffixes(records, "eval", "forward_kl/"), _COLORS * 9):
        drawn |= _line(
            axes,
            _series(records, "eval", f"forward_kl/{task}"),
            f"forward_kl, full vocabulary, held out, {task}",
            color,
        )
    axes.set_ylim(bottom=0.0)
    return _save(figure, axes, path) if drawn else None


def _plot_support(records, path: Path) -> Path | None:
    figure, axes = _axes("Mass off the support", "mean tail mass")
    drawn = _line(axes, _series(records, "train", "student_tail_mass"), "student's tail", _COLORS[0])
    drawn |= _line(axes, _series(records, "train", "teacher_tail_mass"), "teacher's tail", _COLORS[1])
    axes.set_ylim(bottom=0.0)
    sizes = _series(records, "train", "support_size")
    if sizes[0]:
        right = axes.twinx()
        right.plot(*sizes, color="#999999", linestyle=":", label="ids in the support (right axis)")
        right.set_ylabel("mean ids a row")
        right.set_ylim(bottom=0.0)
        right.legend(loc="lower right", frameon=False)
    return _save(figure, axes, path) if drawn else None


def _plot_rollouts(records, path: Path) -> Path | None:
    figure, axes = _axes("Rollouts", "mean tokens a completion")
    drawn = _line(axes, _series(records, "train", "completion_tokens"), "length", _COLORS[0])
    ended = _series(records, "train", "completion_ended")
    axes.set_ylim(bottom=0.0)
    if ended[0]:
        right = axes.twinx()
        right.plot(*ended, color=_COLORS[2], label="ended by themselves (right axis)")
        right.set_ylabel("fraction")
        right.set_ylim(-0.03, 1.05)
        right.legend(loc="lower right", frameon=False)
    return _save(figure, axes, path) if drawn else None


def _plot_perplexity(records, teachers: Mapping[str, float], path: Path) -> Path | None:
    names = _suffixes(records, "eval", "perplexity/")
    if not names:
        return None
    figure, axes = _axes("Perplexity of held-out text", "perplexity")
    for name, color in zip(names, _COLORS * len(names)):
        _line(axes, _series(records, "eval", f"perplexity/{name}"), f"student, {name}", color)
        if name in teachers:
            axes.axhline(teachers[name], color=color, linestyle="--", alpha=0.6, label=f"teacher, {name}")
    axes.set_yscale("log")
    return _save(figure, axes, path)


def draw_plots(directory: Path, divergence: str, teacher_values: Mapping[str, Mapping[str, float]]) -> list[Path]:
    """Draws the plots of a run into directory/plots; returns those there was something to draw for.

    divergence: the name of the training loss.
    teacher_values: {"accuracy": {task: value}, "perplexity": {name: value}}, the teachers' own, drawn as dashed lines.
    """
    records = read_metrics(directory / METRICS_FILE)
    folder = directory / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _plot_accuracy(records, teacher_values.get("accuracy", {}), folder / "accuracy.png"),
        _plot_divergence(records, divergence, folder / "divergence.png"),
        _plot_support(records, folder / "support.png"),
        _plot_rollouts(records, folder / "rollouts.png"),
        _plot_perplexity(records, teacher_values.get("perplexity", {}), folder / "perplexity.png"),
    ]
    return [path for path in drawn if path is not None]
