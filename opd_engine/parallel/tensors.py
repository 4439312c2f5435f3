"""Tensors that torch itself spreads over ranks (DTensor): this rank's part, and the whole."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Who has one has imported the module; importing it here would cost everyone a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_distributed(tensor: Tensor, name: str, way_in: str = "give the rank's own part (.to_local())") -> None:
    """Raise ValueError for a DTensor: what every rank's loss means for its gradient is not what its placements say."""
    if not torch.compiler.is_compiling() and is_distributed(tensor):
        shape, placements = list(tensor.shape), ", ".join(map(str, tensor.placements))
        raise ValueError(
            f"{name}: wanted a plain tensor, got a DTensor of shape {shape} placed ({placements}); {way_in}"
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered; any other tensor as it is. Communicates: an all-gather over the tensor's mesh."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that is spread as `like` is; the whole where that is not spread.

    whole: of like's whole shape, on any device, or spread already
    """
    if not is_distributed(like) or is_distributed(whole):
        return local_tensor(whole)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """This rank's part as a tensor spread as `like` is; itself where that is not spread. Communicates: nothing."""
    if not is_distributed(like):
        return part
    spread = type(like).from_local
    return spread(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
