"""A number of every tensor's bits, the same on host and device: what tells one model's weights from another's.

Bound by memory: each tensor is read once, in chunks of 8 MiB of workspace. It finds mistakes, not malice: sums of bits
times random odd numbers modulo 2^64. A change of one element always shows, any other with probability 1 - 2^-63.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from opd_engine.parallel.tensors import local_tensor

_CHUNK = 1 << 20
_BASE = 0x9E3779B97F4A7C15 - (1 << 64)
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """[tensors] int64 on the first tensor's device, in their order; does not wait for it.

    tensors: of any dtype and shape; of one that is spread over ranks, this rank's part. Equal bits give equal numbers
        on every device.
    """
    factors: dict[torch.device, Tensor] = {}
    numbers: list[Tensor] = []
    with torch.no_grad():
        for tensor in tensors:
            bits = _bits(local_tensor(tensor.detach()))
            if bits.device not in factors:
                generator = torch.Generator().manual_seed(0)
                low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
                drawn = torch.randint(low, high, (_CHUNK,), dtype=torch.int64, generator=generator) | 1
                factors[bits.device] = drawn.to(bits.device)
            number = torch.zeros((), dtype=torch.int64, device=bits.device)
            for chunk in bits.split(_CHUNK):
                # Integer sums wrap and have no order, so that any device and any number of threads agree.
                number = number * _BASE + (chunk * factors[bits.device][: chunk.numel()]).sum()
            numbers.append(number)
        if not numbers:
            return torch.empty(0, dtype=torch.int64)
        return torch.stack([number.to(numbers[0].device) for number in numbers])


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, four bytes at a time where they go in evenly."""
    flat = tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    width = flat.element_size()
    if width < 4 and flat.numel() % (4 // width) == 0 and flat.storage_offset() % (4 // width) == 0:
        return flat.view(torch.int32)
    return flat.view(_WIDTHS[width])
