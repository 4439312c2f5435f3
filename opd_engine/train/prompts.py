"""Prompts as the student sees them: token ids, by its own tokenizer and chat template, and what of them is held out."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from opd_engine.train.records import Messages, Record, Skipped
from opd_engine.train.settings import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_A_TIME = 2000


class Prompt:
    """A prompt as the student sees it, its ids 4 bytes each.

    teacher: the name of its one teacher, a tuple of several, or "" for the pool's default
    task: groups evaluation; label: serves evaluation and rewards, never the divergence
    line: in the file it came from, 0 elsewhere
    """

    __slots__ = ("_ids", "label", "line", "task", "teacher")

    def __init__(
        self,
        token_ids: Sequence[int],
        teacher: str | tuple[str, ...],
        task: str,
        label: str | None = None,
        line: int = 0,
    ) -> None:
        self._ids = array("I", token_ids).tobytes()
        self.teacher, self.task, self.label, self.line = teacher, task, label, line

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(array("I", self._ids))

    @property
    def num_tokens(self) -> int:
        return len(self._ids) // array("I").itemsize

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of its teachers; none for the pool's default."""
        return ((self.teacher,) if self.teacher else ()) if isinstance(self.teacher, str) else self.teacher

    def _content(self) -> tuple:
        return self._ids, self.teacher, self.task, self.label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"Prompt({self.token_ids}, {self.teacher!r}, {self.task!r}, {self.label!r})"


@dataclass(frozen=True)
class Encoding:
    """How records become ids.

    max_tokens: of a prompt.  overlong: what happens to longer ones: refuse, skip, or truncate, which keeps their ends.
    system_prompt: put before messages that have none.  template: more arguments of the chat template.
    continue_assistant: messages that end with an assistant's turn are continued; else refused.
    mixture: of the run; "route" takes one teacher a prompt.
    """

    max_tokens: int
    overlong: str = "refuse"
    system_prompt: str = ""
    template: dict[str, Any] = field(default_factory=dict)
    continue_assistant: bool = False
    mixture: str = "route"


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    teachers: Sequence[str],
    how: int | Encoding,
    skipped: Skipped | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Prompt]:
    """Records as token ids; a record without a teacher belongs to the only one, under a mixture to all.

    how: or the largest number of tokens alone.  on_done: told how many records are done.

    Raises: ValueError, with the record's line, for an unknown or missing teacher, messages without a chat template or
        of a shape it does not take, and a prompt of no or too many tokens.
    """
    how = Encoding(how) if isinstance(how, int) else how
    skipped = skipped or Skipped()
    chats = any(not isinstance(record.prompt, str) for record in records)
    _check_template(how, tokenizer, chats)
    prompts = []
    for start in range(0, len(records), _AT_A_TIME):
        part = records[start : start + _AT_A_TIME]
        names = [_teachers_of(record, teachers, how.mixture) for record in part]
        for record, name, ids in zip(part, names, _encoded(part, tokenizer, how), strict=True):
            if not ids:
                raise ValueError(
                    f"{record.where}: prompt: the student's tokenizer makes no token of {str(record.prompt)[:60]!r}; "
                    "wanted the tokenizer of the student's model"
                )
            if len(ids) > how.max_tokens:
                if how.overlong == "refuse":
                    raise ValueError(
                        f"{record.where}: prompt: wanted 1 to data.max_prompt_tokens = {how.max_tokens} tokens, "
                        f'got {len(ids)}; data.overlong = "skip" or "truncate" takes the others'
                    )
                skipped.add(f"{'skipped' if how.overlong == 'skip' else 'truncated'}, too long", record.where)
                if how.overlong == "skip":
                    continue
                ids = ids[-how.max_tokens :]
            task = name if isinstance(name, str) else ("all" if len(name) == len(teachers) else "+".join(name))
            prompts.append(Prompt(ids, name, task, record.label, record.line))
        on_done(start + len(part))
    return prompts


def _teachers_of(record: Record, known: Sequence[str], mixture: str) -> str | tuple[str, ...]:
    given = record.teacher
    if given is None:
        if len(known) > 1 and mixture == "route":
            raise ValueError(f"{record.where}: teacher: wanted one of {', '.join(known)}, got none")
        given = "all"
    names = tuple(known) if given == "all" and "all" not in known else (given,) if isinstance(given, str) else given
    for name in names:
        if name not in known:
            raise ValueError(
                f"{record.where}: teacher: wanted one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    if len(names) > 1 and mixture == "route":
        raise ValueError(
            f'{record.where}: teacher: wanted one for opd.mixture = "route", got {", ".join(names)}; other mixtures '
            "take several"
        )
    return names[0] if len(names) == 1 else tuple(name for name in known if name in names)


def _encoded(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, how: Encoding) -> Iterator[list[int]]:
    """The ids of each record, texts and chats each in one call."""
    texts = [record.prompt for record in records if isinstance(record.prompt, str)]
    chats = [record for record in records if not isinstance(record.prompt, str)]
    plain = iter(_ids(tokenizer, texts, special=True))
    # A template writes its own special tokens.
    rendered = iter(_ids(tokenizer, _rendered(chats, tokenizer, how), special=False))
    for record in records:
        yield next(plain if isinstance(record.prompt, str) else rendered)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=special, **options)["input_ids"]


def _rendered(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, how: Encoding) -> list[str]:
    if records and tokenizer.chat_template is None:
        where = records[0].where
        raise ValueError(f"{where}: prompt: got messages, and the student's tokenizer has no chat template")
    written: list[tuple[int, str]] = []
    for goes_on in (False, True):
        own = [place for place, record in enumerate(records) if (record.prompt[-1]["role"] == "assistant") is goes_on]
        if goes_on and own and not how.continue_assistant:
            raise ValueError(
                f"{records[own[0]].where}: messages: wanted them to end before the assistant's answer, got an "
                "assistant's turn at the end; data.continue_assistant = true has the student continue it"
            )
        written += zip(own, _texts([records[place] for place in own], tokenizer, how, goes_on), strict=True)
    return [text for _, text in sorted(written)]


def _texts(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, how: Encoding, goes_on: bool) -> list[str]:
    ending = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}

    def write(part: Sequence[Record]) -> list[str]:
        turns = [_with_system(record.prompt, how.system_prompt) for record in part]
        return tokenizer.apply_chat_template(turns, tokenize=False, **ending, **how.template)

    if not records:
        return []
    try:
        return write(records)
    except Exception as error:  # a template raises what it likes, for a turn that it does not take
        for record in records:
            try:
                write([record])
            except Exception as own:
                reason = str(own).strip().splitlines()[0] if str(own).strip() else type(own).__name__
                raise ValueError(f"{record.where}: messages: the chat template does not take them: {reason}") from own
        raise ValueError(f"prompts: the chat template does not take them: {error}") from error


def _with_system(messages: Messages, system_prompt: str) -> Messages:
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


_TEMPLATES_OWN = ("messages", "conversation", "tokenize", "add_generation_prompt", "continue_final_message")


def _check_template(how: Encoding, tokenizer: PreTrainedTokenizerBase, chats: bool) -> None:
    """What is asked of a template can be had of this one, and is not asked in vain."""
    for key, value in (("chat_template_kwargs", how.template), ("system_prompt", how.system_prompt)):
        if value and not chats:
            raise ValueError(f"data.{key}: wanted prompts of messages, which a chat template writes, got texts alone")
    if not chats:
        return
    template = tokenizer.chat_template
    for name in how.template:
        if name in _TEMPLATES_OWN:
            raise ValueError(f"data.chat_template_kwargs: {name!r} is not one of the template's own arguments")
        if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"data.chat_template_kwargs: the student's chat template reads no {name!r}, it would change nothing"
            )


def hold_out(prompts: Sequence[Prompt], fraction: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, split at random but in the file's order; fraction 0 holds out nothing.

    Of each teacher (or set of them) and task the fraction is held out, of different prompts: at least one, and at least
    one is left. The same prompt given twice, also for two teachers, is on one side.
    """
    groups: dict[tuple, dict[bytes, None]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.teachers, prompt.task), {})[prompt._ids] = None
    held: set[bytes] = set()
    trained: set[bytes] = set()
    for place, group in enumerate(sorted(groups)):
        distinct = list(groups[group])
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed + place)).tolist()
        count = 0 if fraction <= 0.0 else min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
        count -= sum(ids in held for ids in distinct)
        for index in order:
            if distinct[index] in held or distinct[index] in trained:
                continue
            (held if count > 0 else trained).add(distinct[index])
            count -= 1
    return [p for p in prompts if p._ids not in held], [p for p in prompts if p._ids in held]


def content_of(prompts: Sequence[Prompt]) -> str:
    """A number of prompts, their order, teachers and labels, to tell them from others."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.teachers, prompt.task, prompt.label]).encode())
        digest.update(len(prompt._ids).to_bytes(8, "little") + prompt._ids)
    return digest.hexdigest()[:16]
