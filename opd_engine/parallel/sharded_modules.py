"""Modules whose parameters torch spreads over ranks (FSDP2), as sums: gradients add up over ranks, never average.

Bound: the wire, one all-gather of a group's parameters each way and one reduce-scatter of its gradients a step. Which
modules are a group is the caller's choice; nothing here knows a model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

_METHOD = "_opd_within"
_Returned = TypeVar("_Returned")


def shard_group(
    module: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, offload: bool = False
) -> None:
    """Spread the module's parameters that no group inside it has over the mesh's ranks.

    dtype: in which it computes; parameters, gradients and their sums keep the dtype they have. None: the same
    offload: this rank's part lies on the host between its uses, gradients and optimizer states too

    Call it from the inside out, the whole model last. Mutates: the module, whose parameters are then other objects.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    pinned = mesh.device_type != "cpu"
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    )
    module.set_gradient_divide_factor(1.0)
    # Without it the factor above becomes a product within the reduction, which gloo lacks and NCCL rounds.
    module.set_force_sum_reduction_for_comms(True)
    setattr(module, _METHOD, types.MethodType(_call, module))
    register_fsdp_forward_method(module, _METHOD)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module is a group, or the root of several."""
    return isinstance(module, FSDPModule)


def within(module: nn.Module, function: Callable[..., _Returned], *inputs: Tensor) -> _Returned:
    """`function(*inputs)` where the parameters of the module's own group are whole, in forward and in backward.

    Inputs that require grad make the group's gradient leave as soon as it is complete. An unsharded module just calls.
    """
    if not is_sharded(module):
        return function(*inputs)
    return getattr(module, _METHOD)(*inputs, function=function)


def _call(self: nn.Module, *inputs: Tensor, function: Callable[..., Any]) -> Any:
    return function(*inputs)


def reduce_gradients(root: nn.Module, wanted: bool) -> None:
    """Whether the next backward sums the gradients over the ranks, or adds them up here, whole, for one that will."""
    if is_sharded(root):
        root.set_requires_gradient_sync(wanted)
        root.set_is_last_backward(wanted)


def reshard(root: nn.Module) -> None:
    """Give back what a forward without backward left whole."""
    for module in _groups(root):
        module.reshard()


def _groups(root: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in root.modules() if is_sharded(module))
