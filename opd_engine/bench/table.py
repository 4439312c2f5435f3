"""Records as text: the table that a run ends with, and the pieces of which the documents' tables are made."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from opd_engine.bench.record import BenchRecord
from opd_engine.bench.shapes import shape_text

IMPL_NAMES = {
    "opd_engine": "opd_engine",
    "torch_eager": "torch eager",
    "torch_eager_cheap_tail": "torch eager, tail as log(1 - sum)",
    "torch_compile": "torch.compile",
    "torch_compile_cheap_tail": "torch.compile, tail as log(1 - sum)",
    "torch_copy": "copy of the logits",
    "opd_ablation_one_thread": "ours on one thread",
    "opd_ablation_op": "the op alone",
    "opd_ablation_op_one_thread": "the op alone on one thread",
    "opd_ablation_random_rows": "ours on random rows",
    "opd_ablation_k64": "ours with k = 64",
    "opd_ablation_one_pass": "`distill_loss_`, one read",
    "opd_ablation_through_logits": "ours on logits that exist",
    "opd_ablation_models_alone": "the models' passes alone",
    "opd_ablation_workspace_16MiB": "ours, workspace of 16 MiB",
    "opd_ablation_workspace_64MiB": "ours, workspace of 64 MiB",
    "opd_ablation_workspace_256MiB": "ours, workspace of 256 MiB",
}


def duration(microseconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= scale:
            return f"{digits(microseconds / scale)} {unit}"
    return f"{digits(microseconds)} µs"


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def size(num_bytes: float) -> str:
    """Binary units."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{digits(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def same_shape(record: BenchRecord) -> tuple:
    """What records must share to be compared as implementations of one thing."""
    return tuple(value for value in record.key() if value != record.impl)


def times_ours(record: BenchRecord, ours: BenchRecord) -> float:
    """How many times slower than ours: median of the ratios within rounds, which noise of the machine leaves alone."""
    pairs = list(zip(record.samples_us, ours.samples_us))
    if len(record.samples_us) != len(ours.samples_us):
        return record.median_us / ours.median_us
    return statistics.median(theirs / own for theirs, own in pairs)


def print_table(records: Sequence[BenchRecord]) -> str:
    """One block a case and shape, ours first."""
    groups: dict[tuple, list[BenchRecord]] = {}
    for record in records:
        groups.setdefault(same_shape(record), []).append(record)
    rows = [["", "median", "p20 .. p80", "rate", "of floor", "x ours", "extra memory", "error"]]
    titles: dict[int, str] = {}
    for group in groups.values():
        first = group[0]
        titles[len(rows)] = f"{first.case}  {shape_text(first)}  {first.dtype}"
        ours = next((record for record in group if record.impl == "opd_engine"), None)
        for record in group:
            low, high = spread(record.samples_us)
            rows.append(
                [
                    f"  {record.impl}",
                    duration(record.median_us),
                    f"{duration(low)} .. {duration(high)}",
                    rate(record),
                    f"{record.floor_fraction:.0%}",
                    "" if ours in (None, record) else digits(times_ours(record, ours)),
                    size(record.peak_extra_bytes),
                    f"{record.max_abs_err:.1e}",
                ]
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        if number in titles:
            lines.append(titles[number])
        cells = [
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def rate(record: BenchRecord) -> str:
    """The least work a second: of cases that contain the LM head its products, of others their bytes."""
    if record.hidden_size:
        return f"{record.flops / record.median_us / 1e6:.3g} TFLOP/s"
    return f"{digits(record.bytes_moved / record.median_us / 1e3)} GB/s"


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
