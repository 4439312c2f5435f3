"""The records of a prompts file: JSONL, a JSON list or parquet, under the keys that its owner gave them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
Teachers = str | tuple[str, ...] | None
"""A record's: one name ("all" stands for each there is), several, or none."""


@dataclass(frozen=True)
class Record:
    """One line of a prompts file. where: for messages; line: its number in the file."""

    prompt: str | Messages
    label: str | None
    teacher: Teachers
    where: str
    line: int = 0


@dataclass(frozen=True)
class Keys:
    """What the file calls them. messages: read where a record has no prompt."""

    prompt: str = "prompt"
    messages: str = "messages"
    label: str = "label"


@dataclass
class Skipped:
    """Records left out: how many, and the first, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """A sentence a reason."""
        return [
            f"{count} prompt{'s' if count > 1 else ''} {reason} (first: {self.first[reason]})"
            for reason, count in self.counts.items()
        ]


def read_records(path: str | Path, keys: Keys | None = None, skipped: Skipped | None = None) -> list[Record]:
    """Every record of a .jsonl, .json or .parquet prompts file; those with an empty prompt are skipped and counted.

    Raises: ValueError for a file that cannot be read or is empty, and for the first bad record, with its line and why.
    """
    path, keys, skipped = Path(path).expanduser(), keys or Keys(), skipped or Skipped()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"prompts: wanted a JSONL or parquet file, got {str(path)!r}, which is {what}")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    records = []
    for line, where, row in rows:
        record = _record(row, line, where, keys)
        if record is None:
            skipped.add("skipped, empty", where)
        else:
            records.append(record)
    if not records:
        empty = sum(skipped.counts.values())
        got = f"{empty} empty ones in {str(path)!r}" if empty else f"an empty file {str(path)!r}"
        raise ValueError(f"prompts: wanted at least one record, got {got}")
    return records


def _json_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    with open(path, "rb") as file:
        if path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _listed(path)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            try:
                # What some editors put before the first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
            if not text:
                continue
            try:
                yield number, where, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error


def _listed(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield number, f"{path}: record {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, f"{path}: row {number}", row


def _record(row: Any, line: int, where: str, keys: Keys) -> Record | None:
    """None where the prompt is empty."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wanted an object with `{keys.prompt}`, got {type(row).__name__}")
    key = next((key for key in (keys.prompt, keys.messages) if row.get(key) is not None), None)
    if key is None:
        if keys.prompt in row or keys.messages in row:
            return None
        raise ValueError(
            f"{where}: wanted a `{keys.prompt}`, got the keys {', '.join(map(repr, row))}; data.prompt_key and "
            "data.messages_key name other ones"
        )
    prompt = row[key]
    if isinstance(prompt, list):
        prompt = [_turn(turn, where, key) for turn in prompt]
    elif not isinstance(prompt, str):
        raise ValueError(f"{where}: {key}: wanted text or messages, got {type(prompt).__name__}")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return None
    label = row.get(keys.label)
    if label is not None and not isinstance(label, (str, int, float)):
        raise ValueError(f"{where}: {keys.label}: wanted text or a number, got {type(label).__name__}")
    return Record(prompt, None if label is None else str(label), _teachers(row.get("teacher"), where), where, line)


def _turn(turn: Any, where: str, key: str) -> dict[str, Any]:
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
        raise ValueError(f"{where}: {key}: wanted messages with `role` and `content` texts, got {turn!r}")
    return {name: value for name, value in turn.items() if value is not None}


def _teachers(given: Any, where: str) -> Teachers:
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ValueError(f'{where}: teacher: wanted a name, a list of names or "all", got {type(given).__name__}')
    if not given or not all(isinstance(name, str) for name in given) or len(set(given)) != len(given):
        raise ValueError(f"{where}: teacher: wanted a list of different names, got {given!r}")
    return tuple(given)
