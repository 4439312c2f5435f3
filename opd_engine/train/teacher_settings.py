"""What a run is told of one teacher: [teachers] NAME = "DIR", or a table [teachers.NAME] with more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_engine.train.settings import ConfigError, check_value, described, leaves, nearest, show


@dataclass(frozen=True)
class TeacherSettings:
    """One teacher's."""

    path: str = described("", "folder of a transformers causal LM and its tokenizer, or of an adapter")
    weight: float = described(1.0, "its share where several teachers score one prompt", min=0.0)
    temperature: float | None = described(None, "divides its logits; none takes opd.temperature", min=1e-6)
    prompt_prefix: str = described("", "text that it sees before each prompt, and the student does not")
    dtype: str = described(
        "", "of its parameters; empty takes run.dtype", choices=("", "float32", "float64", "bfloat16", "float16")
    )


Teachers = dict[str, str | TeacherSettings]
"""A folder alone stays a text."""


def settings_of(given: str | TeacherSettings) -> TeacherSettings:
    """All of them, where a folder alone was given."""
    return TeacherSettings(path=given) if isinstance(given, str) else given


def read_teacher(name: str, given: Any, where: str) -> str | TeacherSettings:
    """An entry of a file's [teachers]. Raises: ConfigError for an unknown key, a wrong type or a value out of range."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: teachers.{name}: wanted a path or a table with one, got {given!r}")
    known = {setting.key: setting for setting in leaves(TeacherSettings)}
    values = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key teachers.{name}.{key}{nearest(key, known)}")
        values[key] = check_value(known[key], value, f"{where}: teachers.{name}.")
    if not values.get("path"):
        raise ConfigError(f"{where}: teachers.{name}.path: wanted a folder, got none")
    return TeacherSettings(**values)


def with_path(given: str | TeacherSettings | None, path: str) -> str | TeacherSettings:
    """The same teacher in another folder."""
    return dataclasses.replace(given, path=path) if isinstance(given, TeacherSettings) else path


def teachers_to_toml(teachers: Teachers) -> str:
    """As `read_teacher` reads them."""
    if not teachers:
        return ""
    plain = "".join(f"{show(name)} = {show(given)}\n" for name, given in teachers.items() if isinstance(given, str))
    text = f"\n[teachers]\n{plain}" if plain else ""
    for name, given in teachers.items():
        if isinstance(given, TeacherSettings):
            values = {key: value for key, value in dataclasses.asdict(given).items() if value is not None}
            text += f"\n[teachers.{show(name)}]\n" + "".join(f"{k} = {show(v)}\n" for k, v in values.items())
    return text
