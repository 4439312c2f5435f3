"""Prompts from the user's files, and the order in which a run draws them.

A file is JSONL or parquet; each record has `prompt` (text, or chat messages with role and content), optionally `label`
and `teacher`. The cursor is a few integers, so a resumed run draws exactly what an undisturbed one would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_engine.train.settings import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Record:
    """One line of a prompts file."""

    prompt: str | list[dict[str, str]]
    label: str | None
    teacher: str | None
    where: str


@dataclass(frozen=True)
class Prompt:
    """A prompt as the student sees it. `task` groups evaluation; `label` serves evaluation, never the loss."""

    token_ids: tuple[int, ...]
    teacher: str
    task: str
    label: str | None = None


def read_records(path: str | Path) -> list[Record]:
    """Every record of a .jsonl, .json or .parquet prompts file.

    Raises: ValueError for a file that cannot be read or is empty, and for the first bad record, with its line and why.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"prompts: wanted a JSONL or parquet file, got {str(path)!r}, which is no file")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    records = [_record(row, where) for where, row in rows]
    if not records:
        raise ValueError(f"prompts: wanted at least one record, got an empty file {str(path)!r}")
    return records


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
            if not text:
                continue
            try:
                yield where, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}: row {number}", row


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wanted an object with `prompt`, got {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"{where}: wanted a `prompt`, got the keys {', '.join(map(repr, row))}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        for turn in prompt:
            if not (
                isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            ):
                raise ValueError(f"{where}: prompt: wanted messages with `role` and `content` texts, got {turn!r}")
        prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    elif not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt: wanted text or messages, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{where}: prompt: wanted at least one character or message, got an empty one")
    label = row.get("label")
    if label is not None and not isinstance(label, (str, int, float)):
        raise ValueError(f"{where}: label: wanted text or a number, got {type(label).__name__}")
    teacher = row.get("teacher")
    if teacher is not None and not isinstance(teacher, str):
        raise ValueError(f"{where}: teacher: wanted a name, got {type(teacher).__name__}")
    return Record(prompt, None if label is None else str(label), teacher, where)


def encode_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, teachers: Sequence[str], max_tokens: int
) -> list[Prompt]:
    """Records as token ids; a record without a teacher belongs to the only one.

    Raises: ValueError, with the record's line, for an unknown or missing teacher, messages without a chat template, and
        a prompt of no or too many tokens.
    """
    prompts = []
    for record in records:
        teacher = record.teacher if record.teacher is not None else (teachers[0] if len(teachers) == 1 else None)
        if teacher is None:
            raise ValueError(f"{record.where}: teacher: wanted one of {', '.join(teachers)}, got none")
        if teacher not in teachers:
            raise ValueError(
                f"{record.where}: teacher: wanted one of {', '.join(teachers)}, got {teacher!r}"
                f"{nearest(teacher, teachers)}"
            )
        if isinstance(record.prompt, str):
            token_ids = tokenizer.encode(record.prompt)
        elif tokenizer.chat_template is None:
            raise ValueError(f"{record.where}: prompt: got messages, and the student's tokenizer has no chat template")
        else:
            text = tokenizer.apply_chat_template(record.prompt, tokenize=False, add_generation_prompt=True)
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        if not 1 <= len(token_ids) <= max_tokens:
            raise ValueError(
                f"{record.where}: prompt: wanted 1 to data.max_prompt_tokens = {max_tokens} tokens, "
                f"got {len(token_ids)}"
            )
        prompts.append(Prompt(tuple(token_ids), teacher, teacher, record.label))
    return prompts


def hold_out(prompts: Sequence[Prompt], fraction: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, split at random but in the file's order; fraction 0 holds out nothing."""
    count = round(fraction * len(prompts)) if fraction > 0.0 else 0
    count = min(max(count, 1 if fraction > 0.0 else 0), len(prompts) - 1)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [p for i, p in enumerate(prompts) if i not in held], [p for i, p in enumerate(prompts) if i in held]


class PromptCursor:
    """Draws prompts epoch by epoch, each epoch in its own order, from one pool or equally from one pool a teacher."""

    def __init__(self, prompts: Sequence[Prompt], mixing: str, seed: int) -> None:
        """prompts: at least one.  mixing: "proportional" (one pool) or "equal" (one a teacher).  seed: of the order."""
        if not prompts:
            raise ValueError("prompts: wanted at least one to train on, got none")
        names = sorted({prompt.teacher for prompt in prompts}) if mixing == "equal" else [""]
        self._pools = {name: [p for p in prompts if name in ("", p.teacher)] for name in names}
        self._seed = seed
        self._drawn = dict.fromkeys(names, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def _order(self, name: str, epoch: int) -> list[int]:
        if self._orders.get(name, (-1, []))[0] != epoch:
            seed = (self._seed * 1_000_003 + epoch * 97 + sorted(self._pools).index(name)) % (2**63)
            generator = torch.Generator().manual_seed(seed)
            self._orders[name] = (epoch, torch.randperm(len(self._pools[name]), generator=generator).tolist())
        return self._orders[name][1]

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts; shares between pools differ by at most one. Mutates: the cursor."""
        names = sorted(self._pools)
        drawn = []
        for place, name in enumerate(names):
            share = count // len(names) + (place < count % len(names))
            pool = self._pools[name]
            for position in range(self._drawn[name], self._drawn[name] + share):
                epoch, offset = divmod(position, len(pool))
                drawn.append(pool[self._order(name, epoch)[offset]])
            self._drawn[name] += share
        return drawn

    def state(self) -> dict[str, int]:
        """How many prompts each pool has given."""
        return dict(self._drawn)

    def restore(self, state: dict[str, int]) -> None:
        """Continues where state() was taken. Raises: ValueError where the pools are not the same."""
        if set(state) != set(self._drawn):
            raise ValueError(f"data cursor: wanted the pools {sorted(self._drawn)}, got {sorted(state)}")
        self._drawn = {name: int(count) for name, count in state.items()}
