"""opd_engine's ops on CPU tensors run on the GPU: a pytest plugin (`-p on_cuda`), so that the truth tests written for
the CPU show what the CUDA kernels compute. Arguments go to the device with their strides; results come back, and so
does what an op overwrote.
"""

import torch

from emulated import pytest_runtest_call  # noqa: F401  (what CUDA refuses is skipped with its own words)


def to_cuda(value):
    """The same layout on the device: a view of a copy of the whole storage."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    moved = storage.cuda()
    return torch.as_strided(moved, value.shape, value.stride(), value.storage_offset())


def to_cpu(value):
    if isinstance(value, tuple):
        return tuple(map(to_cpu, value))
    return value.cpu() if isinstance(value, torch.Tensor) else value


def round_trip(op):
    """A CPU kernel that is the CUDA kernel."""
    mutated = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(*arguments):
        on_device = [to_cuda(value) for value in arguments]
        result = op(*on_device)
        for i in mutated:
            arguments[i].copy_(on_device[i].cpu())
        return to_cpu(result)

    return run


def pytest_configure(config):
    """From here on, opd_engine's ops on CPU tensors run the CUDA kernels."""
    import opd_engine  # noqa: F401  (registers the ops that are replaced)

    replaced = torch.library.Library("opd_engine", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("opd_engine::"):
            op = name.removeprefix("opd_engine::")
            overload = getattr(torch.ops.opd_engine, op).default
            replaced.impl(op, round_trip(overload), "CPU", allow_override=True)
    config.opd_on_cuda = replaced  # lives as long as the run
