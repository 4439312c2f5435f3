"""The inputs of one dtype, whole on every rank: logits, hidden states and heads, ids, temperatures, weights.

Numbers lie on grids, so that ties abound and products of hidden states and heads are exact in every dtype: what the
cells then see is the engine's error and not a product's. Only a rank's own columns or rows go to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import opd_engine
from opd_engine.check import reference
from opd_engine.parallel.launch import World

NUM_ROWS, VOCAB_SIZE, PADDED_VOCAB_SIZE, K = 16, 1031, 1048, 16
WIDE_VOCAB_SIZE, NARROW_VOCAB_SIZE = 1040, 1000  # teachers with more and with fewer ids than the student
HIDDEN_SIZE, TEACHER_HIDDEN_SIZE = 16, 8
TEMPERATURE = 0.75


@dataclass(frozen=True)
class Leaf:
    """An input that is differentiated, and how its gradient is spread over ranks.

    whole: the tensor as one process would have it
    split: "columns" or "rows" of this rank's shard of the vocabulary, "tokens" in equal blocks, or "all"
    """

    whole: Tensor
    split: str


class Inputs:
    """What the cells of one dtype read. All of it follows from the seed, so every rank draws the same."""

    def __init__(self, dtype: torch.dtype, world: World, seed: int) -> None:
        self.dtype, self.world = dtype, world
        self.score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.num_rows = world.world_size * math.ceil(NUM_ROWS / world.world_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._seed, self._kept = seed, {}
        # Flat, ordinary and peaked rows.
        spread = torch.tensor([0.25, 1.0, 3.0, 6.0])[torch.arange(self.num_rows) % 4][:, None]
        self.student = self._logits(spread, VOCAB_SIZE)
        self.teacher = self._logits(spread, WIDE_VOCAB_SIZE)
        self.edges = self.student.clone()
        self.edges[1, :VOCAB_SIZE] = -math.inf
        self.edges[1, 700] = 0.0  # the only id
        self.edges[2, :VOCAB_SIZE] = -0.5  # all alike
        self.edges[5, 7:VOCAB_SIZE] = -math.inf  # fewer ids than K
        spread = torch.tensor([0.25, 0.5, 1.0, 2.0])[torch.arange(self.num_rows) % 4][:, None]
        self.hidden, self.weight, self.bias = self._head(spread, HIDDEN_SIZE, VOCAB_SIZE)
        self.teacher_hidden, self.teacher_weight, self.teacher_bias = self._head(
            spread, TEACHER_HIDDEN_SIZE, WIDE_VOCAB_SIZE
        )
        self.row_temperature = self._put(self._integers(4, 13, self.num_rows) / 8, self.score_dtype)  # 0.5 to 1.5
        target = self._integers(0, VOCAB_SIZE, self.num_rows).long()
        target[5::7], target[6::7] = -1, -100  # both are absent
        self.target = target.to(world.device)
        cuts = self._integers(0, PADDED_VOCAB_SIZE, world.world_size - 1).long().sort().values.tolist()
        self.bounds = [0, *cuts, PADDED_VOCAB_SIZE]
        own = self.bounds[world.rank], self.bounds[world.rank + 1]
        self.shard = opd_engine.VocabShard(*own, VOCAB_SIZE, world.group)
        weights = torch.rand(self.num_rows, generator=self._generator, dtype=torch.float64) + 0.5
        weights[3::11] = 0.0
        self.token_weights = self._put(weights, self.score_dtype)
        self.loss_rows = torch.randperm(self.num_rows, generator=self._generator)[: self.num_rows * 2 // 3]
        ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=self._generator)[:K] for _ in range(self.num_rows)])
        ids[torch.rand(ids.shape, generator=self._generator) < 0.2] = -1
        self.mixed_ids = ids.to(world.device)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).double()

    def _put(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return values.to(self.dtype if dtype is None else dtype).to(self.world.device)

    def _logits(self, spread: Tensor, vocab_size: int) -> Tensor:
        """[T, padded]; the padding holds numbers that would win every row."""
        normal = torch.randn(self.num_rows, PADDED_VOCAB_SIZE, generator=self._generator)
        rows = (normal * spread * 8).round() / 8
        rows[:, vocab_size:] = 1000.0
        return self._put(rows)

    def _head(self, spread: Tensor, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states, weight, bias); logits are eighths of magnitudes that a bfloat16 holds."""
        hidden = self._integers(-1, 2, self.num_rows, hidden_size) * spread
        weight = self._integers(-2, 3, PADDED_VOCAB_SIZE, hidden_size) / 2
        bias = self._integers(-8, 9, PADDED_VOCAB_SIZE) / 8
        weight[vocab_size:], bias[vocab_size:] = 8.0, 64.0
        return self._put(hidden), self._put(weight), self._put(bias)

    def own(self, whole: Tensor, split: str) -> Tensor:
        """This rank's part."""
        start, end = self.shard.vocab_start_index, self.shard.vocab_end_index
        if split == "columns":
            return whole[:, start:end].contiguous()
        if split == "rows":
            return whole[start:end].contiguous()
        if split == "tokens":
            block = self.num_rows // self.world.world_size
            return whole[self.world.rank * block : (self.world.rank + 1) * block].contiguous()
        return whole.clone()

    def part_shape(self, leaf: Leaf, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        rows, *rest = leaf.whole.shape
        width = self.bounds[rank + 1] - self.bounds[rank]
        if leaf.split == "columns":
            return rows, width
        if leaf.split == "rows":
            return width, *rest
        return (rows // self.world.world_size if leaf.split == "tokens" else rows, *rest)

    def assemble(self, parts: list[Tensor], split: str) -> Tensor:
        """The whole from every rank's part; of what all ranks hold, the first rank's."""
        return parts[0] if split == "all" else torch.cat(parts, 1 if split == "columns" else 0)

    def upstream(self, name: str, like: Tensor) -> Tensor:
        """The gradient that an output receives: random, the same on every rank, 0 in some rows.

        A sum over rows receives a power of two: half-precision gradients then round as they would before it.
        """
        if not like.dim():
            return torch.tensor(0.5, dtype=torch.float64, device=like.device)
        generator = torch.Generator().manual_seed(self._seed + sum(name.encode()))
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
        values[3::11] = 0.0
        return values.to(like.device)

    def kept(self, key: tuple, make: Callable[[], object]) -> object:
        """What several cells read, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def ids(self, support: str) -> Tensor:
        """[T, K]: the student's or the teacher's first, or any, unordered and with absent slots ("mixed"), or these and
        an id given twice in every fourth row ("repeated").
        """
        if support == "mixed":
            return self.mixed_ids
        if support == "repeated":
            ids = self.mixed_ids.clone()
            ids[::4, 0] = ids[::4, -1] = 700
            return ids
        logits = self.student if support == "student" else self.teacher
        return self.kept(("ids", support), lambda: reference.top_ids(logits, K, VOCAB_SIZE))

    def teacher_scores(self, support: str) -> opd_engine.TokenScores:
        """The teacher's scores of the support, by the engine."""
        return self.kept(
            ("teacher scores", support),
            lambda: opd_engine.gather_log_probs(
                self.own(self.teacher, "columns"), self.ids(support), temperature=TEMPERATURE, shard=self.shard
            ).detach(),
        )

    def teacher_log_probs(self, compute: torch.dtype, vocab_size: int, temperature: float | Tensor) -> Tensor:
        """The reference's, [T, vocab_size]."""
        per_row = isinstance(temperature, Tensor)
        return self.kept(
            ("teacher", compute, vocab_size, per_row),
            lambda: reference.log_probabilities(self.teacher, vocab_size, temperature, compute),
        )

    def teacher_buckets(self, support: str, compute: torch.dtype) -> reference.Buckets:
        """The reference's, of the support."""
        return self.kept(
            ("teacher buckets", compute, support),
            lambda: reference.buckets(self.teacher_log_probs(compute, VOCAB_SIZE, TEMPERATURE), self.ids(support)),
        )
