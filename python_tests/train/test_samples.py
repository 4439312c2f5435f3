"""The samples a run keeps, and what it shows while it goes: a live view on a terminal, lines elsewhere."""

import io
import json
import math
import sys

import pytest
import torch

from opd_engine.cli import main
from opd_engine.train import progress
from opd_engine.train.journal import read_metrics
from opd_engine.train.progress import LineView, LiveView, Progress
from opd_engine.train.samples import SAMPLES_FILE, choose, forget_after, read_samples

STEPS = 4
FLAGS = [
    *("--data.task", "arithmetic", "--data.mixing", "equal", "--run.threads", "1"),
    *("--arithmetic.teacher.steps", "3", "--arithmetic.student.steps", "2", "--arithmetic.operand_end", "12"),
    *("--arithmetic.model.hidden_size", "32", "--arithmetic.model.feed_forward_size", "64"),
    *("--opd.k", "4", "--rollout.prompts", "6", "--rollout.max_new_tokens", "4", "--optimizer.steps", str(STEPS)),
    *("--eval.every", "2", "--checkpoint.every", "3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose steps are so small that every rollout is kept."""
    folder = tmp_path_factory.mktemp("samples")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        patch.setattr(progress, "LINE_EVERY_S", 0.0)
        cache = ("--arithmetic.cache_dir", str(folder / "cache"))
        assert main(["train", *FLAGS, "--output-dir", str(folder / "run"), *cache]) == 0
        (folder / "lines").write_text(sys.stderr.getvalue())
    return folder


def test_a_sampled_steps_divergences_are_those_of_its_loss(folder):
    samples = read_samples(folder / "run" / SAMPLES_FILE)
    records = {r["step"]: r for r in read_metrics(folder / "run" / "metrics.jsonl") if r["kind"] == "train"}
    assert sorted({sample["step"] for sample in samples}) == [0, 2, STEPS - 1]
    for step in (0, 2, STEPS - 1):
        own = [sample for sample in samples if sample["step"] == step]
        assert len(own) == 6
        for name in ("add", "subtract"):
            values = [value for sample in own if sample["teacher"] == name for value in sample["divergence"]]
            assert sum(values) / len(values) == pytest.approx(records[step + 1][f"divergence/{name}"], rel=1e-6)
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["divergence"]) <= 4
        assert sample["ended"] == (sample["tokens"][-1] == ";")
        assert sample["prompt"][2] == {"add": "+", "subtract": "-"}[sample["task"]] and sample["prompt"][-1] == "="


def test_a_resumed_run_samples_what_it_forgot_again(folder):
    path = folder / "run" / SAMPLES_FILE
    whole = path.read_text()
    path.write_text(whole + '{"step": 9, "cut sho')
    forget_after(folder / "run", 3)
    assert {sample["step"] for sample in read_samples(path)} == {0, 2}
    checkpoint = folder / "run" / "checkpoints" / "step_00000004"
    checkpoint.rename(folder / "newest")  # as if the run had been killed before it
    cache = ("--arithmetic.cache_dir", str(folder / "cache"))
    assert main(["train", *FLAGS, "--run.quiet", "--output-dir", str(folder / "run"), *cache, "--resume"]) == 0
    assert path.read_text() == whole


def test_every_teacher_is_sampled():
    from opd_engine.distillation.rollout import pack_rollouts

    names = [f"t{index % 9}" for index in range(27)]
    batch = pack_rollouts([[1]] * 27, [[2, 3]] * 27, teacher_names=names)
    assert sorted(choose(batch).teacher_names) == sorted(set(names))


def test_without_a_terminal_there_are_lines_with_phases_and_throughput(folder):
    lines = (folder / "lines").read_text().splitlines()
    steps = [line for line in lines if "tokens/s" in line]
    assert [line.split()[1] for line in steps] == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]
    assert all(word in steps[0] for word in ("loss ", "rollout ", "score ", "update ", " left"))
    assert [line.split()[1] for line in lines if "accuracy/add" in line] == ["2/4", "4/4"]
    records = [r for r in read_metrics(folder / "run" / "metrics.jsonl") if r["kind"] == "train"]
    for record in records:
        assert min(record[f"seconds/{name}"] for name in ("rollout", "score", "update")) > 0
        assert record["tokens_per_second"] > 0 and record["peak_memory_bytes"] > 1e7


def record(step: int) -> dict[str, float]:
    return {
        "loss": 0.5 / step,
        "divergence/[red]math": 0.25,
        "divergence/task:math": 0.25,
        "seconds/rollout": 3.0,
        "seconds/update": 1.0,
        "tokens_per_second": 1000.0 * step,
        "peak_memory_bytes": 3.0 * 2**20,
    }


def test_the_live_view_shows_phases_throughput_and_what_is_done_now():
    rich = pytest.importorskip("rich.console", reason="rich comes with the extra [train]")
    view = LiveView(10, 0)
    view.phase("rollout")
    console = rich.Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    console.print(view)
    for step in (1, 2):
        view.advance(record(step))
    view.phase("update")
    view.note({"accuracy/math": 0.75, "seconds": 3.0})
    console.print(view)
    before, after = console.file.getvalue().split("distilling")[1:]
    assert "▸ rollout" in before and "step 0 of 10" in before
    assert "step 2 of 10" in after and "▸ update" in after and "  rollout" in after
    assert "75%" in after and "25%" in after and "1,500 tokens/s  ▅█" in after and "peak memory 3 MiB" in after
    assert "loss 0.25" in after and "[red]math 0.25" in after and "task:" not in after and "accuracy/math 0.75" in after


def test_a_terminal_gets_the_live_view_and_quiet_gets_nothing(monkeypatch):
    pytest.importorskip("rich", reason="rich comes with the extra [train]")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for shown, words in ((True, "step 1 of 1"), (False, "")):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        shows = Progress(shown=shown)
        on_step = shows.supervised("making a teacher", 1)
        on_step(0, 1.0)
        with shows.training(1, 0) as view:
            shows.phase("score")
            view.advance(record(1))
        written = sys.stderr.getvalue()
        assert (words in written and "making a teacher" in written) if shown else written == ""


def test_a_run_without_phases_or_finite_numbers_is_shown_too(capsys):
    view = LineView(2, 1)
    view.advance({"loss": math.nan, "tokens_per_second": math.inf})
    view.note({})
    assert capsys.readouterr().err == "step 2/2  loss nan\n"


def test_markup_and_lone_surrogates_survive_the_file(tmp_path):
    text = '</script>\ud800\x00"\u2028'
    (tmp_path / SAMPLES_FILE).write_text(json.dumps({"step": 1, "tokens": [text]}) + "\n")
    forget_after(tmp_path, 2)
    assert read_samples(tmp_path / SAMPLES_FILE) == [{"step": 1, "tokens": [text]}]
