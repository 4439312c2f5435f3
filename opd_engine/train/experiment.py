"""What a run starts from: folders of the student and its teachers, prompts to train on, prompts and texts held out.

The embedded examples (opd_engine/train/examples) make theirs from nothing. Distillation later sees folders and prompts
only: no label, and no token that a teacher wrote.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_engine.integrations.hf.models import load_tokenizer
from opd_engine.train.backends import backend
from opd_engine.train.config import TrainConfig
from opd_engine.train.folders import check_balancing, check_model_folder, check_positions
from opd_engine.train.prompts import Encoding, Prompt, encode_records, hold_out
from opd_engine.train.records import Keys, Skipped, read_records
from opd_engine.train.settings import ConfigError
from opd_engine.train.teacher_settings import settings_of
from opd_engine.train.validation import check_prompts, teacher_paths

ShowProgress = Callable[[str, int], Callable[[int, float], None]]
"""(what is done, of how many) -> told (index of what was done, loss or NaN)."""

# Prompts from which on reading them shows how far it is.
_MANY = 20_000


@dataclass(frozen=True)
class Experiment:
    """student, teachers: model folders.  train: prompts the student writes after.  evaluation: held-out prompts.

    passages: held-out texts by teacher, on whose rows divergence and perplexity are measured; where there are none,
    divergence is measured on what the student writes after the held-out prompts.
    prefixes: teacher -> what it sees before each prompt.  first_id: what begins a text, where a tokenizer says so.
    template: how prompts became tokens, in words.
    """

    student: Path
    teachers: dict[str, Path]
    train: list[Prompt]
    evaluation: list[Prompt]
    passages: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    prefixes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first_id: int | None = None
    template: str = "none, prompts are plain text"

    def seen_by(self, teachers: Sequence[str], token_ids: Sequence[int]) -> tuple[int, ...] | None:
        """The prompt as those of its teachers see it that have a prefix, after what begins a text; None: as it is."""
        prefix = next((self.prefixes[name] for name in teachers if name in self.prefixes), None)
        if prefix is None:
            return None
        begins = int(self.first_id is not None and token_ids[0] == self.first_id)
        return (*token_ids[:begins], *prefix, *token_ids[begins:])


def prepare(config: TrainConfig, show_progress: ShowProgress, *, make: bool = True) -> Experiment:
    """The experiment of a configuration.

    make: False on ranks other than the first, which find the models made.
    Raises: ValueError for folders or prompts that cannot be used.
    """
    if config.data.task != "prompts":
        from opd_engine.train.examples.prepare import prepare_example

        return prepare_example(config, show_progress, make)
    return _prepare_prompts(config, show_progress)


def _prepare_prompts(config: TrainConfig, show_progress: ShowProgress) -> Experiment:
    data, teachers = config.data, {name: Path(path) for name, path in teacher_paths(config).items()}
    can = backend(config.run.backend).CAPABILITIES
    student = Path(config.student.path).expanduser()
    folders = {"student.path": check_model_folder(student, "student.path")}
    check_balancing(folders["student.path"], student, "student.path", can)
    for name, folder in teachers.items():
        folders[f"teachers.{name}"] = check_model_folder(folder, f"teachers.{name}", adapters=can.lora)
    tokenizer = load_tokenizer(student, trust_remote_code=config.student.trust_remote_code, argument="student.path")
    how = Encoding(
        data.max_prompt_tokens,
        overlong=data.overlong,
        system_prompt=data.system_prompt,
        template=data.chat_template_kwargs,
        continue_assistant=data.continue_assistant,
        mixture=config.opd.mixture,
    )
    keys = Keys(data.prompt_key, data.messages_key, data.label_key)

    chats = 0

    def read(path: str) -> list[Prompt]:
        nonlocal chats
        skipped = Skipped()
        records = read_records(path, keys, skipped)
        chats += sum(not isinstance(record.prompt, str) for record in records)
        on_done = lambda done: None  # noqa: E731
        if len(records) >= _MANY:
            shown = show_progress(f"reading {len(records):,} prompts", len(records))
            on_done = lambda done: shown(done - 1, float("nan"))  # noqa: E731
        prompts = encode_records(records, tokenizer, list(teachers), how, skipped, on_done)
        if not prompts:
            raise ConfigError(f"data.prompts: wanted at least one prompt, got none: {'; '.join(skipped.lines())}")
        for line in skipped.lines():
            print(f"{path}: {line}", file=sys.stderr)
        return prompts

    train = read(data.prompts)
    if data.eval_prompts:
        evaluation = read(data.eval_prompts)
    else:
        train, evaluation = hold_out(train, data.held_out, config.run.seed)
    check_prompts(config, train)
    prefixes = {}
    for name, given in config.teachers.items():
        if text := settings_of(given).prompt_prefix:
            prefixes[name] = tuple(tokenizer.encode(text, add_special_tokens=False))
    for argument, described in folders.items():
        longest = max(prompt.num_tokens for prompt in (*train, *evaluation))
        before = len(prefixes.get(argument.removeprefix("teachers."), ()))
        check_positions(described or {}, argument, longest + before, config.rollout.max_new_tokens)
    experiment = Experiment(student, teachers, train, evaluation, prefixes=prefixes, first_id=tokenizer.bos_token_id)
    return dataclasses.replace(experiment, template=_template(config, chats)) if chats else experiment


def _template(config: TrainConfig, chats: int) -> str:
    data = config.data
    more = [f"{name} = {value}" for name, value in data.chat_template_kwargs.items()]
    more += ["a system prompt"] if data.system_prompt else []
    return f"the student's chat template in {chats:,} prompts" + (f", with {', '.join(more)}" if more else "")
