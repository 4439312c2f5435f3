"""The Arm kernels compile, and under emulation compute what this machine's do: every vocabulary-sized pass and dtype.

Neither speed nor real Arm hardware is shown here. Skipped, saying so, where there is no cross compiler or emulator.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from miniature import ROOT, run

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ["-std=c++17", "-O2", "-static", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-I", "csrc"]
# By dtype, in the order of opd::DType. The last digit may differ with the order of sums; half types round to their own.
TOLERANCES = ((1e-12, 1e-15), (2e-5, 1e-7), (8e-3, 1e-6), (1e-3, 1e-6))

pytestmark = pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f"needs {CROSS} and {EMULATOR} (apt-get install g++-aarch64-linux-gnu qemu-user-static)",
)


def build(compiler: str, variant: str, folder) -> str:
    """The probe with one variant's kernels, linked statically."""
    binary = folder / f"{compiler}-{variant}"
    sources = sorted((ROOT / "csrc/kernels/cpu/variant").glob("*.cpp"))
    probe = ROOT / "python_tests/integration/kernel_probe.cpp"
    defines = [f"-DOPD_CPU_VARIANT={variant}", f"-DOPD_CPU_VARIANT_{variant.upper()}"]
    ran = run(compiler, *FLAGS, *defines, *sources, probe, "-o", binary, cwd=ROOT, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return str(binary)


def outputs(*command: str) -> list[tuple[str, int, np.ndarray]]:
    ran = run(*command, timeout=600)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    return [(op, int(dtype), np.array(values, dtype=np.float64)) for op, dtype, *values in lines]


def differences(ours, theirs) -> list[str]:
    assert [found[:2] for found in ours] == [found[:2] for found in theirs]
    found = []
    for (op, dtype, a), (_, _, b) in zip(ours, theirs):
        relative, absolute = TOLERANCES[dtype]
        # Sums of signed terms are judged against the row's largest, which is what their terms are as large as.
        excess = np.abs(a - b) > absolute + relative * np.maximum(np.abs(b), np.abs(b).max() * 1e-2)
        if excess.any() or not np.isfinite(a).all():
            found.append(f"{op}, dtype {dtype}: {excess.sum()} of {a.size} differ, worst {np.abs(a - b).max():.3g}")
    return found


def test_neon_computes_what_the_baseline_of_this_machine_does(tmp_path):
    native = os.environ.get("CXX", "c++")
    with ThreadPoolExecutor(2) as pool:
        jobs = [(native, "baseline"), (CROSS, "baseline"), (CROSS, "neon")]
        here, arm_baseline, arm_neon = pool.map(lambda job: build(*job, tmp_path), jobs)
    reference = outputs(here)
    assert len(reference) == 4 * (4 + 2 * 5)
    assert differences(outputs(EMULATOR, arm_baseline), reference) == []
    neon = outputs(EMULATOR, arm_neon)
    assert differences(neon, reference) == []
    # The comparison can fail: one value off by one part in a thousand.
    neon[1][2][7] *= 1.001
    assert differences(neon, reference) != []
