"""One rank of `opd-engine check`: walks every cell, judges its share, and writes what it found as JSON lines.

Started by opd_engine.check with torchrun's variables; not meant to be started by hand.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from opd_engine.check.cells import Judged, run_cells
from opd_engine.check.inputs import Inputs
from opd_engine.check.table import list_cells
from opd_engine.parallel.launch import join_world


def run(job: dict) -> None:
    """job: results, dtypes, full, device, seed, timeout_s (as opd_engine.check.command writes it)."""
    import torch

    torch.set_num_threads(1)  # the rows are few: more threads only wait for each other
    cells = list_cells(job["full"])
    with join_world(job["device"], timeout_s=job["timeout_s"]) as world, open(job["results"], "a") as results:
        dtypes = job["dtypes"]
        for turn, dtype in enumerate(dtypes):
            inputs = Inputs(getattr(torch, dtype), world, job["seed"])
            for found in run_cells(cells, inputs, dtype, *(() if job["full"] else (turn, len(dtypes)))):
                kind = "cell" if isinstance(found, Judged) else "control"
                results.write(json.dumps({"kind": kind, **asdict(found)}) + "\n")
                results.flush()  # line by line: the ranks share the file
            results.write(json.dumps({"kind": "done", "dtype": dtype, "rank": world.rank}) + "\n")
            results.flush()


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
