"""What a field of a batch runs along, declared where the field is: choosing, joining, moving and checks follow from it.

A new field cannot be forgotten by any of them: one that declares nothing is refused when its class is made.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BOUNDS, ROWS, SEQUENCES, EITHER = "bounds", "rows", "sequences", "either"
"""Where sequences begin; one entry a packed token; one a sequence; a mapping to tensors of either."""

DTYPES: dict[str, Callable[[torch.dtype], bool]] = {
    "int64": lambda dtype: dtype == torch.int64,
    "int32": lambda dtype: dtype == torch.int32,
    "bool": lambda dtype: dtype == torch.bool,
    "float": lambda dtype: dtype.is_floating_point,
}


def along(
    axis: str, dtype: str | None = None, *, width: bool = False, fill: float = 0, finite: bool = False, **default
):
    """A dataclass field.

    axis: what it runs along
    dtype: "int64", "int32", "bool", "float"; None for a list of anything
    width: whether a row has several entries, and `fill` what widens it where batches of other widths are joined
    finite: whether every value must be a finite number
    """
    metadata = {"axis": axis, "dtype": dtype, "width": width, "fill": fill, "finite": finite}
    return dataclasses.field(metadata=metadata, **default)


def require_declared(kind: type) -> type:
    """A class decorator: every field says what it runs along."""
    for field in dataclasses.fields(kind):
        assert "axis" in field.metadata, f"{kind.__name__}.{field.name}: declare it with `along`"
    return kind


def check_shape(field: dataclasses.Field, value: Any, num_tokens: int, num_seqs: int) -> None:
    """Shapes and dtypes only: no value is read. Raises: ValueError naming the field."""
    name, axis, dtype = field.name, field.metadata["axis"], field.metadata["dtype"]
    if value is None:
        return
    if axis == EITHER:
        for key, weights in value.items():
            if weights.dim() != 1 or weights.shape[0] not in (num_seqs, num_tokens):
                raise ValueError(
                    f"{name}[{key!r}]: wanted shape [{num_seqs}] (a weight a sequence) or [{num_tokens}] (a weight a "
                    f"row), got {list(weights.shape)}"
                )
        return
    size = {BOUNDS: num_seqs + 1, ROWS: num_tokens, SEQUENCES: num_seqs}[axis]
    unit = {BOUNDS: "num_seqs + 1", ROWS: "num_tokens", SEQUENCES: "num_seqs"}[axis]
    if dtype is None:
        if len(value) != size:
            raise ValueError(f"{name}: wanted {size} entries, one a sequence, got {len(value)}")
        return
    dims = 2 if field.metadata["width"] else 1
    if not isinstance(value, Tensor) or value.dim() != dims or not DTYPES[dtype](value.dtype):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        kind = {"float": "floating-point", "bool": "torch.bool"}.get(dtype, f"torch.{dtype}")
        shape = f"[{unit}={size}, k >= 1]" if dims == 2 else "one-dimensional"
        raise ValueError(f"{name}: wanted a {shape} {kind} tensor, got {got}")
    if value.shape[0] != size or (dims == 2 and value.shape[1] < 1):
        raise ValueError(
            f"{name}: wanted {unit}={size} entries, got {list(value.shape) if dims == 2 else value.shape[0]}"
        )


def moved(value: Any, device: torch.device | str) -> Any:
    """On another device, whatever holds it."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: moved(one, device) for name, one in value.items()}
    return [moved(one, device) for one in value] if isinstance(value, list) else value


def chosen(field: dataclasses.Field, value: Any, rows: Tensor, sequences: Tensor, num_tokens: int) -> Any:
    """The entries of some sequences: `rows` are theirs."""
    axis = field.metadata["axis"]
    if value is None:
        return None
    if axis == EITHER:
        # A batch whose sequences all have one token reads either way; both give the same rows.
        return {name: one[rows if one.shape[0] == num_tokens else sequences] for name, one in value.items()}
    if axis == ROWS:
        return value[rows]
    return value[sequences] if isinstance(value, Tensor) else [value[place] for place in sequences.tolist()]


def joined(field: dataclasses.Field, values: Sequence[Any], to_rows: Callable[[int, Tensor], Tensor]) -> Any:
    """The entries of several batches, one after the other; in all of them or in none.

    to_rows: (which batch, its weights) -> a weight a row
    """
    name, missing = field.name, sum(value is None for value in values)
    if missing == len(values):
        return None
    if field.metadata["axis"] == EITHER:
        names = {key for value in values for key in (value or {})}
        if any(set(value or {}) != names for value in values):
            raise ValueError(f"{name}: wanted {sorted(names)} in every batch")
        return {key: torch.cat([to_rows(i, value[key]) for i, value in enumerate(values)]) for key in sorted(names)}
    if missing:
        raise ValueError(f"{name}: present in {len(values) - missing} of {len(values)} batches, wanted all or none")
    if field.metadata["dtype"] is None:
        return [one for value in values for one in value]
    if field.metadata["width"]:
        width, fill = max(value.shape[1] for value in values), field.metadata["fill"]
        values = [torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values]
    return torch.cat(list(values))


def digest(value: Any) -> int:
    """A number of the content: equal values give equal numbers, on any device."""
    if isinstance(value, Tensor):
        head = f"{value.dtype} {list(value.shape)}".encode()
        return zlib.crc32(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(head))
    if isinstance(value, Mapping):
        return zlib.crc32(json.dumps([[str(name), digest(value[name])] for name in sorted(value)]).encode())
    if isinstance(value, (list, tuple)):
        return zlib.crc32(json.dumps([digest(one) for one in value]).encode())
    if callable(value):
        value = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return zlib.crc32(repr(value).encode())
