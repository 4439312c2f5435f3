"""What the CPU path is to reach, computed from records: the documents show it, and the integration tests hold half.

Every goal is a ratio of times measured in one run, or a count of allocations. The shapes are those of PLAN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from opd_engine.bench.record import BenchRecord, latest
from opd_engine.bench.shapes import PATTERNS, Plan, Shape, for_case
from opd_engine.bench.table import times_ours

_HEAD = Shape(256, 151_936)
_BF16 = dataclasses.replace(_HEAD, dtype="bfloat16")
_WIDE = dataclasses.replace(_HEAD, k=1_024)
_LOGIT_CASES = ("topk", "gather", "loss_fwd_bwd", "loss_fwd_bwd_inplace")

# Everything that GOALS read; the sets "readme" and "patterns" contain it.
PLAN: Plan = [
    *((case, shape) for case in _LOGIT_CASES for shape in (_HEAD, _BF16)),
    ("topk", _WIDE),
    ("topk", Shape(1, 151_936)),
    ("full_divergence", for_case("full_divergence", _HEAD)),
]
PATTERN_PLAN: Plan = [
    (case, dataclasses.replace(_HEAD, k=k, pattern=pattern, baselines=False))
    for case, k in (("topk", 64), ("topk", 1_024), ("gather", 64))
    for pattern in PATTERNS[1:]
]
_LINEAR = Shape(2_048, 65_536, hidden_size=512)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on what `measure` finds in the records.

    at_least: whether target is a lower bound
    half: what the tests hold: half of a speed-up, twice a cost, no loss from a second thread; counts as they are; of
        the linear loss a tenth more, but where half of the rows count
    measure: value, or None where the records do not hold what it needs
    """

    name: str
    at_least: bool
    target: float
    half: float
    measure: Callable[[Sequence[BenchRecord]], float | None]

    def met(self, value: float, *, half: bool = False) -> bool:
        """Whether a value is on the right side of the target, or of its half."""
        bound = self.half if half else self.target
        return value >= bound if self.at_least else value <= bound


def find(records: Sequence[BenchRecord], case: str, shape: Shape, impl: str = "opd_engine") -> BenchRecord | None:
    """The latest CPU record of an implementation at a shape, with as many threads as the machine had."""
    shape = for_case(case, shape)
    wanted = (case, shape.dtype, shape.num_tokens, shape.vocab_size, shape.k, shape.tp_size, shape.hidden_size)
    wanted = (*wanted, shape.pattern, shape.mask_density, shape.layout, impl, "cpu")
    found = None
    for record in latest(records).values():
        r = record
        has = (r.case, r.dtype, r.num_tokens, r.vocab_size, r.k, r.tp_size, r.hidden_size or 0)
        if (*has, r.pattern, r.mask_density, r.layout, r.impl, r.device) == wanted:
            found = record
    return found


def _ratio(case: str, shape: Shape, impl: str, *, inverse: bool = False) -> Callable[..., float | None]:
    """How many times slower than ours another implementation is in the same rounds; inverse: how much faster."""

    def measure(records: Sequence[BenchRecord]) -> float | None:
        ours, other = find(records, case, shape), find(records, case, shape, impl)
        if ours is None or other is None:
            return None
        return times_ours(ours, other) if inverse else times_ours(other, ours)

    return measure


def _bf16_share(records: Sequence[BenchRecord]) -> float | None:
    """The worst case's time in bfloat16, in its time in float32."""
    pairs = [(find(records, case, _BF16), find(records, case, _HEAD)) for case in _LOGIT_CASES]
    if any(half is None or full is None for half, full in pairs):
        return None
    return max(half.median_us / full.median_us for half, full in pairs)


def pattern_ratio(records: Sequence[BenchRecord], case: str, shape: Shape) -> float | None:
    """Ours on rows of a pattern in its time on random rows of the same rounds."""
    return _ratio(case, shape, "opd_ablation_random_rows", inverse=True)(records)


def _worst_pattern(records: Sequence[BenchRecord]) -> float | None:
    ratios = [pattern_ratio(records, case, shape) for case, shape in PATTERN_PLAN]
    return None if any(ratio is None for ratio in ratios) else max(ratios)


def _allocations(where: str, cases: Sequence[str]) -> Callable[..., float | None]:
    def measure(records: Sequence[BenchRecord]) -> float | None:
        found = [find(records, case, _HEAD) for case in cases]
        if any(record is None for record in found):
            return None
        return float(max(record.extra[where] for record in found))

    return measure


_FORWARD, _WHOLE = "logits_size_allocations_forward", "logits_size_allocations"
GOALS = (
    Goal("top-k, lse, entropy and tail: times faster than eager", True, 12, 6, _ratio("topk", _HEAD, "torch_eager")),
    Goal("the same: times a copy of the logits", False, 2.5, 5, _ratio("topk", _HEAD, "torch_copy", inverse=True)),
    Goal("gather, lse and tail: times faster than eager", True, 8, 4, _ratio("gather", _HEAD, "torch_eager")),
    Goal("loss, forward + backward: times faster", True, 2.5, 1.25, _ratio("loss_fwd_bwd", _HEAD, "torch_eager")),
    Goal("the same in place: times faster", True, 4.5, 2.25, _ratio("loss_fwd_bwd_inplace", _HEAD, "torch_eager")),
    Goal("bfloat16: times the time of float32, the worst of these", False, 1, 2, _bf16_share),
    Goal(
        "top-k with k=1,024: times that with k=64", False, 2, 4, _ratio("topk", _WIDE, "opd_ablation_k64", inverse=True)
    ),
    Goal(
        "top-k of one row: times faster on 2 threads than on 1",
        *(True, 1.6, 1.0),
        _ratio("topk", Shape(1, 151_936), "opd_ablation_one_thread"),
    ),
    Goal("worst row pattern: times random rows", False, 1.5, 3, _worst_pattern),
    Goal(
        "allocations of [T, V] in any forward",
        *(False, 0, 0),
        _allocations(_FORWARD, (*_LOGIT_CASES, "full_divergence")),
    ),
    Goal(
        "allocations of [T, V] in forward + backward",
        False,
        1,
        1,
        _allocations(_WHOLE, ("loss_fwd_bwd", "full_divergence")),
    ),
    Goal("the same in place", False, 0, 0, _allocations(_WHOLE, ("loss_fwd_bwd_inplace",))),
)


def _times_through_logits(mask_density: float) -> Callable[..., float | None]:
    shape = dataclasses.replace(_LINEAR, mask_density=mask_density)
    return _ratio("linear_distill", shape, "opd_ablation_through_logits", inverse=True)


# From hidden states, by the share of rows that count; seconds a call, so the tests measure them by themselves.
LINEAR_GOALS = {
    1.0: Goal(
        "linear loss of 2,048 x 65,536, H = 512: times the path through logits",
        *(False, 1.1, 1.2),
        _times_through_logits(1.0),
    ),
    0.8: Goal("the same where 80% of rows count", False, 1, 1.1, _times_through_logits(0.8)),
    0.5: Goal("the same where 50% of rows count", False, 1, 1, _times_through_logits(0.5)),
}
