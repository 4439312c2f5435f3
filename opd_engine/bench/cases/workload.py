"""What a case file makes: inputs, implementations beside each other, their common check, and the least work they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opd_engine.bench import reference
from opd_engine.bench.logits import checked_rows, take_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl
from opd_engine.functional.token_scores import TokenScores

# Floating-point operations of one logit, the least that the ops' formulas need. An exponential: scale and subtract (2),
# round to an integer and subtract (2), a polynomial of degree 6 (12); the exponent's bits are integer work.
EXP_FLOPS = 16
STATS_FLOPS = EXP_FLOPS + 5  # maximum, sum, weighted sum (2), tail
GRADIENT_FLOPS = EXP_FLOPS + 4  # q_v and its share of the tail, each a multiply and an add
DIVERGENCE_FLOPS = 2 * EXP_FLOPS + 6  # both probabilities, log-ratio, term, two sums

Fields = Mapping[str, Tensor]


@dataclasses.dataclass
class Workload:
    """One case at one shape.

    impls: ours first
    error: result of an implementation -> largest difference from float64 in all it returned
    bytes_moved, flops: the least that any implementation moves and computes
    num_buffers: rotating inputs
    absent: baselines that are not measured here, each with the reason
    """

    impls: list[Impl]
    error: Callable[[Any], float]
    bytes_moved: int
    flops: int
    num_buffers: int
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def score_fields(scores: TokenScores | Fields) -> Fields:
    """A TokenScores as flat fields, which is how the checks take every result; no part of what is timed."""
    if not isinstance(scores, TokenScores):
        return scores
    flat = {name: getattr(scores, name).reshape(-1) for name in ("tail_log_prob", "lse", "entropy")}
    k = scores.k
    return {"indices": scores.indices.reshape(-1, k), "log_probs": scores.log_probs.reshape(-1, k), **flat}


def topk_error(shape: Shape, logits: Tensor) -> Callable[[TokenScores | Fields], float]:
    """The check of top-k scores: logits are [n, vocab_size] float64, the checked rows alone."""
    truth = reference.topk_scores(logits, shape.k)
    rows = checked_rows(shape)

    def error(answer: TokenScores | Fields) -> float:
        got = score_fields(answer)
        indices = got["indices"].cpu()[rows]
        ours = reference.scores(logits, indices)
        # Equal logits may stand in any order, but the ids must hold the k largest, in descending order.
        worst = reference.max_abs_err(logits.gather(-1, indices), truth["values"])
        return max(worst, _fields_error(got, ours, rows))

    return error


def support_error(shape: Shape, logits: Tensor) -> Callable[[tuple[Tensor, Tensor]], float]:
    """The check of a top-k alone: (values, ids) of every row; logits as for topk_error."""
    largest = logits.topk(shape.k, dim=-1).values
    rows = checked_rows(shape)

    def error(answer: tuple[Tensor, Tensor]) -> float:
        values, indices = (part.cpu()[rows] for part in answer)
        held = reference.max_abs_err(logits.gather(-1, indices.long()), largest)
        return max(held, reference.max_abs_err(values, largest))

    return error


def gather_error(shape: Shape, logits: Tensor, indices: Tensor) -> Callable[[TokenScores | Fields], float]:
    """The check of gathered scores; indices [T, k] are those asked for."""
    rows = checked_rows(shape)
    truth = reference.scores(logits, indices.cpu()[rows])
    return lambda answer: _fields_error(score_fields(answer), truth, rows)


def _fields_error(got: Fields, truth: Fields, rows: Tensor) -> float:
    names = [name for name in ("log_probs", "tail_log_prob", "lse", "entropy") if name in got]
    return max(reference.max_abs_err(got[name].cpu()[rows], truth[name]) for name in names)


def float64_rows(logits: Tensor, shape: Shape) -> Tensor:
    """The checked rows, on the host, over the real vocabulary."""
    return take_rows(logits, checked_rows(shape)).double().cpu()[:, : shape.vocab_size]


def loss_mask(shape: Shape, device: torch.device) -> Tensor:
    """[T] bool, the density asked for, spread evenly; the first row counts."""
    count = max(1, round(shape.num_tokens * shape.mask_density))
    mask = torch.zeros(shape.num_tokens, dtype=torch.bool)
    mask[torch.arange(count) * shape.num_tokens // count] = True
    return mask.to(device)


def one_thread(impl: Impl) -> Impl:
    """The ablation that shows what the second thread brings."""
    return dataclasses.replace(impl, name="opd_ablation_one_thread", threads=1)


def twin(name: str, workload: Workload) -> Impl:
    """Ours on another shape, interleaved with this one: their ratio is one within rounds."""
    ours, count = workload.impls[0], workload.num_buffers
    its_own = {"error": workload.error, "least_work": (workload.bytes_moved, workload.flops)}
    return dataclasses.replace(ours, name=name, prepare=lambda i: ours.prepare(i % count), **its_own)


class Produced(torch.autograd.Function):
    """Logits that an operation computed, without computing any: an in-place backward refuses leaves and their views."""

    @staticmethod
    def forward(ctx, anchor: Tensor, buffer: Tensor) -> Tensor:
        logits = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        return logits.set_(buffer.untyped_storage(), buffer.storage_offset(), buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None
