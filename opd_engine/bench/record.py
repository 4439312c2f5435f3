"""BenchRecord: one implementation of one case on one shape. One line of a .jsonl file, which is only ever appended to.

Units are in the names; every sample is kept. A record whose answer was not compared with float64, or is wrong, is
refused: there is no way to write down a speed without its error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Against float64 on the same (quantised) logits of order 10: scores and gradients of our ops stay far below.
ERROR_LIMIT = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
# Baselines are recorded as the field writes them, rounding and cancellation included; beyond this it is another answer.
BASELINE_ERROR_LIMIT = 1.0

# What tells two measurements of the same thing apart from two things; see BenchRecord.key().
_KEY = (
    *("case", "impl", "device", "machine", "dtype", "num_tokens", "vocab_size", "hidden_size", "k", "tp_size"),
    *("pattern", "mask_density", "layout", "threads"),
)


class RecordRefused(ValueError):
    """A measurement that must not become a record, with the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """What was measured, of what, on what, and how far from the floor.

    case, impl: what was computed and by whom; ours is "opd_engine", parts of ours "opd_ablation_*"
    device, machine: "cpu" or the GPU's name; processor and cores
    commit: of opd_engine, ending in "-dirty" where the sources differed from it
    num_tokens, vocab_size, k, tp_size: one rank's work: [num_tokens, vocab_size / tp_size] logits
    hidden_size: of cases that contain the LM head, else None
    samples_us, median_us: wall time of each call on cold logits, in the order measured
    bytes_moved, flops: the least any implementation must move and compute (analytic)
    copy_gbps, matmul_tflops: of this machine, measured in this run; copy counts read + write
    floor_us, floor_fraction: the larger of bytes / copy rate and flops / matmul rate; its share of the median
    peak_extra_bytes: most that was allocated beyond the inputs at one time, as the allocator reports it
    max_abs_err: over all outputs, gradients included, against float64 computed in this run
    extra: further keys, written beside the others
    """

    case: str
    impl: str
    device: str
    machine: str
    commit: str
    date: str
    dtype: str
    num_tokens: int
    vocab_size: int
    hidden_size: int | None
    k: int
    tp_size: int
    samples_us: list[float]
    median_us: float
    bytes_moved: int
    flops: int
    copy_gbps: float
    matmul_tflops: float
    floor_us: float
    floor_fraction: float
    peak_extra_bytes: int
    max_abs_err: float
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        error = self.max_abs_err
        if not isinstance(error, int | float) or isinstance(error, bool) or not math.isfinite(error) or error < 0:
            raise RecordRefused(f"{self.case}/{self.impl}: max_abs_err was not computed, got {error!r}")
        if self.dtype not in ERROR_LIMIT:
            raise RecordRefused(f"dtype: wanted one of {', '.join(ERROR_LIMIT)}, got {self.dtype!r}")
        limit = ERROR_LIMIT[self.dtype] if self.impl.startswith("opd_") else BASELINE_ERROR_LIMIT
        if error > limit:
            raise RecordRefused(
                f"{self.case}/{self.impl} {self.dtype}: the answer is off by {error:.3g}, allowed {limit:.3g}"
            )
        if not self.samples_us or not all(sample > 0 and math.isfinite(sample) for sample in self.samples_us):
            raise RecordRefused(f"{self.case}/{self.impl}: wanted positive samples, got {self.samples_us!r}")
        if not math.isclose(self.median_us, statistics.median(self.samples_us), rel_tol=1e-6):
            raise RecordRefused(f"{self.case}/{self.impl}: median_us {self.median_us} is not that of the samples")
        floor = floor_us(self.bytes_moved, self.flops, self.copy_gbps, self.matmul_tflops)
        if not math.isclose(self.floor_us, floor, rel_tol=1e-3) or not math.isclose(
            self.floor_fraction, self.floor_us / self.median_us, rel_tol=1e-3
        ):
            raise RecordRefused(f"{self.case}/{self.impl}: the floor does not follow from bytes_moved and flops")

    def __getattr__(self, name: str) -> Any:
        """Extra keys read like the others; one that a record lacks is None."""
        if name.startswith("__") or name == "extra":
            raise AttributeError(name)
        return self.extra.get(name)

    def key(self) -> tuple[Any, ...]:
        """Equal for two measurements of the same thing, whatever the commit and date."""
        return tuple(getattr(self, name) for name in _KEY)

    def to_json(self) -> str:
        """One line; what is not finite cannot be written."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        return json.dumps({**fields, **self.extra}, allow_nan=False)

    def append_to(self, path: Path) -> None:
        """Add this line to a file, creating it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(self.to_json() + "\n")


def floor_us(bytes_moved: int, flops: int, copy_gbps: float, matmul_tflops: float) -> float:
    """The time below which no implementation can stay at this machine's measured rates."""
    return max(bytes_moved / (copy_gbps * 1e3), flops / (matmul_tflops * 1e6))


def read_records(paths: Iterable[Path]) -> list[BenchRecord]:
    """All records of some files, in order.

    Raises: ValueError naming the file and line of one that is not a record.
    """
    names = {field.name for field in dataclasses.fields(BenchRecord)} - {"extra"}
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                missing = names - values.keys()
                if missing:
                    raise RecordRefused(f"keys are missing: {', '.join(sorted(missing))}")
                extra = {name: value for name, value in values.items() if name not in names}
                records.append(BenchRecord(**{name: values[name] for name in names}, extra=extra))
            except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path.name}:{number}: wanted a benchmark record: {error}") from None
    return records


def latest(records: Iterable[BenchRecord]) -> dict[tuple[Any, ...], BenchRecord]:
    """The last record of each key: files are append-only, later lines win."""
    return {record.key(): record for record in records}
