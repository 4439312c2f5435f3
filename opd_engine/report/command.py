"""`opd-engine report`: reads runs, writes one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_engine.report.page import render
from opd_engine.report.runs import read_runs
from opd_engine.whole_files import write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opd-engine report",
        description="One HTML page of one or several runs, finished or not: curves by teacher and task, support and "
        "tail, top-k overlap, phases, memory, samples coloured by divergence, settings. Several runs are overlaid.",
        epilog="example: opd-engine report runs/arithmetic runs/megatron --out compared.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: its run.output_dir")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the run's folder, or here for several runs"
    )
    parser.add_argument("--title", help="default: the names of the runs")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status: 0 done, 1 not written, 2 wrong usage or no run."""
    options = _parser().parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        out = options.out or (runs[0].directory if len(runs) == 1 else Path()) / "report.html"
        write_text(out, render(runs, options.title))
    except ValueError as error:
        print(f"opd-engine: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"opd-engine: error: cannot write the report: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0
