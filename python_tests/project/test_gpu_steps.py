"""`make gpu` ends within eight minutes, whatever hangs, and says what it left out: run with a stand-in for Python."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ranks import ROOT

pytestmark = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("timeout")), reason="needs GNU make and timeout"
)


def make_gpu(tmp_path, does: str, steps: str, *more: str):
    """does: what `python` does, in sh; it sees its arguments."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={python}", f"GPU_STEPS={steps}", *more]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GPU_"))}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=60)


def test_the_steps_are_eight_minutes_together():
    steps = dict(
        re.findall(r"([a-z-]+):(\d+)", re.search(r"^GPU_STEPS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1])
    )
    assert list(steps) == ["machine", "build", "truth", "bench", "bench-linear", "bench-step", "check"]
    assert sum(map(int, steps.values())) == 480


def test_a_benchmark_that_time_cuts_off_is_said_and_the_next_one_runs(tmp_path):
    done = make_gpu(tmp_path, 'case "$*" in *linear-gpu*) exec sleep 50;; esac', "build:6 bench-linear:2 bench-step:2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^gpu-bench-linear: time is up; not measured", done.stdout, re.M)
    assert "== gpu-bench-step" in done.stdout
    seconds, total = map(int, re.search(r"^== (\d+) of (\d+) s$", done.stdout, re.M).groups())
    assert 1 <= seconds <= total == 10


def test_a_build_that_hangs_ends_the_run_and_a_red_check_does_not(tmp_path):
    done = make_gpu(tmp_path, 'case "$*" in *setup.py*) exec sleep 50;; esac', "build:6 check:1")
    assert done.returncode != 0 and "failed: gpu-build" in done.stderr and "== gpu-check" not in done.stdout
    done = make_gpu(tmp_path, 'case "$*" in *pytest*) exit 1;; esac', "build:9 check:9 bench:9")
    assert done.returncode != 0 and "failed: gpu-check" in done.stderr and "== gpu-bench" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is missing here")
def test_a_machine_that_cannot_be_used_is_named_before_anything_is_built(tmp_path):
    done = make_gpu(tmp_path, f'exec {sys.executable} "$@"', "machine:60 build:1")
    assert done.returncode != 0 and "failed: gpu-machine" in done.stderr and "== gpu-build" not in done.stdout
    assert "this machine cannot build or check CUDA kernels: " in done.stderr and "a GPU: torch" in done.stderr


def test_what_a_step_says_is_kept_beside_its_records(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = make_gpu(tmp_path, 'echo "$@"', "truth:20 bench:20", f"OUT={out}")
    assert done.returncode == 0, done.stderr
    assert "test_truth_on_cuda.py" in (out / "gpu-truth.log").read_text()
    assert f"--out {out}/cuda_readme.jsonl" in (out / "gpu-bench.log").read_text()
