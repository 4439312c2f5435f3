"""RolloutBatch -> what Megatron's forward takes: one packed stream (thd) or a padded batch, split over context ranks.

Padding lies at the end of a sequence or of the stream, where no real token attends to it, so that it needs no mask.
Each micro-batch knows which rows of the last stage's output are wanted, and which packed row each of them is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.parallel.sequences import CONTEXT_LAYOUTS, ContextLayout, take_rows

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from opd_engine.integrations.megatron.groups import MegatronGroups


@dataclass(frozen=True)
class BatchLayout:
    """How rollouts become micro-batches.

    packed: one stream without padding between sequences (thd, needs an attention that reads PackedSeqParams), or a
        right-padded batch
    context: "zigzag" or "allgather", the rows a context-parallel rank holds; it must be the attention's own
    max_tokens: tokens in a micro-batch, padding not counted; a longer sequence stands alone. None: no limit
    max_seqs: sequences in a micro-batch; None: no limit
    pad_to: a rank's rows of a micro-batch are padded to a multiple of this (fp8 wants 16)
    """

    packed: bool = True
    context: str = "zigzag"
    max_tokens: int | None = 8192
    max_seqs: int | None = None
    pad_to: int = 1

    def __post_init__(self) -> None:
        if self.context not in CONTEXT_LAYOUTS:
            raise ValueError(f"context: wanted one of {', '.join(CONTEXT_LAYOUTS)}, got {self.context!r}")
        for name in ("max_tokens", "max_seqs", "pad_to"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: wanted a whole number >= 1, got {value!r}")


@dataclass(frozen=True)
class MicroInput:
    """One micro-batch as this rank feeds it.

    batch: the whole micro-batch, on the host, the same on every tensor, pipeline and context rank
    input_ids, position_ids: [sequences, local length] int64 (one sequence if packed)
    packed_seq_params: for thd, else None
    output_rows: [n] int64, the wanted rows of the last stage's output, flattened as [local length, sequences]
    packed_rows: per context rank [n of that rank] int64, the packed row of each wanted row there; -1 for the one row
        that a rank without any takes, so that its graph is never empty
    global_length: rows of a sequence over all context ranks
    """

    batch: RolloutBatch
    input_ids: Tensor
    position_ids: Tensor
    packed_seq_params: PackedSeqParams | None
    output_rows: Tensor
    packed_rows: list[Tensor]
    global_length: int

    @property
    def num_wanted(self) -> list[int]:
        """Wanted rows of each context rank."""
        return [int((rows >= 0).sum()) for rows in self.packed_rows]


def micro_inputs(
    batches: Sequence[RolloutBatch],
    layout: BatchLayout,
    groups: MegatronGroups,
    device: torch.device | str,
    *,
    row_multiple: int = 1,
    same_shape: bool = False,
    wanted: Sequence[Tensor] | None = None,
) -> list[MicroInput]:
    """The micro-batches as this rank feeds them.

    row_multiple: a rank's rows divide by this (tp_size under sequence parallel)
    same_shape: pad all to one shape, which a pipeline needs whose stages do not exchange shapes
    wanted: per micro-batch [num_tokens] bool, the rows whose scores are asked for; default its loss_mask
    """
    context = layout.context if groups.cp_size > 1 else "allgather"  # one rank needs no sequence padded
    multiple = math.lcm(layout.pad_to, row_multiple, 2 if context == "zigzag" else 1)
    shapes = [_local_shape(batch, layout.packed, context, groups.cp_size, multiple) for batch in batches]
    if same_shape:
        shapes = [tuple(max(sizes) for sizes in zip(*shapes))] * len(shapes)
    masks = [batch.loss_mask for batch in batches] if wanted is None else wanted
    inputs = []
    for batch, (length, num_seqs), mask in zip(batches, shapes, masks):
        if layout.packed:
            columns, bounds = _packed_rows(batch, context, groups.cp_size, length)
        else:
            columns, bounds = _padded_rows(batch, context, groups.cp_size, length, num_seqs), None
        inputs.append(_micro_input(batch, columns, bounds, mask, groups.cp_rank, device))
    return inputs


def _local_shape(batch: RolloutBatch, packed: bool, context: str, cp_size: int, multiple: int) -> tuple[int, int]:
    """(rows of a sequence on one rank, sequences)."""
    if not packed:
        return _round_up(-(-max(batch.lengths()) // cp_size), multiple), batch.num_seqs
    return ContextLayout(context, cp_size, 0, multiple).owned_rows(batch.cu_seqlens).numel(), 1


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _packed_rows(batch: RolloutBatch, context: str, cp_size: int, length: int) -> tuple[list[Tensor], list[int]]:
    """Every context rank's packed rows [length, 1], and the bounds of the padded stream; what is left is a sequence."""
    columns = []
    for rank in range(cp_size):
        if context == "zigzag":
            own = ContextLayout(context, cp_size, rank).owned_rows(batch.cu_seqlens)
        else:
            own = torch.arange(rank * length, (rank + 1) * length)
            own = own.where(own < batch.num_tokens, -1)
        columns.append(torch.nn.functional.pad(own, (0, length - own.numel()), value=-1).unsqueeze(1))
    bounds = batch.cu_seqlens.tolist()
    if context == "zigzag":
        sizes = [_round_up(end - start, 2 * cp_size) for start, end in pairwise(bounds)]
        bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    total = length * cp_size
    return columns, bounds if bounds[-1] == total else [*bounds, total]


def _padded_rows(batch: RolloutBatch, context: str, cp_size: int, length: int, num_seqs: int) -> list[Tensor]:
    """Every context rank's packed rows [length, num_seqs]; sequences beyond the batch's are padding."""
    table = torch.full((length * cp_size, num_seqs), -1, dtype=torch.int64)
    table[batch.row_positions(), batch.row_sequence()] = torch.arange(batch.num_tokens)
    if context == "allgather":
        return list(table.chunk(cp_size))
    pieces = table.chunk(2 * cp_size)
    return [torch.cat([pieces[rank], pieces[2 * cp_size - 1 - rank]]) for rank in range(cp_size)]


def _micro_input(
    batch: RolloutBatch,
    columns: list[Tensor],
    bounds: list[int] | None,
    wanted: Tensor,
    cp_rank: int,
    device: torch.device | str,
) -> MicroInput:
    own = columns[cp_rank].flatten()
    output_rows, packed_rows = torch.zeros(1, dtype=torch.int64), []
    for rank, column in enumerate(columns):
        rows = column.flatten()
        here = take_rows(wanted, rows, fill=False).nonzero().flatten()
        packed_rows.append(rows[here] if here.numel() else torch.full((1,), -1, dtype=torch.int64))
        if rank == cp_rank and here.numel():
            output_rows = here
    shape = columns[cp_rank].shape

    def fed(values: Tensor) -> Tensor:
        return take_rows(values, own).view(shape).t().contiguous().to(device)

    return MicroInput(
        batch=batch,
        input_ids=fed(batch.tokens),
        position_ids=fed(batch.row_positions()),
        packed_seq_params=None if bounds is None else _packed_seq_params(bounds, device),
        output_rows=output_rows.to(device),
        packed_rows=packed_rows,
        global_length=shape[0] * len(columns),
    )


def _packed_seq_params(bounds: list[int], device: torch.device | str) -> PackedSeqParams:
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(bounds))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
