"""`opd-engine bench compare A B`: the same things measured twice, before and after.

Medians of different runs carry the machine's mood; a difference counts where it is larger than the spread of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd_engine.bench.record import BenchRecord, latest, read_records
from opd_engine.bench.shapes import shape_text
from opd_engine.bench.table import digits, duration, spread


def compare(before: Sequence[BenchRecord], after: Sequence[BenchRecord]) -> list[tuple[BenchRecord, BenchRecord, str]]:
    """Pairs of the same key with the verdict: "faster", "slower", or "same" where the spreads overlap."""
    old, new = latest(before), latest(after)
    pairs = []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        a_low, a_high = spread(a.samples_us)
        b_low, b_high = spread(b.samples_us)
        verdict = "slower" if b_low > a_high else "faster" if b_high < a_low else "same"
        pairs.append((a, b, verdict))
    return sorted(pairs, key=lambda pair: str(pair[0].key()))


def main(paths: Sequence[Path], max_slowdown: float | None) -> int:
    """Print the comparison; 1 where ours is slower than max_slowdown allows, or nothing can be compared."""
    before, after = (read_records([path]) for path in paths)
    pairs = compare(before, after)
    if not pairs:
        print(f"nothing was measured in both: {len(before)} and {len(after)} records share no case, shape and machine")
        return 1
    worst = 0.0
    for a, b, verdict in pairs:
        ratio = b.median_us / a.median_us
        if b.impl.startswith("opd_") and verdict == "slower":
            worst = max(worst, ratio)
        print(
            f"{a.case:<22}{a.impl:<26}{a.dtype:<10}{shape_text(a):<36}"
            f"{duration(a.median_us):>9} -> {duration(b.median_us):>9}  x {digits(ratio):<6}{verdict}"
        )
    only = len(latest(before)) + len(latest(after)) - 2 * len(pairs)
    commits = [", ".join(sorted({record.commit for record in records})) for records in (before, after)]
    print(f"{len(pairs)} pairs, {only} without a partner; commits {commits[0]} -> {commits[1]}")
    if max_slowdown is not None and worst > max_slowdown:
        print(f"slower than allowed: x {digits(worst)}, limit x {digits(max_slowdown)}")
        return 1
    return 0
