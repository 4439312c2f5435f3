"""The conformance table as text, as a dictionary for JSON, and the progress line while it is made."""

from __future__ import annotations

import argparse
import sys


class Progress:
    """A line on stderr that is rewritten where it is a terminal; silent elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def show(self, done: int) -> None:
        if self._live:
            what = "starting the processes" if done == 0 else f"{done} comparisons"
            print(f"\r\x1b[Kopd-engine check: {what}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summarise(items: list[dict], options: argparse.Namespace, dtypes: list[str], seconds: float) -> dict:
    """Everything that was found, in the table's order. `passed` also needs every rank to have walked every cell."""
    import torch

    from opd_engine.check.table import list_cells
    from opd_engine.ops import build_info

    order = {(cell.function, cell.line, cell.setting): number for number, cell in enumerate(list_cells(options.full))}
    cells = [_without_kind(item) for item in items if item["kind"] == "cell"]
    cells.sort(key=lambda cell: (dtypes.index(cell["dtype"]), order[cell["function"], cell["line"], cell["setting"]]))
    controls = [_without_kind(item) for item in items if item["kind"] == "control"]
    controls.sort(key=lambda control: dtypes.index(control["dtype"]))  # stable: a rank's own stay in order
    num_done = sum(item["kind"] == "done" for item in items)
    complete = num_done == options.tp * len(dtypes) and len(cells) == len(order) * len(dtypes)
    failed = sum(not cell["passed"] for cell in cells)
    unseen = sum(not control["seen"] for control in controls)
    return {
        "passed": complete and failed == 0 and unseen == 0,
        "complete": complete,
        "cells_failed": failed,
        "controls_unseen": unseen,
        "full": options.full,
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
    """The table: one line for each function and what of it is looked at; a column for each dtype."""
    where = (
        f"{summary['device']} ({summary['cpu_variant']} kernels)" if summary["device"] == "cpu" else summary["device"]
    )
    dtypes = summary["dtypes"]
    lines = [
        f"opd-engine check: tp={summary['tp']}, {where}, torch {summary['torch']}, seed {summary['seed']}",
        "value and gradient against float64; the worst error of a line's cells as a share of what is allowed",
        "",
        f"{'':<46}{'cells':>6}" + "".join(f"{name:>11}" for name in dtypes),
    ]
    by_line: dict[str, dict[str, dict[str, list[dict]]]] = {}
    for cell in summary["cells"]:
        found = by_line.setdefault(cell["function"], {}).setdefault(cell["line"], {})
        found.setdefault(cell["dtype"], []).append(cell)
    for function, of_function in by_line.items():
        lines.append(function)
        for line, by_dtype in of_function.items():
            figures = "".join(f"{_figure(by_dtype.get(name, [])):>11}" for name in dtypes)
            lines.append(f"  {line:<44}{max(map(len, by_dtype.values())):>6}{figures}")
    lines += ["", "planted errors, each must be seen:"]
    for name in dict.fromkeys(control["name"] for control in summary["controls"]):
        same = [control for control in summary["controls"] if control["name"] == name]
        seen = sum(control["seen"] for control in same)
        lines.append(f"  {name:<44}{seen:>6} of {len(same)}")
    lines += [
        f"  NOT SEEN {control['dtype']} {control['cell']}: {control['name']}"
        for control in summary["controls"]
        if not control["seen"]
    ]
    lines += [
        f"  FAIL {name_of(cell)}: error {cell['error']:.3g}, allowed {cell['allowed']:.3g}, at {cell['where']}"
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


def name_of(cell: dict) -> str:
    """As a failure names it: "float32 distill_loss: bucket: jsd, mixed"."""
    return f"{cell['dtype']} " + ": ".join(filter(None, (cell["function"], cell["line"], cell["setting"])))


def _figure(cells: list[dict]) -> str:
    if not cells:
        return "missing"
    share = max(cell["error"] / cell["allowed"] if cell["error"] == cell["error"] else float("inf") for cell in cells)
    return f"{share:.0%}" if all(cell["passed"] for cell in cells) else f"FAIL {share:.0%}"
