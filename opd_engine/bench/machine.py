"""What a record says of where it was made: processor, commit, and the two rates that floors are computed from.

No host name and no path is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from opd_engine import ops
from opd_engine._version import __version__

_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured in this run: copy (read + write counted) and matmul.

    copy_bytes: size of one copied buffer
    matmul_dtype: of the factors of the matmul
    """

    copy_gbps: float
    matmul_tflops: float
    copy_bytes: int
    matmul_dtype: torch.dtype


def machine_name(device: torch.device) -> str:
    """Processor and cores that this process may use; for a GPU also what drives it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = f"{processor_name()}, {cores} cores"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {host}"
    return host


def device_name(device: torch.device) -> str:
    """The record's `device`."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def processor_name() -> str:
    """As the operating system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_variant() -> str:
    """Instruction set of the kernels that run here."""
    return ops.build_info()["cpu_variant"]


def commit() -> str:
    """Short hash, "-dirty" where what is measured differs from it; the version where there is no repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return __version__
        measured = ("csrc", "cmake", "CMakeLists.txt", "setup.py", "opd_engine")
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", *measured)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return __version__


def last_level_cache_bytes(device: torch.device) -> int:
    """Largest cache that a buffer could linger in; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def clocks_mhz(device: torch.device) -> dict[str, int] | None:
    """A GPU's clocks right now, just after what was timed: {"sm", "memory", "sm_max"}; None where nobody tells."""
    if device.type != "cuda":
        return None
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, AttributeError):
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        sm, memory, sm_max = (int(value) for value in answer.strip().split(","))
        return {"sm": sm, "memory": memory, "sm_max": sm_max}
    return None


def matmul_dtypes(device: torch.device, dtype: torch.dtype, *, from_hidden: bool) -> tuple[torch.dtype, ...]:
    """What the matrix rate of a case is measured in: the fastest of these.

    from_hidden: the case multiplies by the LM head, in its own dtype. Beside it stands float32 on a CPU: where a half's
        products are slow, whoever widens first is faster. Without a head the arithmetic is the kernels', in float32
    """
    if device.type != "cpu" or dtype in (torch.float32, torch.float64):
        return (dtype,)
    return (dtype, torch.float32) if from_hidden else (torch.float32,)


def measure_rates(device: torch.device, dtypes: Sequence[torch.dtype], copy_bytes: int = 1 << 30) -> Rates:
    """Best of several warm copies and of several square matmuls.

    dtypes: of the matmul; the fastest is kept
    copy_bytes: size of the copied buffer; at least 1 GiB for records that are kept
    """
    copy_s = _copy_seconds(device, copy_bytes)
    matmul_tflops, dtype = max(((_matmul_tflops(device, dtype), dtype) for dtype in dtypes), key=lambda pair: pair[0])
    return Rates(2 * copy_bytes / copy_s / 1e9, matmul_tflops, copy_bytes, dtype)


def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1536
    # Random: a product of ones flips no bits, draws little power and runs at clocks that no real one has.
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    # Where nothing multiplies float16, one such product takes seconds: two of them say that it is slow.
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=out), device, repeats=6, enough=2.0) / 1e12


def _copy_seconds(device: torch.device, copy_bytes: int) -> float:
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    return _best_seconds(lambda: target.copy_(source), device, repeats=8)


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int, enough: float = float("inf")) -> float:
    """enough: seconds of one run after which it is not repeated."""
    best = float("inf")
    for repeat in range(repeats + 1):
        seconds = _seconds(run, device)
        if repeat:  # the first one faults the pages in
            best = min(best, seconds)
            if best > enough:
                break
    return best


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # Events, on the device's own clock: a launch and the wait of the host are no part of a rate.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3
