"""Which charts a report has, and what each of them shows of which runs.

One run is drawn with a line a teacher or task. Several runs are overlaid: a panel a teacher or task, a line a run.
A figure nobody measured anything for is left out, and named as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from opd_engine.report.charts import PLACES, Bars, Chart, Line, number
from opd_engine.report.runs import Points, Run

MIB = 2.0**20
_RANKS = 8
PHASES = ("rollout", "score", "update", "evaluate")


@dataclass(frozen=True)
class Entry:
    """A metric in a figure.

    key: in metrics.jsonl.  label: of its line.  group: the teacher or task it belongs to, or its label.
    beside: the label of another entry, whose colour this one has as a dashed line: a teacher beside its student.
    constant: a value that is not in the metrics, such as a teacher's own accuracy, by run.
    """

    key: str
    label: str
    group: str
    beside: str = ""
    constant: Callable[[Run], float | None] | None = None


@dataclass(frozen=True)
class Figure:
    """A titled figure: panels of lines or bars, a caption, and a table of what its lines say."""

    anchor: str
    title: str
    caption: str
    panels: list[Chart | Bars]
    rows: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """A figure before it knows any run."""

    anchor: str
    title: str
    caption: str
    y_label: str
    kind: str
    prefixes: tuple[tuple[str, str], ...]  # (metric's prefix or whole name, what its line is called)
    groups: str = "all"  # of prefixes that end in "/": all names, "teachers" or "tasks"
    scale: float = 1.0
    y_bounds: tuple[float, float] | None = None
    log_y: bool = False
    reference: str = ""  # the kind of a teacher's own value


_PLANS = (
    _Plan(
        "accuracy",
        "Held-out accuracy by task",
        "Greedy completions that are exactly the label. Dashed: the task's own teacher.",
        "fraction right",
        "eval",
        (("accuracy/", ""),),
        y_bounds=(0.0, 1.0),
        reference="accuracy",
    ),
    _Plan(
        "held-out-divergence",
        "Held-out divergence by teacher",
        "forward_kl over the full vocabulary on what nobody trains on.",
        "nats a token",
        "eval",
        (("forward_kl/", ""),),
    ),
    _Plan(
        "perplexity",
        "Perplexity of held-out text",
        "Dashed: the text's own teacher.",
        "perplexity",
        "eval",
        (("perplexity/", ""),),
        log_y=True,
        reference="perplexity",
    ),
    _Plan(
        "teachers",
        "Training divergence by teacher",
        "The loss's divergence on the step's own rollouts, mean over rows.",
        "nats a token",
        "train",
        (("divergence/", ""),),
        groups="teachers",
    ),
    _Plan(
        "tasks",
        "Training divergence by task",
        "The same rows, grouped by the task of their prompt.",
        "nats a token",
        "train",
        (("divergence/", ""),),
        groups="tasks",
    ),
    _Plan(
        "loss",
        "Loss",
        "What the optimizer minimises, weights and all.",
        "loss",
        "train",
        (("loss", "loss"), ("policy_loss", "policy gradient")),
    ),
    _Plan(
        "support",
        "Mass on the support",
        "Probability that the compared ids hold, mean over rows.",
        "probability",
        "train",
        (("student_support_mass/", "student"), ("teacher_support_mass/", "teacher")),
        groups="teachers",
        y_bounds=(0.0, 1.0),
    ),
    _Plan(
        "tail",
        "Mass in the tail",
        "Probability off the compared ids, which the loss sees as one bucket.",
        "probability",
        "train",
        (("student_tail_mass/", "student"), ("teacher_tail_mass/", "teacher")),
        groups="teachers",
    ),
    _Plan(
        "overlap",
        "Overlap of the two top-k",
        "Fraction of the student's k likeliest ids that are among the teacher's.",
        "fraction of ids",
        "train",
        (("topk_overlap/", ""),),
        y_bounds=(0.0, 1.0),
    ),
    _Plan(
        "coverage",
        "Sampled tokens inside the support",
        "Fraction of rows whose sampled token is among the compared ids.",
        "fraction of rows",
        "train",
        (("coverage/", ""),),
        groups="teachers",
        y_bounds=(0.0, 1.0),
    ),
    _Plan(
        "support-size",
        "Ids in the support",
        "Compared ids, mean over rows.",
        "ids a row",
        "train",
        (("support_size", "ids"),),
    ),
    _Plan(
        "entropy",
        "Entropy",
        "Of the next token under the whole vocabulary, mean over rows.",
        "nats",
        "train",
        (("student_entropy/", "student"), ("teacher_entropy/", "teacher")),
        groups="teachers",
    ),
    _Plan(
        "length",
        "Length of completions",
        "Mean over the step's rollouts.",
        "tokens",
        "train",
        (("completion_tokens", "length"),),
    ),
    _Plan(
        "ended",
        "Completions that ended by themselves",
        "The others were cut off at rollout.max_new_tokens.",
        "fraction",
        "train",
        (("completion_ended", "ended"),),
        y_bounds=(0.0, 1.0),
    ),
    _Plan(
        "phases",
        "Time of each phase",
        "Seconds a step, of the slowest rank.",
        "seconds a step",
        "train",
        tuple((f"seconds/{name}", name) for name in PHASES),
    ),
    _Plan(
        "throughput",
        "Throughput",
        "Prompt and completion tokens of the global batch over the time of all phases.",
        "tokens a second",
        "train",
        (("tokens_per_second", "tokens a second"),),
    ),
    _Plan(
        "memory",
        "Peak memory",
        "The most that any rank held: of the device's allocator, or of the process on a CPU.",
        "MiB",
        "train",
        (("peak_memory_bytes", "peak"),),
        scale=1.0 / MIB,
    ),
    _Plan("gradient", "Gradient norm", "Before clipping.", "norm", "train", (("grad_norm", "norm"),), log_y=True),
    _Plan("learning-rate", "Learning rate", "", "learning rate", "train", (("lr", "rate"),)),
)


def make_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """The figures there is something to draw for, and the titles of the others."""
    figures, absent = [], []
    for plan in _PLANS:
        figure = _figure(plan, runs)
        if figure is None:
            absent.append(plan.title)
        else:
            figures.append(figure)
        beside = {"phases": _phase_shares, "memory": _planned_memory}.get(plan.anchor)
        if beside is not None and (bars := beside(runs)) is not None:
            figures.append(bars)
    return figures, absent


def _names(plan: _Plan, prefix: str, runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.names(plan.kind, prefix))
    if plan.groups == "teachers":
        return [name for name in names if not name.startswith("task:")]
    if plan.groups == "tasks":
        return [name for name in names if name.startswith("task:")]
    return list(names)


def _entries(plan: _Plan, runs: Sequence[Run]) -> list[Entry]:
    """The figure's metrics; those with a teacher's or task's name lie together, name by name."""
    whole = [Entry(prefix, label, label) for prefix, label in plan.prefixes if not prefix.endswith("/")]
    open_ended = [(prefix, label) for prefix, label in plan.prefixes if prefix.endswith("/")]
    names = dict.fromkeys(name for prefix, _ in open_ended for name in _names(plan, prefix, runs))
    found = []
    for name in names:
        shown = name.replace("task:", "task ", 1) if plan.groups == "all" else name.removeprefix("task:")
        labels = [f"{shown}, {label}" if label else shown for _, label in open_ended]
        for (prefix, _), label in zip(open_ended, labels):
            found.append(Entry(f"{prefix}{name}", label, shown, beside="" if label == labels[0] else labels[0]))
        if plan.reference:
            kind = plan.reference
            constant = partial(_teacher_value, kind=kind, name=name)
            found.append(Entry("", f"teacher of {shown}", shown, beside=shown, constant=constant))
    return whole + found


def _teacher_value(run: Run, kind: str, name: str) -> float | None:
    return run.teacher_value(kind, name)


def _points(entry: Entry, run: Run, plan: _Plan) -> Points:
    if entry.constant is not None:
        value, steps = entry.constant(run), [step for step, _ in _steps(run)]
        return [(steps[0], value), (steps[-1], value)] if value is not None and len(steps) > 1 else []
    points = [(step, value * plan.scale) for step, value in run.series(plan.kind, entry.key)]
    # What is 0 throughout is switched off, and says nothing.
    return [] if entry.key == "policy_loss" and all(value == 0 for _, value in points) else points


def _steps(run: Run) -> Points:
    records = run.evaluations or run.train
    return [(float(record["step"]), 0.0) for record in records]


def _figure(plan: _Plan, runs: Sequence[Run]) -> Figure | None:
    entries = _entries(plan, runs)
    places = range(len(runs))
    found = {(e, r): _points(entry, run, plan) for e, entry in enumerate(entries) for r, run in enumerate(runs)}
    if not any(found[e, r] for e, entry in enumerate(entries) for r in places if not entry.beside):
        return None
    panels: list[Chart | Bars] = []
    if len(runs) == 1:
        solid = [e for e, entry in enumerate(entries) if not entry.beside and found[e, 0]]
        for start in range(0, len(solid), PLACES):
            own = {e: place for place, e in enumerate(solid[start : start + PLACES])}
            labels = {entries[e].label: place for e, place in own.items()}
            own |= {e: labels[entry.beside] for e, entry in enumerate(entries) if entry.beside in labels}
            lines = [
                Line(entries[e].label, found[e, 0], place, bool(entries[e].beside)) for e, place in sorted(own.items())
            ]
            title = plan.title if len(solid) <= PLACES else f"{plan.title}, {start // PLACES + 1}"
            panels.append(_chart(plan, title, lines))
    else:
        solid = [e for e, entry in enumerate(entries) if not entry.beside and any(found[e, r] for r in places)]
        for e in solid:
            lines = [Line(runs[r].name, found[e, r], r) for r in places]
            for other, entry in enumerate(entries):
                if entry.beside == entries[e].label:
                    lines += [Line(f"teacher, {runs[r].name}", found[other, r], r, True) for r in places]
            title = f"{plan.title}: {entries[e].group}" if len(solid) > 1 else plan.title
            panels.append(_chart(plan, title, lines))
    rows = [
        _row(entry, run, found[e, r], len(runs) > 1)
        for e, entry in enumerate(entries)
        for r, run in enumerate(runs)
        if found[e, r]
    ]
    return Figure(plan.anchor, plan.title, plan.caption, panels, rows)


def _chart(plan: _Plan, title: str, lines: list[Line]) -> Chart:
    return Chart(title, "optimizer step", plan.y_label, lines, plan.y_bounds, log_y=plan.log_y)


def _row(entry: Entry, run: Run, points: Points, several: bool) -> tuple[str, ...]:
    """label, first, last, lowest, highest"""
    label = f"{entry.label}, {run.name}" if several else entry.label
    values = [value for _, value in points]
    return (label, *(number(value) for value in (values[0], values[-1], min(values), max(values))))


def _phase_shares(runs: Sequence[Run]) -> Figure | None:
    rows = []
    for run in runs:
        parts = []
        for name in PHASES:
            values = [value for _, value in run.series("train", f"seconds/{name}")]
            if values:
                parts.append((name, sum(values) / len(values)))
        if parts:
            rows.append((run.name, parts))
    if not rows:
        return None
    title = "Where a step's time goes"
    table = [(f"{label}: {name}", number(value)) for label, parts in rows for name, value in parts]
    return Figure("shares", title, "Mean over all steps.", [Bars(title, "s", rows)], table)


def _planned_memory(runs: Sequence[Run]) -> Figure | None:
    """What was planned and measured on the fullest ranks, of runs that were planned."""
    rows = []
    for run in runs:
        ranks = sorted(run.memory, key=lambda rank: -rank["measured_bytes"])[:_RANKS]
        for rank in ranks:
            label = f"{run.name}, rank {rank['rank']:.0f}"
            rows.append((f"{label}, planned", [("planned", rank["planned_bytes"] / MIB)]))
            rows.append((f"{label}, measured", [("measured", rank["measured_bytes"] / MIB)]))
    if not rows:
        return None
    title = "Memory, planned and measured"
    table = [(label, number(parts[0][1])) for label, parts in rows]
    caption = f"Above what the process held before its models, at the peak of training; the {_RANKS} fullest ranks."
    return Figure("plan", title, caption, [Bars(title, "MiB", rows)], table)
