"""The loop over an actor that it has never seen: nothing above its protocols knows a framework."""

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


def train(config: TrainConfig, until: int | None = None) -> tuple[dict, ToyActor]:
    """The summary and the actor; stopped after `until` steps as a kill would."""
    tokenizer = make_tokenizer()
    student, teacher = Table(len(tokenizer), 0), Table(len(tokenizer), 1)
    prompts = [Prompt((1, first), "t", "t") for first in range(len(tokenizer))]
    parts = Assembly(
        actor=ToyActor(student, config.opd),
        teachers=TeacherPool({"t": LocalTeacher(teacher)}),
        engine=TableEngine(student),
        tokenizer=tokenizer,
        end_ids=(),
    )
    with opened(config, ALONE) as folder:
        experiment = Experiment(Path("embedded"), {}, prompts, prompts[:8])
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
    assert len(Path(__file__).with_name("toy_actor.py").read_text().splitlines()) <= 100
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
