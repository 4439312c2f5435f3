"""What a process hands to torch.distributed, by whomever: every collective and send, counted where c10d dispatches it.

`opd_engine.parallel.collectives.count_collectives` knows this project's own alone; this one a framework's too. Only
the thread that opened the block is watched, which on a CPU is the one that runs the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
}


@dataclass(frozen=True)
class Message:
    """op as in CollectiveRecord, or send, receive; nbytes: of the gathered, reduced, scattered or sent tensor."""

    op: str
    nbytes: int
    group_size: int


class Wire(TorchDispatchMode):
    """Records messages while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._note(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def nbytes(self, op: str, at_least: int = 0) -> int:
        """Bytes of all messages of an op that are as large as that."""
        return sum(m.nbytes for m in self.messages if m.op == op and m.nbytes >= at_least)

    def _note(self, name: str, args) -> None:
        op = _OPS[name]  # a KeyError is a collective that nobody taught this file
        if op == "barrier":
            return
        group = torch.distributed.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        # Of a gather the output is whole, of a scatter the input.
        tensors = args[1] if op == "reduce_scatter" else args[0]
        self.messages.append(Message(op, _nbytes(tensors), group.size()))


def _nbytes(value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_nbytes(part) for part in value)
