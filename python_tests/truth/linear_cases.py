"""Hidden states and LM heads for the linear functions, and the two texts they are compared with.

Values are small multiples of 1/8, so that every product is exact in float32: all machines agree on logits and ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import oracles
from tolerances import check

ROWS, HIDDEN, WIDTH, K = 12, 24, 61, 6


@dataclass(frozen=True)
class LinearCase:
    """One head in float64 (`cast` gives it in a dtype); WIDTH columns, of which vocab_size are real."""

    name: str
    why: str
    hidden: Tensor  # [ROWS, HIDDEN]
    weight: Tensor  # [WIDTH, HIDDEN]
    bias: Tensor | None = None
    vocab_size: int = WIDTH
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    # Of the teacher of linear_full_distill_loss: another width of hidden state, maybe another vocabulary.
    teacher: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> LinearCase:
        teacher = {name: _cast(value, dtype) for name, value in self.teacher.items()}
        parts = {name: _cast(getattr(self, name), dtype) for name in ("hidden", "weight", "bias")}
        return replace(self, teacher=teacher, **parts)

    def leaves(self) -> list[Tensor]:
        """hidden, weight and, where there is one, bias."""
        return [part for part in (self.hidden, self.weight, self.bias) if part is not None]

    def require_grad(self) -> LinearCase:
        fresh = {
            name: None if getattr(self, name) is None else getattr(self, name).detach().clone().requires_grad_()
            for name in ("hidden", "weight", "bias")
        }
        return replace(self, **fresh)

    def teacher_logits(self, model_dtype: torch.dtype | None) -> Tensor:
        parts = (self.teacher[name] for name in ("hidden", "weight", "bias", "softcap"))
        return oracles.linear_logits(*parts, model_dtype).detach()

    def logits(self, model_dtype: torch.dtype | None) -> Tensor:
        return oracles.linear_logits(self.hidden, self.weight, self.bias, self.softcap, model_dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def eighths(*shape: int, seed: int, spread: float = 0.75) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return (values * 8).round().clamp(-24, 24) / 8


def _case(name: str, why: str, **changes: Any) -> LinearCase:
    teacher = {"hidden": eighths(ROWS, 10, seed=3, spread=1.0), "weight": eighths(WIDTH, 10, seed=4, spread=1.0)}
    teacher |= {"bias": None, "softcap": None, "vocab_size": changes.get("vocab_size", WIDTH)}
    teacher |= changes.pop("teacher", {})
    head = {"hidden": eighths(ROWS, HIDDEN, seed=1), "weight": eighths(WIDTH, HIDDEN, seed=2)}
    return LinearCase(name, why, **{**head, **changes}, teacher=teacher)


CASES = {
    case.name: case
    for case in [
        _case("plain", "61 columns: no multiple of 8, of 2 or of 3"),
        _case("bias", "the bias joins before the rounding; the teacher has one too", bias=eighths(WIDTH, seed=5)),
        _case(
            "softcap",
            "both heads saturate: a slope of 1e-2 beside one of 1",
            softcap=2.5,
            teacher={"softcap": 3.0, "bias": eighths(WIDTH, seed=6)},
        ),
        _case(
            "padded",
            "8 columns of padding in the student, 5 in the teacher, whose vocabulary is wider",
            vocab_size=53,
            bias=eighths(WIDTH, seed=7),
            teacher={"vocab_size": 56},
        ),
        _case(
            "temperatures",
            "one a row, a student's vocabulary wider than the teacher's",
            temperature=torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 4.0] * 2),
            softcap=8.0,
            bias=eighths(WIDTH, seed=8),
            teacher={"vocab_size": 50},
        ),
    ]
}
for _name in ("weight", "bias"):  # padding that would win if anything read it
    getattr(CASES["padded"], _name)[53:] = 3.0


def three_ways(case: LinearCase, dtype: torch.dtype) -> tuple[LinearCase, LinearCase]:
    """(for the oracle, for eager torch), each with leaves of its own; the model's dtype is dtype."""
    in_dtype = case.cast(dtype)
    return in_dtype.cast(torch.float64).require_grad(), in_dtype.require_grad()


def check_gradients(
    where: str, dtype: torch.dtype, ours: list[Tensor], oracle: list[Tensor], eager: list[Tensor]
) -> None:
    """hidden, weight and bias, each by the table of tolerances."""
    for name, mine, true, plain in zip(("hidden", "weight", "bias"), ours, oracle, eager, strict=False):
        assert mine.dtype == dtype, f"{where}: the gradient of {name} has {mine.dtype}"
        shaped = [grad.reshape(-1, grad.size(-1)) for grad in (mine, true, plain)]
        check("gradient", dtype, *shaped, f"{where} {name}")


def distill_definition(
    case: LinearCase, ids: Tensor, teacher_scores: oracles.Scores, model_dtype: torch.dtype | None, **setting: Any
) -> Callable[[], Tensor]:
    """Token losses of linear_distill_loss; model_dtype None: in eager torch at the case's own dtype."""

    def losses() -> Tensor:
        compute = torch.float64 if model_dtype is not None else oracles.score_dtype(case.hidden.dtype)
        student = oracles.gather_scores(
            case.logits(model_dtype), ids, None, case.vocab_size, case.temperature, dtype=compute
        )
        return oracles.distill(student, teacher_scores, **setting)

    return losses


def full_definition(case: LinearCase, model_dtype: torch.dtype | None, **setting: Any) -> Callable[[], Tensor]:
    """Token losses of linear_full_distill_loss."""

    def losses() -> Tensor:
        compute = torch.float64 if model_dtype is not None else oracles.score_dtype(case.hidden.dtype)
        return oracles.full_distill(
            case.logits(model_dtype),
            case.teacher_logits(model_dtype),
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            teacher_vocab_size=case.teacher["vocab_size"],
            dtype=compute,
            **setting,
        )

    return losses
