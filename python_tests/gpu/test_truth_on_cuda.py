"""The truth tests of values and gradients, run on the GPU. Suites are processes side by side: most of their time is the
oracle's, on the CPU."""

import subprocess
import sys

import pytest

from ranks import TESTS, python_environment

SUITES = {
    "scores": ["truth/test_scores.py", "-k", "not gradcheck and not float64"],
    "tails": ["truth/test_tail.py", "-k", "not float64"],
    "conventions": ["truth/test_conventions.py", "-k", "not threads and not (inplace and misaligned)"],
    "divergences": ["truth/test_divergences.py", "-k", "not float64"],
    "full": ["truth/test_full.py", "-k", "not float64 and not gradcheck"],
    "ops": ["truth/test_ops.py", "ops/test_kernels.py", "-k", "not float64 and not dtype0"],
    "linear": [
        *("truth/test_linear_losses.py", "truth/test_linear_scores.py"),
        "-k",
        "bfloat16 and (plain or softcap)",
    ],
}
pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def running():
    """Every suite, started at once."""
    environment = python_environment()
    processes = {}
    for suite, arguments in SUITES.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "on_cuda", "-p", "no:cacheprovider", *arguments]
        processes[suite] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TESTS
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("suite", SUITES)
def test_truth_on_cuda(suite, running, at_most):
    with at_most(200) as seconds:
        output, _ = running[suite].communicate(timeout=seconds)
    assert running[suite].returncode == 0, output[-6000:]
    assert " passed" in output
