"""Teachers that are only looked at: no gradient, no optimizer, eval for good; their weights on the host between turns.

Bound by the host-device link, hidden behind the teacher before: one teacher is brought while another scores. Weights
that nothing trains have one true copy, on the host, pinned where the device is CUDA; leaving the device copies nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from opd_engine.parallel.tensors import is_distributed, local_tensor


def inference_only(module: nn.Module) -> nn.Module:
    """Make a module something that is only looked at: eval mode, nothing that requires or holds a gradient.

    Raises: ValueError where it carries a trainer's memory: gradients, or the main_grad of a data-parallel wrapper.
    Returns: the module.  Mutates: it.
    """
    for name, parameter in module.named_parameters():
        held = "main_grad" if getattr(parameter, "main_grad", None) is not None else "grad"
        if held == "main_grad" or parameter.grad is not None:
            raise ValueError(f"module: wanted one without a trainer around it, got {held} on {name}")
    return module.eval().requires_grad_(False)


class StagedWeights:
    """One teacher's weights: on the host while it is idle, on the device in its turn.

    modules: the model or its chunks; made inference-only here
    device: where it scores. On the host's own device nothing moves and nothing is held twice; elsewhere weights
        that ranks share are refused, with what takes them
    resident: keep it on the device between turns, which costs its weights there and saves the copies
    """

    def __init__(
        self, modules: nn.Module | Sequence[nn.Module], device: torch.device | str, *, resident: bool = False
    ) -> None:
        chunks = [modules] if isinstance(modules, nn.Module) else list(modules)
        self.device = torch.device(device)
        self.resident = resident
        self._modules = [inference_only(chunk) for chunk in chunks]
        self._on_way: list[Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None
        self._moves = self.device.type != "cpu"
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._moves and any(is_distributed(t) for chunk in chunks for t in chunk.parameters()):
            raise ValueError(
                "modules: wanted weights that this process holds whole, got ones that ranks share; those take turns "
                "through Turns (FSDPActor.teacher under two_phase)"
            )
        self._live = {id(t): t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())}
        self._idle = {key: _to_host(tensor, pinned=self._stream is not None) for key, tensor in self._live.items()}
        self._point_at(self._idle)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights: held on the host, and as much again on the device while it is there."""
        parts = [local_tensor(tensor) for tensor in self._idle.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in parts)

    @property
    def is_on_device(self) -> bool:
        """Whether the weights, or a copy under way, take memory on the device."""
        return self._on_way is not None

    def prefetch(self) -> None:
        """Start the copy to the device on a stream of its own; does not wait. Nothing where it is there already."""
        if self._on_way is not None or not self._moves:
            return
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            self._on_way = [self._bring(host) for host in self._idle.values()]
            if self._stream is not None:
                self._arrived = self._stream.record_event()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights on the device for the block; off it on every way out, unless resident. Eval mode stays."""
        self.prefetch()
        if self._on_way is not None:
            if self._arrived is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(self._arrived)
                for tensor in self._on_way:
                    # Allocated on the copying stream, freed after what this one still does with it.
                    tensor.record_stream(current)
            self._point_at(dict(zip(self._idle, self._on_way)))
        try:
            yield
        finally:
            for module in self._modules:
                # Some frameworks' forward-only passes end with train().
                module.eval()
            if not self.resident:
                self._point_at(self._idle)
                self._on_way = self._arrived = None

    def _bring(self, host: Tensor) -> Tensor:
        return host.to(self.device, non_blocking=True)

    def _point_at(self, places: dict[int, Tensor]) -> None:
        for key, tensor in self._live.items():
            tensor.data = places[key]


def _to_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    if tensor.device.type == "cpu" and tensor.is_pinned() == pinned:
        return tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor.detach())
