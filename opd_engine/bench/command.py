"""`opd-engine bench`: parse the command line, show progress, print the table last."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opd_engine.bench.shapes import CASES, DTYPE_ALIASES, DTYPES, SETS, plan

_EPILOG = f"""cases:
  topk                  top-k + lse + entropy + tail of every row
  gather                log-probs at given ids + lse + entropy + tail
  loss_fwd_bwd          reverse_kl on k + 1 buckets, forward and backward on logits
  loss_fwd_bwd_inplace  the same, the gradient over the logits
  full_divergence       reverse_kl over the whole vocabulary, forward and backward
  tp_merge              the merge of tp_size top-k messages
  step                  one distillation step from logits, through opd_engine.distillation; the sets model and model-gpu
                        run it from hidden states, with the models' own passes around it
  linear_topk           topk from hidden states and the LM head
  linear_gather         gather from hidden states and the LM head, forward and backward
  linear_distill        loss_fwd_bwd from hidden states and the LM head
  linear_full           full_divergence from both models' hidden states and LM heads

sets of shapes:
{chr(10).join(f"  {name:<12}{text}" for name, (text, _) in SETS.items())}

examples:
  opd-engine bench                                   # every case, small
  opd-engine bench topk gather --dtype bf16 --shapes readme
  opd-engine bench --shapes sweep --out sweep.jsonl  # run again to resume
  opd-engine bench compare before.jsonl after.jsonl
  opd-engine bench report                            # regenerate the documents' tables and plots from the records
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 1 something of ours failed, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["compare"]:
            return _compare(argv[1:])
        if argv[:1] == ["report"]:
            return _report(argv[1:])
        return _bench(argv)
    except (ValueError, OSError) as error:
        print(f"opd-engine bench: error: {error}", file=sys.stderr)
        return 2


def _bench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="opd-engine bench",
        description="Measure the ops against torch and, where they import, other libraries: interleaved, on cold "
        "logits, every answer checked against float64.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all of the set)")
    parser.add_argument("--shapes", default="quick", metavar="SET", help=f"{', '.join(SETS)} (default: quick)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help=f"{', '.join(DTYPES)}; repeat for several")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="timed rounds of a shape (default: 3)")
    parser.add_argument("--min-rounds", type=int, default=5, metavar="N", help="at least so many rounds (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append records here; what it holds is not repeated")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines, nothing else, to stdout")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-seconds", type=float, default=90.0, metavar="S", help="all compiling together (default: 90)"
    )
    parser.add_argument(
        "--copy-mib", type=int, default=1024, metavar="N", help="size of the copy that gives the rate (default: 1024)"
    )
    options = parser.parse_args(argv)
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        raise ValueError(f"CASE: wanted some of {', '.join(CASES)}, got {', '.join(unknown)}")
    dtypes = tuple(DTYPE_ALIASES.get(name, name) for name in options.dtype or ())
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtype: wanted one of {', '.join([*DTYPES, *DTYPE_ALIASES])}, got {name}")
    for flag, value in (("--threads", options.threads), ("--copy-mib", options.copy_mib)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: wanted at least 1, got {value}")
    chosen = plan(options.shapes, tuple(options.cases), dtypes)
    if not chosen:
        raise ValueError(f"the set {options.shapes!r} has no shape for {', '.join(options.cases)}")

    import torch

    from opd_engine.bench.runner import Settings, run_plan
    from opd_engine.bench.table import print_table

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: wanted a CUDA device, got none that torch can see")
    settings = Settings(
        device=torch.device(options.device),
        threads=options.threads or torch.get_num_threads(),
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        compile_baselines=not options.no_compile,
        compile_seconds=options.compile_seconds,
        copy_bytes=options.copy_mib << 20,
    )
    outcome = run_plan(chosen, settings, options.out, _progress(len(chosen)))
    if options.json:
        for record in outcome.records:
            print(record.to_json())
    elif outcome.records:
        print(print_table(outcome.records))
        one = outcome.records[-1]
        print(
            f"\n{one.device}: {one.machine}, {settings.threads} threads, {one.cpu_variant} kernels, torch {one.torch}, "
            f"commit {one.commit}; copy {one.copy_gbps:.1f} GB/s (read + write), "
            f"matmul {one.matmul_tflops:.2f} TFLOP/s in {one.matmul_dtype}"
        )
    for line in outcome.skipped:
        print(f"left out: {line}", file=sys.stderr)
    for line in outcome.failed:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _progress(total: int) -> Callable[[str], None]:
    """A bar on stderr; lines where that is no terminal, or tqdm is not installed."""
    tqdm = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
    if tqdm is not None:
        bar = tqdm(total=total, file=sys.stderr, unit="shape", dynamic_ncols=True, leave=False)
        state = {"started": False}

        def advance(label: str) -> None:
            if state["started"]:
                bar.update()
            state["started"] = True
            if label:
                bar.set_description_str(label)
            else:
                bar.close()

        return advance
    count = iter(range(1, total + 1))
    return lambda label: print(f"[{next(count)}/{total}] {label}", file=sys.stderr) if label else None


def _compare(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="opd-engine bench compare", description="Two files of records, side by side.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--max-slowdown", type=float, metavar="X", help="exit 1 where one of ours became slower than X times"
    )
    options = parser.parse_args(argv)
    from opd_engine.bench.compare import main as compare_main

    return compare_main((options.before, options.after), options.max_slowdown)


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="opd-engine bench report",
        description="Regenerate the table of README.md, the tables of docs/performance.md and the plots from "
        "benchmarks/results/*.jsonl.",
    )
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR", help="of the checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a document is out of date")
    options = parser.parse_args(argv)
    from opd_engine.bench.report import main as report_main

    return report_main(options.root, check=options.check)
