"""Tensors that torch itself spreads over ranks (DTensor): this rank's part, and the whole."""

from __future__ import annotations

import sys

from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Who has one has imported the module; importing it here would cost everyone a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered; any other tensor as it is. Communicates: an all-gather over the tensor's mesh."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor
