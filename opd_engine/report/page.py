"""The page: figures, samples and settings of runs, through one template that escapes everything it is given.

The result is one file that loads nothing and runs nothing; it is at once well-formed XML and HTML without an error.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

from opd_engine._version import __version__
from opd_engine.report.charts import Bars, Chart, number
from opd_engine.report.figures import MIB, make_figures
from opd_engine.report.runs import Run, differing
from opd_engine.report.samples import legend, shown_samples
from opd_engine.report.text import visible


def environment() -> Any:
    """A jinja2 environment over this package's templates: everything is escaped, a name that is missing is an error.

    Raises: ValueError where jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ValueError("report: needs the package jinja2, which is not installed (pip install jinja2)") from None
    return Environment(
        loader=PackageLoader("opd_engine.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def standalone_svg(chart: Chart, anchor: str) -> str:
    """A chart as an SVG file of its own, in the colours that the reader's system prefers."""
    templates = environment()
    style = templates.get_template("chart.css").render()
    macros = templates.get_template("chart.svg.jinja").make_module()
    return str(macros.line_chart(chart.drawn(), anchor, style)) + "\n"


def render(runs: Sequence[Run], title: str | None = None) -> str:
    """The page of these runs."""
    figures, absent = make_figures(runs)
    differ = differing(list(runs)) if len(runs) > 1 else []
    keys = sorted(dict.fromkeys(key for run in runs for key in run.settings), key=_section)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            title=title or ("Run " if len(runs) == 1 else "Runs ") + ", ".join(run.name for run in runs),
            version=__version__,
            made=datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            runs=runs,
            cards=[(run, _status(run), _card(run)) for run in runs],
            figures=[(figure, [_drawn(panel) for panel in figure.panels]) for figure in figures],
            absent=absent,
            samples=[(run, *shown_samples(run)) for run in runs],
            legend=legend(),
            settings=[(key, key in differ, [run.settings.get(key, "not set") for run in runs]) for key in keys],
            differ=differ,
            troubles=[(run, _troubles(run)) for run in runs],
        )
        + "\n"
    )


def _section(key: str) -> tuple[int, str]:
    order = ("run", "student", "teachers", "data", "rollout", "opd", "optimizer")
    section = key.partition(".")[0]
    return (order.index(section) if section in order else len(order), key.partition(".")[0])


def _drawn(panel: Chart | Bars) -> tuple[str, Any, Any]:
    return ("bars" if isinstance(panel, Bars) else "lines", panel, panel.drawn())


def _status(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.written is None or not (run.train or run.evaluations):
        return "not begun: no step in the metrics yet"
    return f"unfinished: step {run.done:,} of {run.planned:,}, last written {run.written:%Y-%m-%d %H:%M} UTC"


def _card(run: Run) -> list[tuple[str, str]]:
    """What a reader wants to know first, as (name, value)."""
    rows = [("backend", run.backend), ("steps", f"{run.done:,} of {run.planned:,}")]
    layout = [f"{key} {run.settings[f'run.{key}']}" for key in ("tp", "pp", "cp") if f"run.{key}" in run.settings]
    rows.append(("layout", ", ".join(layout) or "not recorded"))
    opd = [run.settings.get(f"opd.{key}", "not set").strip('"') for key in ("divergence", "support")]
    rows.append(("divergence", f"{opd[0]}, support {opd[1]}, k {run.settings.get('opd.k', 'not set')}"))
    for kind, key, name, scale, unit in (
        ("train", "divergence", "training divergence", 1.0, " nats"),
        ("train", "tokens_per_second", "throughput, median", 1.0, " tokens/s"),
        ("train", "peak_memory_bytes", "peak memory", 1.0 / MIB, " MiB"),
    ):
        values = [value * scale for _, value in run.series(kind, key)]
        if not values:
            continue
        if key == "tokens_per_second":
            rows.append((name, f"{sorted(values)[len(values) // 2]:,.0f}{unit}"))
        elif key == "peak_memory_bytes":
            rows.append((name, f"{max(values):,.0f}{unit}"))
        else:
            rows.append((name, f"{number(values[0])} → {number(values[-1])}{unit}"))
    for prefix, word in (("accuracy/", "accuracy, "), ("forward_kl/", "held-out divergence, ")):
        for group in run.names("eval", prefix)[:4]:
            values = [value for _, value in run.series("eval", prefix + group)]
            if values:
                rows.append((word + group, f"{number(values[0])} → {number(values[-1])}"))
    seconds = [record["seconds"] for record in run.train if isinstance(record.get("seconds"), (int, float))]
    if seconds and math.isfinite(seconds[-1]):
        rows.append(("time", str(datetime.timedelta(seconds=round(seconds[-1])))))
    return rows


def _troubles(run: Run) -> list[str]:
    """What should not have happened, counted."""
    words = (
        ("skipped_step", "optimizer steps left out for a gradient that was not finite"),
        ("nan_rows", "rows whose divergence was no number"),
        ("infinite_rows", "rows of infinite divergence"),
        ("short_support_rows", "rows whose support was too short to renormalise"),
        ("union_dropped", "ids that a union's cap left out"),
        ("clipped_rows", "rows whose policy gradient was cut off"),
    )
    return [f"{run.total(key):,.0f} {text}" for key, text in words if run.total(key) > 0]
