"""Speed of the LM head and the loss together, measured here and now.

The goals are 1.1 x the time of the path through logits at T = 2,048, V = 65,536, H = 512, and less than 1 x where 80%
or 50% of the rows count. A shared machine's noise gets the same allowance again, 1.2 x and 1.1 x, and more than one
attempt; at 50% there is room enough to hold the goal itself.
"""

import dataclasses
import os

import pytest
import torch

from opd_engine.bench.cases import build
from opd_engine.bench.goals import LINEAR_GOALS
from opd_engine.bench.record import ERROR_LIMIT
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import interleave

CPU = torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HEAD = Shape(2_048, 65_536, hidden_size=512, baselines=False)
ATTEMPTS = 3


@pytest.mark.slow
@pytest.mark.parametrize("mask_density", LINEAR_GOALS)
def test_the_linear_loss_is_as_fast_as_the_path_through_logits(mask_density):
    torch.set_num_threads(min(CORES, 2))
    workload = build("linear_distill", dataclasses.replace(HEAD, mask_density=mask_density), CPU)
    assert [impl.name for impl in workload.impls] == ["opd_engine", "opd_ablation_through_logits"]
    for impl in workload.impls:  # also the warm-up
        assert workload.error(impl.run(impl.prepare(0))) < ERROR_LIMIT["float32"]
    allowed, ratios = LINEAR_GOALS[mask_density].half, []
    for _ in range(ATTEMPTS):
        ours, through_logits = interleave(workload.impls, num_buffers=1, device=CPU, seconds=0, min_rounds=4)
        ratios.append(min(ours) / min(through_logits))
        print(f"{mask_density:.0%} of rows: {min(ours) / 1e6:.2f} s, {ratios[-1]:.2f} x the path through logits")
        if ratios[-1] < allowed:
            return
    pytest.fail(f"wanted less than {allowed} x the path through logits, got {', '.join(f'{r:.2f}' for r in ratios)}")
