"""Lets megatron-core 0.16.1 run on a CPU with gloo, for tests only: install() after its import, before building.

Megatron asks torch.cuda for the current device and its RNG state even where every tensor is on the CPU. The answers
given here are process-global, so a test calls this in the process of a rank, never in pytest's own. Does nothing
where CUDA exists.
"""

import functools

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "empty_like", "zeros_like", "rand", "randn")


def install() -> bool:
    """Answer Megatron's questions about CUDA with the CPU. Returns whether anything was replaced."""
    if torch.cuda.is_available():
        return False
    cpu, generator = torch.device("cpu"), torch.default_generator
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.set_device = lambda *args, **kwargs: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: generator.manual_seed(int(seed))
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))
    return True


def _on_cpu(factory, cpu):
    """The factory with device="cuda" read as the CPU, and nothing pinned: Megatron spells both out."""

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = cpu
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu
