"""What the public functions accept: every argument checked here, with the name, what was wanted and what came.

Shapes, dtypes and devices are always checked. Values are checked where that costs no synchronisation (Python numbers,
CPU tensors of one number a row); debug mode checks the rest, and then on all ranks of a tensor-parallel group together.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opd_engine.ops import DIVERGENCES, TAIL_MODES, debug_enabled
from opd_engine.parallel.tensors import refuse_distributed
from opd_engine.parallel.vocab import VocabShard

_LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORE_INDEX = -100  # what labels hold, in torch's cross_entropy and in transformers, where a row has none
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LogitRows(NamedTuple):
    """Checked logits and what is needed to read them: the arguments that all row ops share."""

    logits: Tensor  # [*, vocab_shard_size], at least 2-D
    leading_shape: torch.Size
    num_rows: int
    score_dtype: torch.dtype
    shard: VocabShard
    temperature: float
    row_temperature: Tensor | None  # [num_rows], wins over temperature


_cached_shard = functools.lru_cache(maxsize=64)(VocabShard)


def debugging() -> bool:
    """Whether debug mode is on; never while a graph is traced, whose checks could not read a value."""
    return not torch.compiler.is_compiling() and debug_enabled()


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, where it costs no synchronisation, or under debug.

    Never while a graph is traced, nor in a tensor that has none (torch's FakeTensor, by which memory is counted).
    """
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" or debugging()


def check_logits(logits: Tensor, name: str) -> None:
    """Raise ValueError unless these are floating [*, V] rows that the kernels can walk."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name}: wanted a tensor [*, vocab], got {type(logits).__name__}")
    refuse_distributed(logits, name, "opd_engine.local_logits(dtensor, vocab_size) gives its columns and VocabShard")
    if logits.dtype not in _LOGIT_DTYPES:
        raise ValueError(f"{name}: wanted float64, float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() < 1:
        raise ValueError(f"{name}: wanted rank >= 1, [*, vocab], got a tensor of rank 0")
    if logits.size(-1) > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name}: wanted a last dimension of stride 1 (leading strides are free), got strides "
            f"{tuple(logits.stride())} for shape {tuple(logits.shape)}; call .contiguous() if the copy is acceptable"
        )


def check_rows(
    logits: Tensor, temperature: float | Tensor, shard: VocabShard | None, *, name: str = "logits"
) -> LogitRows:
    """The checked logits of one shard; shard=None means that the whole vocabulary is here."""
    check_logits(logits, name)
    if shard is None:
        if logits.size(-1) < 1:
            raise ValueError(f"{name}: wanted at least one column, got shape {tuple(logits.shape)}")
        # A traced graph would warn of the cache.
        make = VocabShard if torch.compiler.is_compiling() else _cached_shard
        shard = make(0, logits.size(-1), logits.size(-1))
    elif not isinstance(shard, VocabShard):
        raise ValueError(f"shard: wanted a VocabShard or None, got {type(shard).__name__}")
    elif logits.size(-1) != shard.local_vocab_size:
        raise ValueError(
            f"{name}: wanted {shard.local_vocab_size} columns for the shard "
            f"[{shard.vocab_start_index}, {shard.vocab_end_index}), got {logits.size(-1)}"
        )
    leading_shape = logits.shape[:-1]
    num_rows = math.prod(leading_shape)
    score_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scalar, row_temperature = check_temperature(temperature, logits, leading_shape, num_rows, score_dtype)
    rows = logits if logits.dim() >= 2 else logits.unsqueeze(0)
    return LogitRows(rows, leading_shape, num_rows, score_dtype, shard, scalar, row_temperature)


def _wrong_temperature(value: float, score_dtype: torch.dtype) -> str:
    least = torch.finfo(score_dtype).tiny
    if not (value > 0 and math.isfinite(value)):
        return f"temperature: wanted finite and > 0, got {value}"
    return (
        f"temperature: wanted within [{least:.3g}, {1 / least:.3g}], where it and its inverse are normal numbers of "
        f"the scores' {score_dtype}, got {value}"
    )


def check_temperature(
    temperature: float | Tensor, logits: Tensor, leading_shape: torch.Size, num_rows: int, score_dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """(the number, None) or (1, one a row, [num_rows]); logits are what it must share a device with."""
    least = torch.finfo(score_dtype).tiny
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise ValueError(f"temperature: wanted a floating tensor, got {temperature.dtype}")
        if temperature.requires_grad:
            raise ValueError("temperature: wanted a constant, got a tensor that requires grad")
        check_device(temperature, "temperature", logits)
        if temperature.dim() == 0:
            temperature = temperature.expand(num_rows)
        elif temperature.shape != leading_shape and temperature.shape != (num_rows,):
            raise ValueError(
                f"temperature: wanted a number or one per row, {shape_choice(leading_shape, num_rows)}, "
                f"got shape {tuple(temperature.shape)}"
            )
        # float64 keeps a temperature that float32 scores would round; half precision is widened.
        wide = temperature.dtype if temperature.dtype == torch.float64 else score_dtype
        rows = temperature.reshape(num_rows).to(wide).contiguous()
        if reads_values(rows):
            wrong = ~((rows >= least) & (rows <= 1 / least))
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"{_wrong_temperature(float(temperature.reshape(-1)[row]), score_dtype)} in row {row}")
        return 1.0, rows
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError(f"temperature: wanted a float or a tensor, got {type(temperature).__name__}")
    if not least <= temperature <= 1 / least:
        raise ValueError(_wrong_temperature(temperature, score_dtype))
    return float(temperature), None


def check_ids(
    ids: Tensor, name: str, logits: Tensor, rows: LogitRows, *, per_row: bool, distinct: bool = False
) -> Tensor:
    """The ids as int64, [T, k] where per_row, else targets [T], whose -100 becomes -1.

    Under debug they are in range, and distinct within a row.
    """
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name}: wanted an integer tensor, got {type(ids).__name__}")
    if ids.dtype not in _ID_DTYPES:
        raise ValueError(f"{name}: wanted an integer dtype, got {ids.dtype}")
    check_device(ids, name, logits)
    shape = ids.shape[:-1] if per_row else ids.shape
    if (per_row and ids.dim() < 1) or (shape != rows.leading_shape and shape != (rows.num_rows,)):
        wanted = shape_choice(rows.leading_shape, rows.num_rows, "k" if per_row else None)
        raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(ids.shape)}")
    flat = ids.reshape(rows.num_rows, ids.size(-1)) if per_row else ids.reshape(rows.num_rows)
    flat = flat.to(torch.int64).contiguous()
    if not per_row:
        flat = flat.masked_fill(flat == IGNORE_INDEX, -1)
    if debugging():
        _check_id_values(flat if per_row else flat.unsqueeze(1), name, rows.shard.vocab_size, distinct)
    return flat


def _check_id_values(ids: Tensor, name: str, vocab_size: int, distinct: bool) -> None:
    outside = (ids < -1) | (ids >= vocab_size)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: wanted ids in [0, vocab_size = {vocab_size}) or -1 for an absent one, "
            f"got {int(ids[row, column])} in row {row}"
        )
    if distinct and ids.size(1) > 1:
        ordered = ids.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(twice.any()):
            row, column = twice.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: wanted distinct ids in a row, got {int(ordered[row, column])} twice in row {row}"
            )


def check_device(tensor: Tensor, name: str, reference: Tensor, reference_name: str = "the logits") -> None:
    """Raise ValueError where two tensors that must meet live on different devices, or the first on many."""
    refuse_distributed(tensor, name)
    if tensor.device != reference.device:
        raise ValueError(f"{name}: wanted the device of {reference_name}, {reference.device}, got {tensor.device}")


def shape_choice(leading_shape: torch.Size, num_rows: int, last: str | None = None) -> str:
    """How an error says "flat or shaped"."""
    tail = [] if last is None else [last]
    shaped, flat = ([*map(str, leading_shape), *tail], [str(num_rows), *tail])
    choices = [f"[{', '.join(choice)}]" for choice in (shaped, flat)]
    return choices[0] if shaped == flat else f"{choices[0]} or flat {choices[1]}"


def check_divergence(divergence: object, beta: object, alpha: object) -> None:
    """Raise ValueError for a name that is not one of the five, or for the parameter that it uses."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: wanted one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence == "jsd" and not (_is_number(beta) and 0 <= beta <= 1):
        raise ValueError(f"beta: wanted 0 <= beta <= 1 for jsd, got {beta!r}")
    if divergence in ("skew_forward_kl", "skew_reverse_kl") and not (_is_number(alpha) and 0 <= alpha < 1):
        raise ValueError(f"alpha: wanted 0 <= alpha < 1 for {divergence}, got {alpha!r}")


def check_tail_mode(tail: object, teacher_log_prob_min: object) -> None:
    """Raise ValueError for an unknown tail mode or a floor that is no log-probability."""
    if tail not in TAIL_MODES:
        raise ValueError(f"tail: wanted one of {', '.join(TAIL_MODES)}, got {tail!r}")
    if teacher_log_prob_min is not None and not (_is_number(teacher_log_prob_min) and teacher_log_prob_min <= 0):
        raise ValueError(f"teacher_log_prob_min: wanted a log-probability <= 0 or None, got {teacher_log_prob_min!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_inplace_backward(logits: Tensor, name: str) -> bool:
    """Whether the gradient may take the logits' own memory.

    Returns: False where nothing requires grad, and under torch.compile, which plans the memory itself.
    Raises: ValueError for a leaf, a view of a leaf, or logits with two elements at one address.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if logits.is_leaf:
        raise ValueError(
            f"inplace_backward: wanted {name} that an operation computed, got a leaf, whose values it would destroy"
        )
    if logits._is_view() and logits._base is not None and logits._base.is_leaf:
        raise ValueError(
            f"inplace_backward: wanted {name} that an operation computed, got a view of a leaf, whose values it would "
            "destroy"
        )
    if _rows_overlap(logits):
        raise ValueError(
            f"inplace_backward: wanted every element of {name} at an address of its own, got shape "
            f"{tuple(logits.shape)} with strides {tuple(logits.stride())}"
        )
    return True


def _rows_overlap(logits: Tensor) -> bool:
    """Exact: whether two elements share an address. The last dimension is known to have stride 1."""
    width = logits.size(-1)
    steps = sorted(
        (stride, size) for stride, size in zip(logits.stride()[:-1], logits.shape[:-1], strict=True) if size > 1
    )
    if logits.numel() == 0:
        return False
    reach = width
    for stride, size in steps:
        if stride < reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    # Strides that interleave may still be disjoint: compare the rows' addresses themselves.
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, size in steps:
        starts = (starts.unsqueeze(1) + torch.arange(size) * stride).flatten()
    return bool((starts.sort().values.diff() < width).any())
