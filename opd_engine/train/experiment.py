"""What a run starts from: folders of the student and its teachers, prompts to train on, prompts and texts held out.

The embedded examples make their models here, from nothing, and keep them by a hash of the settings that made them.
Distillation later sees folders and prompts only: no label, and no token that a teacher wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd_engine.integrations.hf.models import load_tokenizer
from opd_engine.train import arithmetic, text
from opd_engine.train.config import ModelShape, Supervision, TrainConfig
from opd_engine.train.prompts import Prompt, encode_records, hold_out, read_records
from opd_engine.train.workshop import MODELS, DrawBatch, ShowProgress, Workshop


@dataclass(frozen=True)
class Experiment:
    """student, teachers: model folders.  train: prompts the student writes after.  evaluation: held-out prompts.

    passages: held-out texts by teacher, on whose rows divergence and perplexity are measured; where there are none,
    divergence is measured on what the student writes after the held-out prompts.
    """

    student: Path
    teachers: dict[str, Path]
    train: list[Prompt]
    evaluation: list[Prompt]
    passages: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)


def prepare(config: TrainConfig, show_progress: ShowProgress, *, make: bool = True) -> Experiment:
    """The experiment of a configuration.

    make: False on ranks other than the first, which find the models made.
    Raises: ValueError for folders or prompts that cannot be used.
    """
    if config.data.task == "arithmetic":
        return _prepare_arithmetic(config, show_progress, make)
    if config.data.task == "text":
        return _prepare_text(config, show_progress, make)
    return _prepare_prompts(config)


def _prepare_prompts(config: TrainConfig) -> Experiment:
    student = Path(config.student.path)
    tokenizer = load_tokenizer(student, trust_remote_code=config.student.trust_remote_code, argument="student.path")
    names, limit = list(config.teachers), config.data.max_prompt_tokens
    train = encode_records(read_records(config.data.prompts), tokenizer, names, limit)
    if config.data.eval_prompts:
        evaluation = encode_records(read_records(config.data.eval_prompts), tokenizer, names, limit)
    else:
        train, evaluation = hold_out(train, config.data.held_out, config.run.seed)
    return Experiment(student, {name: Path(path) for name, path in config.teachers.items()}, train, evaluation)


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
