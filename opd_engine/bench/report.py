"""`opd-engine bench report`: README's table, docs/performance.md's tables and the plots, from the records alone.

Generated text stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; all else in those files is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opd_engine.bench import plots
from opd_engine.bench.goals import GOALS, LINEAR_GOALS, find
from opd_engine.bench.record import BenchRecord, read_records
from opd_engine.bench.shapes import PATTERNS, Plan, Shape, plan, shape_text
from opd_engine.bench.table import IMPL_NAMES, digits, duration, markdown, size, times_ours

_HEAD_CASES = {
    "topk": "top-k, lse, entropy, tail",
    "gather": "log-probs at given ids, lse, entropy, tail",
    "loss_fwd_bwd": "loss, forward + backward",
    "loss_fwd_bwd_inplace": "the same, in place",
    "full_divergence": "full-vocabulary loss, forward + backward",
    "step": "one distillation step from logits",
}
_DTYPES = ("float32", "bfloat16")
Records = Sequence[BenchRecord]


def headline(records: Records) -> str:
    """README's table: 256 x 151,936, ours beside eager torch and torch.compile."""
    header = ["256 x 151,936 logits, k = 64", "opd_engine", "torch eager", "torch.compile", "faster than eager"]
    header += ["of the floor", "extra memory", "eager's"]
    rows = []
    for case, title in _HEAD_CASES.items():
        for dtype in _DTYPES:
            shape = Shape(256, 151_936, dtype=dtype)
            ours = find(records, case, shape)
            if ours is None:
                continue
            eager = find(records, case, shape, "torch_eager")
            compiled = find(records, case, shape, "torch_compile")
            rows.append(
                [
                    f"{title}, {dtype}",
                    duration(ours.median_us),
                    "" if eager is None else duration(eager.median_us),
                    "" if compiled is None else duration(compiled.median_us),
                    "" if eager is None else f"{digits(times_ours(eager, ours))} x",
                    f"{ours.floor_fraction:.0%}",
                    size(ours.peak_extra_bytes),
                    "" if eager is None else size(eager.peak_extra_bytes),
                ]
            )
    return f"{markdown(header, rows)}\n\n{provenance(records)}"


def provenance(records: Records) -> str:
    """Where, with what and when the head shape was measured."""
    one = find(records, "topk", Shape(256, 151_936))
    if one is None:
        return "No record of the head shape yet."
    place = (one.machine, one.num_tokens, one.vocab_size, one.hidden_size)
    here = [r for r in records if (r.machine, r.num_tokens, r.vocab_size, r.hidden_size) == place]
    commits = sorted({record.commit for record in here})
    return (
        f"{one.machine}, {one.threads} threads, {one.cpu_variant} kernels, torch {one.torch}, {one.date}, "
        f"commit {', '.join(commits)}. Cold logits, medians of interleaved samples. The floor follows from the bytes "
        f"and operations no implementation can avoid, at the {one.copy_gbps:.1f} GB/s (read + write) that this machine "
        f"copies and the {one.matmul_tflops:.2f} TFLOP/s it multiplies at, both measured in the same run. Regenerated "
        "by `opd-engine bench report` from benchmarks/results/."
    )


def goals(records: Records) -> str:
    """What is asked and what was measured."""
    rows = []
    for goal in (*GOALS, *LINEAR_GOALS.values()):
        value = goal.measure(records)
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.target:g}"
        shown = "not measured" if value is None else f"{value:.2f}" if value % 1 else f"{value:.0f}"
        rows.append([goal.name, bound, shown, "" if value is None else "yes" if goal.met(value) else "**no**"])
    return markdown(["256 x 151,936, k = 64, float32 unless said", "asked", "measured", "reached"], rows)


def _every_implementation(records: Records, chosen: Plan) -> Iterator[tuple[list[str], BenchRecord]]:
    """([what it is, its median, times ours], its record) of whoever was measured beside ours."""
    for case, shape in chosen:
        ours = find(records, case, shape)
        for impl in dict.fromkeys(record.impl for record in records):
            record = find(records, case, shape, impl)
            if record is None or ours is None:
                continue
            name = f"{case} {shape_text(record)} {record.dtype}: {IMPL_NAMES.get(impl, impl)}"
            times = "1" if impl == "opd_engine" else digits(times_ours(record, ours))
            yield [name, duration(record.median_us), times], record


def _implementations(records: Records, cases: Sequence[str], shapes: Sequence[Shape]) -> str:
    """Every implementation of some cases at some shapes."""
    rows = [
        [
            *named,
            digits(record.bytes_moved / record.median_us / 1e3),
            f"{record.floor_fraction:.0%}",
            f"{record.max_abs_err:.1e}",
        ]
        for named, record in _every_implementation(records, [(case, shape) for case in cases for shape in shapes])
    ]
    return markdown(["", "median", "x ours", "GB/s of the least bytes", "of the floor", "max abs error"], rows)


def topk(records: Records) -> str:
    """The top-k variants."""
    shapes = [Shape(256, 151_936, dtype=dtype, k=k) for k in (64, 1_024) for dtype in _DTYPES]
    shapes += [Shape(1, 151_936), Shape(256, 151_936, tp_size=8), Shape(256, 151_936, layout="sbv")]
    return _implementations(records, ["topk"], shapes)


def gather(records: Records) -> str:
    """The gather variants."""
    shapes = [Shape(256, 151_936, dtype=dtype) for dtype in _DTYPES]
    return _implementations(records, ["gather"], [*shapes, Shape(1, 151_936), Shape(256, 151_936, tp_size=8)])


def losses(records: Records) -> str:
    """The loss in and out of place, and with most rows masked."""
    shapes = [Shape(256, 151_936, dtype=dtype) for dtype in _DTYPES]
    cases = ["loss_fwd_bwd", "loss_fwd_bwd_inplace"]
    return _implementations(records, cases, [*shapes, Shape(256, 151_936, mask_density=0.1)])


def full(records: Records) -> str:
    """The full-vocabulary divergence."""
    return _implementations(records, ["full_divergence"], [Shape(256, 151_936, dtype=dtype) for dtype in _DTYPES])


def others(records: Records) -> str:
    """The merge and the step."""
    merge = _implementations(records, ["tp_merge"], [Shape(4_096, 151_936, tp_size=8)])
    step = _implementations(records, ["step"], [Shape(256, 151_936)])
    return merge + "\n" + "\n".join(step.splitlines()[2:])


def memory(records: Records) -> str:
    """Allocations as the allocator reports them."""
    rows = []
    for case in ("topk", "gather", "loss_fwd_bwd", "loss_fwd_bwd_inplace", "full_divergence"):
        for impl in ("opd_engine", "torch_eager"):
            record = find(records, case, Shape(256, 151_936), impl)
            if record is not None:
                whole, forward = record.logits_size_allocations, record.logits_size_allocations_forward
                resident = "" if record.resident_extra_bytes is None else size(record.resident_extra_bytes)
                name = f"{case}: {IMPL_NAMES[impl]}"
                rows.append([name, size(record.peak_extra_bytes), resident, str(forward), str(whole - forward)])
    header = ["256 x 151,936 float32, 148 MiB of logits", "peak beyond inputs", "growth of the process"]
    return markdown([*header, "[T, V] in forward", "[T, V] in backward"], rows)


def scaling(records: Records) -> str:
    """Nanoseconds a thousand logits, from 1e6 to 1e9 of them."""
    rows = []
    for axis, shapes in plots.scaling_shapes().items():
        for case in plots._SCALING_CASES:
            found = [(shape, find(records, case, shape)) for shape in shapes]
            if all(record is not None for _, record in found):
                grows = "T grows, V = 151,936" if axis == "T" else "V grows, T = 1,000"
                rows.append([f"{case}, {grows}", *(digits(r.median_us * 1e6 / s.elements) for s, r in found)])
    return markdown(["ns a thousand logits, float32", "1e6", "1e7", "1e8", "1e9"], rows)


def patterns(records: Records) -> str:
    """Time on each row pattern in that on random rows."""
    data = plots.data_of_patterns(records)
    rows = []
    for case, k in dict.fromkeys((case, k) for case, k, *_ in data):
        ratios = {pattern: ratio for name, wide, pattern, ratio in data if (name, wide) == (case, k)}
        rows.append([f"{case}, k = {k:,}", *(digits(ratios[p]) if p in ratios else "" for p in PATTERNS[1:])])
    return markdown(["256 x 151,936 float32, random rows = 1", *PATTERNS[1:]], rows)


def linear(records: Records) -> str:
    """From hidden states and the LM head: every implementation, its share of the matrix rate and its memory."""
    rows = [
        [
            *named,
            digits(record.tflops * 1e3),
            f"{record.tflops / record.matmul_tflops:.0%}",
            size(record.peak_extra_bytes),
            f"{record.max_abs_err:.1e}",
        ]
        for named, record in _every_implementation(records, plan("linear", (), ()))
    ]
    header = ["", "median", "x ours", "GFLOP/s of the least products", "of the matrix rate"]
    return markdown([*header, "extra memory", "max abs error"], rows)


def model_step(records: Records) -> str:
    """A step with the models: what the head and the loss take of it, in time and in memory."""
    plans = [shape for _, shape in plan("model", (), ())]
    rows, budget = [], None
    for impl in ("opd_engine", "opd_ablation_through_logits", "opd_ablation_models_alone", "torch_eager"):
        found = [find(records, "step", shape, impl) for shape in plans]
        ours, alone = (find(records, "step", plans[-1], name) for name in ("opd_engine", "opd_ablation_models_alone"))
        if ours is None or alone is None or any(record is None for record in found):
            continue
        rows.append(
            [
                IMPL_NAMES[impl],
                *(duration(record.median_us) for record in found),
                "1" if impl == "opd_engine" else digits(times_ours(found[-1], ours)),
                f"{1 - 1 / times_ours(found[-1], alone):.0%}",
                *(size(record.peak_extra_bytes) for record in found),
                "" if found[-1].longest_sequence is None else f"{found[-1].longest_sequence:,} tokens",
                f"{found[-1].max_abs_err:.1e}",
            ]
        )
        budget = found[-1].longest_sequence_bytes
    tokens = [f"{shape.num_tokens} tokens" for shape in plans]
    header = ["one OPD step, Qwen3-0.6B's shape, float32", *tokens, "x ours", "head and loss"]
    fits = "longest that fits" if budget is None else f"longest that fits in {size(budget)}"
    return markdown([*header, *(f"extra memory, {text}" for text in tokens), fits, "max abs error"], rows)


# file -> marker -> what generates the text between its begin and end
BLOCKS: dict[str, dict[str, Callable[[Records], str]]] = {
    "README.md": {"benchmark-table": headline},
    "docs/performance.md": {
        "bench-headline": headline,
        "bench-goals": goals,
        "bench-topk": topk,
        "bench-gather": gather,
        "bench-losses": losses,
        "bench-full": full,
        "bench-others": others,
        "bench-linear": linear,
        "bench-model-step": model_step,
        "bench-memory": memory,
        "bench-scaling": scaling,
        "bench-patterns": patterns,
    },
}


def regenerate(name: str, text: str, records: Records) -> str:
    """A document with its generated blocks replaced.

    Raises: ValueError where a block's markers are missing.
    """
    for marker, generate in BLOCKS[name].items():
        pattern = re.compile(rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(
                f"{name}: wanted the markers <!-- {marker}:begin --> and <!-- {marker}:end -->, found none"
            )
        block = generate(records) + "\n"
        text = pattern.sub(lambda found, block=block: found.group(1) + block + found.group(2), text)
    return text


def load(root: Path) -> list[BenchRecord]:
    """All committed records."""
    return read_records(sorted((root / "benchmarks" / "results").glob("*.jsonl")))


def out_of_date(root: Path) -> list[str]:
    """Documents and plots that differ from what the records generate."""
    records = load(root)
    stale = []
    for name in BLOCKS:
        text = (root / name).read_text(encoding="utf-8")
        if regenerate(name, text, records) != text:
            stale.append(name)
    for name, (collect, _) in plots.PLOTS.items():
        if plots.read_digest(root / "docs" / "assets" / name) != plots.digest(collect(records)):
            stale.append(f"docs/assets/{name}")
    return stale


def main(root: Path, *, check: bool) -> int:
    """Write what is out of date, or with check only name it; returns the exit status."""
    if not (root / "benchmarks" / "results").is_dir():
        raise ValueError(f"--root: wanted a checkout with benchmarks/results, got {root}")
    stale = out_of_date(root)
    if check:
        print("\n".join(f"out of date: {name}" for name in stale) or "up to date")
        return 1 if stale else 0
    records = load(root)
    for name in BLOCKS:
        path = root / name
        path.write_text(regenerate(name, path.read_text(encoding="utf-8"), records), encoding="utf-8")
    for name, (collect, _) in plots.PLOTS.items():
        if data := collect(records):
            plots.draw(name, data, root / "docs" / "assets" / name)
    print("\n".join(f"written: {name}" for name in stale) or "nothing had changed")
    return 0
