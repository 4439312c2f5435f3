"""The plots of docs/performance.md, each drawn from records alone; a digest of what was drawn is kept in the PNG."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_engine.bench.goals import PATTERN_PLAN, find, pattern_ratio
from opd_engine.bench.record import BenchRecord
from opd_engine.bench.shapes import Shape

_COLOURS = {"topk": "#0072B2", "gather": "#009E73", "loss_fwd_bwd": "#E69F00", "loss_fwd_bwd_inplace": "#D55E00"}
_COLOURS["full_divergence"] = "#CC79A7"
_SCALING_CASES = ("topk", "gather", "loss_fwd_bwd_inplace")


def data_of_roofline(records: Sequence[BenchRecord]) -> list[Any]:
    """Flops a byte and reached GFLOP/s of ours and of eager torch, and the two measured ceilings."""
    points = []
    for case in _COLOURS:
        for dtype in ("float32", "bfloat16"):
            for impl in ("opd_engine", "torch_eager"):
                record = find(records, case, Shape(256, 151_936, dtype=dtype), impl)
                if record is not None:
                    intensity = record.flops / record.bytes_moved
                    points.append([case, dtype, impl, intensity, record.flops / record.median_us / 1e3])
                    points[-1] += [record.copy_gbps, record.matmul_tflops]
    return points


def data_of_scaling(records: Sequence[BenchRecord]) -> list[Any]:
    """Elements and microseconds of ours, growing in T and growing in V."""
    points = []
    for case in _SCALING_CASES:
        for axis, shapes in scaling_shapes().items():
            for shape in shapes:
                record = find(records, case, shape)
                if record is not None:
                    points.append([case, axis, shape.elements, record.median_us])
    return points


def scaling_shapes() -> dict[str, list[Shape]]:
    """The shapes of the set "scaling", by what grows."""
    in_tokens = [Shape(10**n // 151_936 + 1, 151_936) for n in (6, 7, 8, 9)]
    return {"T": in_tokens, "V": [Shape(1_000, 10**n) for n in (3, 4, 5, 6)]}


def data_of_patterns(records: Sequence[BenchRecord]) -> list[Any]:
    """Time of ours on each row pattern, in that on random rows."""
    points = []
    for case, shape in PATTERN_PLAN:
        ratio = pattern_ratio(records, case, shape)
        if ratio is not None:
            points.append([case, shape.k, shape.pattern, ratio])
    return points


def draw_roofline(axes: Any, data: list[Any]) -> None:
    copy, matmul = (max(point[column] for point in data) for column in (5, 6))
    lowest, highest = min(point[3] for point in data) / 2, max(point[3] for point in data) * 6
    ridge = matmul * 1e3 / copy
    axes.plot([lowest, ridge, highest], [lowest * copy, matmul * 1e3, matmul * 1e3], color="black", linewidth=1)
    axes.annotate(f"copy {copy:.0f} GB/s", (lowest * 1.1, lowest * 1.5 * copy), rotation=34, fontsize=8)
    axes.annotate(f"matmul {matmul * 1e3:.0f} GFLOP/s", (ridge * 1.2, matmul * 1e3 * 1.08), fontsize=8)
    for case, dtype, impl, intensity, reached, *_ in data:
        ours = impl == "opd_engine"
        style = {"marker": "o" if dtype == "float32" else "s", "markersize": 7, "linestyle": ""}
        fill = _COLOURS[case] if ours else "none"
        name = f"{case} {dtype}" if ours else None
        axes.plot([intensity], [reached], color=_COLOURS[case], markerfacecolor=fill, label=name, **style)
    axes.plot([], [], "o", color="grey", markerfacecolor="none", label="the same work by eager torch")
    axes.set(xscale="log", yscale="log", xlabel="least operations a byte", ylabel="least operations, 1e9 a second")
    axes.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_title("256 x 151,936 logits, k=64, against what this machine copies and multiplies", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")


def draw_scaling(axes: Any, data: list[Any]) -> None:
    for case in _SCALING_CASES:
        for axis, line in (("T", "-"), ("V", "--")):
            points = sorted((elements, us) for name, grows, elements, us in data if (name, grows) == (case, axis))
            if points:
                label = f"{case}, {'T grows at V = 151,936' if axis == 'T' else 'V grows at T = 1,000'}"
                axes.plot(*zip(*points), line, marker="o", markersize=4, color=_COLOURS[case], label=label)
    ends = [min(point[2] for point in data), max(point[2] for point in data)]
    largest = min(point[3] / point[2] for point in data if point[2] == max(p[2] for p in data))
    axes.plot(ends, [largest * end * 0.5 for end in ends], ":", color="black", linewidth=1, label="linear")
    axes.set(xscale="log", yscale="log", xlabel="logits, float32", ylabel="microseconds")
    axes.legend(fontsize=7)


def draw_patterns(axes: Any, data: list[Any]) -> None:
    kinds, shown = (list(dict.fromkeys(found)) for found in (((c, k) for c, k, *_ in data), (p for _, _, p, _ in data)))
    width = 0.8 / len(kinds)
    for place, (case, k) in enumerate(kinds):
        ratios = {pattern: ratio for name, wide, pattern, ratio in data if (name, wide) == (case, k)}
        positions = [shown.index(pattern) + (place - (len(kinds) - 1) / 2) * width for pattern in ratios]
        shade = {"color": _COLOURS[case], "alpha": 1.0 if k == 64 else 0.5}
        axes.bar(positions, list(ratios.values()), width, label=f"{case}, k = {k:,}", **shade)
    axes.axhline(1.0, color="black", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(shown)), shown)
    axes.set(ylabel="time, random rows = 1", ylim=(0, 1.2 * max(1.2, *(point[3] for point in data))))
    axes.set_title("ours, 256 x 151,936 float32, by what the rows hold", fontsize=9)
    axes.legend(fontsize=7, ncols=len(kinds), loc="upper center")


Draw = Callable[[Any, list[Any]], None]
PLOTS: dict[str, tuple[Callable[[Sequence[BenchRecord]], list[Any]], Draw]] = {
    "bench_roofline.png": (data_of_roofline, draw_roofline),
    "bench_scaling.png": (data_of_scaling, draw_scaling),
    "bench_patterns.png": (data_of_patterns, draw_patterns),
}


def digest(data: list[Any]) -> str:
    """Of what is drawn; the pixels depend on matplotlib's version, this does not."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def read_digest(path: Path) -> str | None:
    """The digest that a PNG carries; None where there is no such file or it carries none."""
    marker = b"opd-records:"
    if not path.exists():
        return None
    content = path.read_bytes()
    start = content.find(marker)
    return None if start < 0 else content[start + len(marker) :][:64].decode("ascii", "replace")


def draw(name: str, data: list[Any], path: Path) -> None:
    """Write one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, which="major", linewidth=0.3)
    axes.set_axisbelow(True)
    PLOTS[name][1](axes, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, "Description": f"opd-records:{digest(data)}"})
