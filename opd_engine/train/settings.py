"""Nested dataclasses as settings: one declaration gives the TOML keys, the command-line flags, the help and the checks.

Each field's metadata may hold: help, unit, min, max, choices, rare (a flag that help leaves out), hidden (no setting of
its own). Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, what was wanted and what came."""


@dataclass(frozen=True)
class Setting:
    """One leaf: its dotted key, the Python type behind it, whether None is legal, its default and its metadata."""

    key: str
    kind: type
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    def describe(self) -> str:
        """Help text: what it is, the unit, the range or choices, the default."""
        parts = [str(self.metadata.get("help", "")).rstrip(".")]
        if "unit" in self.metadata:
            parts.append(f"in {self.metadata['unit']}")
        if "choices" in self.metadata:
            parts.append("one of " + ", ".join(map(str, self.metadata["choices"])))
        elif "min" in self.metadata or "max" in self.metadata:
            parts.append(_range_text(self.metadata))
        default = "none" if self.default is None else ("" if self.default == "" else show(self.default))
        parts.append(f"default {default}" if default else "default empty")
        return "; ".join(part for part in parts if part)


def show(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {show(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    return repr(value)


def _range_text(metadata: Mapping[str, Any]) -> str:
    low, high = metadata.get("min"), metadata.get("max")
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


def _unwrap(annotation: Any) -> tuple[type, bool, tuple[str, ...] | None]:
    """(plain type, whether None is legal, choices of a Literal)."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        plain = [_unwrap(member) for member in members]
        kinds = {kind for kind, _, _ in plain}
        kind = next(
            (kind for kind in (bool, int, float, str) if kinds == {kind}), float if kinds <= {int, float} else str
        )
        return kind, len(members) < len(typing.get_args(annotation)), plain[0][2]
    if origin is dict:
        return dict, False, None
    if origin is typing.Literal:
        return str, False, tuple(typing.get_args(annotation))
    return annotation, False, None


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def described(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field of a section, with its help and what else its metadata holds."""
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def leaves(schema: type, prefix: str = "", defaults: Any = None, *, rare: bool = False) -> list[Setting]:
    """Every setting of a nested dataclass, in order; fields whose metadata says `hidden` are left out.

    rare: all of them are
    """
    hints = typing.get_type_hints(schema)
    found: list[Setting] = []
    for field in dataclasses.fields(schema):
        if field.metadata.get("hidden"):
            continue
        annotation = hints[field.name]
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        own = {"rare": True} if rare or field.metadata.get("rare") else {}
        if dataclasses.is_dataclass(annotation):
            found += leaves(annotation, f"{prefix}{field.name}.", default, rare=bool(own))
            continue
        kind, optional, choices = _unwrap(annotation)
        metadata = (
            dict(field.metadata) | own | ({"choices": choices} if choices and "choices" not in field.metadata else {})
        )
        if kind not in (bool, int, float, str, dict):
            continue
        found.append(Setting(prefix + field.name, kind, optional, default, metadata))
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name nearest to this one; a dotted name may match by its last part alone."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        by_last: dict[str, str] = {}
        for key in known:
            by_last.setdefault(key.rsplit(".", 1)[-1], key)
        close = [by_last[key] for key in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def check_value(setting: Setting, value: Any, where: str) -> Any:
    """The value in the setting's type, checked against its range or choices.

    Raises: ConfigError that names the key, what was wanted and what came.
    """
    named = f"{where}{setting.key}"
    if value is None or (setting.optional and value == "none"):
        if not setting.optional:
            raise ConfigError(f"{named}: wanted {setting.kind.__name__}, got none")
        return None
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not setting.kind:
        raise ConfigError(f"{named}: wanted {setting.kind.__name__}, got {type(value).__name__} {value!r}")
    if "choices" in setting.metadata and value not in setting.metadata["choices"]:
        choices = [str(choice) for choice in setting.metadata["choices"]]
        raise ConfigError(f"{named}: wanted one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")
    low, high = setting.metadata.get("min"), setting.metadata.get("max")
    outside = setting.kind in (int, float) and not (
        (low is None or value >= low) and (high is None or value <= high) and not math.isnan(value)
    )
    if outside:
        wanted = _range_text(setting.metadata) if low is not None or high is not None else "a number"
        raise ConfigError(f"{named}: wanted {wanted}, got {value!r}")
    return value


def parse_text(setting: Setting, text: str) -> Any:
    """A flag's text in the setting's type, unchecked; text that does not read as that type comes back as it is."""
    if setting.optional and text == "none":
        return None
    if setting.kind is bool:
        return {"true": True, "false": False, "yes": True, "no": False}.get(text.lower(), text)
    if setting.kind is dict:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    if setting.kind in (int, float):
        try:
            return setting.kind(text)
        except ValueError:
            return text
    return text


def flatten_tables(
    tables: Mapping[str, Any], stop: Iterable[str] = (), whole: Iterable[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Nested TOML tables as {dotted key: value}; tables under a key in `stop` are left out, in `whole` are values."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        key = prefix + name
        if key in stop:
            continue
        if isinstance(value, Mapping) and key not in whole:
            flat |= flatten_tables(value, stop, whole, f"{key}.")
        else:
            flat[key] = value
    return flat


def assign(target: Any, key: str, value: Any) -> None:
    """Sets a dotted key of a nested dataclass. Mutates: target."""
    *parents, name = key.split(".")
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, name, value)


def look_up(source: Any, key: str) -> Any:
    """The value of a dotted key of a nested dataclass."""
    for name in key.split("."):
        source = getattr(source, name)
    return source


class Once(argparse.Action):
    """Stores what there is one of, a model say: a second one would silently win. Raises: ValueError with both."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in vars(namespace):
            before = getattr(namespace, self.dest)
            raise ValueError(f"{option_string}: given twice, {before!r} and {values!r}; wanted one value")
        setattr(namespace, self.dest, values)


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """One flag a setting, `--section.key VALUE`, grouped by section; a bare boolean means true. Mutates: parser."""
    groups: dict[str, Any] = {}
    for setting in settings:
        section = setting.key.rsplit(".", 1)[0]
        group = groups.setdefault(section, None) or parser.add_argument_group(f"[{section}]")
        groups[section] = group
        optional_value = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
        shown = argparse.SUPPRESS if setting.metadata.get("rare") else setting.describe().replace("%", "%%")
        group.add_argument(
            f"--{setting.key}",
            dest=setting.key,
            metavar={bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}[setting.kind],
            default=argparse.SUPPRESS,
            help=shown,
            **optional_value,
        )


def to_toml(config: Any, settings: Iterable[Setting]) -> str:
    """The settings as TOML text, one table a section; None is left out, since TOML has no word for it."""
    sections: dict[str, list[str]] = {}
    for setting in settings:
        value = look_up(config, setting.key)
        section, name = setting.key.rsplit(".", 1)
        if value is not None:
            sections.setdefault(section, []).append(f"{name} = {show(value)}")
    return "\n\n".join(f"[{section}]\n" + "\n".join(lines) for section, lines in sections.items()) + "\n"
