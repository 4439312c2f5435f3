"""examples/text.toml at reduced size: the student halves its divergence to the teacher, alone and with a split LM head.

In float64: in float32 the two runs differ by 1e-8 until, after some 20,000 drawn tokens, one draw falls between the two
roundings; from there on the rollouts are different ones. Nothing is downloaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_engine.train.journal import read_metrics, without_measurements
from ranks import ROOT, free_port

STEPS, PROMPTS, NEW_TOKENS, K = 40, 32, 24, 32
REDUCED = {
    "run.dtype": "float64",
    "run.threads": 1,
    "text.teacher_model.hidden_size": 64,
    "text.teacher_model.head_dim": 16,
    "text.teacher_model.feed_forward_size": 256,
    "text.student_model.hidden_size": 48,
    "text.student_model.head_dim": 12,
    "text.student_model.feed_forward_size": 192,
    "text.teacher.steps": 150,
    "text.teacher.batch_size": 24,
    "text.student.steps": 10,
    "rollout.prompts": PROMPTS,
    "rollout.max_new_tokens": NEW_TOKENS,
    "opd.k": K,
    "optimizer.lr": 4e-3,
    "optimizer.steps": STEPS,
    "eval.every": 20,
    "eval.max_prompts": 48,
}


def train(folder: Path, name: str, ranks: int = 1, **changes) -> Path:
    """Runs the command as a user would; returns the run's folder."""
    settings = REDUCED | {"run.output_dir": folder / name, "text.cache_dir": folder / "cache"} | changes
    flags = [f"--{key}={value}" for key, value in settings.items()]
    launcher = ["-m"]
    if ranks > 1:
        port = free_port()
        launcher = [
            *("-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port), "-m"),
        ]
        flags += ["--tp", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "opd_engine", "train", "examples/text.toml", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, "alone")


@pytest.fixture(scope="module")
def shared(folder, alone):
    return train(folder, "shared", ranks=2)


@pytest.fixture(params=["alone", "shared"])
def run(request):
    return request.getfixturevalue(request.param)


def test_the_held_out_divergence_to_the_teacher_at_least_halves(run):
    summary = json.loads((run / "summary.json").read_text())
    divergence, perplexity = summary["forward_kl"]["prose"], summary["perplexity"]["prose"]
    assert divergence["after"] <= 0.5 * divergence["before"], divergence
    assert divergence["before"] > 1.0, "a student that begins at its teacher shows nothing"
    assert perplexity["teacher"] < perplexity["after"] < 0.5 * perplexity["before"], perplexity


def test_two_ranks_with_a_split_head_have_the_losses_of_one(alone, shared):
    ours, theirs = read_metrics(alone / "metrics.jsonl"), read_metrics(shared / "metrics.jsonl")
    assert [(r["step"], r["kind"]) for r in ours] == [(r["step"], r["kind"]) for r in theirs]
    assert len([r for r in ours if r["kind"] == "train"]) == STEPS
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in without_measurements(one).keys() - {"kind"}:
            assert two[key] == pytest.approx(one[key], rel=1e-9, abs=1e-12, nan_ok=True), (one["step"], key)
    losses = [r["loss"] for r in ours if r["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0] and len(set(losses)) == STEPS


def test_rollouts_supports_and_tail_masses_are_logged(run):
    for record in read_metrics(run / "metrics.jsonl"):
        if record["kind"] == "eval":
            assert {"forward_kl/prose", "perplexity/prose"} <= record.keys()
            continue
        assert 0 < record["completion_tokens"] <= NEW_TOKENS and 0 <= record["completion_ended"] <= 1
        assert record["rows"] == round(record["completion_tokens"] * PROMPTS)
        assert K <= record["support_size"] <= 2 * K  # the union of the student's top-k and the teacher's
        for side in ("student", "teacher"):
            assert 0 < record[f"{side}_tail_mass"] < 1
            assert record[f"{side}_tail_mass"] + record[f"{side}_support_mass"] == pytest.approx(1, abs=1e-9)


def test_rollouts_supports_tail_masses_divergence_and_perplexity_are_plotted(run):
    for name in ("length", "support-size", "tail", "held-out-divergence", "teachers", "perplexity"):
        picture = (run / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000, name
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").glob("events.out.tfevents.*"))
    for tag in (b"train/loss", b"train/student_tail_mass", b"train/support_size", b"eval/forward_kl/prose"):
        assert tag in events


def test_a_loss_that_counts_nothing_halves_nothing(folder, alone):
    still = train(folder, "still", **{"opd.coefficient": 0, "optimizer.steps": 2})
    divergence = json.loads((still / "summary.json").read_text())["forward_kl"]["prose"]
    began = json.loads((alone / "summary.json").read_text())["forward_kl"]["prose"]["before"]
    assert divergence == {"before": began, "after": began}
