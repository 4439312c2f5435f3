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


def _save(figure, path: Path) -> Path:
    # Below the axes: inside, a legend hides lines sooner or later.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _right_axis(axes, points: tuple[list[int], list[float]], label: str, y_label: str, top: float) -> None:
    if points[0]:
        right = axes.twinx()
        right.plot(*points, color="#888888", linestyle=":", label=label)
        right.set_ylabel(y_label)
        right.set_ylim(0.0, top)


def _from_zero(axes) -> None:
    """The vertical axis from 0, with room above the highest point."""
    axes.set_ylim(0.0, 1.08 * max((max(line.get_ydata()) for line in axes.get_lines()), default=1.0) or 1.0)


def _plot_accuracy(records, teachers: Mapping[str, float], path: Path) -> Path | None:
    tasks = _suffixes(records, "eval", "accuracy/")
    if not tasks:
        return None
    figure, axes = _axes("Held-out accuracy by task, greedy", "fraction of problems right")
    for place, (task, color) in enumerate(zip(tasks, _COLORS * len(tasks))):
        _line(axes, _series(records, "eval", f"accuracy/{task}"), f"student, {task}", color)
        if task in teachers:
            # Each dash pattern starts elsewhere, so that teachers of equal accuracy both show.
            style = (5 * place, (5, 5))
            axes.axhline(teachers[task], color=color, linestyle=style, label=f"teacher, {task}")
    axes.set_ylim(-0.03, 1.05)
    return _save(figure, path)


def _plot_divergence(records, name: str, path: Path) -> Path | None:
    figure, axes = _axes(f"Divergence to the teachers (trained on {name})", "nats a token")
    drawn = _line(axes, _series(records, "train", "divergence"), f"{name} on the support, rollouts", "#bbbbbb")
    tasks = _suffixes(records, "eval", "forward_kl/")
    for task, color in zip(tasks, _COLORS * len(tasks)):
        points = _series(records, "eval", f"forward_kl/{task}")
        drawn |= _line(axes, points, f"forward_kl, full vocabulary, held out, {task}", color)
    _from_zero(axes)
    return _save(figure, path) if drawn else None


def _plot_support(records, path: Path) -> Path | None:
    figure, axes = _axes("Mass off the support", "mean tail mass")
    drawn = _line(axes, _series(records, "train", "student_tail_mass"), "student's tail", _COLORS[0])
    drawn |= _line(axes, _series(records, "train", "teacher_tail_mass"), "teacher's tail", _COLORS[1])
    _from_zero(axes)
    sizes = _series(records, "train", "support_size")
    _right_axis(axes, sizes, "ids in the support (right)", "mean ids a row", 1.3 * max(sizes[1], default=1.0))
    return _save(figure, path) if drawn else None


def _plot_rollouts(records, path: Path) -> Path | None:
    figure, axes = _axes("Rollouts", "mean tokens a completion")
    drawn = _line(axes, _series(records, "train", "completion_tokens"), "length", _COLORS[0])
    _from_zero(axes)
    ended = _series(records, "train", "completion_ended")
    _right_axis(axes, ended, "ended by themselves (right)", "fraction", 1.08)
    return _save(figure, path) if drawn else None


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
    return _save(figure, path)


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
