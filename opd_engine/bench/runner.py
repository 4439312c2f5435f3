"""Measure a plan: check every implementation's answer and allocations first, then time them all, interleaved.

What cannot be measured is reported with its reason, and never silently left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from opd_engine.bench import machine
from opd_engine.bench.cases import Workload, build
from opd_engine.bench.memory import Allocations, trace_allocations
from opd_engine.bench.record import BenchRecord, floor_us
from opd_engine.bench.shapes import Plan, Shape, measures, shape_text
from opd_engine.bench.timing import Impl, interleave

# Eager torch holds the logits, their float32 copy, softmax, its product, gradient and scattered gradient at once.
_EAGER_COPIES = 8
# Ours needs the original, a copy to overwrite or a gradient, and for two models the teacher's.
_OUR_COPIES = 3
# A single row takes as long as an interpreter whose code has just been evicted by another implementation.
_SMALL_ELEMENTS, _CALLS_OF_A_SMALL_SAMPLE = 1 << 18, 50


@dataclasses.dataclass
class Settings:
    """How to measure; seconds are those of the timed rounds of one case at one shape."""

    device: torch.device
    threads: int
    seconds: float = 3.0
    min_rounds: int = 5
    compile_baselines: bool = True
    compile_seconds: float = 90.0
    copy_bytes: int = 1 << 30


@dataclasses.dataclass
class Outcome:
    """Records in the order measured; what was left out, and what failed, each with its reason."""

    records: list[BenchRecord] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)


class _TooLong(Exception):
    pass


def run_plan(plan: Plan, settings: Settings, out: Path | None, report: Callable[[str], None]) -> Outcome:
    """Measure what `out` does not hold yet; each shape's records are appended to it as soon as they exist.

    report: called with a line before each shape; "" after the last
    """
    outcome = Outcome()
    torch.set_num_threads(settings.threads)
    session = _Session(settings)
    done = session.already_in(out)
    for case, shape in plan:
        label = f"{case} {shape_text(shape)} {shape.dtype}"
        why = measures(case, shape)
        if why is not None:
            outcome.skipped.append(f"{label}: {why}")
            report(label)
            continue
        if session.place(case, shape) in done:
            outcome.skipped.append(f"{label}: already in {out}")
            report(label)
            continue
        report(label)
        try:
            records = session.measure(case, shape, outcome)
        except (RuntimeError, ValueError, NotImplementedError, MemoryError) as error:
            outcome.failed.append(f"{label}: {_one_line(error)}")
            continue
        finally:
            gc.collect()
        for record in records:
            if out is not None:
                record.append_to(out)
        outcome.records += records
    report("")
    return outcome


class _Session:
    """One run: its machine, commit, rates, and the time that compiling may still take."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.machine = machine.machine_name(settings.device)
        self.commit = machine.commit()
        self.compile_seconds = settings.compile_seconds
        self.rates: dict[tuple[torch.dtype, ...], machine.Rates] = {}

    def place(self, case: str, shape: Shape) -> tuple[Any, ...]:
        """What tells whether a record of ours at this commit exists."""
        where = (self.machine, machine.device_name(self.settings.device), self.settings.threads, self.commit)
        return (*where, case, *dataclasses.astuple(dataclasses.replace(shape, baselines=True)))

    def already_in(self, out: Path | None) -> set[tuple[Any, ...]]:
        if out is None or not out.exists():
            return set()
        from opd_engine.bench.record import read_records

        found = set()
        for r in read_records([out]):
            shape = Shape(
                *(r.num_tokens, r.vocab_size, r.k, r.tp_size, r.dtype),
                *(r.pattern, r.mask_density, r.layout),
                hidden_size=r.hidden_size or 0,
            )
            found.add((r.machine, r.device, r.threads, r.commit, r.case, *dataclasses.astuple(shape)))
        return found

    def measure(self, case: str, shape: Shape, outcome: Outcome) -> list[BenchRecord]:
        settings = self.settings
        label = f"{case} {shape_text(shape)} {shape.dtype}"
        if _OUR_COPIES * shape.logits_bytes > _available_bytes(settings.device):
            outcome.skipped.append(f"{label}: would need {_OUR_COPIES * shape.logits_bytes / 2**30:.0f} GiB")
            return []
        if shape.baselines and _EAGER_COPIES * shape.elements * 4 > _available_bytes(settings.device):
            outcome.skipped.append(
                f"{label}: baselines would need {_EAGER_COPIES * shape.elements * 4 / 2**30:.0f} GiB"
            )
            shape = dataclasses.replace(shape, baselines=False)
        rates = self._rates(shape)
        torch._dynamo.reset()
        workload = build(case, shape, settings.device, compile_baselines=settings.compile_baselines)
        for name, why in workload.absent.items():
            line = f"{name}: {why}"
            if line not in outcome.skipped:
                outcome.skipped.append(line)
        checked: list[tuple[Impl, Allocations, Allocations, float]] = []
        for impl in workload.impls:
            try:
                checked.append((impl, *self._check(impl, workload, shape)))
            except _TooLong:
                outcome.skipped.append(f"{label}: {impl.name}: no time left to compile it")
            except Exception as error:
                # The compiler wraps what stopped it.
                if impl.name.startswith("torch_compile") and self.compile_seconds < 1:
                    outcome.skipped.append(f"{label}: {impl.name}: no time left to compile it")
                    continue
                # A baseline may fail in its own way; ours may not.
                ours = impl.name.startswith("opd_")
                (outcome.failed if ours else outcome.skipped).append(f"{label}: {impl.name}: {_one_line(error)}")
        if not checked:
            return []
        samples = interleave(
            [impl for impl, *_ in checked],
            num_buffers=workload.num_buffers,
            device=settings.device,
            seconds=settings.seconds,
            min_rounds=settings.min_rounds,
            threads=settings.threads,
            calls=_CALLS_OF_A_SMALL_SAMPLE if shape.elements <= _SMALL_ELEMENTS else 1,
        )
        return [self._record(case, shape, workload, rates, *checks, timed) for checks, timed in zip(checked, samples)]

    def _rates(self, shape: Shape) -> machine.Rates:
        """Measured once a run for each dtype that is multiplied in."""
        dtypes = machine.matmul_dtypes(self.settings.device, shape.torch_dtype, from_hidden=bool(shape.hidden_size))
        if dtypes not in self.rates:
            self.rates[dtypes] = machine.measure_rates(self.settings.device, dtypes, self.settings.copy_bytes)
        return self.rates[dtypes]

    def _timing(self, impl: Impl) -> str:
        if self.settings.device.type == "cpu":
            return "wall clock"
        return "graph replay" if impl.graph else "events"

    def _check(self, impl: Impl, workload: Workload, shape: Shape) -> tuple[Allocations, Allocations, float]:
        """(allocations of the whole call, of its forward alone, error); warms the implementation up."""
        device = self.settings.device
        with self._limited_compile(impl.name):
            impl.run(impl.prepare(0))
        _restore(impl)
        threads = torch.get_num_threads()
        if device.type == "cpu" and impl.threads:
            torch.set_num_threads(impl.threads)
        try:
            # Inputs are prepared before the watch begins: they are the caller's memory.
            prepared = impl.prepare(0)
            result, whole = trace_allocations(lambda: impl.run(prepared), device, shape.elements)
            error = (impl.error or workload.error)(result)
            del result, prepared
            _restore(impl)
            forward = whole
            if impl.backward is not None:
                prepared = impl.prepare(0)
                forwarded, forward = trace_allocations(lambda: impl.forward(prepared), device, shape.elements)
                del forwarded, prepared
                _restore(impl)
        finally:
            if device.type == "cpu":
                torch.set_num_threads(threads)
        return whole, forward, error

    @contextlib.contextmanager
    def _limited_compile(self, name: str) -> Iterator[None]:
        """What torch.compile may still take in this run; a thread cannot be interrupted, the main one can."""
        if not name.startswith("torch_compile") or threading.current_thread() is not threading.main_thread():
            yield
            return
        if self.compile_seconds < 1:
            raise _TooLong

        def stop(*_: Any) -> None:
            raise _TooLong

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.compile_seconds)
        try:
            yield
        finally:
            self.compile_seconds = signal.getitimer(signal.ITIMER_REAL)[0]
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _record(
        self,
        case: str,
        shape: Shape,
        workload: Workload,
        rates: machine.Rates,
        impl: Impl,
        whole: Allocations,
        forward: Allocations,
        error: float,
        samples: list[float],
    ) -> BenchRecord:
        samples = [round(sample, 2) for sample in samples]
        median = statistics.median(samples)
        bytes_moved, flops = impl.least_work or (workload.bytes_moved, workload.flops)
        floor = floor_us(bytes_moved, flops, rates.copy_gbps, rates.matmul_tflops)
        return BenchRecord(
            case=case,
            impl=impl.name,
            device=machine.device_name(self.settings.device),
            machine=self.machine,
            commit=self.commit,
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            dtype=shape.dtype,
            num_tokens=shape.num_tokens,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size or None,
            k=shape.k,
            tp_size=shape.tp_size,
            samples_us=samples,
            median_us=median,
            bytes_moved=bytes_moved,
            flops=flops,
            copy_gbps=rates.copy_gbps,
            matmul_tflops=rates.matmul_tflops,
            floor_us=floor,
            floor_fraction=floor / median,
            peak_extra_bytes=whole.peak_bytes,
            max_abs_err=error,
            extra={
                **impl.extra(),
                "pattern": shape.pattern,
                "mask_density": shape.mask_density,
                "layout": shape.layout,
                "threads": self.settings.threads,
                "impl_threads": impl.threads or self.settings.threads,
                "cpu_variant": machine.cpu_variant(),
                "torch": torch.__version__,
                "timing": self._timing(impl),
                "clocks_mhz": machine.clocks_mhz(self.settings.device),
                "copy_bytes": rates.copy_bytes,
                "matmul_dtype": str(rates.matmul_dtype).removeprefix("torch."),
                "logits_bytes": shape.logits_bytes,
                "tflops": flops / median / 1e6,
                "logits_size_allocations": whole.large,
                "logits_size_allocations_forward": forward.large,
                "resident_extra_bytes": whole.resident_bytes,
            },
        )


def _restore(impl: Impl) -> None:
    if impl.restore is not None:
        impl.restore(0)


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
