"""A run killed at any moment continues to the same bits: weights, optimizer, generators, cursor and metrics."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from fsdp.steps import state_of
from opd_engine.cli import main
from opd_engine.train import run_folder
from opd_engine.train.checkpoint import list_checkpoints
from opd_engine.train.journal import Journal, read_metrics, without_measurements

STEPS = 24
FLAGS = [
    *("--data.task", "arithmetic", "--data.mixing", "equal", "--run.threads", "1", "--run.quiet"),
    *("--arithmetic.teacher.steps", "6", "--arithmetic.student.steps", "3", "--arithmetic.operand_end", "12"),
    *("--arithmetic.model.hidden_size", "32", "--arithmetic.model.feed_forward_size", "64"),
    *("--opd.divergence", "jsd", "--opd.k", "4", "--opd.optimizer_steps_per_rollout", "2", "--optimizer.lr", "2e-3"),
    *("--rollout.prompts", "12", "--rollout.max_new_tokens", "4", "--optimizer.steps", str(STEPS)),
    *("--optimizer.micro_batch", "5", "--eval.every", "8", "--checkpoint.every", "3"),
]


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    return ["train", *FLAGS, "--output-dir", str(folder / run), "--arithmetic.cache_dir", str(folder / "cache"), *more]


def killed_after(lines: int, folder: Path, *more: str) -> None:
    """Runs the command in a process of its own and kills it once metrics.jsonl has that many lines."""
    metrics = folder / "killed" / "metrics.jsonl"
    command = [sys.executable, "-m", "opd_engine", *arguments(folder, "killed", *more)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 240
        while child.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        assert child.poll() is None, "the run ended, or never began, before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


def without_times(folder: Path) -> list[dict]:
    """The records as they are written: "nan" is equal to "nan"."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [without_measurements(record) for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    torch.set_num_threads(1)
    assert main(arguments(folder, "whole")) == 0
    return folder


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_same_bits(undisturbed):
    folder = undisturbed
    killed_after(9, folder)
    first = list_checkpoints(folder / "killed" / "checkpoints")
    assert 0 < first[-1][0] < STEPS
    killed_after(20, folder)
    second = list_checkpoints(folder / "killed" / "checkpoints")
    assert first[-1][0] < second[-1][0] < STEPS
    assert main(arguments(folder, "killed")) == 0
    assert without_times(folder / "killed") == without_times(folder / "whole")
    ours, theirs = (list_checkpoints(folder / run / "checkpoints")[-1] for run in ("killed", "whole"))
    assert ours[0] == theirs[0] == STEPS
    weights = [(path / "model.safetensors").read_bytes() for _, path in (ours, theirs)]
    assert weights[0] == weights[1]
    values = [json.loads((path / "actor.json").read_text()) for _, path in (ours, theirs)]
    assert values[0] == values[1] and values[0]["publications"] > STEPS // 2, "versions go on counting"
    states = [state_of(path) for _, path in (ours, theirs)]
    assert states[0].keys() == states[1].keys() and any(name.startswith("optimizer/") for name in states[0])
    for name, value in states[0].items():  # weights, moments, generators
        assert torch.equal(value, states[1][name]), name


def test_a_finished_run_resumes_to_its_end_at_once(undisturbed, capsys):
    before = without_times(undisturbed / "whole")
    assert main(arguments(undisturbed, "whole")) == 0
    assert without_times(undisturbed / "whole") == before
    assert f"{STEPS} steps" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(undisturbed, capsys):
    assert main(arguments(undisturbed, "whole", "--resume", "--opd.k", "5", "--run.seed", "1")) == 2
    message = capsys.readouterr().err
    assert "opd.k: saved 4, given 5" in message and "run.seed: saved 0, given 1" in message


def test_a_run_is_neither_mixed_with_another_nor_lost(undisturbed, capsys, monkeypatch):
    assert main(arguments(undisturbed, "whole", "--opd.k", "6")) == 2
    assert "already holds a run of other settings (opd.k: saved 4, given 6)" in capsys.readouterr().err
    with open(undisturbed / "whole" / ".lock", "a") as other, monkeypatch.context() as patience:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(0)
        other.write("process 1 on a host")
        other.flush()
        patience.setattr(run_folder, "_WAIT_S", 0.2)
        assert main(arguments(undisturbed, "whole")) == 2
    assert "whole is being written by process 1 on a host" in capsys.readouterr().err
    assert main(arguments(undisturbed, "nothing here", "--resume")) == 2
    assert "wanted a run in" in capsys.readouterr().err and not (undisturbed / "nothing here").exists()
    assert list_checkpoints(undisturbed / "whole" / "checkpoints")[-1][0] == STEPS


@pytest.mark.parametrize("mistake", [("--opd.k", "33"), ("--data.task", "prompts", "--student", "none")])
def test_a_mistake_neither_discards_a_run_nor_leaves_one_that_never_began(undisturbed, capsys, mistake):
    more = ["--teacher", "a=none", "--prompts", "none"] if "prompts" in mistake else []
    assert main(arguments(undisturbed, "whole", "--overwrite", *mistake, *more)) == 2
    assert list_checkpoints(undisturbed / "whole" / "checkpoints")[-1][0] == STEPS
    assert main(arguments(undisturbed, "mistaken", *mistake, *more)) == 2
    assert "error: opd.k: wanted at most" in (said := capsys.readouterr().err) or "student.path" in said
    assert not (undisturbed / "mistaken" / "config.toml").exists()


def test_a_full_disk_ends_the_run_with_the_reason_and_what_is_whole(undisturbed, capsys, monkeypatch):
    save, saves = checkpoint.save, []

    def full_the_third_time(*values, **options):
        saves.append(values)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*values, **options)

    monkeypatch.setattr(checkpoint, "save", full_the_third_time)
    assert main(arguments(undisturbed, "full")) == 1
    message = capsys.readouterr().err
    assert "step 6" in message and "No space left on device" in message and "step_00000003, is whole" in message
    monkeypatch.undo()
    assert main(arguments(undisturbed, "full")) == 0
    assert without_times(undisturbed / "full") == without_times(undisturbed / "whole")


def test_other_evaluations_change_nothing_of_what_is_learned(undisturbed):
    assert main(arguments(undisturbed, "often", "--eval.every", "5", "--checkpoint.every", "24")) == 0
    runs = [undisturbed / run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors" for run in ("often", "whole")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    journal = Journal(tmp_path)
    journal.record(1, "train", {"loss": 1.0})
    size = journal.sync()
    journal.record(2, "train", {"loss": float("inf")})
    journal.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "ki')
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, float("inf")]
    journal = Journal(tmp_path, size=size, first_step=2)
    journal.record(2, "train", {"loss": 0.5})
    journal.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 0.5)]
