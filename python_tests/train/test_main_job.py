"""The main job at reduced size: two teachers distilled into one student on policy, and controls that must not learn.

Every run shares its problems, budget and student; a control differs by what its name says and by nothing else.
"""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from opd_engine.integrations.fsdp import FSDPActor
from opd_engine.integrations.hf.engine import InlineEngine
from opd_engine.integrations.hf.models import load_model, load_tokenizer
from opd_engine.report.figures import make_figures
from opd_engine.report.page import render
from opd_engine.report.runs import read_runs
from opd_engine.train import loop
from opd_engine.train.config import TrainConfig, config_from_toml
from opd_engine.train.examples.arithmetic import TASKS, split_problems
from opd_engine.train.experiment import prepare
from opd_engine.train.journal import read_metrics
from ranks import ROOT


def reduced(folder: Path, name: str) -> TrainConfig:
    """examples/arithmetic.toml with weaker teachers, a student that is further along, and fewer steps."""
    config = config_from_toml(ROOT / "examples" / "arithmetic.toml")
    config.run.output_dir, config.arithmetic.cache_dir = str(folder / name), str(folder / "cache")
    config.run.quiet = True
    config.arithmetic.teacher.steps, config.arithmetic.teacher.lr = 260, 5e-3
    config.arithmetic.student.steps = 250
    config.optimizer.steps, config.optimizer.lr = 110, 3e-3
    config.rollout.prompts = 192
    config.eval.every = config.checkpoint.every = 110
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("main_job")


@pytest.fixture(scope="module")
def batches():
    return []


@pytest.fixture(scope="module")
def written():
    return []


@pytest.fixture(scope="module")
def summary(folder, batches, written):
    """The real job, watched: what the student wrote, and what was scored and trained on."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        score, write = FSDPActor.score_rollouts, InlineEngine.generate

        def watched_score(self, batch, teachers):
            batches.append(batch)
            return score(self, batch, teachers)

        def watched_write(self, prompts, sampling, *, seed):
            completions = write(self, prompts, sampling, seed=seed)
            written.append((prompts, completions, sampling.temperature == 0))
            return completions

        patch.setattr(FSDPActor, "score_rollouts", watched_score)
        patch.setattr(InlineEngine, "generate", watched_write)
        return loop.run(reduced(folder, "real"))


@pytest.mark.slow
def test_the_student_closes_the_gap_on_both_tasks(summary):
    assert set(summary["tasks"]) == set(TASKS)
    for task, values in summary["tasks"].items():
        assert values["accuracy_teacher"] > 0.9, task
        assert values["accuracy_before"] < 0.5, task
        assert values["gap_closed"] > 0.4, task


def test_the_summary_is_what_it_promises_to_be(summary, folder):
    assert json.loads((folder / "real" / "summary.json").read_text()) == summary
    for key in ("accuracy_before", "accuracy_after", "accuracy_teacher"):
        assert isinstance(summary[key], float) and 0.0 <= summary[key] <= 1.0
        mean = sum(values[key] for values in summary["tasks"].values()) / len(TASKS)
        assert summary[key] == pytest.approx(mean, abs=1e-12)
    assert (summary["divergence"], summary["k"], summary["steps"]) == ("forward_kl", 8, 110)
    assert summary["seconds"] > 0


def test_events_plots_metrics_and_checkpoints_are_there(summary, folder):
    run = folder / "real"
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("accuracy", "held-out-divergence", "teachers", "tail", "length"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 111))
    assert {"loss", "student_tail_mass", "teacher_tail_mass", "support_size", "grad_norm", "lr"} <= set(records[1])
    assert load_model(run / "checkpoints" / "step_00000110").config.vocab_size == 32


def test_the_report_of_the_run_shows_every_chart(summary, folder):
    figures, absent = make_figures(read_runs([folder / "real"]))
    assert absent == ["Perplexity of held-out text"] and len(figures) == 19
    root = ElementTree.fromstring(render(read_runs([folder / "real"])))
    assert len(root.findall(".//{*}figure")) == 19 and len(root.findall(".//{*}svg")) == 18
    coloured = [span.get("class") for p in root.findall(".//{*}p[@class='tokens']") for span in p if span.get("title")]
    assert len(coloured) >= 18 and len(set(coloured)) >= 3, "tokens of several divergences"


def greedy_without_cache(model, token_ids: list[int], length: int, end: int) -> list[int]:
    start = len(token_ids)
    for _ in range(length):
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
        token_ids = [*token_ids, int(logits.argmax())]
        if token_ids[-1] == end:
            break
    return token_ids[start:]


@torch.no_grad()
def test_step_0_is_the_untrained_student_measured_separately(summary, folder):
    config = reduced(folder, "real")
    student = prepare(config, lambda *_: None, make=False).student
    model, tokenizer = load_model(student), load_tokenizer(student)
    for task in TASKS:
        held_out = split_problems(task, config.arithmetic.operand_end, config.arithmetic.held_out, config.run.seed)[1]
        some = held_out[:40]
        end = tokenizer.eos_token_id
        answers = [greedy_without_cache(model, tokenizer.encode(p.prompt), 4, end) for p in some]
        right = [a == tokenizer.encode(p.answer + ";") for a, p in zip(answers, some, strict=True)]
        config.eval.max_prompts = len(some)
        assert sum(right) / len(some) == measured_at_step_0(config, folder)[task]


def measured_at_step_0(config: TrainConfig, folder: Path) -> dict[str, float]:
    config.run.output_dir, config.optimizer.steps = str(folder / "step0"), 0
    return {task: values["accuracy_before"] for task, values in loop.run(config)["tasks"].items()}


def test_the_full_step_0_evaluation_agrees_with_a_run_of_no_steps(summary, folder):
    before = measured_at_step_0(reduced(folder, "real"), folder)
    assert before == {task: values["accuracy_before"] for task, values in summary["tasks"].items()}


def test_the_student_sees_no_label_and_no_token_of_a_teacher(summary, folder, batches, written):
    experiment = prepare(reduced(folder, "real"), lambda *_: None, make=False)
    assert all(prompt.label is None for prompt in experiment.train)
    trainable = {prompt.token_ids: prompt.task for prompt in experiment.train}
    assert trainable.keys().isdisjoint({prompt.token_ids for prompt in experiment.evaluation})
    rollouts = [(prompts, c) for prompts, c, greedy in written if not greedy and len(prompts) == 192]
    assert len(rollouts) == len(batches) == 110
    for batch, (prompts, completions) in zip(batches, rollouts, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for place, (prompt, tokens) in enumerate(zip(prompts, completions.tokens, strict=True)):
            sequence = batch.tokens[bounds[place] : bounds[place + 1]].tolist()
            assert sequence == [*prompt, *tokens] and prompt in trainable
            assert batch.teacher_names[place] == trainable[prompt]
            assert int(batch.loss_mask[bounds[place] : bounds[place + 1]].sum()) == len(tokens)


@torch.no_grad()
def test_what_was_trained_on_is_the_students_own_writing(summary, folder, batches):
    """The first step's rollouts, under the untrained student, have the log-probs that came with them."""
    student = load_model(prepare(reduced(folder, "real"), lambda *_: None, make=False).student)
    batch = batches[0]
    bounds = batch.cu_seqlens.tolist()
    for place in range(0, 192, 24):
        sequence = batch.tokens[bounds[place] : bounds[place + 1]]
        log_probs = torch.log_softmax(student(input_ids=sequence[None]).logits[0], -1)[:-1]
        own = log_probs.gather(1, sequence[1:, None])[:, 0]
        rows = slice(bounds[place], bounds[place + 1] - 1)
        mask = batch.loss_mask[rows]
        assert torch.allclose(own[mask], batch.rollout_log_probs[rows][mask], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["untrained teachers", "swapped routing", "coefficient 0"])
def test_a_control_does_not_learn(summary, folder, control):
    config = reduced(folder, control.replace(" ", "_"))
    if control == "untrained teachers":
        config.arithmetic.teacher.steps = 0
    elif control == "swapped routing":
        config.arithmetic.swap_teachers = True
    else:
        config.opd.coefficient = 0.0
        config.optimizer.steps = 10
    tasks = loop.run(config)["tasks"]
    for task, values in tasks.items():
        assert values["accuracy_before"] == summary["tasks"][task]["accuracy_before"]
        if control == "coefficient 0":
            assert values["accuracy_after"] == values["accuracy_before"]
        else:
            assert values["accuracy_after"] <= values["accuracy_before"]
