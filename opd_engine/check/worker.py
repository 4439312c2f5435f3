"""One rank of `opd-engine check`: runs every cell; the main rank writes the results and the progress as JSON lines.

Started by opd_engine.check with torchrun's variables; not meant to be started by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from opd_engine.check import cells
from opd_engine.parallel.launch import join_world


def run(job: dict) -> None:
    """job: folder, dtypes, device, seed, timeout_s, plant (as opd_engine.check.main writes it)."""
    import torch

    torch.set_num_threads(1)  # the rows are few: more threads only wait for each other
    with join_world(job["device"], timeout_s=job["timeout_s"]) as world, open(job["results"], "a") as results:
        for dtype in job["dtypes"]:
            for kind, items in (
                ("cell", cells.bucket_cells(dtype, world, job["seed"], job["plant"])),
                ("cell", cells.full_cells(dtype, world, job["seed"], job["plant"])),
                ("control", cells.controls(dtype, world, job["seed"])),
            ):
                for item in items:
                    if item is not None:
                        results.write(json.dumps({"kind": kind, **cells.as_json(item)}) + "\n")
                        results.flush()


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
