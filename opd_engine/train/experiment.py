"""What a run starts from: folders of the student and its teachers, prompts to train on, prompts and texts held out.

The embedded examples make their models here, from nothing, and keep them by a hash of the settings that made them.
Distillation later sees folders and prompts only: no label, and no token that a teacher wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd_engine.integrations.hf.models import load_tokenizer, save_model
from opd_engine.train import arithmetic, text
from opd_engine.train.checkpoint import whole_or_absent
from opd_engine.train.config import ModelShape, Supervision, TrainConfig
from opd_engine.train.pretrain import make_model, train_on_sequences
from opd_engine.train.prompts import Prompt, encode_records, hold_out, read_records

# Part of every cache key: models made by older recipes are not reused.
_RECIPE = 1

DrawBatch = Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]
ShowProgress = Callable[[str, int], Callable[[int, float], None]]


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


def _cache_folder(config: TrainConfig, section: Any, name: str) -> Path:
    """Where the models of a section's settings are kept; beside the run itself where reuse is switched off."""
    if not section.reuse_teachers:
        return Path(config.run.output_dir) / "models"
    settings = dataclasses.asdict(section)
    for key in ("reuse_teachers", "cache_dir", "swap_teachers"):
        settings.pop(key, None)
    key = json.dumps([_RECIPE, name, config.run.seed, torch.__version__, settings], sort_keys=True)
    return Path(section.cache_dir) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _made(folder: Path, make: bool, write: Callable[[Path], None]) -> Path:
    """The folder, written first where it is absent and this process is the one to make it."""
    if make and not folder.exists():
        try:
            with whole_or_absent(folder) as writing:
                write(writing)
        except OSError:
            # Another run with the same settings was first: its folder is whole.
            if not folder.exists():
                raise
    return folder


def _make_trained(
    folder: Path,
    shape: ModelShape,
    supervision: Supervision,
    tokenizer: Any,
    draw: DrawBatch,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    model = make_model(shape, len(tokenizer), tokenizer, seed)
    train_on_sequences(model, draw, supervision, seed=seed, on_step=on_step)
    save_model(model, tokenizer, folder)


def _draw_rows(rows: torch.Tensor, first_target: int, batch_size: int) -> DrawBatch:
    """Batches of equally long sequences; positions from first_target on are to be predicted."""
    loss_mask = torch.zeros(batch_size, rows.shape[1], dtype=torch.bool)
    loss_mask[:, first_target:] = True

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[torch.randint(len(rows), (batch_size,), generator=generator)], loss_mask

    return draw


def _prepare_arithmetic(config: TrainConfig, show_progress: ShowProgress, make: bool) -> Experiment:
    section, seed = config.arithmetic, config.run.seed
    tokenizer = arithmetic.make_tokenizer()
    splits = {
        task: arithmetic.split_problems(task, section.operand_end, section.held_out, seed) for task in arithmetic.TASKS
    }

    def rows_of(problems: Sequence[arithmetic.Problem]) -> torch.Tensor:
        return torch.tensor([tokenizer.encode(p.prompt + p.answer + arithmetic.END) for p in problems])

    def trained(folder: Path, supervision: Supervision, tasks: Sequence[str], model_seed: int) -> Path:
        def write(writing: Path) -> None:
            problems = [problem for task in tasks for problem in splits[task][0]]
            draw = _draw_rows(rows_of(problems), len(problems[0].prompt), supervision.batch_size)
            on_step = show_progress(f"making {folder.name}", supervision.steps)
            _make_trained(writing, section.model, supervision, tokenizer, draw, model_seed, on_step)

        return _made(folder, make, write)

    cache = _cache_folder(config, section, "arithmetic")
    teachers = {
        task: trained(cache / f"teacher_{task}", section.teacher, [task], seed * 16 + place)
        for place, task in enumerate(arithmetic.TASKS)
    }
    student = trained(cache / "student", section.student, arithmetic.TASKS, seed * 16 + 8)
    other = dict(zip(arithmetic.TASKS, reversed(arithmetic.TASKS), strict=True))
    train, evaluation = [], []
    for task, (training, held_out) in splits.items():
        scored_by = other[task] if section.swap_teachers else task
        train += [Prompt(tuple(tokenizer.encode(p.prompt)), scored_by, task) for p in training]
        evaluation += [Prompt(tuple(tokenizer.encode(p.prompt)), task, task, p.answer) for p in held_out]
    return Experiment(student, teachers, train, evaluation)


def _prepare_text(config: TrainConfig, show_progress: ShowProgress, make: bool) -> Experiment:
    section, seed = config.text, config.run.seed
    cache = _cache_folder(config, section, "text")
    documents = text.read_documents()

    def write_tokenizer(folder: Path) -> None:
        text.make_tokenizer(documents, section.vocab_size).save_pretrained(folder)

    from transformers import AutoTokenizer

    vocabulary = _made(cache / "tokenizer", make, write_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(vocabulary, local_files_only=True)
    passages = text.cut_passages(documents, tokenizer, section.passage_tokens)
    training, held_out = text.split_passages(passages, section.held_out, seed)
    rows = torch.tensor(training)

    def trained(name: str, shape: ModelShape, supervision: Supervision, model_seed: int) -> Path:
        def write(writing: Path) -> None:
            draw = _draw_rows(rows, 1, supervision.batch_size)
            on_step = show_progress(f"making {name}", supervision.steps)
            _make_trained(writing, shape, supervision, tokenizer, draw, model_seed, on_step)

        return _made(cache / name, make, write)

    teacher = trained("teacher", section.teacher_model, section.teacher, seed * 16)
    student = trained("student", section.student_model, section.student, seed * 16 + 8)
    beginnings = [Prompt(passage[: section.prompt_tokens], "prose", "prose") for passage in training]
    evaluation = [Prompt(passage[: section.prompt_tokens], "prose", "prose") for passage in held_out]
    return Experiment(student, {"prose": teacher}, beginnings, evaluation, {"prose": held_out})
