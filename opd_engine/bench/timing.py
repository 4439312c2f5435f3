"""Interleaved timing on cold buffers: one sample of every implementation, then the next round.

A machine that slows down, slows all of them: ratios within a run mean something, ratios across runs less. Samples
are single calls. On a CPU the wall clock; on a GPU events around the call, queued behind a spinning kernel, so that the
launches are not what is measured, or, where a case is that short, a captured graph of one call a buffer, replayed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


@dataclasses.dataclass
class Impl:
    """One way to compute a case.

    name: as in records
    forward: prepared input -> result, or what backward needs
    backward: what forward returned -> result; None for cases without one
    prepare: buffer number -> the input of forward, untimed (default: the buffers' number itself)
    restore: buffer number -> None, untimed, after a call: puts back what an in-place backward overwrote
    threads: CPU threads, where it is not the run's number
    error: its own check, where it computes something else than the others
    least_work: (bytes, flops), where what it computes can be had for another least than the case's
    graph: on a GPU, time the replay of a captured graph: for what launches take longer than kernels. Forward alone
    extra: further keys of its records, computed when one is written
    """

    name: str
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any] | None = None
    prepare: Callable[[int], Any] = lambda number: number
    restore: Callable[[int], None] | None = None
    threads: int | None = None
    error: Callable[[Any], float] | None = None
    least_work: tuple[int, int] | None = None
    graph: bool = False
    extra: Callable[[], dict[str, Any]] = dict

    def run(self, prepared: Any) -> Any:
        """The timed work."""
        result = self.forward(prepared)
        return result if self.backward is None else self.backward(result)


def interleave(
    impls: Sequence[Impl],
    *,
    num_buffers: int,
    device: torch.device,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
    threads: int | None = None,
    calls: int = 1,
) -> list[list[float]]:
    """Samples in microseconds of each implementation, in rounds; the order within a round rotates.

    seconds: rounds go on until this is spent, but for min_rounds and max_rounds
    calls: of a sample on a CPU, one after another, each on a buffer of its own; the sample is their mean. As many go
        before them untimed: what another implementation leaves behind (evicted code, spinning threads, memory on its
        way back to the system) is longer than such a call
    threads: of implementations that do not say; None leaves the number alone
    """
    calls = 1 if device.type == "cuda" else calls
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    samples: list[list[float]] = [[] for _ in impls]
    replays = {impl.name: _Replay(impl, num_buffers) for impl in impls if impl.graph and device.type == "cuda"}
    default = torch.get_num_threads() if threads is None else threads
    number = 0
    started = time.perf_counter()
    try:
        for round_number in range(max_rounds):
            if round_number >= min_rounds and time.perf_counter() - started > seconds:
                break
            for position in range(len(impls)):
                which = (position + round_number) % len(impls)
                impl = impls[which]
                if impl.name in replays:
                    samples[which].append(replays[impl.name].sample())
                    continue
                wanted = impl.threads or default
                if device.type == "cpu" and torch.get_num_threads() != wanted:
                    torch.set_num_threads(wanted)
                    number = _untimed(impl, number, num_buffers)  # the pool starts or ends threads now
                for _ in range(calls if calls > 1 else 0):
                    number = _untimed(impl, number, num_buffers)
                numbers = [(number + call) % num_buffers for call in range(calls)]
                samples[which].append(sample(impl, numbers))
                if impl.restore is not None:
                    for used in numbers:
                        impl.restore(used)
                number = (numbers[-1] + 1) % num_buffers
    finally:
        if device.type == "cpu":
            torch.set_num_threads(default)
    return samples


def _untimed(impl: Impl, number: int, num_buffers: int) -> int:
    impl.run(impl.prepare(number))
    if impl.restore is not None:
        impl.restore(number)
    return (number + 1) % num_buffers


def _cpu_sample(impl: Impl, numbers: Sequence[int]) -> float:
    prepared = [impl.prepare(number) for number in numbers]
    results = []  # freeing the outputs is the caller's time, not the op's
    start = time.perf_counter_ns()
    for one in prepared:
        results.append(impl.run(one))
    elapsed = time.perf_counter_ns() - start
    del results
    return elapsed / 1e3 / len(numbers)


class _Replay:
    """A graph of one call on each of up to eight buffers, which together are larger than the second-level cache."""

    def __init__(self, impl: Impl, num_buffers: int) -> None:
        prepared = [impl.prepare(number) for number in range(min(num_buffers, 8))]
        self.calls = len(prepared)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            impl.run(prepared[0])
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [impl.run(one) for one in prepared]

    def sample(self) -> float:
        """Microseconds a call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / self.calls


def _cuda_sample(impl: Impl, numbers: Sequence[int]) -> float:
    prepared = impl.prepare(numbers[0])
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about 1 ms: the host gets ahead, and launches overlap with it
    start.record()
    result = impl.run(prepared)
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end) * 1e3
