"""Weights, and only weights, from a checkpoint into host memory: no optimizer, scheduler or generator state is read.

Two kinds of folder: safetensors of a Qwen3 or Llama, of which each rank reads its own part, and Megatron's distributed
checkpoints. Both are checked before anything is loaded, and neither goes through a live model.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.weight_map import fill, sources
from opd_engine.teachers.checkpoint_files import check_safetensors_folder
from opd_engine.teachers.vocabularies import check_token_maps
from opd_engine.teachers.weight_store import WeightStore

METADATA = ".metadata"
TOKEN_MAP = "token_to_id.json"
"""Beside a distributed checkpoint, which has no tokenizer of its own: {token: id}."""


# Every class that torch and Megatron write into a checkpoint's metadata; none of them runs anything when it is made.
_KNOWN = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what torch's distributed checkpoints write of tensors, and refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def read_index(directory: str | Path, *, argument: str) -> Any:
    """The index of a distributed checkpoint: which tensors, and which bytes of which file hold them.

    Raises: ValueError where it does not read, or names a class that no index has.
    """
    path = Path(directory) / METADATA
    try:
        with open(path, "rb") as file:
            index = _MetadataUnpickler(file).load()
        if not all(isinstance(info.offset + info.length, int) for info in index.storage_data.values()):
            raise ValueError("wanted places in files")
    except Exception as error:
        raise ValueError(f"{argument}: {path} does not read ({error})") from error
    return index


def check_distributed_checkpoint(
    directory: str | Path, *, argument: str, token_map: Mapping[str, int] | None = None
) -> None:
    """Check that a distributed checkpoint is whole and speaks the student's tokens; reads no tensor.

    directory: as megatron.core.dist_checkpointing wrote it
    argument: what to call it in an error ("teacher 'math'")
    token_map: the student's; compared where the folder has a token_to_id.json

    Raises: ValueError naming the file that is missing, cut short or not what it should be, or the tokens that differ.
    """
    directory = Path(directory)
    for name in ("metadata.json", METADATA, "common.pt"):
        if not (directory / name).is_file():
            raise ValueError(f"{argument}: wanted {name} in {directory}, got none: no whole distributed checkpoint")
    index = read_index(directory, argument=argument)
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    missing = sorted(name for name in ends if not (directory / name).is_file())
    if missing:
        raise ValueError(
            f"{argument}: {len(missing)} of {len(ends)} shards missing in {directory}: {', '.join(missing[:5])}"
        )
    for name, end in sorted(ends.items()):
        if (size := (directory / name).stat().st_size) < end:
            raise ValueError(f"{argument}: {directory / name} is cut short: wanted {end} bytes, got {size}")
    if token_map is not None and (directory / TOKEN_MAP).is_file():
        try:
            own = json.loads((directory / TOKEN_MAP).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{argument}: {directory / TOKEN_MAP} does not read ({error})") from error
        check_token_maps(token_map, own, teacher_name=argument)


def is_distributed_checkpoint(directory: str | Path) -> bool:
    """Whether the folder is one of Megatron's, rather than of safetensors."""
    return (Path(directory) / METADATA).is_file() or not (Path(directory) / "config.json").is_file()


def check_checkpoint(directory: str | Path, *, argument: str, token_map: Mapping[str, int] | None = None) -> None:
    """Refuse a checkpoint of either kind that is not whole, before training starts. Raises: ValueError, by name."""
    if is_distributed_checkpoint(directory):
        check_distributed_checkpoint(directory, argument=argument, token_map=token_map)
    else:
        check_safetensors_folder(directory, argument=argument)


def read_weights(
    directory: str | Path,
    module: torch.nn.Module,
    buffers: Mapping[str, Tensor],
    groups: MegatronGroups,
    *,
    argument: str,
) -> None:
    """This rank's weights out of a checkpoint, written into buffers of the module's names and shapes.

    module: tells names and places; its own tensors are neither read nor written
    Raises: ValueError naming what is missing or of another shape.
    Communicates: for a distributed checkpoint, its reader's own.
    Mutates: buffers.
    """
    if is_distributed_checkpoint(directory):
        _read_distributed(Path(directory), module, buffers, argument)
        return
    from safetensors import safe_open

    shape = GPTShape.read(directory, argument=argument)
    places = check_safetensors_folder(directory, argument=argument)
    open_files: dict[Path, Any] = {}
    for name, piece in sources(module, shape):
        parts = piece.sources
        lost = [part for part in parts if part not in places]
        if lost:
            raise ValueError(f"{argument}: {directory} has no {lost[0]}, which {name} is made of")
        for part in parts:
            if places[part] not in open_files:
                open_files[places[part]] = safe_open(places[part], framework="pt")
        slices = [open_files[places[part]].get_slice(part) for part in parts]
        try:
            fill(buffers[name], slices, piece.how, shape, groups.tp_rank, groups.tp_size)
        except (RuntimeError, IndexError) as error:
            sizes = [list(piece.get_shape()) for piece in slices]
            raise ValueError(
                f"{argument}: {', '.join(parts)} of shapes {sizes} do not make {name} {list(buffers[name].shape)}"
            ) from error


def load_module(module: torch.nn.Module, directory: str | Path, groups: MegatronGroups, *, argument: str) -> None:
    """A module of its own, filled in place: an inference-only teacher, or the student before anything wraps it."""
    buffers = {name: parameter.detach() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        read_weights(directory, module, buffers, groups, argument=argument)


def load_set(
    weights: WeightStore,
    tag: str,
    module: torch.nn.Module,
    directory: str | Path,
    groups: MegatronGroups,
    *,
    argument: str,
) -> None:
    """A set of weights for the live module, read into the store's host buffers; the live module is untouched."""
    buffers = weights.host_buffers()
    for name, buffer in module.named_buffers():
        buffers[name].copy_(buffer)
    read_weights(directory, module, buffers, groups, argument=argument)
    weights.load(tag, buffers)


def save_weights(module: torch.nn.Module, directory: str | Path, *, token_map: Mapping[str, int] | None = None) -> None:
    """A distributed checkpoint of the weights alone, and the token map beside it. Every rank calls.

    Raises: ValueError where psutil is missing: Megatron's writers would die of it, and the ranks wait for them.
    Mutates: the folder, which must be empty.
    """
    from megatron.core import dist_checkpointing

    if importlib.util.find_spec("psutil") is None:
        raise ValueError("save_weights: Megatron's checkpoint writers need the package psutil, which is not installed")

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(module.sharded_state_dict(), str(directory))
    if token_map is not None:
        (directory / TOKEN_MAP).write_text(json.dumps(dict(token_map)), encoding="utf-8")


def _read_distributed(directory: Path, module: torch.nn.Module, buffers: Mapping[str, Tensor], argument: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    check_distributed_checkpoint(directory, argument=argument)
    wanted = {}
    for name, entry in module.sharded_state_dict().items():
        if isinstance(entry, ShardedObject):
            continue  # extra state travels pickled; the live model's own stands in
        # The reader writes into `data`: left as it is, that would be the live model.
        entry.data = torch.empty_like(entry.data, device="cpu")
        wanted[name] = entry
    try:
        found = dist_checkpointing.load(wanted, str(directory))
    except Exception as error:
        raise ValueError(f"{argument}: {directory} does not hold this model: {error}") from error
    for name, buffer in buffers.items():
        if name not in found:
            if name in dict(module.named_buffers()):
                continue
            raise ValueError(f"{argument}: {directory} has no {name}")
        buffer.copy_(found[name])
