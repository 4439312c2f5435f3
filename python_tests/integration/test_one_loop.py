"""One TOML through every actor: the same metrics, the same refusals, and the same first step from the same weights."""

import os
import subprocess
import sys

import pytest

from opd_engine.cli import main
from opd_engine.train.journal import read_metrics
from ranks import ROOT, free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.ranks]
pytest.importorskip("megatron.core", reason="megatron-core is not installed (the [megatron] extra)")
TOML = """
[run]
output_dir = "runs/none"
quiet = true
threads = 1
[data]
task = "arithmetic"
mixing = "equal"
[arithmetic]
operand_end = 12
cache_dir = "CACHE"
[arithmetic.teacher]
steps = 40
[arithmetic.student]
steps = 10
[rollout]
prompts = 8
samples = 2
max_new_tokens = 4
[opd]
divergence = "jsd"
support = "union"
k = 5
[optimizer]
steps = 2
lr = 1e-3
warmup_steps = 0
micro_batch = 3
[eval]
every = 2
[checkpoint]
every = 2
"""
ACTORS = {
    "one process": (1, "hf", []),
    "fsdp on 2": (2, "hf", []),
    "fsdp on 2, offloaded": (2, "hf", ["--run.offload", "true"]),
    "in two phases on 2": (2, "hf", ["--run.two_phase", "true"]),
    "hidden states": (1, "hf", ["--run.workspace_bytes", "2000"]),
    "shared head": (2, "hf", ["--tp", "2"]),
    "shared head, hidden states": (2, "hf", ["--tp", "2", "--run.workspace_bytes", "2000"]),
    "megatron": (1, "megatron", []),
    "megatron on tp 2": (2, "megatron", ["--tp", "2"]),
    "megatron on dp 2": (2, "megatron", []),
}


def command(ranks: int, backend: str, *arguments: str) -> list[str]:
    script = ["examples/megatron/train.py"] if backend == "megatron" else ["-m", "opd_engine", "train"]
    if ranks == 1:
        return [sys.executable, *script, *arguments]
    port = str(free_port())
    launcher = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, "-m", "torch.distributed.run", *launcher, *script, *arguments]


def run(ranks: int, backend: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    whole = command(ranks, backend, *arguments)
    return subprocess.run(whole, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_loop")
    path = folder / "run.toml"
    path.write_text(TOML.replace("CACHE", str(folder / "cache")))
    assert main(["train", str(path), "--run.output_dir", str(folder / "one process")]) == 0
    return path


@pytest.mark.parametrize("name", [name for name in ACTORS if name != "one process"])
def test_every_actor_takes_the_same_first_step_and_writes_the_same_metrics(toml, name):
    ranks, backend, more = ACTORS[name]
    out = toml.parent / name
    done = run(ranks, backend, str(toml), "--run.output_dir", str(out), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, toml.parent / "one process"))
    assert [(r["step"], r["kind"], sorted(r)) for r in ours] == [(r["step"], r["kind"], sorted(r)) for r in theirs]
    for key, value in theirs[0].items():
        if key not in ("seconds", "kind"):
            assert ours[0][key] == pytest.approx(value, rel=1e-4), key
    first, reference = ours[1], theirs[1]
    assert first["kind"] == "train" and reference["loss"] > 1e-3, "a loss near 0 shows nothing"
    assert first["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    if backend == "hf":  # transformers' embedding takes no gradient at its padding id, Megatron's does
        assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert first["rows"] == reference["rows"] and first["completion_tokens"] == reference["completion_tokens"]
    assert ours[2]["loss"] == pytest.approx(theirs[2]["loss"], rel=1e-3), "the optimizer took the same step"


REFUSALS = [
    (["--opd.tail", "truncate", "--opd.divergence", "reverse_kl"], "opd.tail"),
    (["--opd.k", "33"], "opd.k: wanted at most"),
    (["--opd.policy_coefficient", "1", "--rollout.top_p", "0.5"], "opd.policy_coefficient"),
    (["--run.cp", "2"], "run.cp: wanted 1"),
    (["--rollout.top_logprobs", "4"], "rollout.top_logprobs"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSALS)
def test_every_actor_refuses_with_the_same_words(toml, flags, words):
    said = set()
    for backend in ("hf", "megatron"):
        done = run(1, backend, str(toml), "--run.output_dir", str(toml.parent / "refused"), *flags)
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and words in line, done.stderr
        said.add(line.split(" for the ")[0])
    assert len(said) == 1, said
    assert not (toml.parent / "refused" / "config.toml").exists()
