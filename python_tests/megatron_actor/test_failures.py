"""The last pipeline stage fails in the middle of a pass: the stage that waits for it ends too, and says why."""

import subprocess
import sys
import time

import pytest

from foreign import needs_megatron
from ranks import ROOT, TESTS, free_port, python_environment

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
TIMEOUT_S = 600.0  # of the collectives: what ends the job must not be it


@pytest.mark.parametrize(("fault", "reason"), [("raises", "ValueError: row 3 is sour"), ("killed", "")])
def test_no_stage_waits_for_one_that_is_gone(fault, reason, tmp_path):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    command = [sys.executable, str(TESTS / "megatron_actor" / "failing_rank.py"), fault, str(TIMEOUT_S)]
    begun = time.monotonic()
    ranks = []
    for rank in range(2):
        with open(tmp_path / f"{rank}.log", "wb") as log:
            environment = python_environment(RANK=rank, LOCAL_RANK=rank, **address)
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    outputs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert all("scored" in output for output in outputs), outputs
    assert 0 not in codes, outputs
    assert "trained" not in outputs[0] + outputs[1]
    if fault == "raises":
        assert f"rank 0 ends because rank 1 failed: {reason}" in outputs[0], outputs[0]
    else:
        assert codes[1] == -9
        assert "rank 1 failed: it ended without a word; rank 0 lost its connection" in outputs[0], outputs[0]
    assert time.monotonic() - begun < TIMEOUT_S / 4
