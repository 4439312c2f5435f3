"""Which rows of a packed batch a context-parallel rank owns, and which token each row predicts.

Layouts: zigzag (every sequence in 2 x cp_size chunks, rank r owning chunks r and 2 x cp_size - 1 - r) and allgather
(the packed stream in cp_size contiguous blocks). Row i predicts packed token i + 1, also where that token lives on
another rank; the last row of a sequence predicts nothing. Index mathematics only: nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

CONTEXT_LAYOUTS = ("zigzag", "allgather")


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int | None = None) -> list[int]:
    """The boundaries as Python ints.

    cu_seqlens: [num_seqs + 1], integer, starts at 0, never falls; its last entry is num_tokens where that is given
    Raises: ValueError naming what is not so. It reads the tensor on the host.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: wanted a tensor [num_seqs + 1], got {got}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: wanted int32 or int64, got {cu_seqlens.dtype}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: wanted a first entry of 0, got {bounds[0]}")
    for position, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens: wanted entries that never fall, got {start} then {end} at {position + 1}")
    if num_tokens is not None and bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens: wanted a last entry of num_tokens = {num_tokens}, got {bounds[-1]}")
    return bounds


def next_token_rows(cu_seqlens: Tensor) -> Tensor:
    """The packed row of the token that each row predicts.

    cu_seqlens: [num_seqs + 1], integer
    Returns: [num_tokens] int64: i + 1, or -1 in the last row of every sequence.
    """
    bounds = check_cu_seqlens(cu_seqlens)
    rows = torch.arange(1, bounds[-1] + 1)
    # An empty sequence ends where the one before it does: its "last row" is then already -1, or does not exist.
    rows[[end - 1 for start, end in pairwise(bounds) if end > start]] = -1
    return rows.to(cu_seqlens.device)


def sequence_of_rows(cu_seqlens: Tensor) -> Tensor:
    """The sequence each packed row belongs to. Returns: [num_tokens] int64."""
    bounds = check_cu_seqlens(cu_seqlens)
    lengths = torch.tensor(bounds[1:], dtype=torch.int64) - torch.tensor(bounds[:-1], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(cu_seqlens.device)


@dataclass(frozen=True)
class ContextLayout:
    """How cp_size ranks share the rows of a packed batch.

    layout: "zigzag" or "allgather"; cp_size >= 1; 0 <= cp_rank < cp_size
    pad_multiple: >= 1; under allgather the packed stream is padded to a multiple of cp_size x pad_multiple, under
        zigzag every sequence is padded to 2 x cp_size equal chunks and each rank's rows to a multiple of pad_multiple
    Raises: ValueError for anything else.
    """

    layout: str = "zigzag"
    cp_size: int = 1
    cp_rank: int = 0
    pad_multiple: int = 1

    def __post_init__(self) -> None:
        if self.layout not in CONTEXT_LAYOUTS:
            raise ValueError(f"layout: wanted one of {', '.join(CONTEXT_LAYOUTS)}, got {self.layout!r}")
        if self.cp_size < 1:
            raise ValueError(f"cp_size: wanted >= 1, got {self.cp_size}")
        if not 0 <= self.cp_rank < self.cp_size:
            raise ValueError(f"cp_rank: wanted 0 <= cp_rank < cp_size = {self.cp_size}, got {self.cp_rank}")
        if self.pad_multiple < 1:
            raise ValueError(f"pad_multiple: wanted >= 1, got {self.pad_multiple}")

    def owned_rows(self, cu_seqlens: Tensor) -> Tensor:
        """The packed row behind each local row, in local order.

        cu_seqlens: [num_seqs + 1] of the whole packed batch, the same on every rank
        Returns: [num_local_rows] int64; -1 marks a row that is only padding. num_local_rows is the same on every rank.
        """
        bounds = check_cu_seqlens(cu_seqlens)
        rows = self._zigzag_rows(bounds) if self.layout == "zigzag" else self._allgather_rows(bounds[-1])
        return rows.to(cu_seqlens.device)

    def _zigzag_rows(self, bounds: list[int]) -> Tensor:
        pieces = [torch.empty(0, dtype=torch.int64)]
        for start, end in pairwise(bounds):
            chunk = -(-(end - start) // (2 * self.cp_size))
            for index in (self.cp_rank, 2 * self.cp_size - 1 - self.cp_rank):
                rows = torch.arange(start + index * chunk, start + (index + 1) * chunk)
                pieces.append(torch.where(rows < end, rows, -1))
        rows = torch.cat(pieces)
        return torch.cat((rows, rows.new_full((-rows.numel() % self.pad_multiple,), -1)))

    def _allgather_rows(self, num_tokens: int) -> Tensor:
        block = -(-num_tokens // (self.cp_size * self.pad_multiple)) * self.pad_multiple
        rows = torch.arange(self.cp_rank * block, (self.cp_rank + 1) * block)
        return torch.where(rows < num_tokens, rows, -1)


def take_rows(packed: Tensor, rows: Tensor, *, fill: float | int | bool = 0) -> Tensor:
    """The rows of a packed tensor, in the order asked for.

    packed: [num_tokens, ...]; rows: [n] int64, -1 for none
    Returns: [n, ...]; `fill` where the row is -1.
    Grad: for packed.
    """
    absent = (rows < 0).view(-1, *([1] * (packed.dim() - 1)))
    if packed.size(0) == 0:
        return packed.new_full((rows.numel(), *packed.shape[1:]), fill)
    return packed.index_select(0, rows.clamp(min=0)).masked_fill(absent, fill)


def local_targets(tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """The token each local row predicts: looked up in the whole packed batch, so chunk edges need no neighbour.

    tokens: [num_tokens] int64, the whole packed batch; rows: [n] int64 from owned_rows
    Returns: [n] int64; -1 for padding and for the last row of a sequence.
    """
    check_cu_seqlens(cu_seqlens, tokens.numel())
    return take_rows(tokens, take_rows(next_token_rows(cu_seqlens), rows, fill=-1), fill=-1)


def local_loss_mask(loss_mask: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """Which local rows count: loss_mask[row], never the last row of a sequence, never padding.

    loss_mask: [num_tokens] bool, row i counts when packed token i + 1 was generated by the model
    Returns: [n] bool.
    """
    check_cu_seqlens(cu_seqlens, loss_mask.numel())
    counts = loss_mask.bool() & (next_token_rows(cu_seqlens) >= 0)
    return take_rows(counts, rows, fill=False)


def reassemble(parts: list[Tensor], rows: list[Tensor], num_tokens: int) -> Tensor:
    """The packed tensor from every rank's local rows: the inverse of take_rows over all ranks.

    parts: per rank [n, ...]; rows: per rank [n] int64 from owned_rows
    Returns: [num_tokens, ...].
    Raises: ValueError where a packed row is owned by no rank or by several.
    Grad: for the parts.
    """
    source = torch.cat(rows)
    present = source >= 0
    owners = torch.bincount(source[present], minlength=num_tokens)
    if owners.numel() != num_tokens or not bool((owners == 1).all()):
        wrong = int((owners != 1).nonzero()[0]) if bool((owners != 1).any()) else num_tokens
        raise ValueError(
            f"rows: wanted every packed row of {num_tokens} on exactly one rank, got row {wrong} otherwise"
        )
    order = torch.empty(num_tokens, dtype=torch.int64, device=source.device)
    order[source[present]] = present.nonzero().flatten()
    return torch.cat(parts).index_select(0, order)
