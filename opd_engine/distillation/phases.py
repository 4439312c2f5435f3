"""How long each phase of a step took, how many tokens went through it, and the most memory it held.

Nothing waits for the device while a phase runs: on CUDA two events mark it, read when the step is over anyway.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

NAMES = ("rollout", "score", "update", "evaluate")
"""The phases of a step, in the order in which ranks exchange their times."""


class Phases:
    """The phases of one step.

    device: where the work runs; its clock and its memory are measured
    on_phase: called with the name of a phase that begins, for a live view
    """

    def __init__(self, device: torch.device | str = "cpu", on_phase: Callable[[str], None] | None = None) -> None:
        self._device = torch.device(device)
        self._on_phase = on_phase
        self._marks: list[tuple[str, float, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything in the block belongs to this phase; several blocks of one name add up."""
        if name not in NAMES:
            raise ValueError(f"name: wanted one of {', '.join(NAMES)}, got {name!r}")
        if self._on_phase is not None:
            self._on_phase(name)
        start = time.perf_counter()
        begun = self._event()
        try:
            yield
        finally:
            if begun is None:
                self._marks.append((name, start, time.perf_counter()))
            else:
                self._events.append((name, begun, self._event()))

    def measured(self, tokens: int, largest_over_ranks: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """seconds/NAME, tokens_per_second and peak_memory_bytes; waits for the device.

        tokens: of the global batch that went through all phases
        largest_over_ranks: all-reduces a float64 tensor to its maximum over ranks: the slowest rank's time and the
            largest memory are what the step cost
        """
        seconds = dict.fromkeys(NAMES, 0.0)
        for name, start, end in self._marks:
            seconds[name] += end - start
        for name, begun, ended in self._events:
            ended.synchronize()
            seconds[name] += begun.elapsed_time(ended) * 1e-3
        values = torch.tensor(
            [*seconds.values(), sum(seconds.values()), float(self._peak_bytes())], dtype=torch.float64
        )
        if largest_over_ranks is not None:
            values = largest_over_ranks(values)
        *each, total, peak = values.tolist()
        found = {f"seconds/{name}": value for name, value in zip(NAMES, each) if value > 0}
        return found | {"tokens_per_second": tokens / total if total else float("nan"), "peak_memory_bytes": peak}

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
