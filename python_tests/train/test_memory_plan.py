"""The memory plan from sizes alone, on any machine; python_tests/megatron_actor holds it to what processes take."""

import dataclasses
import subprocess
import sys
import time

import pytest

from opd_engine.integrations.megatron.gpt_shape import PUBLISHED
from opd_engine.scaling.memory_plan import PARTS, Work, plan_memory, plan_table, stage_parameters
from opd_engine.train.config import config_from_toml
from opd_engine.train.memory import shape_of, work_of
from ranks import ROOT

EXAMPLE = ROOT / "examples" / "megatron" / "qwen3_8b.toml"
WORK = Work(seqs=2, length=1024, rows=512, micro_batches=8, share_seqs=16, share_rows=4096, k=64)
GIB = 2**30


def plan(name="qwen3-8b", teachers=(), **options):
    layout = {"tp": 1, "pp": 1, "dp": 1} | {key: options.pop(key) for key in ("tp", "pp", "dp") if key in options}
    return plan_memory(PUBLISHED[name], {t: PUBLISHED[t] for t in teachers}, WORK, **layout, **options)


def test_dry_run_plans_the_example_without_models_or_megatron():
    started = time.monotonic()
    watched = (
        "import re, sys\n"
        "from opd_engine.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'megatron.core' not in sys.modules and 'transformers' not in sys.modules\n"
        # Not getrusage: its peak is inherited from the process that forked.
        "peak_kib = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "assert peak_kib < 600_000, peak_kib\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", watched, "train", str(EXAMPLE), "--dry-run", "8"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("memory plan: 8 ranks, tp 4, pp 1, dp 2, bfloat16, micro-batches of 4 x 1024 tokens")
    for word in ("weights", "gradients", "optimizer", "teachers", "activations", "workspace", "peak", "host: cache"):
        assert word in ran.stdout
    peak = float(next(line for line in ran.stdout.splitlines() if line.startswith("peak")).split()[1])
    assert 30 < peak < 72, "GiB: wanted room on a GPU of 80 GB"
    assert time.monotonic() - started < 60


def test_what_is_not_known_is_said(capsys):
    from opd_engine.cli import main

    for arguments, message in (
        (["--dry-run", "6"], "wanted a divisor of 6 ranks, got 4"),
        (["--dry-run", "8", "--student", "models/unheard-of"], "or a name that begins with one of qwen3-0.6b"),
        (["--dry-run", "8", "--run.backend", "hf", "--tp", "1"], "wanted"),
        (["--dry-run", "16", "--tp", "16"], "wanted query groups that divide by 16 ranks, got 8"),
    ):
        assert main(["train", str(EXAMPLE), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


def test_every_rank_together_holds_the_model_once():
    for name, shape in PUBLISHED.items():
        whole = stage_parameters(shape, tp=1, pp=1, stage=0)[0]
        for tp, pp in ((2, 1), (8, 1), (1, 2), (4, 2)):
            held = sum(tp * stage_parameters(shape, tp=tp, pp=pp, stage=stage)[0] for stage in range(pp))
            doubled = shape.hidden_size * shape.padded_vocab_size(1) if pp > 1 and shape.tied else 0
            norms = (tp - 1) * shape.num_layers * (2 * shape.hidden_size + 256)
            padding = shape.hidden_size * 2 * 128 * tp * 2
            assert 0 <= held - whole - doubled <= norms + padding, name


def test_what_a_choice_saves_is_what_the_plan_says():
    student = PUBLISHED["qwen3-8b"]
    parameters = stage_parameters(student, tp=1, pp=1, stage=0)[0]
    [alone] = plan()
    assert alone.device["weights"] == 2 * parameters and alone.device["gradients"] == 4 * parameters
    assert alone.device["optimizer"] == 12 * parameters
    assert plan(dp=8)[0].device["optimizer"] == pytest.approx(1.5 * parameters)
    kept = {how: plan(tp=8, dp=8, recompute=how)[0].device["activations"] for how in ("none", "selective", "full")}
    assert kept["none"] > kept["selective"] > kept["full"] > 0
    # Teachers: on the host while idle; a resident one of another shape stays on the device.
    teachers = ("qwen3-8b", "qwen3-32b")
    large = 2 * stage_parameters(PUBLISHED["qwen3-32b"], tp=8, pp=1, stage=0)[0]
    small = 2 * stage_parameters(student, tp=8, pp=1, stage=0)[0]
    [switched], [resident] = plan(teachers=teachers, tp=8), plan(teachers=teachers, tp=8, teacher_weights="resident")
    assert switched.host["teachers"] == large + 2 * small  # and a place for the student while it waits
    assert resident.device["teachers"] == large + small
    assert switched.device["teachers"] in (0, large)
    # One micro-batch in flight more on each stage before the last.
    first, last = plan(pp=2)
    assert first.device["activations"] / last.device["activations"] == pytest.approx(2, rel=0.05)
    assert plan(workspace_bytes=2**20)[0].device["workspace"] < alone.device["workspace"]
    # On a CPU there is one memory.
    [cpu] = plan(teachers=teachers, on_cpu=True)
    assert not cpu.host and cpu.device["teachers"] > 0 and cpu.device["cache"] > 0 and cpu.saving > 0
    assert cpu.peak == sum(cpu.device[part] for part in PARTS)


def test_the_table_has_a_column_a_stage():
    lines = plan_table(plan(pp=2, tp=4), "title").splitlines()
    assert lines[0] == "title" and lines[1].split() == ["GiB", "a", "rank", "stage", "0", "stage", "1"]
    assert any(line.startswith("peak") for line in lines)


def test_the_work_is_the_largest_the_settings_allow():
    config = config_from_toml(EXAMPLE)
    work = work_of(config, dp=2)
    assert work == Work(4, 1024, 4 * 256, 8, 32, 32 * 256, 64, 1)
    config.opd = dataclasses.replace(config.opd, score_batch_tokens=2048, mixture="arithmetic")
    assert (work_of(config, dp=2).seqs, work_of(config, dp=2).scorers) == (2, 2)
    assert shape_of("Qwen/Qwen3-8B-math", argument="x") == PUBLISHED["qwen3-8b"]
    assert shape_of("models/Llama-3.1-70B-Instruct", argument="x") == PUBLISHED["llama-3.1-70b"]
