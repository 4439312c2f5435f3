"""Lets megatron-core run where there is no CUDA device: install() answers what it asks of torch.cuda with the CPU.

For trying things out at tiny size. It replaces functions of torch and one class of Megatron for the whole process, so
call it first, and never where there is a GPU (it does nothing there). Packed batches and context parallelism need
TransformerEngine's attention and stay out of reach.
"""

import contextlib
import functools
import logging

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "empty_like", "zeros_like", "rand", "randn")


class _Stream:
    """Stands for torch.cuda.Stream: on a CPU everything is in order already."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def install() -> bool:
    """Returns whether anything was replaced."""
    if torch.cuda.is_available():
        return False
    # What is replaced must have been read by torch's compiler and by Megatron as it is.
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.tensor_parallel.random

    # `with torch.device("meta")`, which transformers loads under, knows the factories by identity from its first use.
    torch.utils._device._device_constructors()
    cpu, cuda, generator = torch.device("cpu"), torch.cuda, torch.default_generator
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.set_device = lambda *args, **kwargs: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    # The trackers of tensor-parallel generators set a state when CUDA begins, which is never here.
    megatron.core.tensor_parallel.random._set_cuda_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)  # "CPU RNG state changed"
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: generator.manual_seed(int(seed))
    cuda.Stream, cuda.stream = _Stream, lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.empty_cache = lambda: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))
    _name_types_as_on_cuda()
    return True


def _on_cpu(factory, cpu):
    """The factory with device="cuda" read as the CPU: Megatron spells the string out."""

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = cpu
        return factory(*args, **kwargs)

    return on_cpu


def _name_types_as_on_cuda() -> None:
    """Megatron's optimizer sorts parameters by the strings that CUDA tensors have for a type."""
    plain = torch.Tensor.type

    def named(self, *args, **kwargs):
        name = plain(self, *args, **kwargs)
        return name if args or kwargs or "cuda" in name else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named
