"""The CUDA kernels in the emulator, in the place of the CPU kernels: a pytest plugin (`-p emulated`) for a process
whose every test then shows something of the `.cuh` files that nvcc compiles.

`torch.ops.opd_emulated` holds the same ops built once more: same checks, same cutting of rows into pieces, blocks of
fibers instead of a GPU. OPD_EMULATOR_LIBRARY names another build of it than the one `make` leaves.
"""

import os
from pathlib import Path

import torch

LIBRARY = Path(
    os.environ.get("OPD_EMULATOR_LIBRARY", Path(__file__).resolve().parents[2] / "build/emulator/opd_emulated.so")
)


def load():
    """Makes torch.ops.opd_emulated exist."""
    assert LIBRARY.exists(), f"{LIBRARY} is missing: `make build` compiles it (OPD_EMULATOR=ON)"
    torch.ops.load_library(str(LIBRARY))
    return torch.ops.opd_emulated


def pytest_configure(config):
    """From here on, opd_engine's ops on CPU tensors run the CUDA kernels."""
    import opd_engine  # noqa: F401  (registers the ops that are replaced)

    emulated = load()
    replaced = torch.library.Library("opd_engine", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("opd_engine::"):
            op = name.removeprefix("opd_engine::")
            replaced.impl(op, getattr(emulated, op).default, "CPU", allow_override=True)
    config.opd_emulated = replaced  # lives as long as the run


CPU_ONLY = ("float64 runs on the CPU only", "k must be at most 1024 on CUDA")


def pytest_runtest_call(item):
    """What the CUDA kernels refuse is skipped with their own words, and counted among what was not shown."""
    import pytest

    test = item.obj

    def refused_is_skipped(**arguments):
        try:
            return test(**arguments)
        except RuntimeError as error:
            for words in CPU_ONLY:
                if words in str(error):
                    pytest.skip(words)
            raise

    item.obj = refused_is_skipped
