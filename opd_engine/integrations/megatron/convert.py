"""Hugging Face safetensors to a Megatron distributed checkpoint and back, a tensor at a time, without either framework.

One process, no GPU, no group: memory is a few times the largest tensor, whatever the model. A distributed checkpoint
knows no tensor- or pipeline-parallel size: one conversion serves every layout. The result is written aside, read back
and compared by hash, and only then takes its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.loading import TOKEN_MAP, check_distributed_checkpoint, read_index
from opd_engine.integrations.megatron.safetensors_stream import SafetensorsFolder, SafetensorsWriter, raw_bytes
from opd_engine.integrations.megatron.weight_map import (
    Piece,
    fill,
    piece_shape,
    pieces,
    source_shapes,
    taken_apart,
)
from opd_engine.parallel.tensor_files import TensorPiece, TensorReader, write_tensors
from opd_engine.whole_files import remove_leftovers, whole_or_absent

HASHES = "tensor_hashes.json"
"""In a converted checkpoint: {"tensors": {name in the Hugging Face folder: SHA-256 of its bytes}}."""
_IGNORED = ("rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".distcp", ".gguf")
_NOT_ABOUT_THE_MODEL = (HASHES, TOKEN_MAP, "metadata.json", ".metadata")
_TEXT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_MOVED = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was done. unchanged: tensors whose bytes are those the checkpoint was converted from; None where it does
    not say."""

    tensors: int
    tensor_bytes: int
    unchanged: int | None = None


def is_megatron(folder: str | Path) -> bool:
    """Whether the folder holds a distributed checkpoint."""
    return (Path(folder) / ".metadata").is_file()


def to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    moved: _MOVED | None = None,
) -> Conversion:
    """A Hugging Face folder as a distributed checkpoint, its config and tokenizer beside it.

    dtype: of the result; None keeps each tensor's
    overwrite: replace a target that is there, once the new one is whole
    moved: called with what is done ("write", "check"), the bytes it moved, and those there are to move

    Returns: what was done.
    Raises: ValueError, before anything is written, naming a tensor that is missing, unknown or of another shape, a
        target that is there, or a full disk; and where the result does not read back as it was written.
    """
    source, target = Path(source), Path(target)
    check_apart(target, source=source)
    shape = GPTShape.read(source, argument="source")
    folder = SafetensorsFolder(source, argument="source")
    _check_tensors(shape, folder, source)
    found = folder.tensors
    plan: dict[TensorPiece, tuple[Piece, tuple[str, ...]]] = {}
    for piece in pieces(shape):
        whole = dtype or found[piece.sources[0]][1]
        for part, names in _blocks(shape, piece, whole):
            plan[part] = (piece, names)
    size = sum(math.prod(found[name][0]) * part.dtype.itemsize for part, (_, names) in plan.items() for name in names)
    hashes: dict[str, str] = {}

    def produce(part: TensorPiece) -> Tensor:
        piece, names = plan[part]
        parts = [folder.read(name).to(part.dtype) for name in names]
        for name, tensor in zip(names, parts):
            hashes[name] = _hash(tensor)
        buffer = torch.empty(part.sizes, dtype=part.dtype)
        # The gate and the other half of its layer are stored apart, each as it is.
        fill(buffer.view(part.sizes[-2:] if buffer.dim() > 1 else -1), parts, _how(piece, names), shape)
        for tensor in parts:
            _tell(moved, "write", tensor, size)
        return buffer

    with _written_aside(target, size, overwrite) as aside:
        write_tensors(aside, list(plan), produce)
        (aside / "metadata.json").write_text(
            json.dumps(
                {
                    "sharded_backend": "torch_dist",
                    "sharded_backend_version": 1,
                    "common_backend": "torch",
                    "common_backend_version": 1,
                }
            ),
            encoding="utf-8",
        )
        torch.save({}, aside / "common.pt")
        _copy_texts(source, aside, dtype)
        checkpoint = _Checkpoint(aside, shape, argument="target")
        for piece in pieces(shape):
            for name, tensor in zip(piece.sources, checkpoint.parts(piece)):
                if _hash(tensor) != hashes[name]:
                    raise ValueError(f"target: {name} does not read back as it was written")
                _tell(moved, "check", tensor, size)
        (aside / HASHES).write_text(json.dumps({"tensors": hashes}, indent=1) + "\n", encoding="utf-8")
    return Conversion(len(hashes), size)


def to_hugging_face(
    source: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    moved: _MOVED | None = None,
) -> Conversion:
    """A distributed checkpoint as a Hugging Face folder: safetensors in shards with an index, config, tokenizer.

    like: folder whose config.json and tokenizer the result gets; None: they lie beside the checkpoint
    shard_bytes: most tensor bytes in a file. The rest, Returns and Raises as to_megatron.
    """
    source, target = Path(source), Path(target)
    check_apart(target, source=source, like=like)
    texts = Path(like) if like is not None else source
    if not (texts / "config.json").is_file():
        raise ValueError(
            f"{'like' if like is not None else 'source'}: wanted a config.json in {texts}, got none; "
            "name a Hugging Face folder of the same model as `like`"
        )
    shape = GPTShape.read(texts, argument="like" if like is not None else "source")
    check_distributed_checkpoint(source, argument="source")
    checkpoint = _Checkpoint(source, shape, argument="source")
    tensors = {
        name: (size, dtype or checkpoint.dtype(piece))
        for piece in pieces(shape)
        for name, size in zip(piece.sources, source_shapes(shape, piece))
    }
    size = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    hashes: dict[str, str] = {}

    def produced() -> Iterator[tuple[str, Tensor]]:
        for piece in pieces(shape):
            for name, tensor in zip(piece.sources, checkpoint.parts(piece)):
                tensor = tensor.to(tensors[name][1])
                hashes[name] = _hash(tensor)
                _tell(moved, "write", tensor, size)
                yield name, tensor

    with _written_aside(target, size, overwrite) as aside:
        SafetensorsWriter(aside, tensors, shard_bytes=shard_bytes).write(produced())
        _copy_texts(texts, aside, dtype)
        written = SafetensorsFolder(aside, argument="target")
        for name in tensors:
            tensor = written.read(name)
            if _hash(tensor) != hashes[name]:
                raise ValueError(f"target: {name} does not read back as it was written")
            _tell(moved, "check", tensor, size)
    known = _known_hashes(source)
    unchanged = None if known is None else sum(known.get(name) == value for name, value in hashes.items())
    return Conversion(len(hashes), size, unchanged)


class _Checkpoint:
    """A distributed checkpoint's tensors as a folder's, whatever stands before their names."""

    def __init__(self, folder: Path, shape: GPTShape, *, argument: str) -> None:
        self._shape, self._argument, self._folder = shape, argument, folder
        self._reader = TensorReader(folder, read_index(folder, argument=argument))
        self._tensors = self._reader.tensors
        first = next(pieces(shape)).key
        # Training checkpoints keep the model beside optimizer states of the same names.
        prefixes = sorted(
            (key.removesuffix(first) for key in self._tensors if key.endswith(first) and "optimizer" not in key),
            key=len,
        )
        if not prefixes:
            raise ValueError(f"{argument}: {folder} holds no {first}: no language model of Megatron's")
        self._prefix = prefixes[0]
        layers = {key for key in self._tensors if key.startswith(f"{self._prefix}decoder.layers.")}
        for piece in pieces(shape):
            self._place(piece)
            layers -= {self._prefix + piece.key, self._prefix + piece.name}
        if layers:
            raise ValueError(f"{argument}: {folder} has {min(layers)}, which no {shape.family} has")

    def _place(self, piece: Piece) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """(key, offsets, sizes) of the piece; checks that the checkpoint has it in this shape."""
        wanted = piece_shape(self._shape, piece)
        key, offsets, sizes = self._prefix + piece.key, (0,) * len(wanted), wanted
        lead: tuple[int, ...] = ()
        if piece.layer is not None and key in self._tensors:
            lead, offsets, sizes = (self._shape.num_layers,), (piece.layer, *offsets), (1, *sizes)
        elif piece.layer is not None:
            key = self._prefix + piece.name
        if key not in self._tensors:
            raise ValueError(f"{self._argument}: {self._folder} has no {key}, which {piece.sources[0]} is read from")
        found = self._tensors[key][0]
        if piece.how == "rows":
            # Padded to a multiple that depends on the tensor-parallel size it was trained with.
            wanted = (self._shape.vocab_size, wanted[1])
            if len(found) == 2 and found[0] >= wanted[0] and found[1] == wanted[1]:
                return key, offsets, wanted
        if found != (*lead, *wanted):
            raise ValueError(
                f"{self._argument}: {key}: wanted {[*lead, *wanted]} as config.json says, got {list(found)}"
            )
        return key, offsets, sizes

    def dtype(self, piece: Piece) -> torch.dtype:
        return self._tensors[self._place(piece)[0]][1]

    def parts(self, piece: Piece) -> list[Tensor]:
        key, offsets, sizes = self._place(piece)
        whole = self._reader.read(key, offsets, sizes)
        return taken_apart(
            whole[0] if len(sizes) > len(piece_shape(self._shape, piece)) else whole, piece.how, self._shape
        )


def _blocks(shape: GPTShape, piece: Piece, dtype: torch.dtype) -> list[tuple[TensorPiece, tuple[str, ...]]]:
    """How a checkpoint keeps the piece: one block, or the gate and its other half in two, as Megatron cuts them."""
    whole = piece_shape(shape, piece)
    first, lead = ((piece.layer, 1), (shape.num_layers,)) if piece.layer is not None else (None, ())
    spans = [(0, whole[0], piece.sources)]
    if piece.how == "gate":
        half = whole[0] // 2
        spans = [(side * half, half, (name,)) for side, name in enumerate(piece.sources)]
    found = []
    for start, rows, names in spans:
        offsets, sizes = (start, *(0 for _ in whole[1:])), (rows, *whole[1:])
        if first is not None:
            offsets, sizes = (first[0], *offsets), (first[1], *sizes)
        found.append((TensorPiece(piece.key, offsets, sizes, (*lead, *whole), dtype), names))
    return found


def _how(piece: Piece, names: tuple[str, ...]) -> str:
    return "whole" if piece.how == "gate" and len(names) == 1 else piece.how


def _check_tensors(shape: GPTShape, folder: SafetensorsFolder, source: Path) -> None:
    found = folder.tensors
    known: set[str] = set()
    for piece in pieces(shape):
        for name, wanted in zip(piece.sources, source_shapes(shape, piece)):
            known.add(name)
            if name not in found:
                raise ValueError(f"source: {source} has no {name}")
            if found[name][0] != wanted:
                raise ValueError(
                    f"source: {name}: wanted {list(wanted)} as config.json says, got {list(found[name][0])}"
                )
    # A tied head is sometimes written out; transformers reads the embedding in its place, and so do we.
    more = sorted(n for n in found if n not in known and n != "lm_head.weight" and not n.endswith(_IGNORED))
    if more:
        raise ValueError(f"source: {source} has {len(more)} tensors that no {shape.family} has: {', '.join(more[:3])}")


def check_apart(target: str | Path, **others: str | Path | None) -> None:
    """Refuse a target that is, holds, lies in or is linked to by a folder that is read: replacing it would destroy it.

    others: argument -> folder; None where there is none

    Raises: ValueError naming the two.
    """
    there = Path(target).resolve()
    for name, folder in others.items():
        if folder is None:
            continue
        here = Path(folder).resolve()
        files = [file.resolve() for file in here.rglob("*")] if here.is_dir() else []
        if here == there or here in there.parents or there in here.parents or any(there in f.parents for f in files):
            raise ValueError(
                f"target: wanted a folder apart from {name} {str(folder)!r}, got {str(target)!r}: the two are, hold or "
                "link to each other, so that writing the one would destroy the other"
            )


@contextlib.contextmanager
def _written_aside(target: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the target's name at the end, or leaves nothing behind."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: {target} is there already; wanted a new folder, or overwrite")
    if overwrite and target.is_dir() and not any((target / n).exists() for n in ("config.json", ".metadata")):
        raise ValueError(f"target: {target} holds no model; it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise ValueError(f"target: wanted {size:,} bytes free on the disk of {target.parent}, got {free:,}")
    remove_leftovers(target.parent, target.name)
    with whole_or_absent(target, replace=True) as aside:
        yield aside


def _copy_texts(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Config, generation config and tokenizer; no weights, no code."""
    for file in sorted(source.iterdir()):
        plain = file.suffix in _TEXT and not file.name.endswith(_WEIGHTS) and file.name not in _NOT_ABOUT_THE_MODEL
        if file.is_file() and plain:
            shutil.copyfile(file, target / file.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _known_hashes(folder: Path) -> dict[str, str] | None:
    if not (folder / HASHES).is_file():
        return None
    return json.loads((folder / HASHES).read_text(encoding="utf-8"))["tensors"]


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _tell(moved: _MOVED | None, what: str, tensor: Tensor, size: int) -> None:
    if moved is not None:
        moved(what, tensor.nbytes, size)
