"""Which of Megatron's tensors is made of which of a Hugging Face folder's, and how: one table for every use of it.

Read by ranks that load their own part of a folder, and by the converter, both ways. Every rule only moves numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_engine.integrations.megatron.gpt_shape import GPTShape

_EMBEDDING = ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows")
_FINAL_NORM = ("decoder.final_layernorm.weight", ("model.norm.weight",), "whole")
_HEAD = ("output_layer.weight", ("lm_head.weight",), "rows")
_QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
# The names a distributed checkpoint has, and a module of TransformerEngine's layers; how: "whole" on every rank, "rows"
# or "columns" cut over tensor-parallel ranks, "qkv" and "gate" rows of several tensors interleaved.
_LAYER = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), "whole"),
    ("self_attention.linear_qkv.weight", _QKV, "qkv"),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "whole"),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "whole"),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), "whole"),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate"),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns"),
)
# Megatron's own layers keep their norms apart; checkpoints of both kinds have the names above.
_LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class Piece:
    """One tensor of Megatron's whole model, and what it is made of.

    key: its name in a distributed checkpoint, where all layers are one tensor with the layer as first dimension
    layer: which of them, or None
    sources: names of the folder's tensors; how: see the table
    """

    key: str
    layer: int | None
    sources: tuple[str, ...]
    how: str

    @property
    def name(self) -> str:
        """As an error calls it, and as a checkpoint whose layers are kept apart does."""
        return self.key if self.layer is None else self.key.replace("layers.", f"layers.{self.layer}.", 1)


def pieces(shape: GPTShape) -> Iterator[Piece]:
    """Every tensor of the whole model, in the order in which a folder's are read."""
    yield Piece(_EMBEDDING[0], None, *_EMBEDDING[1:])
    for layer in range(shape.num_layers):
        for rest, parts, how in _LAYER:
            if shape.qk_norm or "_layernorm" not in rest:
                names = tuple(f"model.layers.{layer}.{part}" for part in parts)
                yield Piece(f"decoder.layers.{rest}", layer, names, how)
    yield Piece(_FINAL_NORM[0], None, *_FINAL_NORM[1:])
    if not shape.tied:
        yield Piece(_HEAD[0], None, *_HEAD[1:])


def source_shapes(shape: GPTShape, piece: Piece) -> tuple[tuple[int, ...], ...]:
    """Shapes of the folder's tensors that the piece is made of, in their order."""
    d, h, ffn = shape.head_dim, shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_heads * d, shape.num_query_groups * d
    if piece.how == "qkv":
        return (queries, h), (keys, h), (keys, h)
    if piece.how == "gate":
        return (ffn, h), (ffn, h)
    if piece.how == "rows":
        return ((shape.vocab_size, h),)
    if piece.how == "columns":
        return ((h, queries if "linear_proj" in piece.key else ffn),)
    return ((d,) if "q_layernorm" in piece.key or "k_layernorm" in piece.key else (h,),)


def piece_shape(shape: GPTShape, piece: Piece) -> tuple[int, ...]:
    """Of the piece itself, the vocabulary padded as Megatron does on one rank."""
    parts = source_shapes(shape, piece)
    if piece.how == "rows":
        return shape.padded_vocab_size(1), parts[0][1]
    return (sum(part[0] for part in parts), *parts[0][1:])


def sources(module: torch.nn.Module, shape: GPTShape) -> Iterator[tuple[str, Piece]]:
    """(name of a parameter of this rank's module, what it is made of); Megatron's own layers or TransformerEngine's."""
    layered = {rest: (parts, how) for rest, parts, how in _LAYER}
    for name, _ in module.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name.removeprefix("decoder.layers.").split(".", 1)
            rest = _LOCAL_NAMES.get(rest, rest)
            # Megatron numbers layers through all stages, from 1.
            layer = module.decoder.layers[int(index)].layer_number - 1
            if rest not in layered:
                raise ValueError(f"model: {name} has no counterpart in a {shape.family} folder")
            parts, how = layered[rest]
            names = tuple(f"model.layers.{layer}.{part}" for part in parts)
            yield name, Piece(f"decoder.layers.{rest}", layer, names, how)
        elif name == _FINAL_NORM[0]:
            yield name, Piece(name, None, *_FINAL_NORM[1:])
        elif name == _HEAD[0] and not shape.tied:
            yield name, Piece(name, None, *_HEAD[1:])
        else:
            yield name, Piece(_EMBEDDING[0], None, *_EMBEDDING[1:])


def fill(buffer: Tensor, parts: Sequence[Any], how: str, shape: GPTShape, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Write this rank's part of the folder's tensors.

    parts: anything that gives a tensor when sliced; only the rows or columns of this rank are read
    Mutates: buffer; rows beyond the folder's vocabulary become 0.
    """
    if how == "whole":
        buffer.copy_(parts[0][:])
    elif how == "columns":
        width = buffer.shape[1]
        buffer.copy_(parts[0][:, tp_rank * width : (tp_rank + 1) * width])
    elif how == "rows":
        start = tp_rank * buffer.shape[0]
        end = min(start + buffer.shape[0], shape.vocab_size)
        buffer.zero_()
        if end > start:
            buffer[: end - start].copy_(parts[0][start:end])
    elif how == "gate":
        half = buffer.shape[0] // 2
        for side, part in enumerate(parts):
            buffer[side * half : (side + 1) * half].copy_(part[tp_rank * half : (tp_rank + 1) * half])
    else:
        groups = shape.num_query_groups // tp_size
        rows, spans = _query_groups(buffer, shape)
        for part, (begin, size) in zip(parts, spans):
            own = part[tp_rank * groups * size : (tp_rank + 1) * groups * size]
            rows[:, begin : begin + size].copy_(own.view(groups, size, -1))


def taken_apart(whole: Tensor, how: str, shape: GPTShape) -> list[Tensor]:
    """The folder's tensors out of a whole one of Megatron's, contiguous: the inverse of fill on one rank."""
    if how == "rows":
        return [whole[: shape.vocab_size].contiguous()]
    if how == "gate":
        return [half.contiguous() for half in whole.chunk(2)]
    if how == "qkv":
        rows, spans = _query_groups(whole, shape)
        return [rows[:, begin : begin + size].reshape(-1, whole.shape[1]).contiguous() for begin, size in spans]
    return [whole]


def _query_groups(qkv: Tensor, shape: GPTShape) -> tuple[Tensor, list[tuple[int, int]]]:
    """([groups, rows a group, columns], (first row, rows) of queries, key and value).

    A group is its queries, one key, one value.
    """
    d = shape.head_dim
    queries = shape.num_heads // shape.num_query_groups * d
    return qkv.view(-1, queries + 2 * d, qkv.shape[1]), [(0, queries), (queries, d), (queries + d, d)]
