"""Models that take turns on one device: while one is there, the weights of all others are away.

Away is host memory, or, where the device is the host itself, a file. Bound by that link: a switch copies each way once,
of weights that nothing trains only the first time out. Storages are emptied and filled in place, so that whoever holds
a tensor (an optimizer, FSDP2, a tied name) holds it still.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from opd_engine.parallel.tensors import local_tensor


class Turns:
    """The one place on a device. Members come when they are asked for, and whoever is there leaves first."""

    def __init__(self) -> None:
        self._here: Member | None = None
        self._files = tempfile.TemporaryDirectory(prefix="opd-turns-")
        self._count = 0

    def add(self, tensors: Callable[[], Iterable[Tensor]], *, changes: bool) -> Member:
        """A further member, which leaves at once.

        tensors: all that it holds; asked whenever it leaves, since an optimizer's states come later
        changes: whether they are written while it is here: they are then copied out every time
        """
        self._count += 1
        member = Member(tensors, Path(self._files.name) / str(self._count), changes)
        member.leave()
        return member

    def bring(self, member: Member) -> None:
        """Have the member here, alone."""
        if self._here is not member:
            self.empty()
            member.come()
            self._here = member

    def empty(self) -> None:
        """Have nobody here."""
        if self._here is not None:
            self._here.leave()
            self._here = None

    @contextlib.contextmanager
    def turn(self, member: Member, *, leaves: bool) -> Iterator[None]:
        """The member here for the block. leaves: it goes at the end, also after an exception"""
        self.bring(member)
        try:
            yield
        finally:
            if leaves:
                self.empty()


class Member:
    """What one model holds, here or away. Made by Turns.add."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], folder: Path, changes: bool) -> None:
        self._tensors, self._folder, self._changes = tensors, folder, changes
        self._away: dict[int, tuple[torch.UntypedStorage, int, Tensor | Path]] = {}
        self.is_here = True
        for tensor in tensors():
            # Weights that a file was mapped for cannot give their memory back.
            if not local_tensor(tensor.detach()).untyped_storage().resizable():
                tensor.data = tensor.data.clone()

    @property
    def nbytes(self) -> int:
        """Bytes on the device now."""
        return sum(storage.nbytes() for storage in self._storages().values())

    def leave(self) -> None:
        """Copy out what may have changed, and give the memory back."""
        storages = self._storages()
        self._away = {key: held for key, held in self._away.items() if key in storages}
        for key, storage in storages.items():
            size = storage.nbytes()
            if size == 0:
                continue
            if self._changes or key not in self._away:
                self._away[key] = (storage, size, self._copy_out(key, storage))
            storage.resize_(0)
        self.is_here = False

    def come(self) -> None:
        for storage, size, held in self._away.values():
            storage.resize_(size)
            _bytes_of(storage).copy_(held, non_blocking=True) if isinstance(held, Tensor) else _read(held, storage)
        self.is_here = True

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors():
            storage = local_tensor(tensor.detach()).untyped_storage()
            found[storage._cdata] = storage
        return found

    def _copy_out(self, key: int, storage: torch.UntypedStorage) -> Tensor | Path:
        if storage.device.type != "cpu":
            held = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            return held.copy_(_bytes_of(storage))
        self._folder.mkdir(exist_ok=True)
        path = self._folder / str(key)
        with open(path, "wb") as file:
            file.write(_memory(storage))
        return path


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _read(path: Path, storage: torch.UntypedStorage) -> None:
    with open(path, "rb") as file:
        if file.readinto(_memory(storage)) != storage.nbytes():
            raise OSError(f"{path}: wanted {storage.nbytes()} bytes, the file is shorter")
