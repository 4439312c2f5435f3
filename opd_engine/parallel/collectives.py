"""Every collective of the project: packed all-gather, SUM all-reduce, reduce-scatter, and the autograd of each.

Bound: the wire. Callers pack what belongs together, so that an op of the public API costs one or two collectives.
torch.distributed.nn is not used: on gloo the backward of its all_gather is silently wrong for non-contiguous gradients.
A group of None means "alone": every function is then the identity and communicates nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_engine.ops.autograd import differentiable_once

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# torch 2.13 renamed both and warns about the old names; 2.10 knows only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective as this rank issued it.

    op: all_gather | all_reduce | reduce_scatter | broadcast, or debug_all_gather for what only debug mode sends.
    nbytes: of the gathered result, of the reduced tensor, or of the tensor that is scattered.
    """

    op: str
    nbytes: int
    group_size: int


class CollectiveLog(list[CollectiveRecord]):
    """The records of one count_collectives block, in the order of issue."""

    def nbytes(self, op: str | None = None) -> int:
        """Bytes of all records, or of those of one op."""
        return sum(record.nbytes for record in self if op is None or record.op == op)


# A plain global, not a thread-local: autograd runs the backward of CUDA tensors on threads of its own.
_open_logs: list[CollectiveLog] = []


@contextlib.contextmanager
def count_collectives() -> Iterator[CollectiveLog]:
    """Record every collective that this process issues inside the block, from any thread.

    Returns: a CollectiveLog; it keeps its records after the block.
    Communicates: nothing.
    """
    log = CollectiveLog()
    _open_logs.append(log)
    try:
        yield log
    finally:
        _open_logs[:] = [other for other in _open_logs if other is not log]


def _record(op: str, tensor: Tensor, group: ProcessGroup) -> None:
    for log in _open_logs:
        log.append(CollectiveRecord(op, tensor.numel() * tensor.element_size(), group.size()))


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks in the group; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """This process's place in the group; 0 for None."""
    return 0 if group is None else group.rank()


def all_gather_stacked(tensor: Tensor, group: ProcessGroup | None, *, op: str = "all_gather") -> Tensor:
    """The tensors of all ranks, stacked in rank order.

    tensor: [...], any dtype, the same shape on every rank
    Returns: [group_size, ...], a new tensor; a view of the input when alone.
    Communicates: one all-gather of tensor.nbytes x group_size; none for an empty tensor.
    Grad: none; all_gather_rows is the differentiable one.
    """
    return start_all_gather_stacked(tensor, group, op=op).wait()


@dataclass(frozen=True)
class PendingTensor:
    """The result of a collective that was started and may still be on its way."""

    result: Tensor
    work: Any = None  # torch.distributed.Work, None where nothing was sent
    sent: Tensor | None = None  # kept alive until it has left

    def wait(self) -> Tensor:
        """The result. A CPU backend blocks here; NCCL makes the current stream wait."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_gather_stacked(tensor: Tensor, group: ProcessGroup | None, *, op: str = "all_gather") -> PendingTensor:
    """As all_gather_stacked, without waiting: what is computed before wait() overlaps with the wire.

    Every rank must start its collectives in the same order. The tensor must not be written before wait().
    """
    if group is None:
        return PendingTensor(tensor.unsqueeze(0))
    tensor = tensor.detach().contiguous()
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    if gathered.numel() == 0:
        return PendingTensor(gathered)
    _record(op, gathered, group)
    # Flat on both sides: backends disagree on whether a stacked output is welcome.
    work = _all_gather(gathered.view(-1), tensor.view(-1), group=group, async_op=True)
    return PendingTensor(gathered, work, tensor)


def all_reduce_sum_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group, in place, in the tensor's own dtype.

    tensor: [...], contiguous, the same shape on every rank
    Returns: the tensor it was given.
    Communicates: one SUM all-reduce of tensor.nbytes; none for an empty tensor.
    Mutates: tensor.
    Grad: none; copy_to_group and reduce_from_group are the differentiable ones.
    """
    if group is not None and tensor.numel() > 0:
        _record("all_reduce", tensor, group)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def reduce_scatter_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group in the tensor's own dtype, of which each rank keeps its block of dim 0.

    tensor: [group_size * rows, ...], the same shape on every rank
    Returns: [rows, ...], a new tensor; the input when alone.
    Raises: ValueError where dim 0 does not divide by the group's size.
    Communicates: one SUM reduce-scatter of tensor.nbytes; none for an empty tensor.
    Grad: none; all_gather_rows and reduce_scatter_rows are the differentiable ones.
    """
    if group is None:
        return tensor
    tp_size = group.size()
    if tensor.size(0) % tp_size != 0:
        raise ValueError(
            f"tensor: wanted a first dimension divisible by the group's {tp_size} ranks, got {tensor.size(0)}"
        )
    tensor = tensor.detach().contiguous()
    part = tensor.new_empty((tensor.size(0) // tp_size, *tensor.shape[1:]))
    if tensor.numel() > 0:
        _record("reduce_scatter", tensor, group)
        _reduce_scatter(part, tensor, op=dist.ReduceOp.SUM, group=group)
    return part


def all_reduce_max_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Maximum over the group, in place; otherwise as all_reduce_sum_."""
    if group is not None and tensor.numel() > 0:
        _record("all_reduce", tensor, group)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast_(tensor: Tensor, group: ProcessGroup | None, *, source: int = 0) -> Tensor:
    """The source's values on every rank, in place.

    tensor: [...], contiguous, the same shape and dtype on every rank
    source: the sender's place in the group
    Returns: the tensor it was given.
    Communicates: one broadcast of tensor.nbytes.
    Mutates: tensor, everywhere but on the source.
    """
    if group is not None and tensor.numel() > 0:
        _record("broadcast", tensor, group)
        dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every rank of the group has come here."""
    if group is not None:
        dist.barrier(group=group)


def all_gather_json(
    value: Any, group: ProcessGroup | None, device: torch.device, *, op: str = "all_gather"
) -> list[Any]:
    """A small JSON value of every rank, in rank order. For checks and summaries: it reads the result on the host.

    Communicates: two all-gathers, of 8 bytes and of the longest value, x group_size.
    """
    if group is None:
        return [value]
    encoded = json.dumps(value).encode()
    lengths = all_gather_stacked(torch.tensor([len(encoded)], device=device), group, op=op).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    texts = all_gather_stacked(padded.to(device), group, op=op).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(texts, lengths, strict=True)]


def _reduced(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """SUM all-reduce into a new tensor: low precision is summed in float32 and rounded once, last."""
    wide = torch.float32 if tensor.dtype in _LOW_PRECISION else tensor.dtype
    total = torch.empty(tensor.shape, dtype=wide, device=tensor.device).copy_(tensor)
    return all_reduce_sum_(total, group).to(tensor.dtype)


def _scattered(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """SUM reduce-scatter of dim 0 into a new tensor, with the rounding of _reduced."""
    wide = torch.float32 if tensor.dtype in _LOW_PRECISION else tensor.dtype
    return reduce_scatter_sum(tensor.to(wide), group).to(tensor.dtype)


# Each backward below is the transposed Function, so that the four of them are closed under differentiation.
class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ReduceFromGroup.apply(grad, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduced(tensor, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _CopyToGroup.apply(grad, ctx.group), None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_stacked(tensor, group).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ReduceScatterRows.apply(grad, ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(tensor, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllGatherRows.apply(grad, ctx.group), None


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank = group.rank()
        return all_gather_stacked(tensor, group)

    @staticmethod
    @differentiable_once("all_gather_replicated")
    def backward(ctx, grad: Tensor):
        return grad[ctx.rank], None


def copy_to_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Identity forward; backward sums the gradient over the group: where a replicated tensor meets sharded weights.

    Communicates: backward, one SUM all-reduce of the gradient (4 bytes an element for bf16 and fp16).
    Precision: low precision is summed in float32 and rounded once, last.
    """
    return tensor if group is None else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group forward; identity backward: where partial results become a replicated tensor.

    Communicates: forward, one SUM all-reduce. Precision: as copy_to_group.
    """
    return tensor if group is None else _ReduceFromGroup.apply(tensor, group)


def all_gather_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """All ranks' rows, concatenated on dim 0 in rank order; backward sums and scatters: out of sequence parallelism.

    tensor: [rows, ...], the same shape on every rank. Returns: [group_size * rows, ...].
    Communicates: forward, one all-gather; backward, one SUM reduce-scatter. Precision: as copy_to_group.
    """
    return tensor if group is None else _AllGatherRows.apply(tensor, group)


def reduce_scatter_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The group's sum, of which each rank keeps its block of dim 0; backward all-gathers: into sequence parallelism.

    tensor: [group_size * rows, ...]. Returns: [rows, ...].
    Raises: ValueError where dim 0 does not divide by the group's size.
    Communicates: forward, one SUM reduce-scatter; backward, one all-gather. Precision: as copy_to_group.
    """
    return tensor if group is None else _ReduceScatterRows.apply(tensor, group)


def all_gather_replicated(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """All ranks' tensors, stacked, for a computation that every rank repeats alike: backward takes the own part.

    Summing there, as all_gather_rows does, would count the one gradient that every rank computes group_size times.

    tensor: [...], the same shape on every rank. Returns: [group_size, ...].
    Communicates: forward, one all-gather; backward nothing. Grad: once differentiable.
    """
    return tensor.unsqueeze(0) if group is None else _AllGatherReplicated.apply(tensor, group)
