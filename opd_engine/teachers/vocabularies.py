"""Teachers whose vocabulary is not the student's: token maps that must agree, widths that may differ.

Each model normalises over its own vocabulary. Ids that only the teacher has leave the support and their mass joins the
tail; ids that only the student has get probability 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores

SHOWN = 5
"""Disagreements named in an error."""


def check_token_maps(
    student: Mapping[str, int], teacher: Mapping[str, int], *, student_name: str = "student", teacher_name: str
) -> None:
    """Refuse token -> id maps that disagree: a shared token with two ids, or a shared id with two tokens.

    Tokens that only one side has are fine.

    Raises:
        ValueError: naming the first disagreements by id and how many there are.
    """
    if student is teacher:
        return
    found: list[tuple[int, str]] = []
    for token, own in student.items():
        other = teacher.get(token)
        if other is not None and other != own:
            found.append((own, f"token {token!r} is {own} for {student_name} and {other} for {teacher_name}"))
    tokens_of_teacher = {number: token for token, number in teacher.items()}
    for token, own in student.items():
        other_token = tokens_of_teacher.get(own)
        if other_token is not None and other_token != token and token not in teacher and other_token not in student:
            found.append((own, f"id {own} is {token!r} for {student_name} and {other_token!r} for {teacher_name}"))
    if not found and student and teacher and not set(student) & set(teacher):
        raise ValueError(f"vocabularies: {student_name} and {teacher_name} have no token in common")
    if found:
        found.sort()
        shown = "; ".join(text for _, text in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"vocabularies: the token -> id maps of {student_name} and {teacher_name} disagree on {len(found)} "
            f"entries: {shown}{more}. Log-probs are compared by id, so both must use one tokenizer"
        )


def askable(indices: Tensor, teacher_vocab_size: int) -> Tensor:
    """The ids with those the teacher lacks replaced by -1, which is what it can be asked about."""
    return indices.masked_fill(indices >= teacher_vocab_size, -1)


def rebucket(scores: TokenScores, *, vocab_size: int, asked: Tensor | None = None) -> TokenScores:
    """A teacher's scores in the student's vocabulary.

    Equation: docs/math.md (46)
    scores: over the teacher's vocabulary, [rows, k]
    vocab_size: the student's real vocabulary
    asked: [rows, k], the ids the student wants scored, where the teacher was asked through `askable`; None when the
        ids are the teacher's own

    Ids at or above `vocab_size` become absent and their mass is added to the tail. Ids the teacher could not be asked
    about come back with log-prob -inf. lse, entropy and target_log_prob are the teacher's own and stay.
    """
    with torch.no_grad():
        foreign = scores.indices >= vocab_size
        gone = scores.log_probs.masked_fill(~foreign, -torch.inf)
        tail = torch.logsumexp(torch.cat([gone, scores.tail_log_prob.unsqueeze(-1)], dim=-1).double(), dim=-1)
        return dataclasses.replace(
            scores,
            indices=scores.indices.masked_fill(foreign, -1) if asked is None else asked,
            log_probs=scores.log_probs.masked_fill(foreign, -torch.inf),
            tail_log_prob=tail.to(scores.tail_log_prob.dtype),
        )
