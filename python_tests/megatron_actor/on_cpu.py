"""Whole Megatron models, schedules and optimizers on a CPU with gloo, for tests only: install() before building.

What is replaced: torch.cuda's questions, the tensor-type string that Megatron's optimizer compares, the RMS norm that
refuses sequence parallelism, and (`PlainAttention`) the attention kernel of TransformerEngine that packed and
context-parallel batches need. All process-global: a test calls it in the process of a rank, never in pytest's own.
"""

import contextlib
import logging
from itertools import pairwise

import torch
from torch import Tensor

from integration import megatron_cpu
from opd_engine.parallel.collectives import all_gather_rows


class _Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def install() -> None:
    if not megatron_cpu.install():
        return
    cuda = torch.cuda
    cuda.Stream, cuda.stream = _Stream, lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.empty_cache = lambda: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    plain_type = torch.Tensor.type

    def named_as_on_cuda(self, *args, **kwargs):
        name = plain_type(self, *args, **kwargs)
        if args or kwargs or "cuda" in name:
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named_as_on_cuda
    _let_trackers_set_generators()
    _let_norms_be_sequence_parallel()


def _let_trackers_set_generators() -> None:
    """Megatron sets a generator when CUDA begins, which is never here: tensor-parallel ranks would drop out different
    activations where they must drop the same, and nothing but a gradient would tell.
    """
    from megatron.core.tensor_parallel import random

    cuda, generator = torch.cuda, torch.default_generator
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: generator.manual_seed(int(seed))
    random._set_cuda_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # "CPU RNG state changed": it is the same one here


def _let_norms_be_sequence_parallel() -> None:
    """The plain norm needs only its weights marked, so that Megatron sums their gradients over the sequence's parts."""
    from megatron.core.transformer import torch_norm

    wrapped = torch_norm.WrappedTorchNorm
    original = wrapped.__new__

    def marked(cls, config, *args, **kwargs):
        split, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = split
        for parameter in norm.parameters():
            parameter.sequence_parallel = split
        return norm

    wrapped.__new__ = staticmethod(marked)


def chunk_positions(bounds: list[int], context: str, cp_size: int) -> list[Tensor]:
    """Where each context rank's rows stand in the whole stream, written from the layouts' definitions."""
    if context == "allgather":
        return list(torch.arange(bounds[-1]).chunk(cp_size))
    ranks: list[list[Tensor]] = [[] for _ in range(cp_size)]
    for start, end in pairwise(bounds):
        chunks = torch.arange(start, end).chunk(2 * cp_size)
        for rank in range(cp_size):
            ranks[rank] += [chunks[rank], chunks[2 * cp_size - 1 - rank]]
    return [torch.cat(parts) for parts in ranks]


def plain_attention(context: str):
    """A core attention for module specs: causal in each sequence, packed or padded, keys gathered over the ranks."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import MegatronModule

    class PlainAttention(MegatronModule):
        def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
            super().__init__(config=config)
            self.scale = softmax_scale

        def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
            cp_size = parallel_state.get_context_parallel_world_size()
            packed = packed_seq_params is not None
            bounds = packed_seq_params.cu_seqlens_q.tolist() if packed else [0, query.shape[0] * cp_size]
            assert bounds[-1] == query.shape[0] * cp_size, (bounds, query.shape)
            places = chunk_positions(bounds, context if cp_size > 1 else "allgather", cp_size)
            if cp_size > 1:
                group = parallel_state.get_context_parallel_group()
                key, value = all_gather_rows(key, group), all_gather_rows(value, group)
            sequence = torch.repeat_interleave(torch.tensor(bounds).diff())
            here, there = places[parallel_state.get_context_parallel_rank()], torch.cat(places)
            allowed = (there[None] <= here[:, None]) & (sequence[there][None] == sequence[here][:, None])
            if packed:
                query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [batch, heads, length, size]
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
            scores = (q @ k.transpose(2, 3)) * (self.scale or q.shape[-1] ** -0.5)
            mixed = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
            mixed = mixed.permute(2, 0, 1, 3)
            return mixed.reshape(mixed.shape[0], -1) if packed else mixed.reshape(*mixed.shape[:2], -1)

    return PlainAttention
