"""Tensors of torch's distributed checkpoints, written and read a piece at a time by one process, without any group.

Bound by the disk: what is held in memory is one piece. The index is read by the caller, who chooses which classes may
come out of a pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class TensorPiece:
    """A block of a tensor. offsets, sizes: of the block in the tensor of shape whole, as many as it has dimensions."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype


class _Produced(SavePlanner):
    """Asks for a piece when it is its turn to be written, and keeps none."""

    def __init__(self, pieces: Sequence[TensorPiece], produce: Callable[[TensorPiece], Tensor]) -> None:
        self._pieces = {_index(piece): piece for piece in pieces}
        self._produce = produce

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self._pieces[write_item.index]
        tensor = self._produce(piece)
        assert tensor.shape == piece.sizes and tensor.dtype == piece.dtype, (piece, tensor.shape, tensor.dtype)
        # What is saved is a tensor's storage: a view would bring all of it.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.whole),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        held: dict[str, TensorStorageMetadata] = {}
        for piece in self._pieces.values():
            properties = TensorProperties(dtype=piece.dtype)
            entry = held.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.whole), []))
            entry.chunks.append(_chunk(piece))
        return all_plans, Metadata(dict(held))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def write_tensors(
    directory: str | Path, pieces: Sequence[TensorPiece], produce: Callable[[TensorPiece], Tensor]
) -> None:
    """A distributed checkpoint of the pieces, which tile their tensors.

    produce: gives a piece's tensor on the CPU, contiguous; called once for each, in order
    Mutates: the folder, which exists.
    """
    writer, planner = FileSystemWriter(directory), _Produced(pieces, produce)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan(plans)
    results = writer.write_data(plan, planner)
    writer.finish(metadata, [results.wait()])


class _Into(LoadPlanner):
    """Everything that is read lands in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            view = view.narrow(dimension, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: Any) -> None: ...

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


class TensorReader:
    """Blocks of the tensors in a distributed checkpoint, however it cut them. metadata: its index, as it was read."""

    def __init__(self, directory: str | Path, metadata: Metadata) -> None:
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, True)
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Key -> (shape, dtype)."""
        return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in self._entries.items()}

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The block, on the CPU. Pieces that overlap it are read whole, one after the other.

        Raises: ValueError where the checkpoint's pieces do not fill the block.
        """
        entry = self._entries[key]
        target = torch.empty(tuple(sizes), dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        filled = sum(torch.Size(item.lengths).numel() for item in items)
        if filled != target.numel():
            raise ValueError(f"{key}: wanted {target.numel()} numbers at {list(offsets)}, its pieces hold {filled}")
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target


def _index(piece: TensorPiece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size(piece.offsets))


def _chunk(piece: TensorPiece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
