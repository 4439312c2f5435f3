"""Pairs of settings that cannot work together, found before anything is loaded: from the settings alone, then with the
records of the prompts file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_engine.train.settings import ConfigError
from opd_engine.train.teacher_settings import settings_of

if TYPE_CHECKING:
    from opd_engine.train.config import TrainConfig
    from opd_engine.train.prompts import Prompt


def check_pairs(config: TrainConfig) -> None:
    """Raises: ConfigError with the key, what was wanted, what came and why."""
    _check_sampling(config)
    _check_data(config)
    _check_places(config)
    _check_teachers(config)
    opd, rollout = config.opd, config.rollout
    if rollout.top_logprobs and opd.support != "rollout":
        raise ConfigError(
            f'rollout.top_logprobs: wanted 0 for opd.support = "{opd.support}", got '
            f'{rollout.top_logprobs}; only opd.support = "rollout" reads them'
        )
    if opd.measure_overlap and opd.support not in ("student", "union"):
        raise ConfigError(
            'opd.measure_overlap: wanted opd.support = "student" or "union", whose top-k it compares, got '
            f'"{opd.support}"'
        )
    if opd.policy_coefficient > 0 and rollout.samples == 1:
        raise ConfigError(
            f"opd.policy_coefficient = {opd.policy_coefficient}: wanted rollout.samples >= 2, got 1: an advantage is a "
            "sample's reward less the mean of its prompt's, which of one sample is 0"
        )
    if opd.mixture != "route" and config.data.mixing == "equal":
        raise ConfigError(
            f'data.mixing: wanted "proportional" for opd.mixture = "{opd.mixture}", whose prompts have several '
            'teachers, got "equal"'
        )


def _check_data(config: TrainConfig) -> None:
    data = config.data
    if data.task == "prompts":
        return
    for key, value in (
        ("student.path", config.student.path),
        ("data.prompts", data.prompts),
        ("data.eval_prompts", data.eval_prompts),
    ):
        if value:
            raise ConfigError(f'{key}: data.task = "{data.task}" makes its own, got {value!r}')
    if config.opd.policy_coefficient > 0 or config.opd.reward_beta is not None:
        key = "policy_coefficient" if config.opd.policy_coefficient > 0 else "reward_beta"
        raise ConfigError(f'opd.{key}: wanted prompts with labels, data.task = "{data.task}" trains on none')


def _check_sampling(config: TrainConfig) -> None:
    rollout, opd = config.rollout, config.opd
    if not 0.0 < rollout.top_p <= 1.0:
        raise ConfigError(f"rollout.top_p: wanted above 0 and at most 1, got {rollout.top_p}")
    if rollout.temperature == 0.0 and rollout.samples > 1:
        raise ConfigError(
            f"rollout.samples: wanted 1 for rollout.temperature = 0, got {rollout.samples}: greedy samples of one "
            "prompt are all the same"
        )
    cut = [key for key, off in (("top_k", 0), ("top_p", 1.0)) if getattr(rollout, key) != off]
    readers = {
        "opd.loss_type 'advantage' cannot distil": opd.loss_type == "advantage",
        "opd.policy_coefficient: the ratios of an unchanged policy are not 1": opd.policy_coefficient > 0,
        "opd.state_weight_cap: the ratios of an unchanged policy are not 1": opd.state_weight_cap is not None,
    }
    reader = next((name for name, reads in readers.items() if reads), None)
    if reader is not None and (cut or rollout.temperature != opd.temperature):
        raise ConfigError(
            f"{reader} with rollouts of another distribution than the student's: wanted "
            f"rollout.temperature = opd.temperature = {opd.temperature}, rollout.top_k and top_p off, "
            f"got temperature {rollout.temperature}, top_k {rollout.top_k}, top_p {rollout.top_p}"
        )


def _check_places(config: TrainConfig) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.run.device):
        raise ConfigError(f"run.device: wanted cpu, cuda or cuda:N, got {config.run.device!r}")
    out = Path(config.run.output_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.output_dir: wanted a folder, got the file {config.run.output_dir!r}")
    models = {"student.path": config.student.path} | {f"teachers.{n}": p for n, p in teacher_paths(config).items()}
    for key, folder in models.items():
        model = Path(folder).expanduser().resolve()
        if folder and (out.resolve() == model or model in out.resolve().parents):
            raise ConfigError(
                f"run.output_dir: wanted a folder apart from {key} = {folder!r}, got {config.run.output_dir!r}, which "
                "is the model's own or in it"
            )


def teacher_paths(config: TrainConfig) -> Mapping[str, str]:
    """Teacher -> its folder."""
    return {name: settings_of(given).path for name, given in config.teachers.items()}


def _check_teachers(config: TrainConfig) -> None:
    teachers = {name: settings_of(given) for name, given in config.teachers.items()}
    prefixes = {teacher.prompt_prefix for teacher in teachers.values()} - {""}
    if config.opd.mixture != "route" and len(prefixes) > 1:
        raise ConfigError(
            f'teachers: wanted one prompt_prefix at most for opd.mixture = "{config.opd.mixture}", whose prompts '
            f"several teachers score, got {len(prefixes)}"
        )
    for name, teacher in teachers.items():
        if config.opd.mixture == "route" and teacher.weight != 1.0:
            raise ConfigError(
                f'teachers.{name}.weight: wanted 1 for opd.mixture = "route", which gives each prompt one teacher, got '
                f"{teacher.weight}"
            )
        if config.run.backend == "megatron" and teacher.dtype not in ("", config.run.dtype):
            raise ConfigError(
                f'teachers.{name}.dtype: wanted run.dtype = "{config.run.dtype}" for the Megatron actor, got '
                f'"{teacher.dtype}"'
            )


def check_prompts(config: TrainConfig, prompts: Sequence[Prompt]) -> None:
    """What the prompts to train on must have for the settings to do anything.

    Raises: ConfigError with the first line that lacks it.
    """
    opd = config.opd
    if opd.reward_beta is not None or opd.policy_coefficient > 0:
        key = "reward_beta" if opd.reward_beta is not None else "policy_coefficient"
        without = [prompt for prompt in prompts if prompt.label is None]
        if without:
            raise ConfigError(
                f"opd.{key} = {getattr(opd, key)}: wanted a label ({config.data.label_key}) in every prompt, to reward "
                f"answers with; {len(without)} of {len(prompts)} have none, first {config.data.prompts}: line "
                f"{without[0].line}"
            )
    if opd.mixture != "route" and all(len(prompt.teachers) == 1 for prompt in prompts):
        raise ConfigError(
            f'opd.mixture: got "{opd.mixture}", and every prompt of {config.data.prompts} has one teacher, so that '
            'nothing is mixed; wanted records whose `teacher` is a list or "all" (or is left out), or opd.mixture = '
            '"route"'
        )
