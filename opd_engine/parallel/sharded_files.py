"""Named tensors of all ranks on disk, each rank its part, readable on any number of ranks (torch's DCP).

Bound: the disk, behind training: states are copied to host memory, and written while the caller goes on.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta

from opd_engine.parallel.collectives import all_gather_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CPU = torch.device("cpu")


class FileWriter:
    """Writes beside what the ranks do, in a thread and with a group of its own.

    group: ranks that write together, None for this process alone
    replicas: ranks of which only the first writes, and which wait for it; None for none
    Communicates: sets up another group of the writing ranks.
    """

    def __init__(self, group: ProcessGroup | None, *, replicas: ProcessGroup | None = None) -> None:
        # Asked here, where training talks: the writer's own group may be in the middle of a checkpoint.
        self._asked, self._group = (group, replicas), None
        if group is not None and group.size() > 1:
            ranks = dist.get_process_group_ranks(group)
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def start(self, folder: Path | None, tensors: dict[str, Tensor], then: Callable[[], None]) -> PendingFiles:
        """Copy the tensors and begin to write them; `then` runs in the thread, after them, on this rank.

        folder: None where another rank writes the same
        tensors: distributed ones by all ranks; one that a single rank holds under a name of its own is written by it
        """
        copies = {name: _copied(tensor) for name, tensor in tensors.items() if folder is not None}

        def write() -> None:
            if folder is not None:
                with _quiet(), _told_by_the_system():
                    dcp.save(copies, checkpoint_id=str(folder), **_ranks(self._group))
            then()

        return PendingFiles(self._pool.submit(write), self._asked)


class PendingFiles:
    """Implements PendingSave over the ranks of a writer and their replicas."""

    def __init__(self, future: Future, groups: tuple[ProcessGroup | None, ...]) -> None:
        self._future, self._groups = future, groups

    def is_done(self) -> bool:
        """Whether every rank's part is on disk. Raises: what writing raised, on every rank."""
        done = self._future.done()
        for group in self._groups:
            done = all(all_gather_json(done, group, _CPU))
        if done:
            self.wait()
        return done

    def wait(self) -> None:
        """Until it is. Communicates: every rank's failure, if any."""
        error = self._future.exception()
        told = None if error is None else f"{type(error).__name__}: {error}"
        for group in self._groups:
            told = next((text for text in all_gather_json(told, group, _CPU) if text is not None), None)
        if error is not None:
            raise error
        if told is not None:
            raise OSError(f"another rank could not write its part of a checkpoint: {told}")


def read_files(folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Fill the tensors from the folder, whatever ranks wrote it. Mutates: the tensors."""
    with _quiet():
        dcp.load(tensors, storage_reader=_Reader(str(folder)), **_ranks(group))


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> whole shape and dtype of the tensors that a folder holds."""
    found = _Reader(str(folder)).read_metadata().state_dict_metadata
    return {name: (held.size, held.properties.dtype) for name, held in found.items()}


class _Reader(dcp.FileSystemReader):
    """torch's, but for its unpickling of whatever the list of contents names: nothing but such lists is made."""

    def read_metadata(self, *args, **kwargs):
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            metadata = _ContentsUnpickler(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _ContentsUnpickler(pickle.Unpickler):
    _NAMES = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")})
    _ROOMS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NAMES or (module in self._ROOMS and name in _CONTENTS):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"wanted the contents of a checkpoint, got {module}.{name}")


# What the lists of torch 2.10 to 2.13 are made of.
_CONTENTS = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
    "_StoragePrefix",
)


def _ranks(group: ProcessGroup | None) -> dict:
    return {"no_dist": True} if group is None or group.size() == 1 else {"process_group": group}


@contextlib.contextmanager
def _told_by_the_system() -> Iterator[None]:
    """torch reports a full disk as a wrong position in a file; what the system said lies behind that."""
    try:
        yield
    except dcp.CheckpointException as failed:
        for error, _ in failed.failures.values():
            while error is not None and not isinstance(error, OSError):
                error = error.__cause__ or error.__context__
            if error is not None:
                raise error from failed
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _copied(tensor: Tensor) -> Tensor:
    """On the host, apart from what trains."""
    return tensor.detach().to("cpu", copy=True)
