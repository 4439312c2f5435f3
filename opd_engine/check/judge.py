"""What a cell is judged by: how far from the float64 reference is too far, and which planted errors it has to see.

An answer holds measures by name, values and gradients. The error of each is relative to its largest element and to its
norm, whichever is worse, and is compared with that of the same formula in plain torch at the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# error <= FACTOR x the error of the same formula in eager torch + FLOOR, relative to the largest element and to the
# norm. A half dtype's gradient is rounded last: its floor is an eighth of an eps, so that 1% is seen.
FACTOR = 2.0
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1.3e-4}
EXACT = 1e-12  # of ids: any difference is an error
# Gradients that sum products of rounded numbers and are rounded again. Where one element outweighs the rest, half a
# dtype's eps twice is 0.8% of a bfloat16 matrix: 1% is seen in most of them, 2% in all.
PRODUCTS = ("d hidden", "d weight", "d bias")
HALVES = (torch.bfloat16, torch.float16)

Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Of the measure that comes nearest to its limit, or exceeds it most. where: "lse [3]: got 1.2, wanted 1.3"."""

    error: float
    allowed: float
    where: str

    @property
    def holds(self) -> bool:
        """False for a NaN too."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed; a NaN is the worst of all."""
        share = self.error / self.allowed
        return share if share == share else math.inf


class Limit:
    """What one measure has to be, and how far from it is too far."""

    def __init__(self, name: str, true: Tensor, eager: Tensor, floor: float) -> None:
        """floor: what is allowed even where eager has no error; of ids, nothing is."""
        self.name, self.true = name, true.double()
        finite = self.true.isfinite()
        self._odd = None if bool(finite.all()) else ~finite
        floor = floor if true.is_floating_point() else EXACT
        sizes = _norms(self.true if self._odd is None else self.true.masked_fill(self._odd, 0.0))
        self._sizes = [max(size, 1e-3) for size in sizes]
        eager_off = [0.0, 0.0] if eager is true else _norms(self._off(eager)[0])
        self._allowed = [FACTOR * error / size + floor for error, size in zip(eager_off, self._sizes, strict=True)]

    def _off(self, got: Tensor) -> tuple[Tensor, bool]:
        """(got - true where that is finite, whether the rest is the same)."""
        off = got.double() - self.true
        if self._odd is None:
            return off, True
        same = (got == self.true) | (got.isnan() & self.true.isnan())
        return off.masked_fill(self._odd, 0.0), bool(same[self._odd].all())

    def judge(self, got: Tensor | None, *, with_place: bool) -> Verdict:
        """The worse of the two errors."""
        if got is None or got.shape != self.true.shape:
            found = "nothing" if got is None else f"shape {list(got.shape)}"
            return Verdict(math.inf, self._allowed[0], f"{self.name}: got {found}, wanted {list(self.true.shape)}")
        if not got.numel():
            return Verdict(0.0, self._allowed[0], self.name)
        off, same = self._off(got)
        errors = [norm / size for norm, size in zip(_norms(off), self._sizes, strict=True)] if same else [math.inf] * 2
        found = [Verdict(*numbers, self.name) for numbers in zip(errors, self._allowed, strict=True)]
        worst = max(found, key=lambda verdict: verdict.share)
        if not with_place:
            return worst
        if not same:
            off = off.masked_fill(self._odd & (got != self.true), math.inf)
        at = int(off.abs().nan_to_num(nan=math.inf).argmax())
        place = [int(index) for index in torch.unravel_index(torch.tensor(at), off.shape)]
        numbers = f"got {got.flatten()[at].item():.6g}, wanted {self.true.flatten()[at].item():.6g}"
        return Verdict(worst.error, worst.allowed, f"{self.name} {place}: {numbers}")


def _norms(values: Tensor) -> list[float]:
    """The largest element and the norm; NaN where there is one."""
    if not values.numel():
        return [0.0, 0.0]
    return [torch.linalg.vector_norm(values, order).item() for order in (torch.inf, 2)]


def judge(got: Answer, limits: dict[str, Limit]) -> Verdict:
    """The worst of the measures that have a limit, each of which has to be there."""
    verdicts = [limit.judge(got.get(name), with_place=False) for name, limit in limits.items()]
    worst = max(verdicts, key=lambda verdict: verdict.share)
    name = worst.where.split(":")[0]
    return worst if worst.holds else limits[name].judge(got.get(name), with_place=True)


def plants(
    answer: Answer, limits: dict[str, Limit], dtype: torch.dtype, shards: list[int]
) -> Iterator[tuple[str, str, Tensor]]:
    """(what was planted, in which measure, the measure with it), one at a time.

    dtype: of the leaves
    shards: the columns at which the shards begin, and the end of the last
    """
    for name in limits:
        values, is_gradient = answer[name], name.startswith("d ")
        if values.is_floating_point():
            percent = 2 if name.startswith(PRODUCTS) and dtype in HALVES else 1
            kind = "gradient" if is_gradient else "value"
            yield f"{percent}% {kind} error", name, values.double() * (1 + percent / 100)
        if values.dim():
            yield "off-by-one row", name, values.roll(1, 0)
        if not is_gradient:
            continue
        yield "loss / tp", name, values.double() / max(len(shards) - 1, 2)
        if name.startswith("d logits"):
            spoiled = values.double().clone()
            spoiled[:, -1] += 0.05 * spoiled.abs().max()
            yield "gradient in a padding column", name, spoiled
            if len(shards) > 2 and 0 < shards[1] < values.shape[1]:
                spoiled = values.clone()
                spoiled[:, shards[1] :] = 0
                yield "loss on rank 0 only", name, spoiled
