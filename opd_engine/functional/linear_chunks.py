"""Logits of a chunk or a tile at a time, in buffers that all of them reuse, and the products of their gradients.

A chunk is some rows of all columns: what a row's statistics need. Where these are known a tile will do, some columns of
some rows, and no gradient of the weight has to wait for other rows (docs/math.md (59), (60)).

Bound: arithmetic, one GEMM forward and two backward. The buffers are all of [*, vocab] that exists: a kernel writes the
gradient over the logits before the next chunk does. Products go to torch (cuBLAS, or the CPU's library).
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from opd_engine.functional.linear_arguments import Head

# Elements that are widened at a time where a library lacks mixed precision, and by the soft-cap: 1 MiB in float32 stays
# in a core's cache; on a GPU 64 MiB keep it busy.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

_Returned = TypeVar("_Returned")


def outside_graphs(function: Callable[..., _Returned]) -> Callable[..., _Returned]:
    """Under torch.compile a graph break: a loop over chunks, unrolled into one graph, would be as long as the batch.

    torch.compiler.disable as a decorator would import the compiler with the package.
    """

    @functools.wraps(function)
    def call(*arguments: object) -> _Returned:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments)
        return function(*arguments)

    return call


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks_of(num_rows: int, rows_a_chunk: int) -> list[slice]:
    """[0, num_rows) in order."""
    return [slice(start, min(start + rows_a_chunk, num_rows)) for start in range(0, num_rows, rows_a_chunk)]


def rows_a_chunk(workspace_bytes: int, row_bytes: int) -> int:
    """How many rows the workspace holds; at least one."""
    return max(1, workspace_bytes // row_bytes)


def tiles_of(num_rows: int, width: int, num_logits: int, chunk: int) -> tuple[list[slice], list[slice]]:
    """(rows, columns) that cut [num_rows, width] into tiles of at most num_logits, about as tall as wide.

    chunk: the rows of a chunk of at most num_logits; a tile has those of whole chunks

    Tall enough tiles have all rows, so that a block of the weight's gradient is one product; wide ones make the hidden
    gradient's accumulator travel less. Blocks of columns are of one width, a multiple of 64 where there are that many.
    """
    tall = max(1, min(num_rows, max(chunk, math.isqrt(num_logits) // chunk * chunk)))
    wide = max(1, num_logits // tall)
    if wide < width:
        step = 64 if wide >= 64 else 1
        blocks = -(-width // (wide // step * step))
        wide = -(-width // (blocks * step)) * step
    return chunks_of(num_rows, tall) or [slice(0, 0)], chunks_of(width, max(1, wide))


def take_turns(chunks: Iterable[Iterator[None]], in_flight: int) -> None:
    """Run chunks that yield after starting a collective, up to in_flight of them at a time.

    While one chunk's numbers are on the wire the next one computes. The order of all steps is a function of the number
    of chunks alone, so every rank starts its collectives in the same order; chunks end in order.
    """
    active: deque[Iterator[None]] = deque()
    for chunk in chunks:
        while len(active) == in_flight:
            _step_each(active)
        if _step(chunk):
            active.append(chunk)
    while active:
        _step_each(active)


def _step_each(active: deque[Iterator[None]]) -> None:
    """A step of each, oldest first, until one has ended."""
    for chunk in list(active):
        if not _step(chunk):
            active.remove(chunk)
            return


def _step(chunk: Iterator[None]) -> bool:
    return next(chunk, StopIteration) is None


class ChunkLogits:
    """The logits of one chunk or tile at a time: round(hidden W^T + b), soft-capped (docs/math.md (53), (54))."""

    def __init__(self, head: Head, max_rows: int, *, with_gradient: bool, max_columns: int | None = None) -> None:
        self.head = head
        width = head.weight.size(0) if max_columns is None else max_columns
        self._logits = head.weight.new_empty((max_rows * width,))
        keep = with_gradient and head.softcap is not None
        self._uncapped = torch.empty_like(self._logits) if keep else None

    def compute(
        self, hidden: Tensor, chunks: Sequence[slice] = (slice(None),), blocks: Sequence[slice] | None = None
    ) -> Tensor:
        """[n, columns] for hidden [n, hidden_size]; valid until the next call.

        chunks, blocks: rows of hidden, and of the weight, neighbours in order, whose products are made one by one.
            Logits that are computed twice have the same bits where these products have the same shapes
        """
        head = self.head
        blocks = blocks or [slice(0, head.weight.size(0))]
        start = blocks[0].start
        shape = hidden.size(0), blocks[-1].stop - start
        logits = self._logits[: shape[0] * shape[1]].view(shape)
        raw = logits if self._uncapped is None else self._uncapped[: logits.numel()].view(shape)
        for rows in chunks:
            for block in blocks:
                weight, out = head.weight[block].t(), raw[rows, block.start - start : block.stop - start]
                if head.bias is None:
                    torch.mm(hidden[rows], weight, out=out)
                else:
                    torch.addmm(head.bias[block], hidden[rows], weight, out=out)  # the bias joins before the rounding
        if head.softcap is not None:
            for block in _blocks(raw):
                capped = _tanh(raw.view(-1)[block], head.softcap).mul_(head.softcap)
                logits.view(-1)[block] = capped
        return logits

    def uncap_(self, grad: Tensor) -> None:
        """The gradient with respect to the logits of the last call becomes that before the soft-cap, (55)."""
        if self._uncapped is None:
            return
        for block in _blocks(grad):
            wide = grad.view(-1)[block].to(wide_dtype(grad.dtype))
            slope = _tanh(self._uncapped[: grad.numel()][block], self.head.softcap).square_().neg_().add_(1)
            # Rows without upstream gradient may hold NaN, and padding anything: 0 x NaN is not 0.
            grad.view(-1)[block] = (wide * slope).masked_fill_(wide == 0, 0)


def _tanh(logits: Tensor, softcap: float) -> Tensor:
    return logits.to(wide_dtype(logits.dtype), copy=True).div_(softcap).tanh_()


def _blocks(tensor: Tensor) -> Iterator[slice]:
    step = _BLOCK_ELEMENTS.get(tensor.device.type, 1 << 24)
    for start in range(0, tensor.numel(), step):
        yield slice(start, start + step)


class _Gradients:
    """What gradients of hidden states, weight and bias add up in (docs/math.md (56)).

    hidden: [num_rows, hidden_size], wide, or None: this shard's part, not yet summed over ranks
    weight: [vocab_shard_size, hidden_size] or None
    bias: [vocab_shard_size], wide, or None
    is_added: weight is main_grad, which had something in it before
    """

    def __init__(
        self,
        head: Head,
        num_rows: int,
        needs: tuple[bool, bool, bool],
        weight_into: Tensor | None,
        weight_dtype: torch.dtype,
    ) -> None:
        """needs: of hidden, weight, bias; weight_into: what the weight's gradient is added to, in the wide dtype."""
        wide = wide_dtype(head.weight.dtype)
        width, hidden_size = head.weight.shape
        self.head = head
        self.hidden = head.weight.new_zeros((num_rows, hidden_size), dtype=wide) if needs[0] else None
        self.weight = weight_into
        if needs[1] and weight_into is None:
            self.weight = torch.empty((width, hidden_size), dtype=weight_dtype, device=head.weight.device)
        self.bias = head.weight.new_zeros((width,), dtype=wide) if needs[2] else None
        self.is_added = weight_into is not None


class HeadGradients(_Gradients):
    """Over all chunks, the weight's accumulated wide."""

    def __init__(
        self,
        head: Head,
        num_rows: int,
        needs: tuple[bool, bool, bool],
        weight_into: Tensor | None = None,
        magnitude: Tensor | None = None,
    ) -> None:
        """magnitude: [] or None, what the gradients of the logits are still to be multiplied by, in the wide dtype."""
        super().__init__(head, num_rows, needs, weight_into, wide_dtype(head.weight.dtype))
        self._magnitude = magnitude
        self._weight_is_set = self.is_added  # otherwise the first chunk writes what later ones add to

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        """One chunk's part: grad_logits [n, vocab_shard_size], its hidden states [n, hidden_size]."""
        if self.hidden is not None:
            multiply_wide(grad_logits, self.head.weight, self.hidden[rows], accumulate=False)
        if self.weight is not None:
            if self.is_added and self._magnitude is not None:
                self._add_scaled(grad_logits, hidden)
            else:
                multiply_transposed_wide(grad_logits, hidden, self.weight, accumulate=self._weight_is_set)
            self._weight_is_set = True
        if self.bias is not None:
            self.bias += torch.sum(grad_logits, 0, dtype=self.bias.dtype)

    def _add_scaled(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Into main_grad, which others' gradients are in: a block of products at a time can still be scaled."""
        step = max(64, _BLOCK_ELEMENTS.get(hidden.device.type, 1 << 24) // max(hidden.size(1), 1))
        for start in range(0, self.weight.size(0), step):
            block = self.weight[start : start + step]
            product = torch.empty_like(block)
            multiply_transposed_wide(grad_logits[:, start : start + step], hidden, product, accumulate=False)
            block.addcmul_(product, self._magnitude)

    def finish(self) -> HeadGradients:
        """After the last chunk; without any, the weight's gradient is zero."""
        if self._magnitude is not None:
            own = (self.hidden, None if self.is_added else self.weight, self.bias)
            for gradient in own:
                if gradient is not None:
                    gradient.mul_(self._magnitude)
        if self.weight is not None and not self._weight_is_set:
            self.weight.zero_()
        return self


class TileGradients(_Gradients):
    """Over all tiles, a block of columns after another.

    A block's rows of the weight's gradient are complete and rounded before the next block begins: nothing of
    [vocab_shard_size, hidden_size] accumulates wide.
    """

    def __init__(
        self, head: Head, num_rows: int, needs: tuple[bool, bool, bool], weight_into: Tensor | None = None
    ) -> None:
        super().__init__(head, num_rows, needs, weight_into, head.weight.dtype)
        self._num_rows = num_rows
        self._block: Tensor | None = None  # the wide sum of a block of columns whose tiles are several

    def add(self, rows: slice, columns: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        """One tile's part, a block's rows in order: grad_logits [n, columns], its hidden states [n, hidden_size]."""
        if self.hidden is not None:
            multiply_wide(grad_logits, self.head.weight[columns], self.hidden[rows], accumulate=True)
        if self.weight is not None:
            self._add_to_weight(rows, self.weight[columns], grad_logits, hidden)
        if self.bias is not None:
            self.bias[columns] += torch.sum(grad_logits, 0, dtype=self.bias.dtype)

    def _add_to_weight(self, rows: slice, block: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        is_first, is_last = rows.start == 0, rows.stop == self._num_rows
        if self.is_added or block.dtype == wide_dtype(block.dtype):
            multiply_transposed_wide(grad_logits, hidden, block, accumulate=self.is_added or not is_first)
        elif is_first and is_last:
            torch.mm(grad_logits.t(), hidden, out=block)  # accumulates wide, rounds once
        else:
            if is_first:
                self._block = torch.empty_like(block, dtype=wide_dtype(block.dtype))
            multiply_transposed_wide(grad_logits, hidden, self._block, accumulate=not is_first)
            if is_last:
                block.copy_(self._block)
                self._block = None


def multiply_wide(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out (+)= left @ right; out is wide, the factors may be half precision."""
    beta = 1 if accumulate else 0
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=beta)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)
    else:  # no CPU library multiplies bfloat16 into float32: widen what fits a cache
        if not accumulate:
            out.zero_()
        for columns in _column_blocks(left, right):
            out.addmm_(left[:, columns].to(out.dtype), right[columns].to(out.dtype))


def multiply_transposed_wide(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out (+)= left^T @ right; out is wide, the factors may be half precision."""
    beta = 1 if accumulate else 0
    if left.dtype == out.dtype:
        out.addmm_(left.t(), right, beta=beta)
    elif left.is_cuda:
        torch.addmm(out, left.t(), right, out_dtype=out.dtype, beta=beta, out=out)
    else:
        wide = right.to(out.dtype)
        for columns in _column_blocks(left, out):
            out[columns].addmm_(left[:, columns].to(out.dtype).t(), wide, beta=beta)


def _column_blocks(left: Tensor, of_columns: Tensor) -> Iterator[slice]:
    """Columns of left, together with as many rows of the other factor, a few MiB at a time."""
    step = max(64, 4 * _BLOCK_ELEMENTS["cpu"] // max(left.size(0), of_columns.size(1), 1))
    for start in range(0, left.size(1), step):
        yield slice(start, start + step)
