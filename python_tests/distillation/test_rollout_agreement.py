"""What writes is compared with what trains: at the first step by name, and as a metric ever after."""

import pytest
import torch

from opd_engine.cli import main
from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.distillation.rollout_agreement import TOLERANCES, RolloutMismatchError, compare_rollouts
from opd_engine.integrations.hf import engine, generate, make_backend
from opd_engine.teachers import LocalTeacher
from opd_engine.train.journal import read_metrics
from tiny_models import wide_qwen3

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]


def written(model, temperature=1.0, **options):
    out = generate(model, PROMPTS, max_new_tokens=6, end_ids=[13], pad_id=14, temperature=temperature, **options)
    return pack_rollouts(PROMPTS, out.tokens, response_log_probs=out.log_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 0.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_an_unchanged_student_agrees_with_itself_at_any_temperature_and_cut(temperature, cuts):
    model = wide_qwen3()
    batch = written(model, temperature, **cuts)
    found = compare_rollouts(batch, LocalTeacher(make_backend(model)), temperature=temperature)
    assert found.rows == int(batch.loss_mask.sum()) and found.largest < 2e-5
    found.check(torch.float32)


@pytest.mark.parametrize("fault", ["other weights", "another temperature", "rows off by one", "one token"])
def test_what_is_not_the_students_is_refused_by_name(fault):
    model = wide_qwen3()
    batch = written(model)
    student, temperature = LocalTeacher(make_backend(model)), 1.0
    if fault == "other weights":
        student = LocalTeacher(make_backend(wide_qwen3(seed=5)))
    elif fault == "another temperature":
        temperature = 0.7
    elif fault == "rows off by one":
        batch.rollout_log_probs = batch.rollout_log_probs.roll(1).clamp(max=0.0)
    else:
        batch.rollout_log_probs[int(batch.loss_mask.nonzero()[2])] -= 3.0
    with pytest.raises(
        RolloutMismatchError, match=r"rollout_log_probs: wanted the student's own .*sample \d, position \d"
    ):
        compare_rollouts(batch, student, temperature=temperature).check(torch.float32)


FLAGS = [
    *("--data.task", "arithmetic", "--run.threads", "1", "--run.quiet", "true", "--optimizer.steps", "3"),
    *("--arithmetic.teacher.steps", "4", "--arithmetic.student.steps", "3", "--arithmetic.operand_end", "8"),
    *("--arithmetic.model.hidden_size", "32", "--arithmetic.model.feed_forward_size", "64", "--opd.k", "4"),
    *("--rollout.prompts", "8", "--rollout.max_new_tokens", "4", "--eval.every", "3", "--checkpoint.every", "3"),
]


def test_a_run_stops_at_its_first_step_where_the_engine_answers_for_another_model(tmp_path, capsys, monkeypatch):
    flags = ["train", *FLAGS, "--arithmetic.cache_dir", str(tmp_path / "cache"), "--output-dir"]
    assert main([*flags, str(tmp_path / "good"), "--rollout.temperature", "0.7"]) == 0
    gaps = [r["rollout_gap_max"] for r in read_metrics(tmp_path / "good" / "metrics.jsonl") if r["kind"] == "train"]
    assert len(gaps) == 3 and 0 <= max(gaps) < 2e-5

    def shifted(*arguments, **options):
        found = generate(*arguments, **options)
        for row in found.log_probs:
            row[:] = [value - 0.5 for value in row]
        return found

    capsys.readouterr()
    monkeypatch.setattr(engine, "generate", shifted)
    assert main([*flags, str(tmp_path / "bad")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"to {TOLERANCES[torch.float32]:g} nats" in said and "got 0.5 over" in said and "what is trained" in said
