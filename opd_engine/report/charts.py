"""Line charts and stacked bars as geometry: positions, ticks and paths that a template draws as SVG.

No markup is made here and no text is escaped here: `chart.svg.jinja` does both. Every series is told apart three
ways, by colour, by the shape of its marks and by its label, so that no reader depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 20.0, 12.0, 46.0
_LEGEND_ROW, _LETTER = 20.0, 6.7  # pixels of the legend's text at its size of 12
_DRAWN = 160  # points of a line; longer ones are drawn as the mean and the range of as many buckets
_MARKS = 7  # marks on a line of many points
_APART, _CLEAR = (WIDTH - _LEFT - _RIGHT) / _MARKS, 13.0  # pixels between its marks, and between those of a line of few
PLACES = 8
"""Colours and shapes there are; series beyond share them."""


@dataclass(frozen=True)
class Line:
    """A series: its label, its points in order of x, and its place, which is its colour and the shape of its marks."""

    label: str
    points: Sequence[tuple[float, float]]
    place: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart.

    y_bounds: what the vertical axis must hold; by default it begins at 0 where no value is below
    log_x, log_y: decades (values at or below 0 are left out)
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_bounds: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False

    def drawn(self) -> Drawing:
        """Its geometry."""
        return Drawing(self)


@dataclass
class Path:
    """A line on paper: `d` of its path, `band` of the range around it or "", and its marks (x, y, what it says)."""

    label: str
    place: int
    dashed: bool
    d: str
    band: str
    marks: list[tuple[float, float, str]]
    legend: tuple[float, float] = (0.0, 0.0)


@dataclass
class Axis:
    """Maps values to pixels, and says where the ticks are."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


class Drawing:
    """A chart on paper, in pixels of a canvas of `width` by `height`."""

    def __init__(self, chart: Chart) -> None:
        self.chart, self.width = chart, WIDTH
        lines = [line for line in (_cleaned(line, chart) for line in chart.lines) if line.points]
        self.left, self.right, self.top, self.bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        self.x = _axis(xs, chart.log_x, None, self.left, self.right, whole=True)
        self.y = _axis(ys, chart.log_y, chart.y_bounds or _from_zero(ys, chart.log_y), self.bottom, self.top)
        self.paths = [self._path(line, place) for place, line in enumerate(lines)]
        self.height = HEIGHT + self._lay_legend()

    def _path(self, line: Line, place: int) -> Path:
        buckets = _buckets(line.points, _DRAWN)
        dots = [(self.x.at(x), self.y.at(mean)) for x, mean, _, _ in buckets]
        band = ""
        if len(buckets) < len(line.points):
            upper = [f"{self.x.at(x)},{self.y.at(high)}" for x, _, _, high in buckets]
            lower = [f"{self.x.at(x)},{self.y.at(low)}" for x, _, low, _ in reversed(buckets)]
            band = f"M{' L'.join([*upper, *lower])} Z"
        marks: list[tuple[float, float, str]] = []
        # Each series begins elsewhere, so that marks of lines that lie on each other can be told apart.
        next_at = dots[0][0] + (place * _APART / 3 if len(dots) > 3 * _MARKS else 0.0)
        for (x, y), (step, mean, _, _) in zip(dots, buckets):
            if x >= next_at and not line.dashed:
                marks.append((x, y, f"{line.label}, {self.chart.x_label} {number(step)}: {number(mean)}"))
                next_at = x + (_APART if len(dots) > 3 * _MARKS else _CLEAR)
        d = "M" + " L".join(f"{x},{y}" for x, y in dots)
        return Path(line.label, line.place % PLACES, line.dashed, d, band, marks)

    def _lay_legend(self) -> float:
        """Puts the legend below the axes, as many entries a row as fit; returns the height it takes."""
        x, row = self.left, 0
        for path in self.paths:
            wide = 34.0 + _LETTER * len(path.label)
            if x > self.left and x + wide > self.right:
                x, row = self.left, row + 1
            path.legend = (round(x, 2), HEIGHT + 4.0 + row * _LEGEND_ROW)
            x += wide + 14.0
        return (row + 1) * _LEGEND_ROW + 4.0 if self.paths else 0.0


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars, one a row, all as long as their total: [(label, [(part, value)])]."""

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]

    def drawn(self) -> list[tuple[str, str, list[tuple[int, str, float, float, str]]]]:
        """Of each row its label, its total and its parts: (place, name, start %, width %, what it says)."""
        names = list(dict.fromkeys(name for _, parts in self.rows for name, _ in parts))
        longest = max((sum(value for _, value in parts) for _, parts in self.rows), default=0.0) or 1.0
        found = []
        for label, parts in self.rows:
            total, start, drawn = sum(value for _, value in parts), 0.0, []
            for name, value in parts:
                says = f"{number(value)} {self.unit}, {value / total:.0%}" if total else f"0 {self.unit}"
                wide = 100.0 * value / longest
                drawn.append((names.index(name) % PLACES, name, round(start, 3), round(wide, 3), says))
                start += wide
            found.append((label, f"{number(total)} {self.unit}", drawn))
        return found


def number(value: float) -> str:
    """A number for a reader: four digits that count, thousands set apart, powers of ten only where it needs them."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == 0 or 1e-4 <= size < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= size < 1e9 else f"{value:.3g}"


def _cleaned(line: Line, chart: Chart) -> Line:
    points = [
        (x, y)
        for x, y in line.points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)
    ]
    return Line(line.label, points, line.place, line.dashed)


def _from_zero(values: Sequence[float], log: bool) -> tuple[float, float] | None:
    return None if log or not values or min(values) < 0 else (0.0, max(values) * 1.04)


def _buckets(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most `most` runs of neighbours."""
    each = max(1, math.ceil(len(points) / most))
    found = []
    for start in range(0, len(points), each):
        part = points[start : start + each]
        ys = [y for _, y in part]
        # The last point keeps its place, so that a line ends where the run ends.
        x = part[-1][0] if start + each >= len(points) else sum(x for x, _ in part) / len(part)
        found.append((x, sum(ys) / len(ys), min(ys), max(ys)))
    return found


def _axis(
    values: Sequence[float],
    log: bool,
    bounds: tuple[float, float] | None,
    start: float,
    end: float,
    *,
    whole: bool = False,
) -> Axis:
    low, high = (min(values), max(values)) if values else (1.0, 10.0) if log else (0.0, 1.0)
    if bounds is not None:
        low, high = min(low, bounds[0]), max(high, bounds[1])
    if log:
        ticks = _decades(low, high, powers_of_two=whole)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        if low == high:
            high = low * 10
    else:
        if low == high:
            low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
        step = _nice_step((high - low) / 5, whole=whole)
        ticks = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if not whole and bounds is None:
            pad = 0.04 * (high - low)
            low, high = low - pad, high + pad
    axis = Axis(low, high, start, end, log)
    axis.ticks = [(axis.at(tick), _tick(tick)) for tick in ticks if low <= tick <= high * (1 + 1e-12)]
    return axis


def _decades(low: float, high: float, *, powers_of_two: bool) -> list[float]:
    """The powers around two values: of ten, or of two where a whole quantity spans less than four decades."""
    base = 2.0 if powers_of_two and high / low < 1e4 else 10.0
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    every = max(1, math.ceil((last - first) / 11))
    return [base**n for n in range(first, last + 1, every)]


def _nice_step(step: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    nice = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
    return max(1.0, nice) if whole else nice


def _tick(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"
