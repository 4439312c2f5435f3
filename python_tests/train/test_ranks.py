"""`torchrun -m opd_engine train --tp 2`: one process's losses; a rank that fails ends the other with its message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fsdp.steps import state_of
from opd_engine.cli import main
from opd_engine.train.checkpoint import list_checkpoints, load_state
from opd_engine.train.journal import read_metrics, without_measurements
from ranks import ROOT, free_port, python_environment

pytestmark = pytest.mark.ranks
STEPS = 6
# float64: in float32 the two runs' roundings differ, and sooner or later so does a drawn token.
FLAGS = [
    *("--data.task", "arithmetic", "--data.mixing", "equal", "--run.threads", "1", "--run.dtype", "float64"),
    *("--arithmetic.teacher.steps", "6", "--arithmetic.student.steps", "3", "--arithmetic.operand_end", "12"),
    *("--arithmetic.model.hidden_size", "32", "--arithmetic.model.feed_forward_size", "64"),
    *("--opd.divergence", "jsd", "--opd.support", "union", "--opd.k", "5", "--optimizer.lr", "2e-3"),
    *("--rollout.prompts", "12", "--rollout.max_new_tokens", "4", "--optimizer.steps", str(STEPS)),
    *("--optimizer.micro_batch", "5", "--eval.every", "3", "--checkpoint.every", "2", "--run.timeout_s", "300"),
]

# Rank 1 fails in its fourth step; or rank 0 may write no file beyond 50 kB from step 4 on, as on a disk that is full.
FAULTS = """
import os, resource, sys
from opd_engine.cli import main
from opd_engine.train.loop import Trainer

step = Trainer.step

def faulty(trainer):
    if trainer.step_number == 3 and os.environ["RANK"] == "1" and sys.argv[1] == "raises":
        raise ValueError("row 3 is sour")
    if trainer.step_number == 3 and os.environ["RANK"] == "0" and sys.argv[1] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return step(trainer)

Trainer.step = faulty
sys.exit(main(sys.argv[2:]))
"""


def two_ranks(*command: str) -> subprocess.CompletedProcess:
    launcher = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, *command],
        env=python_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )


def arguments(folder: Path, run: str) -> list[str]:
    return ["train", *FLAGS, "--output-dir", str(folder / run), "--arithmetic.cache_dir", str(folder / "cache")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    assert main(arguments(folder, "alone")) == 0
    return folder


def test_two_ranks_give_the_losses_and_weights_of_one(folder):
    done = two_ranks("-m", "opd_engine", *arguments(folder, "shared"), "--tp", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (read_metrics(folder / run / "metrics.jsonl") for run in ("alone", "shared"))
    assert len(ours) == len(theirs) > STEPS
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in without_measurements(one).keys() - {"kind"}:
            assert two[key] == pytest.approx(one[key], rel=1e-10, abs=1e-13, nan_ok=True), (one["step"], key)
    assert ours[-1]["step"] == STEPS and ours[1]["loss"] > 0
    moments = [state_of(list_checkpoints(folder / run / "checkpoints")[-1][1]) for run in ("alone", "shared")]
    for name in (name for name in moments[0] if name.endswith("/exp_avg")):
        torch.testing.assert_close(moments[1][name], moments[0][name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "rank 0 ends because rank 1 failed: ValueError: row 3 is sour"),
        ("full", "failed: CheckpointError: cannot write the checkpoint of step 4"),
    ],
)
def test_a_rank_that_fails_ends_the_other_with_its_message(folder, fault, told, tmp_path):
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    began = time.monotonic()
    done = two_ranks(str(script), fault, *arguments(folder, fault), "--tp", "2")
    assert done.returncode != 0 and told in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - began < 150, "they waited for the timeout"
    assert "opd-engine: error: " in done.stderr
    whole = list_checkpoints(folder / fault / "checkpoints")
    assert [step for step, _ in whole] == [0, 2], "the last one before the fault is there, and none after it"
    assert load_state(whole[-1][1])["step"] == 2
    if fault == "full":
        assert "File too large" in done.stderr and "step_00000002, is whole; what is whole is continued" in done.stderr
        assert not [path for path in (folder / fault / "checkpoints").iterdir() if path.name.startswith(".writing")]
