"""The one table of tolerances, and the comparison that applies it.

Rule: our error against the float64 oracle <= FACTOR x the error of the same formula in eager torch at that dtype
+ a small floor. tail_log_prob has a promise of its own: TAIL_ULP ulp of max(1, |log q_tail|), whatever eager does.
What is not finite must be not finite in the same places. Every comparison leaves its error in WORST.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FACTOR = 2.0
TAIL_ULP = 4.0
TAIL_ORACLE = 2e-15  # what the float64 oracle's own tail may be off by, measured against math.fsum on flat rows

# Relative to max(1, |value|) for scores and losses, to the largest element (and to the norm) for gradients. float64's
# floor is the oracle's own error, for there eager and oracle are the same text. A gradient's floor in a half dtype is
# an eighth of its eps: less than 1% by far, so that a 1% error is seen.
FLOOR = {
    ("score", torch.float64): 1e-13,
    ("score", torch.float32): 5e-7,
    ("loss", torch.float64): 1e-12,
    ("loss", torch.float32): 2e-6,
    ("gradient", torch.float64): 1e-11,
    ("gradient", torch.float32): 2e-6,
    ("gradient", torch.bfloat16): 1e-3,
    ("gradient", torch.float16): 1.3e-4,
}

# Gradients smaller than this are judged as if they were this large (the norm: this large in every row). A saturated row
# (q one-hot) has gradients of 1e-20 that are differences of numbers near 1/t: what remains is their rounding.
SMALLEST_GRADIENT_SCALE = {torch.float64: 0.1, torch.float32: 0.5, torch.bfloat16: 1e-3, torch.float16: 1e-2}
# A loss beyond this is infinite: whether finfo.min / t overflows float32 before or after an exponent is nobody's truth.
INFINITE_LOSS = 1e30

NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# (logits dtype, quantity) -> (our error / allowed error, our error, eager's error, where)
WORST: dict[tuple[str, str], tuple[float, float, float, str]] = {}


class Mismatch(AssertionError):
    """Ours is further from the oracle than the table allows."""


def absorb(rows: list | dict) -> None:
    """Add what another process recorded (a JSON-able copy of WORST) to this one's."""
    for dtype, quantity, *rest in rows:
        key = (dtype, quantity)
        if key not in WORST or rest[0] > WORST[key][0]:
            WORST[key] = tuple(rest)


def recorded() -> list[list]:
    """WORST as JSON-able rows."""
    return [[*key, *value] for key, value in WORST.items()]


def record(dtype: torch.dtype, quantity: str, share: float, ours: float, eager: float, where: str) -> None:
    absorb([[NAMES[dtype], quantity, share, ours, eager, where]])


def same_non_finite(ours: Tensor, oracle: Tensor) -> Tensor:
    """True where both are finite; raises Mismatch where they disagree on inf, -inf or NaN."""
    for kind, name in ((torch.isnan, "NaN"), (torch.isposinf, "+inf"), (torch.isneginf, "-inf")):
        if not torch.equal(kind(ours), kind(oracle)):
            at = (kind(ours) != kind(oracle)).nonzero()[0].tolist()
            raise Mismatch(
                f"{name} in other places than the oracle, first at {at}: {ours[tuple(at)]} and {oracle[tuple(at)]}"
            )
    return oracle.isfinite()


def check(quantity: str, dtype: torch.dtype, ours: Tensor, oracle: Tensor, eager: Tensor, where: str) -> None:
    """Apply the rule to one tensor. quantity: score | tail | loss | gradient; dtype: the logits'."""
    if ours.shape != oracle.shape:
        raise Mismatch(f"{where} {quantity}: shape {tuple(ours.shape)}, oracle's {tuple(oracle.shape)}")
    if ours.numel() == 0:
        return
    ours, oracle, eager = ours.detach(), oracle.detach(), eager.detach()
    if quantity == "loss":
        ours, oracle = (torch.where(loss > INFINITE_LOSS, torch.inf, loss) for loss in (ours, oracle))
    try:
        finite = same_non_finite(ours, oracle.to(ours.dtype))
    except Mismatch as mismatch:
        raise Mismatch(f"{where} {quantity} {NAMES[dtype]}: {mismatch}") from None
    if not finite.any():
        return
    own_floor = FLOOR["score" if quantity == "tail" else quantity, ours.dtype]
    truth, got = oracle.double()[finite], ours.double()[finite]
    plain = torch.where(eager[finite].isfinite(), eager.double()[finite], truth)  # eager's own NaN earns no slack
    measures = {"": _worst_element}
    if quantity == "gradient":
        smallest = SMALLEST_GRADIENT_SCALE[dtype]
        largest = truth.abs().max().clamp_min(smallest)
        length = truth.norm().clamp_min(smallest * ours.shape[:-1].numel() ** 0.5)
        measures = {
            "": lambda values, truth, _: ((values - truth).abs().max() / largest).item(),
            " (norm)": lambda values, truth, _: ((values - truth).norm() / length).item(),
        }
    for suffix, measure in measures.items():
        error, eager_error = measure(got, truth, quantity), measure(plain, truth, quantity)
        limit = FACTOR * eager_error + own_floor
        if quantity == "tail":
            limit = TAIL_ULP * torch.finfo(ours.dtype).eps + (TAIL_ORACLE if ours.dtype == torch.float64 else 0.0)
        if not error <= limit:
            measured = f"error {error:.3g}, eager torch's {eager_error:.3g}, allowed {limit:.3g}"
            raise Mismatch(f"{where} {quantity}{suffix} {NAMES[dtype]}: {measured}")
        record(dtype, quantity + suffix, error / limit, error, eager_error, where)


def _worst_element(values: Tensor, truth: Tensor, quantity: str) -> float:
    scale = truth.abs().clamp_min(1.0)
    if quantity == "tail":
        scale = torch.exp2(scale.log2().floor())  # so that the error is in eps, one ulp each
    return ((values - truth).abs() / scale).max().item()


def table() -> list[str]:
    """The worst comparison of each logits dtype and quantity, as lines to print."""
    lines = [f"{'logits':<10}{'quantity':<18}{'of allowed':>11}{'our error':>12}{'eager':>12}  where"]
    for (dtype, quantity), (share, ours, eager, where) in sorted(WORST.items()):
        lines.append(f"{dtype:<10}{quantity:<18}{share:>10.0%} {ours:>12.2e}{eager:>12.2e}  {where}")
    return lines
