"""What a run shows while it goes: a live view of phases and throughput on a terminal, a line now and then elsewhere.

All of it goes to standard error, from the first rank; nothing here is read back, and nothing waits for a device.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opd_engine.distillation.phases import NAMES

LINE_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal; evaluations, the first and the last step have one anyway."""

_KEPT = 40  # steps that means, shares and the sparkline look back over
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = ("accuracy/", "forward_kl/", "perplexity/")


class TrainingView:
    """The state of a run as it is shown; what shows it subclasses this.

    total: steps of the run; done: those that were done before this process began
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.doing = ""
        self.evaluation: dict[str, float] = {}
        self.record: Mapping[str, float] = {}
        self._begun, self._first = time.monotonic(), done
        self._recent: deque[Mapping[str, float]] = deque(maxlen=_KEPT)

    def phase(self, name: str) -> None:
        """This begins now."""
        self.doing = name

    def advance(self, record: Mapping[str, float]) -> None:
        """One step done."""
        self.done += 1
        self.record = record
        self._recent.append(record)

    def note(self, values: Mapping[str, float]) -> None:
        """The newest evaluation."""
        self.evaluation = {key: value for key, value in values.items() if key.startswith(_SHOWN)}

    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first step."""
        steps = self.done - self._first
        return (time.monotonic() - self._begun) / steps * (self.total - self.done) if steps else None

    def phases(self) -> dict[str, tuple[float, float]]:
        """Phase -> (mean seconds a step, share), over the last steps."""
        means = {
            name: sum(record.get(f"seconds/{name}", 0.0) for record in self._recent) / max(1, len(self._recent))
            for name in NAMES
        }
        total = sum(means.values())
        return {name: (mean, mean / total) for name, mean in means.items() if mean > 0}

    def throughput(self) -> list[float]:
        """Tokens a second of the last steps, oldest first."""
        values = [record.get("tokens_per_second", math.nan) for record in self._recent]
        return [value for value in values if math.isfinite(value)]

    def divergences(self) -> dict[str, float]:
        """Of the last step, by teacher."""
        found = {key.partition("/")[2]: value for key, value in self.record.items() if key.startswith("divergence/")}
        return {name: value for name, value in found.items() if not name.startswith("task:")}


class LineView(TrainingView):
    """A line now and then, for logs."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__(total, done)
        self._last = -math.inf

    def advance(self, record: Mapping[str, float]) -> None:
        super().advance(record)
        now = time.monotonic()
        if self.done == self.total or now - self._last >= LINE_EVERY_S:
            self._last = now
            self._print(f"loss {record['loss']:.4g}", *self._speed())

    def note(self, values: Mapping[str, float]) -> None:
        super().note(values)
        self._print(*(f"{key} {value:.4g}" for key, value in self.evaluation.items()))

    def _speed(self) -> list[str]:
        parts = [f"{self.throughput()[-1]:,.0f} tokens/s"] if self.throughput() else []
        parts += [f"{name} {share:.0%}" for name, (_, share) in self.phases().items()]
        if (left := self.seconds_left()) and self.done < self.total:
            parts.append(f"{_clock(left)} left")
        return parts

    def _print(self, *parts: str) -> None:
        if parts:
            print(f"step {self.done}/{self.total}", *parts, sep="  ", file=sys.stderr, flush=True)


class LiveView(TrainingView):
    """A table on a terminal, drawn anew four times a second; `rich` draws whatever `__rich__` returns."""

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text("distilling", style="bold"),
            ProgressBar(total=max(1, self.total), completed=self.done, width=36),
            f"step {self.done:,} of {self.total:,}",
            f"{_clock(time.monotonic() - self._begun)} so far",
            "" if left is None else f"{_clock(left)} left",
        )
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "right", "left"):
            table.add_column(justify=justify)
        phases = self.phases()
        for name in phases:
            seconds, share = phases[name]
            mark = Text(f"{'▸' if name == self.doing else ' '} {name}", style="bold cyan" if name == self.doing else "")
            table.add_row(mark, f"{seconds:.3f} s", f"{share:.0%}", Text("━" * round(30 * share), style="cyan"))
        if self.doing and self.doing not in phases:
            table.add_row(Text(f"▸ {self.doing}", style="bold cyan"), "", "", "")
        lines = []
        if speeds := self.throughput():
            mean = sum(speeds) / len(speeds)
            memory = self.record.get("peak_memory_bytes", math.nan)
            held = f"   peak memory {memory / 2**20:,.0f} MiB" if math.isfinite(memory) else ""
            lines.append(f"  {mean:,.0f} tokens/s  {_sparkline(speeds)}{held}")
        if "loss" in self.record:
            by_teacher = "".join(f"   {name} {value:.4g}" for name, value in self.divergences().items())
            lines.append(f"  loss {self.record['loss']:.4g}" + (f"   divergence to{by_teacher}" if by_teacher else ""))
        if self.evaluation:
            lines.append("  held out:" + "".join(f"   {key} {value:.4g}" for key, value in self.evaluation.items()))
        # Text, not markup: a teacher's name may hold brackets.
        return Group(head, table, *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines))


class Progress:
    """Shows a run on standard error where `shown` is true."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._view = TrainingView(0, 0)

    def _console(self) -> Any | None:
        """A terminal to draw on, or None."""
        if not (self._shown and sys.stderr.isatty()):
            return None
        try:
            from rich.console import Console
        except ImportError:
            return None
        return Console(file=sys.stderr)

    def lines(self, lines: Sequence[str]) -> None:
        """Said once, before what they are about."""
        if self._shown:
            print(*lines, sep="\n", file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        """What the run does now."""
        self._view.phase(name)

    @contextlib.contextmanager
    def training(self, total: int, done: int) -> Iterator[TrainingView]:
        """The view of the run's steps."""
        console = self._console()
        if console is None:
            self._view = LineView(total, done) if self._shown else TrainingView(total, done)
            yield self._view
            return
        from rich.live import Live

        view = self._view = LiveView(total, done)
        with Live(get_renderable=lambda: view, console=console, refresh_per_second=4):
            yield view

    def supervised(self, title: str, total: int) -> Callable[[int, float], None]:
        """A callback for train_on_sequences that moves a bar of its own."""
        console = self._console()
        if console is None or total == 0:
            if self._shown and total:
                print(f"{title}: {total:,} steps" if "making" in title else title, file=sys.stderr, flush=True)
            return lambda step, loss: None
        from rich.progress import Progress as Bars

        bars = Bars(*Bars.get_default_columns(), "{task.fields[loss]}", console=console)
        task = bars.add_task(title, total=total, loss="")
        bars.start()

        def on_step(step: int, loss: float) -> None:
            bars.update(task, completed=step + 1, loss="" if math.isnan(loss) else f"loss {loss:.3f}")
            if step + 1 == total:
                bars.stop()

        return on_step


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _sparkline(values: list[float]) -> str:
    top = max(values)
    return "".join(_BLOCKS[min(7, int(8 * value / top))] for value in values) if top > 0 else ""
