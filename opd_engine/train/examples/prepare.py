"""The models and prompts of the embedded examples, kept by a hash of the settings that made them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_engine.integrations.hf.models import load_tokenizer
from opd_engine.train.examples import arithmetic, text
from opd_engine.train.examples.settings import ModelShape, Supervision
from opd_engine.train.examples.workshop import MODELS, DrawBatch, ShowProgress, Workshop
from opd_engine.train.experiment import Experiment
from opd_engine.train.prompts import Prompt

if TYPE_CHECKING:
    from opd_engine.train.config import TrainConfig


def prepare_example(config: TrainConfig, show_progress: ShowProgress, make: bool) -> Experiment:
    """Of data.task."""
    prepared = _prepare_arithmetic if config.data.task == "arithmetic" else _prepare_text
    return prepared(config, show_progress, make)


def _workshop(config: TrainConfig, section: Any, show_progress: ShowProgress, make: bool) -> Workshop:
    """Models are kept in the cache, or beside the run itself where reuse is switched off."""
    cached = section.reuse_teachers
    folder = Path(section.cache_dir) if cached else Path(config.run.output_dir) / MODELS
    return Workshop(folder, config.run.seed, show_progress, make)


def _rows_drawn(rows: torch.Tensor, first_target: int, batch_size: int) -> DrawBatch:
    """Batches of equally long sequences; positions from first_target on are to be predicted."""
    loss_mask = torch.zeros(batch_size, rows.shape[1], dtype=torch.bool)
    loss_mask[:, first_target:] = True

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[torch.randint(len(rows), (batch_size,), generator=generator)], loss_mask

    return draw


def _prepare_arithmetic(config: TrainConfig, show_progress: ShowProgress, make: bool) -> Experiment:
    section, seed = config.arithmetic, config.run.seed
    workshop = _workshop(config, section, show_progress, make)
    tokenizer = arithmetic.make_tokenizer()
    splits = {
        task: arithmetic.split_problems(task, section.operand_end, section.held_out, seed) for task in arithmetic.TASKS
    }

    def trained(name: str, supervision: Supervision, tasks: Sequence[str], place: int) -> Path:
        problems = [problem for task in tasks for problem in splits[task][0]]
        rows = torch.tensor([tokenizer.encode(p.prompt + p.answer + arithmetic.END) for p in problems])
        draw = _rows_drawn(rows, len(problems[0].prompt), supervision.batch_size)
        data = ["arithmetic", section.operand_end, section.held_out, *tasks]
        return workshop.trained(name, data, section.model, supervision, tokenizer, draw, place)

    teachers = {
        task: trained(f"teacher_{task}", section.teacher, [task], place) for place, task in enumerate(arithmetic.TASKS)
    }
    student = trained("student", section.student, arithmetic.TASKS, len(teachers))
    other = dict(zip(arithmetic.TASKS, reversed(arithmetic.TASKS), strict=True))
    train, evaluation = [], []
    for task, (training, held_out) in splits.items():
        scored_by = other[task] if section.swap_teachers else task
        train += [Prompt(tuple(tokenizer.encode(p.prompt)), scored_by, task) for p in training]
        evaluation += [Prompt(tuple(tokenizer.encode(p.prompt)), task, task, p.answer) for p in held_out]
    return Experiment(student, teachers, train, evaluation)


def _prepare_text(config: TrainConfig, show_progress: ShowProgress, make: bool) -> Experiment:
    section = config.text
    workshop = _workshop(config, section, show_progress, make)
    documents = text.read_documents()

    def write_tokenizer(folder: Path) -> None:
        text.make_tokenizer(documents, section.vocab_size).save_pretrained(folder)

    # The text belongs to the keys: it differs between Python versions.
    data = ["text", hashlib.sha256("".join(documents).encode()).hexdigest(), section.vocab_size]
    tokenizer = load_tokenizer(workshop.made("tokenizer", data, write_tokenizer))
    passages = text.cut_passages(documents, tokenizer, section.passage_tokens)
    training, held_out = text.split_passages(passages, section.held_out, config.run.seed)
    rows = torch.tensor(training)
    data += [section.passage_tokens, section.held_out]

    def trained(name: str, shape: ModelShape, supervision: Supervision, place: int) -> Path:
        draw = _rows_drawn(rows, 1, supervision.batch_size)
        return workshop.trained(name, data, shape, supervision, tokenizer, draw, place)

    teacher = trained("teacher", section.teacher_model, section.teacher, 0)
    student = trained("student", section.student_model, section.student, 1)
    beginnings = [Prompt(passage[: section.prompt_tokens], "prose", "prose") for passage in training]
    evaluation = [Prompt(passage[: section.prompt_tokens], "prose", "prose") for passage in held_out]
    return Experiment(student, {"prose": teacher}, beginnings, evaluation, {"prose": held_out})
