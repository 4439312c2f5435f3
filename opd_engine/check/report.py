"""The conformance table as text, as a dictionary for JSON, and the progress line while it is made."""

from __future__ import annotations

import argparse
import sys

from opd_engine.check.reference import DIVERGENCES, TAIL_MODES

CELLS_A_DTYPE = 3 * len(TAIL_MODES) * len(DIVERGENCES) + len(DIVERGENCES)


class Progress:
    """A line on stderr that is rewritten where it is a terminal; silent elsewhere."""

    def __init__(self, num_dtypes: int, tp: int) -> None:
        self._total = num_dtypes * (CELLS_A_DTYPE + (6 if tp > 1 else 5))
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def show(self, done: int) -> None:
        if self._live:
            what = "starting the processes" if done == 0 else f"{done} of {self._total} comparisons"
            print(f"\r\x1b[Kopd-engine check: {what}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summarise(items: list[dict], options: argparse.Namespace, dtypes: list[str], seconds: float) -> dict:
    """Everything that was found. `passed` also needs every cell and every control to be there."""
    import torch

    from opd_engine.ops import build_info

    cells = [_without_kind(item) for item in items if item["kind"] == "cell"]
    controls = [_without_kind(item) for item in items if item["kind"] == "control"]
    complete = len(cells) == CELLS_A_DTYPE * len(dtypes) and len(controls) == (6 if options.tp > 1 else 5) * len(dtypes)
    failed = sum(not cell["passed"] for cell in cells)
    unseen = sum(not control["seen"] for control in controls)
    return {
        "passed": complete and failed == 0 and unseen == 0,
        "complete": complete,
        "cells_failed": failed,
        "controls_unseen": unseen,
        "tp": options.tp,
        "device": options.device,
        "seed": options.seed,
        "torch": torch.__version__,
        "cpu_variant": build_info()["cpu_variant"],
        "seconds": round(seconds, 1),
        "dtypes": dtypes,
        "cells": cells,
        "controls": controls,
    }


def _without_kind(item: dict) -> dict:
    return {key: value for key, value in item.items() if key != "kind"}


def render(summary: dict) -> str:
    """The table: one line for each dtype, support and tail mode; a column for each divergence."""
    where = (
        f"{summary['device']} ({summary['cpu_variant']} kernels)" if summary["device"] == "cpu" else summary["device"]
    )
    lines = [f"opd-engine check: tp={summary['tp']}, {where}, torch {summary['torch']}, seed {summary['seed']}"]
    lines.append("value and gradient against float64; the worse error as a share of what is allowed")
    lines.append("")
    lines.append(f"{'dtype':<10}{'support':<9}{'tail':<13}" + "".join(f"{name:>17}" for name in DIVERGENCES))
    by_line: dict[tuple[str, str, str], dict[str, dict]] = {}
    for cell in summary["cells"]:
        by_line.setdefault((cell["dtype"], cell["support"], cell["tail"]), {})[cell["divergence"]] = cell
    for (dtype, support, tail), found in by_line.items():
        shown = "".join(f"{_figure(found.get(name)):>17}" for name in DIVERGENCES)
        lines.append(f"{dtype:<10}{support:<9}{tail:<13}{shown}")
    lines.append("")
    lines.append("planted errors, each must be seen:")
    for name in dict.fromkeys(control["name"] for control in summary["controls"]):
        same = [control for control in summary["controls"] if control["name"] == name]
        unseen = [control["dtype"] for control in same if not control["seen"]]
        lines.append(f"  {name:<30}{'seen' if not unseen else 'NOT SEEN at ' + ', '.join(unseen)}")
    lines += [
        f"  FAIL {cell['dtype']} {cell['support']} {cell['tail']} {cell['divergence']}: {cell['reason']} "
        f"(error {cell['error']:.3g}, allowed {cell['allowed']:.3g})"
        for cell in summary["cells"]
        if not cell["passed"]
    ]
    lines.append("")
    count = f"{len(summary['cells'])} cells, {len(summary['controls'])} controls, {summary['seconds']} s"
    if summary["passed"]:
        lines.append(f"PASS: {count}")
    elif not summary["complete"]:
        lines.append(f"FAIL: the table is incomplete ({count})")
    else:
        lines.append(f"FAIL: {summary['cells_failed']} cells, {summary['controls_unseen']} controls not seen ({count})")
    return "\n".join(lines)


def _figure(cell: dict | None) -> str:
    if cell is None:
        return "missing"
    share = f"{cell['error'] / cell['allowed']:.0%}"
    return share if cell["passed"] else f"FAIL {share}"
