"""What the linear_* functions accept: hidden states, the LM head, and how many rows of logits fit in the workspace.

Names, wants and gots as in arguments.py. Nothing here computes a logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from opd_engine.functional.agreement import check_together, describe_rows, fingerprint
from opd_engine.functional.arguments import check_device, check_temperature, debugging, reads_values, shape_choice
from opd_engine.parallel.collectives import all_gather_stacked
from opd_engine.parallel.tensors import refuse_distributed
from opd_engine.parallel.vocab import VocabShard

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Head:
    """An LM head, or this rank's rows of one."""

    weight: Tensor  # [vocab_shard_size, hidden_size]
    bias: Tensor | None  # [vocab_shard_size]
    softcap: float | None

    def row_bytes(self, vocab_size: int, tp_size: int, *, with_gradient: bool) -> int:
        """Workspace of one row: ceil(vocab_size / tp_size) logits, the same on every rank whatever its own width.

        A soft-cap's derivative is that at the logits before it, which then stay beside those after it.
        """
        copies = 2 if with_gradient and self.softcap is not None else 1
        return -(-vocab_size // tp_size) * self.weight.element_size() * copies


@dataclass(frozen=True)
class LinearRows:
    """What is known of checked hidden states, which a backward is not to keep alive, and the head.

    T counts the rows of all ranks under sequence parallelism.
    """

    leading_shape: torch.Size  # of the outputs
    num_rows: int  # T
    score_dtype: torch.dtype
    shard: VocabShard
    temperature: float
    row_temperature: Tensor | None  # [T], wins over temperature
    head: Head
    sequence_parallel: bool
    workspace_bytes: int

    def gather_hidden(self, hidden: Tensor) -> Tensor:
        """[T, hidden_size]: every rank's rows under sequence parallelism, else the same tensor.

        hidden: [rows of this rank, hidden_size]
        """
        if not self.sequence_parallel:
            return hidden
        return all_gather_stacked(hidden, self.shard.merge_group).flatten(0, 1)


@dataclass(frozen=True)
class LossRows:
    """Which rows a loss computes, and their weights."""

    num_rows: int  # T
    weights: Tensor  # [n], in the score dtype
    index: Tensor | None  # [n] int64; None: all rows, n = T

    @property
    def count(self) -> int:
        return self.weights.size(0)

    def take(self, tensor: Tensor, part: slice) -> Tensor:
        """Rows of a [T, ...] tensor; part counts those that are computed."""
        return tensor[self.where(part)]

    def where(self, part: slice) -> slice | Tensor:
        """Their numbers among the T rows."""
        return part if self.index is None else self.index[part]

    def spread(self, losses: Tensor) -> Tensor:
        """[T], 0 in rows that are not computed."""
        if self.index is None:
            return losses
        return losses.new_zeros(self.num_rows).index_copy_(0, self.index, losses)

    def description(self) -> dict[str, object]:
        """What must be the same on every rank, by argument."""
        return {"token_weights": describe_tensor(self.weights), "loss_rows": describe_tensor(self.index)}


def describe_tensor(tensor: Tensor | None) -> str | None:
    """What debug mode compares between ranks."""
    return None if tensor is None else f"shape {tuple(tensor.shape)}, hash {fingerprint(tensor)}"


def flat_rows(hidden: Tensor) -> Tensor:
    """[*, hidden_size] as [rows of this rank, hidden_size]; a copy only where strides leave no other way."""
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.size(-1))


def default_workspace_bytes(device: torch.device, tp_size: int) -> int:
    """64 MiB on a CPU, which a cache can hold the better part of; 1.25 GiB / tp_size on a GPU.

    There every chunk reads and writes the weight gradient's accumulator once: fewer rows than about 4,000 a chunk, and
    that traffic is more than a tenth of the matrix products.
    """
    return 64 << 20 if device.type == "cpu" else (1280 << 20) // tp_size


def check_linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    temperature: float | Tensor,
    shard: VocabShard | None,
    sequence_parallel: bool,
    workspace_bytes: int | None,
) -> LinearRows:
    """The rows and the head; shard=None means that the whole vocabulary is here. Raises ValueError."""
    head = check_head(hidden, weight, bias, logit_softcap)
    if shard is None:
        if weight.size(0) < 1:
            raise ValueError(f"weight: wanted at least one row, got shape {tuple(weight.shape)}")
        shard = VocabShard(0, weight.size(0), weight.size(0))
    elif not isinstance(shard, VocabShard):
        raise ValueError(f"shard: wanted a VocabShard or None, got {type(shard).__name__}")
    elif weight.size(0) != shard.local_vocab_size:
        raise ValueError(
            f"weight: wanted {shard.local_vocab_size} rows for the shard "
            f"[{shard.vocab_start_index}, {shard.vocab_end_index}), got {weight.size(0)}"
        )
    if not isinstance(sequence_parallel, bool):
        raise ValueError(f"sequence_parallel: wanted a bool, got {sequence_parallel!r}")
    leading_shape = hidden.shape[:-1]
    if sequence_parallel:
        if hidden.dim() < 2:
            raise ValueError(f"hidden: wanted [rows, ..., hidden_size] to split on dim 0, got {tuple(hidden.shape)}")
        leading_shape = torch.Size((hidden.size(0) * shard.tp_size, *hidden.shape[1:-1]))
    num_rows = math.prod(leading_shape)
    score_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scalar, row_temperature = check_temperature(temperature, hidden, leading_shape, num_rows, score_dtype)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden.device, shard.tp_size)
    elif isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: wanted an int >= 1 or None, got {workspace_bytes!r}")
    return LinearRows(
        leading_shape,
        num_rows,
        score_dtype,
        shard,
        scalar,
        row_temperature,
        head,
        sequence_parallel,
        workspace_bytes,
    )


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_softcap: float | None, prefix: str = ""
) -> Head:
    """Raise ValueError unless these multiply; prefix names the teacher's arguments."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{prefix}{name}: wanted a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{prefix}{name}: wanted float64, float32, bfloat16 or float16, got {tensor.dtype}")
        check_device(tensor, f"{prefix}{name}", hidden, f"{prefix}hidden")
        if tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{prefix}{name}: wanted {prefix}hidden's dtype, {hidden.dtype} (autocast is not applied), "
                f"got {tensor.dtype}"
            )
    if weight.dim() != 2:
        raise ValueError(f"{prefix}weight: wanted [vocab_shard_size, hidden_size], got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.size(-1) != weight.size(1):
        raise ValueError(f"{prefix}hidden: wanted [*, hidden_size = {weight.size(1)}], got shape {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias: wanted [vocab_shard_size = {weight.size(0)}], got shape {tuple(bias.shape)}")
    cap_name = f"{prefix}logit_softcap"
    if logit_softcap is not None:
        is_number = isinstance(logit_softcap, int | float) and not isinstance(logit_softcap, bool)
        if not (is_number and math.isfinite(logit_softcap) and logit_softcap > 0):
            raise ValueError(f"{cap_name}: wanted a finite number > 0 or None, got {logit_softcap!r}")
        logit_softcap = float(logit_softcap)
    return Head(weight, bias, logit_softcap)


def check_loss_rows(
    rows: LinearRows, hidden: Tensor, token_weights: Tensor | None, loss_rows: Tensor | None
) -> LossRows:
    """The rows to compute and their weights. Raises ValueError."""
    if token_weights is None:
        weights = torch.ones(rows.num_rows, dtype=rows.score_dtype, device=hidden.device)
    else:
        if not isinstance(token_weights, Tensor):
            raise ValueError(f"token_weights: wanted a tensor or None, got {type(token_weights).__name__}")
        if not token_weights.is_floating_point() and token_weights.dtype != torch.bool:
            raise ValueError(f"token_weights: wanted a floating or bool tensor, got {token_weights.dtype}")
        if token_weights.requires_grad:
            raise ValueError("token_weights: wanted constants, got a tensor that requires grad; use .detach()")
        check_device(token_weights, "token_weights", hidden, "hidden")
        if token_weights.shape not in (rows.leading_shape, (rows.num_rows,)):
            wanted = shape_choice(rows.leading_shape, rows.num_rows)
            raise ValueError(f"token_weights: wanted shape {wanted}, got {tuple(token_weights.shape)}")
        weights = token_weights.reshape(rows.num_rows).to(rows.score_dtype)
        if reads_values(weights):
            wrong = ~((weights >= 0) & weights.isfinite())
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"token_weights: wanted finite and >= 0, got {float(weights[row])} in row {row}")
    if loss_rows is None:
        return LossRows(rows.num_rows, weights.contiguous(), None)
    if not isinstance(loss_rows, Tensor) or loss_rows.dtype != torch.int64 or loss_rows.dim() != 1:
        got = (
            f"{loss_rows.dtype} {list(loss_rows.shape)}" if isinstance(loss_rows, Tensor) else type(loss_rows).__name__
        )
        raise ValueError(f"loss_rows: wanted int64 row numbers [n] or None, got {got}")
    if reads_values(loss_rows):
        outside = (loss_rows < 0) | (loss_rows >= rows.num_rows)
        if bool(outside.any()):
            raise ValueError(f"loss_rows: wanted rows in [0, T = {rows.num_rows}), got {int(loss_rows[outside][0])}")
        if loss_rows.unique().numel() != loss_rows.numel():
            raise ValueError("loss_rows: wanted distinct rows, got one twice")
    refuse_distributed(loss_rows, "loss_rows")
    index = loss_rows.to(hidden.device, non_blocking=True)
    return LossRows(rows.num_rows, weights[index], index)


def check_grad_scale(grad_scale: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless it is a scalar on the device, and the weight's main_grad can take what it scales."""
    if grad_scale is None:
        return
    if not isinstance(grad_scale, Tensor) or grad_scale.dim() != 0 or not grad_scale.is_floating_point():
        got = list(grad_scale.shape) if isinstance(grad_scale, Tensor) else repr(grad_scale)
        raise ValueError(f"grad_scale: wanted a floating tensor of shape [] or None, got {got}")
    if grad_scale.requires_grad:
        raise ValueError("grad_scale: wanted a constant, got a tensor that requires grad")
    check_device(grad_scale, "grad_scale", hidden, "hidden")
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError("grad_scale: wanted a weight with a main_grad to accumulate in, got one without")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if main_grad.dtype != wide:
        raise ValueError(f"grad_scale: wanted a main_grad of {wide} to accumulate in, got {main_grad.dtype}")


def agree_on_rows(
    shard: VocabShard | None,
    hidden: Tensor,
    check: Callable[[], tuple[LinearRows, _Result]],
    describe: Callable[[LinearRows, _Result], dict[str, object]],
) -> tuple[LinearRows, _Result]:
    """check_together for what every linear_* function takes; describe adds what else must be the same on every rank."""

    def same(checked: tuple[LinearRows, _Result]) -> dict[str, object]:
        rows, rest = checked
        described = describe_rows(rows)
        described["hidden"] = f"{described.pop('logits')}, {list(hidden.shape)} here"
        if debugging() and not rows.sequence_parallel:
            described["hidden"] += f", hash {fingerprint(hidden)}"
        described["logit_softcap"] = rows.head.softcap
        described["sequence_parallel"] = rows.sequence_parallel
        described["workspace_bytes"] = rows.workspace_bytes
        return {**described, **describe(rows, rest)}

    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    return check_together(shard, device, check, same)
