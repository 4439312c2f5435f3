"""Whether a folder's safetensors files are whole, from their headers alone: no tensor is read, nothing is unpickled.

A missing shard, a file that a full disk cut short and an index that names what no file holds are all found before
anything is loaded, in milliseconds, whatever the size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound on a header."""
_ITEM_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def check_safetensors_folder(folder: str | Path, *, argument: str) -> dict[str, Path]:
    """Check a checkpoint's files; what it promises is there and is as long as it says.

    folder: with model.safetensors, or with an index and its shards
    argument: what to call the checkpoint in an error ("teacher 'math'")

    Returns: tensor name -> the file that holds it.
    Raises:
        ValueError: naming the file: none there, a shard missing, cut short, too long, a header that does not read,
            or a tensor that the index names and its shard lacks.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{argument}: wanted {SINGLE} or {INDEX} in {folder}, got neither")
        return dict.fromkeys(read_header(folder / SINGLE, argument=argument), folder / SINGLE)
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{argument}: {folder / INDEX} does not read as an index ({error})") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{argument}: {folder / INDEX} names {shard!r}, wanted a file beside it")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{argument}: {len(missing)} of {len(shards)} shards missing in {folder}: {', '.join(missing[:5])}"
        )
    held = {shard: read_header(folder / shard, argument=argument) for shard in shards}
    for name, shard in listed.items():
        if name not in held[shard]:
            raise ValueError(f"{argument}: {INDEX} promises {name} in {shard}, which does not hold it")
    return {name: folder / shard for name, shard in listed.items()}


def read_header(path: str | Path, *, argument: str) -> dict[str, dict[str, Any]]:
    """The header of one safetensors file: tensor name -> {"dtype", "shape", "data_offsets"}.

    Raises: ValueError naming the file where its length is not what the header says, or the header does not read.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{argument}: {path} is cut short or no safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        for name, entry in header.items():
            _check_span(name, entry)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: the header of {path} does not read ({error})") from error
    wanted = 8 + length + max((end for _, end in spans.values()), default=0)
    if size != wanted:
        raise ValueError(
            f"{argument}: {path} is {'cut short' if size < wanted else 'too long'}: wanted {wanted} bytes, got {size}"
        )
    return header


def _check_span(name: str, entry: dict[str, Any]) -> None:
    begin, end = entry["data_offsets"]
    count = math.prod(entry["shape"])
    kind = entry["dtype"]
    bits = _ITEM_BITS.get(kind) or 8 * _ITEM_BYTES.get(kind, 0)
    if begin < 0 or end < begin or (bits and (end - begin) * 8 != count * bits):
        raise ValueError(f"{name}: {kind} {entry['shape']} does not fill bytes {begin} to {end}")
