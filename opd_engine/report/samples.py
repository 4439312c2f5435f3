"""A run's samples for the page: which steps are shown, and how far from its teacher each token lies, in classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opd_engine.report.charts import number
from opd_engine.report.runs import Run
from opd_engine.report.text import shown_token

BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats a token where a colour ends: the same in every report, so that reports can be compared."""

_STEPS = 3
_TOKENS = 1200  # of a sample; the rest is counted
_PROMPT = 4000  # characters of a prompt


@dataclass(frozen=True)
class Sample:
    """One rollout: tokens as (class, text, what hovering says), how many more there are, and its furthest token."""

    teacher: str
    task: str
    prompt: str
    tokens: list[tuple[int, str, str]]
    left_out: int
    mean: str
    furthest: str
    ended: bool
    label: str | None


def legend() -> list[tuple[int, str]]:
    """(class, what it stands for)"""
    edges = [f"< {BOUNDS[0]:g}", *(f"{low:g} – {high:g}" for low, high in pairwise(BOUNDS)), f"> {BOUNDS[-1]:g}"]
    return list(enumerate(edges))


def shown_samples(run: Run) -> tuple[list[tuple[int, list[Sample]]], int]:
    """The samples of the first, a middle and the last sampled step, and how many sampled steps there are."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for sample in run.samples:
        by_step.setdefault(int(sample["step"]), []).append(sample)
    steps = sorted(by_step)
    if len(steps) > _STEPS:
        steps = [steps[0], steps[len(steps) // 2], steps[-1]]
    return [(step, [_sample(found) for found in by_step[step]]) for step in steps], len(by_step)


def _sample(found: Mapping[str, Any]) -> Sample:
    tokens = [str(token) for token in found.get("tokens", [])]
    values = [float(value) for value in found.get("divergence", [])]
    prompt = str(found.get("prompt", ""))
    if len(prompt) > _PROMPT:
        prompt = f"… {prompt[-_PROMPT:]}"
    shown = [
        (_class(value), shown_token(token), "not measured" if math.isnan(value) else f"{number(value)} nats")
        for token, value in zip(tokens[:_TOKENS], values[:_TOKENS])
    ]
    finite = [(value, place) for place, value in enumerate(values[: len(tokens)]) if math.isfinite(value)]
    largest, place = max(finite, key=lambda pair: pair[0], default=(math.nan, 0))
    furthest = f"{number(largest)} nats at token {place + 1}, “{shown_token(tokens[place])[:40]}”" if finite else "none"
    return Sample(
        teacher=str(found.get("teacher", "")),
        task=str(found.get("task", "")),
        prompt=prompt,
        tokens=shown,
        left_out=max(0, len(tokens) - _TOKENS),
        mean=number(sum(value for value, _ in finite) / len(finite)) if finite else "none",
        furthest=furthest,
        ended=bool(found.get("ended")),
        label=None if found.get("label") is None else str(found["label"]),
    )


def _class(value: float) -> int:
    """0 for the nearest, and where nothing was measured; len(BOUNDS) for the furthest, infinities included."""
    return sum(abs(value) >= bound for bound in BOUNDS)
