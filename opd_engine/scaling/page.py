"""docs/scaling.md and its plots, written from the model; a test says when they are out of date."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opd_engine.integrations.megatron.gpt_shape import PUBLISHED
from opd_engine.report.charts import Chart, Line
from opd_engine.report.page import standalone_svg
from opd_engine.scaling.hardware import H100, Times, step_times
from opd_engine.scaling.model import (
    Layout,
    Pass,
    held_bytes,
    moved_bytes,
    parameters,
    publish_bytes,
    step_traffic,
    switch_bytes,
)

STUDENT, TEACHER = PUBLISHED["qwen3-8b"], PUBLISHED["qwen3-32b"]
TOKENS = 2**22  # of the global batch
COUNTED = 0.75  # of them in completions
K = 64
KS = (8, 16, 32, 64, 128, 256, 512, 1024)
SIZES = (1, 2, 4, 8)
TEACHERS = (1, 2, 4, 8, 16)
REPLICAS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def passes(layout: Layout, teachers: int = 1, tokens: float = TOKENS) -> list[Pass]:
    """A step's passes on one data-parallel rank: the old policy, the teachers that score every row, the update."""
    own = tokens / layout.dp
    rows = COUNTED * own
    scored = [Pass(TEACHER, own, rows, "score")] * teachers
    return [Pass(STUDENT, own, rows, "topk"), *scored, Pass(STUDENT, own, rows, "update")]


def wire(
    layout: Layout, *, whose: str, over: str = "", k: int = K, teachers: int = 1, stage: int | None = None
) -> float:
    """Bytes that a rank sends, per token of its data-parallel share."""
    found = step_traffic(passes(layout, teachers), layout, k=k, stage=stage)
    sent = sum(t.wire for t in found if t.whose == whose and over in ("", t.over))
    return sent / (TOKENS / layout.dp)


def times(layout: Layout, teachers: int = 1, switched: int = 0) -> Times:
    return step_times(passes(layout, teachers), layout, H100, k=K, scored_by=teachers, switched=switched)


def size(value: float) -> str:
    """Bytes for a reader, three digits that count."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} B" if value else "0"


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}"


def table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---:" + "|---:" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows)])


def _grid(corner: str, sizes: Sequence[int], word: str, value: Callable[[int, int], float]) -> str:
    rows = [(f"{k:,}", [size(value(k, n)) for n in sizes]) for k in KS]
    return table(corner, [f"{word} {n}" for n in sizes], rows)


def _named(layout: Layout) -> str:
    parts = [f"{name.upper()} {n}" for name, n in (("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp)) if n > 1]
    return " x ".join([*parts, f"DP {layout.dp:,}"])


LAYOUTS = (
    Layout(tp=1, dp=8),
    Layout(tp=8, dp=1),
    Layout(tp=8, dp=16),
    Layout(tp=8, dp=128),
    Layout(tp=8, dp=1024),
    Layout(tp=4, cp=2, dp=128),
    Layout(tp=8, cp=8, dp=16),
    Layout(tp=8, pp=4, dp=32),
    Layout(tp=8, pp=8, dp=1024),
)


def plots() -> dict[str, str]:
    """File name under docs/assets -> SVG."""
    engine = [
        Line(f"engine, TP {tp}", [(k, wire(Layout(tp=tp), whose="engine", k=k)) for k in KS], place)
        for place, tp in enumerate(SIZES[1:])
    ]
    level = [
        Line(
            f"the models' layers, TP {tp}",
            [(k, wire(Layout(tp=tp), whose="framework", over="tp")) for k in KS],
            place,
            True,
        )
        for place, tp in enumerate(SIZES[1:])
    ]
    held = [Line(f"{m} teachers a row", [(k, held_bytes(k, m)) for k in KS], place) for place, m in enumerate(TEACHERS)]
    held[0] = Line("1 teacher a row", held[0].points, 0)
    replicas = [(dp, times(Layout(tp=8, dp=dp), switched=1).named()) for dp in REPLICAS]
    per_token = [
        Line(name, [(dp, 1e6 * found[name] / (TOKENS / dp)) for dp, found in replicas], place)
        for place, name in enumerate(replicas[0][1])
    ]
    charts = {
        "scaling_sent": Chart(
            "Sent by a rank over the tensor-parallel group",
            "k",
            "bytes a token",
            [*engine, *level],
            log_x=True,
            log_y=True,
        ),
        "scaling_held": Chart("Held on the host for a row", "k", "bytes a row", held, log_x=True, log_y=True),
        "scaling_replicas": Chart(
            "A rank's time for a token at TP 8, predicted from data sheets",
            "data-parallel ranks",
            "microseconds a token",
            per_token,
            log_x=True,
            log_y=True,
        ),
    }
    return {f"{name}.svg": standalone_svg(chart, name) for name, chart in charts.items()}


def markdown() -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    at = Layout(tp=8, dp=128)
    templates = Environment(  # no escaping: it is Markdown, of this module's own numbers
        loader=PackageLoader("opd_engine.scaling", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return templates.get_template("page.md.jinja").render(
        **_tables(at),
        size=size,
        percent=percent,
        held_bytes=held_bytes,
        machine=H100,
        tokens=TOKENS,
        counted=COUNTED,
        k=K,
        at=at,
        engine=wire(at, whose="engine"),
        layers=wire(at, whose="framework", over="tp"),
        wide=wire(at, whose="engine", k=1024),
        t8=times(at),
        t4=times(Layout(tp=4, dp=2 * at.dp)),
        crossing=_first_network_bound(),
        one_switch=switch_bytes(TEACHER, at, 1),
        moved1=moved_bytes(STUDENT.vocab_size, 1),
        moved8=moved_bytes(STUDENT.vocab_size, 8),
        published=publish_bytes(STUDENT, Layout()),
    )


def _tables(at: Layout) -> dict[str, str]:
    split = SIZES[1:]
    resources = list(times(at).named())
    return {
        "by_layout": table("layout", [*resources, "next bottleneck"], [_layout_row(layout) for layout in LAYOUTS]),
        "by_k": _grid("k", split, "TP", lambda k, tp: wire(Layout(tp=tp), whose="engine", k=k)),
        "by_cp": _grid("k", split, "CP", lambda k, cp: wire(Layout(cp=cp), whose="engine", over="cp", k=k)),
        "by_tp": table(
            "",
            [f"TP {n}" for n in split],
            [
                ("sent a token by the layers", [size(wire(Layout(tp=n), whose="framework", over="tp")) for n in split]),
                ("logits moved a row", [size(moved_bytes(STUDENT.vocab_size, n)["engine"]) for n in split]),
            ],
        ),
        "keys_and_values": table(
            "",
            [f"CP {n}" for n in split],
            [("sent a token", [size(wire(Layout(cp=n), whose="framework", over="cp")) for n in split])],
        ),
        "by_pp": table(
            "PP",
            ["sent between stages", "by the layers", "by the engine", "student's weights", "teacher's weights"],
            [_stage_row(pp) for pp in SIZES],
        ),
        "by_dp": table(
            "DP",
            ["GPUs", "tokens a replica", "gradients and parameters", "network", "products"],
            [_replica_row(dp) for dp in REPLICAS],
        ),
        "by_teachers": table(
            "teachers",
            ["host a row, routed", "mixed", "sent a token, routed", "mixed", "weights a rank", "copied a step"],
            [_teacher_row(m, at) for m in TEACHERS],
        ),
    }


def _layout_row(layout: Layout) -> tuple[str, list[str]]:
    found, share = times(layout), TOKENS / layout.dp
    name, part = found.next_bottleneck()
    return _named(layout), [*(f"{1e6 * s / share:.3g}" for s in found.named().values()), f"{name} ({part:.0%})"]


def _stage_row(pp: int) -> tuple[str, list[str]]:
    layout = Layout(tp=8, pp=pp)
    sent = (
        max(wire(layout, whose="framework", over="pp", stage=stage) for stage in range(pp)),
        wire(layout, whose="framework", over="tp"),
        wire(layout, whose="engine"),
    )
    held = (2 * parameters(shape, layout, pp - 1) for shape in (STUDENT, TEACHER))
    return str(pp), [size(value) for value in (*sent, *held)]


def _replica_row(dp: int) -> tuple[str, list[str]]:
    layout, share = Layout(tp=8, dp=dp), TOKENS / dp
    found = times(layout)
    sent = size(wire(layout, whose="framework", over="dp"))
    seconds = (f"{1e6 * value / share:.3g}" for value in (found.network, found.products))
    return f"{dp:,}", [f"{8 * dp:,}", f"{share:,.0f}", sent, *seconds]


def _teacher_row(m: int, at: Layout) -> tuple[str, list[str]]:
    engine = (wire(at, whose="engine"), wire(at, whose="engine", teachers=m))
    weights = 2 * m * parameters(TEACHER, at, at.pp - 1)
    values = (held_bytes(K), held_bytes(K, m), *engine, weights, switch_bytes(TEACHER, at, m))
    return str(m), [size(value) for value in values]


def _first_network_bound() -> int:
    """The smallest DP, of the powers of two, at which the network takes longer than the products at TP 8."""
    sizes = (2**n for n in range(24))
    return next(dp for dp in sizes if (found := times(Layout(tp=8, dp=dp))).network > found.products)


def files(root: Path) -> dict[Path, str]:
    """Path -> content of everything that is generated."""
    return {root / "docs" / "scaling.md": markdown()} | {
        root / "docs" / "assets" / name: svg for name, svg in plots().items()
    }
