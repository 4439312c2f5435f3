"""What nvcc made of the CUDA kernels, where it is found: no spill in a hot kernel, registers within the budget that its
blocks an SM need, 16-byte accesses. `make build` compiles every architecture with warnings as errors.
"""

import re
import shutil
import subprocess

import pytest

from ranks import ROOT

# Kernel -> most registers a thread: 65,536 of an SM over the threads that are to be resident.
BUDGET = {
    "topk_partials_kernel": 65_536 // (2 * 512),
    "gather_partials_kernel": 65_536 // (2 * 512),
    "scores_backward_kernel": 65_536 // (3 * 256),
    "distill_loss_kernel": 65_536 // 768,
}
TYPES = {"f": "float32", "NS0_8BFloat16E": "bfloat16", "NS0_7Float16E": "float16"}


def nvcc(*arguments):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not on PATH: the compiled code was not looked at")
    command = [compiler, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "--Werror=all-warnings", *arguments]
    done = subprocess.run([*command, ROOT / "csrc/kernels/cuda/kernels.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the assembler says of each kernel for Hopper."""
    out = tmp_path_factory.mktemp("cubin") / "kernels.cubin"
    return nvcc("-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-o", out)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    out = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    nvcc("-arch=sm_90a", "-ptx", "-o", out)
    return out.read_text()


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("kernel", BUDGET)
def test_no_spill_and_registers_within_budget(kernel, dtype, report):
    pattern = rf"Function properties for _ZN3opd4cuda\d+{kernel}I{dtype}[^\n]*\n\s*(\d+) bytes stack frame, "
    found = re.search(
        pattern + r"(\d+) bytes spill stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers", report
    )
    assert found, f"no {kernel} for {TYPES[dtype]} in what ptxas said"
    _, stores, loads, registers = map(int, found.groups())
    assert (stores, loads) == (0, 0) and registers <= BUDGET[kernel]


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
def test_rows_are_read_and_written_sixteen_bytes_at_a_time(dtype, ptx):
    def body(kernel):
        found = [text for text in ptx.split(".entry ") if re.match(rf"_ZN3opd4cuda\d+{kernel}I{dtype}", text)]
        assert len(found) == 1
        return found[0]

    for kernel in ("topk_partials_kernel", "gather_partials_kernel", "distill_loss_kernel"):
        # A batch of four in flight, and the rest of a row.
        assert body(kernel).count("ld.global.nc.L1::no_allocate.v4.u32") >= 5, kernel
    for kernel in ("scores_backward_kernel", "distill_loss_kernel"):
        assert len(re.findall(r"ld\.global(?:\.nc)?\.v4\.\w+ ", body(kernel))) >= 4, kernel
        assert len(re.findall(r"st\.global\.v4\.\w+ ", body(kernel))) >= 4, kernel
