"""PNG plots of a run, beside its metrics: the first figures of its report, for where no browser is at hand.

What is drawn is what `figures` makes of the run's folder; here it only gets its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd_engine.report.charts import Chart
from opd_engine.report.figures import make_figures
from opd_engine.report.runs import read_runs

PLOTS_FOLDER = "plots"
PLOTTED = ("accuracy", "held-out-divergence", "teachers", "tail", "support-size", "length", "perplexity")
"""Anchors of the figures that are drawn, those that there is something to draw for."""

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_MARKED = 30  # points of a line, at the most, that are marked one by one


def draw_plots(directory: Path) -> list[Path]:
    """Draws the plots of a run into its folder `plots`, at any time of the run or after it.

    Returns: the files, one a figure that there was something to draw for.
    """
    figures, _ = make_figures(read_runs([directory]))
    folder = directory / PLOTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for figure in figures:
        charts = [panel for panel in figure.panels if isinstance(panel, Chart)]
        if figure.anchor in PLOTTED and charts:
            drawn.append(folder / f"{figure.anchor}.png")
            _draw(charts, drawn[-1])
    return drawn


def _draw(charts: Sequence[Chart], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Each panel is a figure of its own with its legend below the axes: inside, it hides lines sooner or later.
    whole = Figure(figsize=(7.2, 4.2 * len(charts)), layout="constrained")
    FigureCanvasAgg(whole)
    parts = whole.subfigures(len(charts), 1, squeeze=False)[:, 0]
    for part, chart in zip(parts, charts):
        axes = part.add_subplot()
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        axes.grid(alpha=0.3)
        for line in (line for line in chart.lines if line.points):
            steps, values = zip(*line.points)
            mark = "o" if len(steps) <= _MARKED and not line.dashed else None
            # Each dash pattern starts elsewhere, so that lines of equal height both show.
            style = (5 * line.place, (5, 5)) if line.dashed else "-"
            color = _COLORS[line.place % len(_COLORS)]
            axes.plot(steps, values, label=line.label, color=color, linestyle=style, marker=mark, markersize=4)
        if chart.log_x:
            axes.set_xscale("log")
        if chart.log_y:
            axes.set_yscale("log")
        elif chart.y_bounds is not None:
            low, high = chart.y_bounds
            axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
        elif all(value >= 0 for line in chart.lines for _, value in line.points):
            axes.set_ylim(bottom=0.0)
        part.legend(loc="outside lower center", ncols=2, frameon=False)
    whole.savefig(path, dpi=110)
