"""The cases, one file each, the baseline beside ours. `build(name, shape, device)` makes one ready to be measured."""

import importlib

import torch

from opd_engine.bench.cases.workload import Workload
from opd_engine.bench.shapes import CASES, Shape


def build(name: str, shape: Shape, device: torch.device, *, compile_baselines: bool = True) -> Workload:
    """Inputs, implementations and the check of their answers, of one case at one shape."""
    if name not in CASES:
        raise ValueError(f"case: wanted one of {', '.join(CASES)}, got {name!r}")
    workload = importlib.import_module(f"opd_engine.bench.cases.{name}").build(shape, device)
    if not compile_baselines:
        workload.impls = [impl for impl in workload.impls if not impl.name.startswith("torch_compile")]
    return workload


__all__ = ["Workload", "build"]
