"""The loop over an actor that it has never seen: nothing above its protocols knows a framework."""

import json
import time
from pathlib import Path

import pytest
import torch

from opd_engine.parallel.launch import World
from opd_engine.teachers import LocalTeacher, TeacherPool
from opd_engine.train.assembly import Assembly
from opd_engine.train.config import TrainConfig
from opd_engine.train.examples.arithmetic import make_tokenizer
from opd_engine.train.experiment import Experiment
from opd_engine.train.journal import read_metrics, without_measurements
from opd_engine.train.loop import Trainer
from opd_engine.train.progress import Progress
from opd_engine.train.prompts import Prompt
from opd_engine.train.run_folder import opened
from opd_engine.train.settings import ConfigError
from ranks import TESTS
from toy_actor import Table, TableEngine, ToyActor

ALONE = World(0, 1, 0, torch.device("cpu"))


def config(folder: Path, **optimizer) -> TrainConfig:
    config = TrainConfig()
    config.run.output_dir, config.run.quiet = str(folder), True
    config.opd.k, config.opd.divergence = 16, "forward_kl"
    config.rollout.prompts, config.rollout.max_new_tokens = 16, 8
    config.optimizer.steps, config.optimizer.lr, config.optimizer.warmup_steps = 60, 100.0, 0
    config.eval.every = config.checkpoint.every = 10
    config.student.path = config.data.prompts = "embedded"
    config.teachers = {"t": "embedded"}
    for name, value in optimizer.items():
        setattr(config.optimizer, name, value)
    return config


def train(config: TrainConfig, until: int | None = None, first: int = 1) -> tuple[dict, ToyActor]:
    """The summary and the actor; stopped after `until` steps as a kill would. first: id of every prompt."""
    tokenizer = make_tokenizer()
    student, teacher = Table(len(tokenizer), 0), Table(len(tokenizer), 1)
    prompts = [Prompt((first, second), "t", "t") for second in range(len(tokenizer))]
    parts = Assembly(
        actor=ToyActor(student, config.opd),
        teachers=TeacherPool({"t": LocalTeacher(teacher)}),
        engine=TableEngine(student),
        tokenizer=tokenizer,
        end_ids=(),
    )
    with opened(config, ALONE) as folder:
        experiment = Experiment(Path("embedded"), {}, prompts, prompts[:8])
        folder.take(experiment)
        trainer = Trainer(config, ALONE, folder, experiment, parts, Progress(shown=False), time.monotonic())
        if until is None:
            return trainer.train(), parts.actor
        step = trainer.step

        def killed():
            if trainer.step_number == until:
                raise KeyboardInterrupt
            return step()

        trainer.step = killed
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return {}, parts.actor


def test_an_actor_of_no_framework_learns_and_is_resumed(tmp_path):
    assert len((TESTS / "support" / "toy_actor.py").read_text().splitlines()) <= 100
    summary, actor = train(config(tmp_path / "whole"))
    values = summary["forward_kl"]["t"]
    assert values["after"] < 0.5 * values["before"], values
    train(config(tmp_path / "killed"), until=25)
    _, resumed = train(config(tmp_path / "killed"))
    assert torch.equal(resumed.table.module.weight, actor.table.module.weight)
    ours, theirs = (
        [without_measurements(record) for record in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("killed", "whole")
    )
    assert str(ours) == str(theirs)
    # Control: at a learning rate of 0 nothing is learned.
    still, _ = train(config(tmp_path / "still", lr=0.0))
    assert still["forward_kl"]["t"]["after"] == pytest.approx(values["before"], rel=1e-6)


def test_other_prompts_are_noticed_by_their_content_and_held_out_ones_are_written_down(tmp_path):
    train(config(tmp_path), until=25)
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [line["ids"] for line in held_out] == [[1, second] for second in range(8)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"data.prompts: the train prompts are not those .* --overwrite"):
        train(config(tmp_path), first=2)
    assert {path: path.read_bytes() for path in before} == before
    anew = config(tmp_path, steps=30)
    anew.run.overwrite = True
    train(anew, first=2)
    assert json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0])["ids"] == [2, 0]


def test_a_run_that_ended_can_be_given_more_steps_and_one_that_did_not_cannot(tmp_path):
    summary, _ = train(config(tmp_path / "ended", steps=20))
    assert summary["steps"] == 20
    with pytest.raises(ConfigError, match=r"optimizer\.steps: saved 20, given 10"):
        train(config(tmp_path / "ended", steps=10))
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        train(config(tmp_path / "ended", steps=30, lr=1.0))
    summary, _ = train(config(tmp_path / "ended", steps=30))
    steps = [
        record["step"] for record in read_metrics(tmp_path / "ended" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert summary["steps"] == 30 and steps == list(range(1, 31))
    train(config(tmp_path / "killed", steps=20), until=15)
    with pytest.raises(ConfigError, match=r"optimizer\.steps: saved 20, given 30"):
        train(config(tmp_path / "killed", steps=30))
