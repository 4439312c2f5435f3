"""Logits to measure on: row patterns, rotating cold copies, and the rows whose answers are checked in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine.bench.machine import last_level_cache_bytes
from opd_engine.bench.shapes import Shape

_CHECKED_ELEMENTS = 4_000_000  # in float64: a second of reference, not a minute
_POOL_ELEMENTS = 1 << 24  # above this, rows are windows of one pool of random numbers: drawing 1e9 takes a minute


def make_logits(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """One rank's logits: [T, shard_size], or [s, b, shard_size] with strides of a transposed [b, s, shard_size].

    A "periodic" row repeats 256 values, a "spiky" one has 4 k spikes anywhere, a "clustered" one has them side by side
    at its end, where nothing read before announces them.
    """
    # Drawn where they are used: a GPU's gigabytes take seconds on the host.
    generator = torch.Generator(device).manual_seed(seed)
    rows, width = shape.num_tokens, shape.shard_size
    logits = torch.empty(rows, width, dtype=shape.torch_dtype, device=device)
    if shape.pattern == "constant":
        logits.fill_(1.0)
    elif shape.pattern == "periodic":
        logits.copy_((torch.arange(width, device=device) % 256 * (10 / 256)).expand(rows, width))
    else:
        _fill_random(logits, generator, scale=3.0 if shape.pattern in ("random", "ascending", "descending") else 0.1)
    if shape.pattern in ("ascending", "descending"):
        logits = logits.sort(dim=-1, descending=shape.pattern == "descending").values
    elif shape.pattern in ("spiky", "clustered"):
        count = min(4 * max(shape.k, 1), width)
        for row in logits:
            where = torch.randperm(width, generator=generator, device=device)[:count]
            where = where if shape.pattern == "spiky" else torch.arange(width - count, width, device=device)
            row[where] += 20.0
    if shape.layout == "sbv":
        batch = next(size for size in (4, 3, 2, 1) if rows % size == 0)
        # Built from its transpose, so that row order is the same as of plain rows.
        sequence = logits.view(rows // batch, batch, width)
        logits = sequence.transpose(0, 1).contiguous().transpose(0, 1)
    return logits


def _fill_random(logits: Tensor, generator: torch.Generator, scale: float) -> None:
    (rows, width), device = logits.shape, logits.device
    if logits.numel() <= _POOL_ELEMENTS:
        logits.copy_(torch.randn(rows, width, generator=generator, device=device) * scale)
        return
    pool = (torch.randn(_POOL_ELEMENTS + width, generator=generator, device=device) * scale).to(logits.dtype)
    for row, start in zip(logits, torch.randint(_POOL_ELEMENTS, (rows,), generator=generator, device=device).tolist()):
        row.copy_(pool[start : start + width])


@dataclasses.dataclass
class ColdLogits:
    """Equal copies of the logits, used in turn, so many that each has left the caches before its turn comes again."""

    original: Tensor
    copies: list[Tensor]

    def restore(self, number: int) -> None:
        """Put back what an in-place backward overwrote."""
        if self.copies[number] is not self.original:
            self.copies[number].copy_(self.original)


def cold_copies(logits: Tensor, *, overwritten: bool = False, max_bytes: int = 2 << 30) -> ColdLogits:
    """Copies of at least 4 last-level caches together.

    overwritten: the original is kept apart, to restore from
    max_bytes: of all copies; one copy that fills a cache 16 times needs no second one
    """
    nbytes = max(logits.nbytes, 1)
    cache = last_level_cache_bytes(logits.device)
    count = 1 if nbytes >= 16 * cache else max(2, min(-(-4 * cache // nbytes), max_bytes // nbytes, 4096))
    copies = [_same_strides(logits) for _ in range(count if overwritten else count - 1)]
    return ColdLogits(logits, copies if overwritten else [logits, *copies])


def _same_strides(logits: Tensor) -> Tensor:
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device).copy_(logits)


def checked_rows(shape: Shape, width: int | None = None) -> Tensor:
    """Rows compared with float64, first and last among them: [n] int64, ascending."""
    count = max(2, _CHECKED_ELEMENTS // (width or shape.vocab_size))
    return torch.linspace(0, shape.num_tokens - 1, min(count, shape.num_tokens)).long().unique()


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a [*, V] tensor by their flat number, whatever its strides: [n, V]."""
    rows = rows.to(tensor.device)
    if tensor.dim() == 2:
        return tensor[rows]
    return tensor[rows // tensor.size(1), rows % tensor.size(1)]
