"""Memory of the linear functions, as the process's peak: the workspace, the weight's gradient and O(T k), no logits.

T = 4,096, V = 65,536, float32: the logits would be 1 GiB. Each call runs in a process of its own.
"""

import json
import os
import subprocess
import sys

import pytest

from linear_memory_probe import FEWER_ROWS, HIDDEN, ROWS, VOCAB, K
from ranks import TESTS

WORKSPACE, LOGITS, ACCUMULATOR = 64 << 20, ROWS * VOCAB * 4, VOCAB * HIDDEN * 4
ROW_BYTES = ROWS * (HIDDEN * 8 + K * 32)  # hidden gradient and its last rounding; scores, ids, upstream gradients
SLACK = 16 << 20  # the buffers a matrix library packs its factors into, and page-sized accidents

pytestmark = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


def peak(function: str) -> int:
    probe = TESTS / "support" / "linear_memory_probe.py"
    ran = subprocess.run(
        [sys.executable, str(probe), function],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},  # freed memory is returned
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# How much of [V, H] float32 exists: an accumulator, or gather's own gradient, which needs none (half of one in
# bfloat16). The accumulator's rounding comes when the workspace, here the larger of the two, is free.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "accumulators"),
    [
        *[("distill", 1), ("distill_softcap", 1), ("distill_bfloat16", 1), ("distill_main_grad", 0)],
        *[("gather", 1), ("gather_bfloat16", 0.5), ("topk", 0), ("full", 1)],
    ],
)
def test_the_peak_is_the_workspace_and_the_weights_gradient(function, accumulators):
    grown = peak(function)
    allowed = WORKSPACE + accumulators * ACCUMULATOR + ROW_BYTES + SLACK
    print(f"{function}: {grown / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f}")
    assert grown < LOGITS / 6 and grown <= allowed, f"{grown / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    assert grown > WORKSPACE / 2, "the probe measures nothing"


@pytest.mark.slow
def test_a_path_through_the_logits_is_seen():
    """The control: the same loss through logits peaks above them."""
    assert peak("through_logits") > FEWER_ROWS["through_logits"] * VOCAB * 4
