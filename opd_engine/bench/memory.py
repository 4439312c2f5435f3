"""What a call allocates, as the allocator itself reports it: no estimate, every output and temporary counted.

On a CPU the profiler's stream of allocations and frees gives peak and sizes; the growth of the process's resident peak
is measured beside it, because memory that a kernel takes from malloc never passes torch's allocator. On a GPU the
caching allocator's own peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass(frozen=True)
class Allocations:
    """peak_bytes: most held at one time beyond what was there before; large: allocations of at least the asked size;
    resident_bytes: growth of the resident peak, None where the system does not tell."""

    peak_bytes: int
    large: int
    resident_bytes: int | None


def trace_allocations(call: Callable[[], Any], device: torch.device, large_bytes: int) -> tuple[Any, Allocations]:
    """Run once and watch; returns the result and what was allocated.

    large_bytes: allocations of at least this size are counted
    """
    if device.type == "cuda":
        return _trace_cuda(call, device, large_bytes)
    resident = _resident_peak_reset()
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = call()
    peak_now = _status_bytes("VmHWM")
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = large = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
        large += event.nbytes() >= large_bytes
    grown = None if resident is None or peak_now is None else max(peak_now - resident, 0)
    return result, Allocations(peak, large, grown)


class CountedStorages(TorchDispatchMode):
    """Within it tensors have shapes and no values, and peak_bytes is the most that their storages hold at one time.

    Any size can be asked of any machine. What a kernel takes for itself is not seen, and where autograd would add two
    gradients of one weight in place it may not do so here: the count is then higher than the truth.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._held_bytes = 0
        self._known: set[int] = set()
        self._valueless = contextlib.ExitStack()

    def __enter__(self) -> CountedStorages:
        # The one part of torch that runs operators on shapes; importing it is slow.
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._valueless.enter_context(FakeTensorMode())
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._valueless.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known:
            return
        self._known.add(place)
        self._held_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        weakref.finalize(storage, self._release, place, storage.nbytes())

    def _release(self, place: int, nbytes: int) -> None:
        self._known.discard(place)
        self._held_bytes -= nbytes


def device_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _trace_cuda(call: Callable[[], Any], device: torch.device, large_bytes: int) -> tuple[Any, Allocations]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        result = call()
        torch.cuda.synchronize(device)
        trace = [event for events in torch.cuda.memory._snapshot()["device_traces"] for event in events]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    large = sum(event["action"] == "alloc" and event["size"] >= large_bytes for event in trace)
    return result, Allocations(torch.cuda.max_memory_allocated(device) - before, large, None)


def _status_bytes(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _resident_peak_reset() -> int | None:
    """Start the resident peak anew; returns what is resident now, None where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library announces its start and stop on descriptor 2; exceptions still travel as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
