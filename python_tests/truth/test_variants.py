"""Every instruction set that the module was compiled for and this machine can run passes the same truth tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_engine.ops import build_info

TESTS = Path(__file__).resolve().parent
SUITES = ["test_scores.py", "test_tail.py", "test_conventions.py", "test_full.py", "../functional/test_edge_rows.py"]
BUILD = build_info()
OTHERS = [name for name in BUILD["cpu_variants_available"].split(",") if name != BUILD["cpu_variant"]]


def run(variant, *arguments):
    environment = {**os.environ, "OPD_CPU_VARIANT": variant, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400, cwd=TESTS.parents[1]
    )


def test_the_variant_can_be_forced():
    assert OTHERS, f"only {BUILD['cpu_variant']} can run here: nothing to compare"
    for variant in OTHERS:
        show = "from opd_engine.ops import build_info; print(build_info()['cpu_variant'])"
        assert run(variant, "-c", show).stdout.strip() == variant
    refused = run("sse9", "-c", "import opd_engine, torch; opd_engine.topk_log_probs(torch.zeros(2, 4), 1)")
    assert refused.returncode != 0 and "OPD_CPU_VARIANT" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_truth_on(variant):
    files = [str(TESTS / name) for name in SUITES]
    # The widest rows show nothing of an instruction set that the others do not.
    done = run(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not gpt2 and not 151936", *files)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
