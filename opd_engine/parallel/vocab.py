"""VocabShard: which columns of the vocabulary this rank holds, passed in by the caller and never derived from a rank.

Shards tile [0, padded_vocab_size); they may be uneven, of zero width, and wholly padding (ids >= vocab_size).
Construction communicates nothing; check_tiling is the collective that debug mode runs before every public call.
local_logits makes one of logits that torch itself has spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.parallel.collectives import all_gather_json, group_rank, group_size
from opd_engine.parallel.tensors import is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The columns [vocab_start_index, vocab_end_index) of a vocabulary split over tp_group.

    vocab_start_index: int >= 0, the global id of local column 0
    vocab_end_index: int, exclusive; end - start is the local width, which may be 0
    vocab_size: int >= 1, the real vocabulary; columns whose id is at or above it are padding
    tp_group: the ranks whose shards tile [0, padded_vocab_size); None: no communication, all of [0, vocab_size) is here
    Raises: ValueError for bounds that are not such integers, and, where there is no other rank, for a shard that
        does not cover [0, vocab_size).
    Communicates: nothing.
    """

    vocab_start_index: int
    vocab_end_index: int
    vocab_size: int
    tp_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_start_index", "vocab_end_index", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: wanted an int, got {value!r} ({type(value).__name__})")
        if self.vocab_start_index < 0:
            raise ValueError(f"vocab_start_index: wanted >= 0, got {self.vocab_start_index}")
        if self.vocab_end_index < self.vocab_start_index:
            raise ValueError(
                f"vocab_end_index: wanted >= vocab_start_index = {self.vocab_start_index} (it is exclusive), "
                f"got {self.vocab_end_index}"
            )
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: wanted >= 1, got {self.vocab_size}")
        if self.tp_size == 1 and not (self.vocab_start_index == 0 and self.vocab_end_index >= self.vocab_size):
            where = "tp_group=None" if self.tp_group is None else "a tp_group of one rank"
            raise ValueError(
                f"shard: with {where} wanted one that covers [0, vocab_size = {self.vocab_size}), "
                f"got [{self.vocab_start_index}, {self.vocab_end_index})"
            )

    @property
    def tp_size(self) -> int:
        """Ranks in tp_group; 1 without one."""
        return group_size(self.tp_group)

    @property
    def tp_rank(self) -> int:
        """This process's place in tp_group: the order of merging. It says nothing about which columns are here."""
        return group_rank(self.tp_group)

    @property
    def local_vocab_size(self) -> int:
        """Columns here, padding included: the width that local logits must have."""
        return self.vocab_end_index - self.vocab_start_index

    @property
    def valid_local_size(self) -> int:
        """Columns here whose id is below vocab_size."""
        return min(max(self.vocab_size - self.vocab_start_index, 0), self.local_vocab_size)

    @property
    def merge_group(self) -> ProcessGroup | None:
        """tp_group where there is anybody to talk to, else None."""
        return self.tp_group if self.tp_size > 1 else None

    def check_tiling(self, device: torch.device | str = "cpu") -> None:
        """Compare the bounds of all ranks.

        Raises: ValueError, the same on every rank, where the shards overlap, leave a gap, end below vocab_size or
            disagree about vocab_size.
        Communicates: two small all-gathers over tp_group; every rank of it must call.
        """
        bounds = (self.vocab_start_index, self.vocab_end_index, self.vocab_size)
        everybody = all_gather_json(bounds, self.merge_group, torch.device(device), op="debug_all_gather")
        if (fault := find_tiling_fault(everybody)) is not None:
            raise ValueError(fault)


def local_logits(dtensor: Tensor, vocab_size: int) -> tuple[Tensor, VocabShard]:
    """This rank's columns of logits that are a DTensor, and the VocabShard that says which they are.

    The way from tensor parallelism by torch (a ColwiseParallel head with use_local_output=False) to the functions on
    logits, which take plain tensors: a DTensor's placements cannot say that every rank computes the same loss.

    dtensor: DTensor [*, padded_vocab_size], floating, Shard(-1) on exactly one dimension of its mesh, Replicate or, of
        its rows, Shard(0) on all others
    vocab_size: int >= 1, the real vocabulary, at most the last dimension's size
    Returns: ([*, vocab_shard_size], sharing the DTensor's memory; VocabShard over the group of that mesh dimension).
    Raises: ValueError where an argument is not as above: a plain tensor, Partial sums (redistribute them first), a
        vocabulary that no mesh dimension splits, or that two do.
    Communicates: nothing. Mutates: nothing.
    Grad: for dtensor, with its own placements.
    """
    if not isinstance(dtensor, Tensor) or not is_distributed(dtensor):
        got = f"a plain tensor {list(dtensor.shape)}" if isinstance(dtensor, Tensor) else type(dtensor).__name__
        raise ValueError(f"dtensor: wanted a DTensor [*, padded_vocab_size], got {got}")
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, last = dtensor.device_mesh, dtensor.placements, dtensor.ndim - 1
    split_by = []
    for number, placement in enumerate(placements):
        dim = placement.dim % max(dtensor.ndim, 1) if isinstance(placement, Shard) else None
        if dim is not None and dim == last:
            split_by.append(number)
        elif dim != 0 and not isinstance(placement, Replicate):
            raise ValueError(
                f"dtensor: wanted Shard(-1) on one mesh dimension and Replicate or Shard(0) on the others, got "
                f"{placement} on mesh dimension {number}{'; redistribute it first' if placement.is_partial() else ''}"
            )
    if len(split_by) != 1:
        listed = ", ".join(map(str, placements))
        raise ValueError(
            f"dtensor: wanted Shard(-1) on exactly one mesh dimension, got it on {len(split_by)} of ({listed})"
        )
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= dtensor.shape[-1]:
        raise ValueError(
            f"vocab_size: wanted an int in [1, {dtensor.shape[-1]}], dtensor's columns, got {vocab_size!r}"
        )
    shape, offset = compute_local_shape_and_global_offset(dtensor.shape, mesh, placements)
    start = offset[last]
    return dtensor.to_local(), VocabShard(start, start + shape[last], vocab_size, mesh.get_group(split_by[0]))


def find_tiling_fault(bounds: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with the (start, end, vocab_size) of all ranks, in rank order; None where they tile.

    A zero-width shard holds nothing, so it may sit anywhere.
    """
    listed = ", ".join(f"rank {rank}: [{start}, {end})" for rank, (start, end, _) in enumerate(bounds))
    sizes = [size for _, _, size in bounds]
    if len(set(sizes)) > 1:
        return f"vocab_size: wanted the same on every rank of tp_group, got {sizes} in rank order"
    covered = 0
    for start, end in sorted((start, end) for start, end, _ in bounds if end > start):
        if start != covered:
            what = "a gap" if start > covered else "an overlap"
            place = min(start, covered)
            return f"shard: wanted shards that tile [0, padded_vocab_size), got {what} at id {place}: {listed}"
        covered = end
    if covered < sizes[0]:
        return f"shard: wanted shards that cover [0, vocab_size = {sizes[0]}), got an end at {covered}: {listed}"
    return None
