"""Safetensors folders a tensor at a time: read into memory of its own, written into shards planned beforehand.

Bound by the disk. Nothing is mapped, so that the memory a conversion takes is one tensor and can be measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_engine.teachers.checkpoint_files import INDEX, SINGLE, check_safetensors_folder, read_header

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


class SafetensorsFolder:
    """The tensors of a folder. Raises: ValueError naming what is missing, cut short, or of a dtype not known here."""

    def __init__(self, folder: str | Path, *, argument: str) -> None:
        places = check_safetensors_folder(folder, argument=argument)
        headers = {path: read_header(path, argument=argument) for path in set(places.values())}
        self._entries: dict[str, tuple[Path, dict[str, Any]]] = {
            name: (path, headers[path][name]) for name, path in places.items()
        }
        for name, (path, entry) in self._entries.items():
            if entry["dtype"] not in _TORCH:
                raise ValueError(
                    f"{argument}: {name} in {path}: wanted one of {', '.join(_TORCH)}, got {entry['dtype']}"
                )

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype)."""
        return {name: (tuple(e["shape"]), _TORCH[e["dtype"]]) for name, (_, e) in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        path, entry = self._entries[name]
        begin, end = entry["data_offsets"]
        tensor = torch.empty(entry["shape"], dtype=_TORCH[entry["dtype"]])
        with open(path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little") + begin)
            if tensor.numel() and file.readinto(raw_bytes(tensor)) != end - begin:
                raise ValueError(f"{path}: cut short while {name} was read")
        return tensor


class SafetensorsWriter:
    """Shards of a new folder, filled in the order in which the tensors were announced.

    tensors: name -> (shape, dtype), in order; shard_bytes: most tensor bytes in a file, one tensor at least
    """

    def __init__(
        self, folder: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, shard_bytes: int
    ) -> None:
        self._folder = Path(folder)
        shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = []
        held = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            if not shards or held + size > shard_bytes:
                shards.append({})
                held = 0
            shards[-1][name] = (shape, dtype)
            held += size
        self._tensors, self._shards = tensors, shards
        self._names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """All of them, in order. Mutates: the folder, which exists and gets an index where there are several shards."""
        given = iter(tensors)
        for file_name, shard in zip(self._names, self._shards):
            with open(self._folder / file_name, "wb") as file:
                file.write(_header(shard))
                for wanted, (shape, dtype) in shard.items():
                    name, tensor = next(given)
                    assert (name, tensor.shape, tensor.dtype) == (wanted, shape, dtype), (name, wanted)
                    file.write(raw_bytes(tensor))
        if len(self._shards) > 1:
            total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._tensors.values())
            places = {name: file for file, shard in zip(self._names, self._shards) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, shared."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    return len(text).to_bytes(8, "little") + text
