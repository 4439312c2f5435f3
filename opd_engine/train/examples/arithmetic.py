"""The embedded task: two-digit sums and differences, made from nothing, held-out pairs and all.

A problem is `ab+cd=` or `ab-cd=` (a >= b in differences); the answer is three digits, least significant first (the
order in which carries run), and `;`. One character is one token, and the vocabulary is padded to 32 ids.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("add", "subtract")
END = ";"
PAD = "_"
_SYMBOLS = {"add": "+", "subtract": "-"}
VOCAB_SIZE = 32


@dataclass(frozen=True)
class Problem:
    """One problem: the task it belongs to, the prompt, and the digits of its answer without the end mark."""

    task: str
    prompt: str
    answer: str


def make_problem(task: str, left: int, right: int) -> Problem:
    """The problem `left` (+ or -) `right`, operands written with two digits, the answer with three, reversed."""
    value = left + right if task == "add" else left - right
    return Problem(task, f"{left:02d}{_SYMBOLS[task]}{right:02d}=", f"{value:03d}"[::-1])


def all_problems(task: str, operand_end: int) -> list[Problem]:
    """Every problem of a task with operands in [0, operand_end); differences are never negative.

    Raises: ValueError for another task, or operand_end outside [2, 100].
    """
    if task not in TASKS:
        raise ValueError(f"task: wanted one of {', '.join(TASKS)}, got {task!r}")
    if not 2 <= operand_end <= 100:
        raise ValueError(f"arithmetic.operand_end: wanted 2 to 100 (operands have two digits), got {operand_end}")
    pairs = [(a, b) for a in range(operand_end) for b in range(operand_end) if task == "add" or a >= b]
    return [make_problem(task, a, b) for a, b in pairs]


def split_problems(task: str, operand_end: int, held_out: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems of a task; a held-out pair is seen by nobody: teachers, student, rollouts.

    held_out: the fraction held out, in (0, 1).  seed: of the split alone, so that every model shares it.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"arithmetic.held_out: wanted a fraction in (0, 1), got {held_out}")
    problems = all_problems(task, operand_end)
    random.Random(f"{seed}/{task}").shuffle(problems)
    count = max(1, round(held_out * len(problems)))
    return problems[count:], problems[:count]


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One character, one token; `;` ends a sequence, `_` pads it, and unused ids fill the vocabulary up to 32."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*"0123456789+-=", END, PAD]
    symbols += [f"<unused{index}>" for index in range(VOCAB_SIZE - len(symbols))]
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=PAD)
