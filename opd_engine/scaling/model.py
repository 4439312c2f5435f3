"""Bytes of one distillation step on one rank, counted from what is communicated, kept and read: no measurement in it.

A message's `nbytes` is that of the gathered, reduced, scattered or sent tensor, as opd_engine.parallel counts it;
`wire` is what a rank sends of it where rings are used. Messages whose size does not grow with tokens, parameters or
vocabulary (digests, norms, counts) are left out: they cost latency, not bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

CACHE_ROW_FIELDS = 4
"""tail, lse, entropy and target of a cached row, float32 (opd_engine.distillation.cache)."""


class Shape(Protocol):
    """Sizes of a decoder, as opd_engine.integrations.megatron.gpt_shape.GPTShape has them."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    tied: bool

    @property
    def qk_norm(self) -> bool: ...


@dataclass(frozen=True)
class Layout:
    """Ranks in each dimension. sequence_parallel: Megatron's, of the tensor-parallel ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def splits_sequence(self) -> bool:
        """Whether hidden states between layers are split over the tensor-parallel ranks."""
        return self.sequence_parallel and self.tp > 1


@dataclass(frozen=True)
class Pass:
    """A model's forward over the rollouts of one data-parallel rank, the backward too where it is the update.

    positions: tokens that go through the layers, padding included.  rows: of them, those whose scores are wanted
    kind: "topk" (the old policy's support), "score" (a teacher at given ids) or "update"
    """

    shape: Shape
    positions: float
    rows: float
    kind: str


@dataclass(frozen=True)
class Traffic:
    """One kind of message of a step.

    over: "tp", "cp", "pp" or "dp".  whose: "engine" or "framework".  what: in words.  group: ranks that take part
    """

    over: str
    whose: str
    what: str
    op: str
    nbytes: float
    group: int

    @property
    def wire(self) -> float:
        """Bytes this rank sends: a ring's share of the tensor."""
        if self.group == 1 or self.op == "send":
            return self.nbytes if self.group > 1 else 0.0
        return (2.0 if self.op == "all_reduce" else 1.0) * self.nbytes * (self.group - 1) / self.group


ALONE = Layout()


def parameters(shape: Shape, layout: Layout = ALONE, stage: int | None = None) -> float:
    """Parameters on a rank of a stage (None: of all stages together), the vocabulary unpadded."""
    h, d = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * d, shape.num_query_groups * d
    split = h * (queries + 2 * keys) + queries * h + 3 * h * shape.ffn_hidden_size
    layers = shape.num_layers / (layout.pp if stage is not None else 1)
    total = layers * (split / layout.tp + norms(shape))
    vocabulary = shape.vocab_size * h / layout.tp
    if stage is None or stage == 0:
        total += vocabulary
    if stage is None or stage == layout.pp - 1:
        total += h
        # A tied head is a second copy where the embedding is on another stage.
        total += vocabulary if not shape.tied or (stage is not None and layout.pp > 1) else 0.0
    return total


def norms(shape: Shape) -> float:
    """Parameters of a layer that every tensor-parallel rank holds whole."""
    return 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)


def step_traffic(
    passes: Sequence[Pass], layout: Layout, *, k: int, stage: int | None = None, activation_bytes: int = 2
) -> list[Traffic]:
    """All messages of one step on a rank of a stage.

    passes: of one data-parallel rank's rollouts, the update among them; its shape is the student's
    stage: pipeline stage, default the last, where the scores are
    activation_bytes: of an element of hidden states; gradients are reduced in float32
    """
    stage = layout.pp - 1 if stage is None else stage
    found: list[Traffic] = []
    for one in passes:
        found += _layer_traffic(one, layout, stage, activation_bytes)
        if stage == layout.pp - 1:
            found += _engine_traffic(one, layout, k)
    for one in passes:
        if one.kind == "update":
            found += _gradient_traffic(one.shape, layout, stage, activation_bytes)
    return [traffic for traffic in found if traffic.group > 1 and traffic.nbytes > 0]


def _engine_traffic(one: Pass, layout: Layout, k: int) -> Iterable[Traffic]:
    """Scores over vocabulary shards, then over context ranks: opd_engine.functional.scores, context_parallel."""
    own, tp, cp = one.rows / layout.cp, layout.tp, layout.cp
    target = 1 if one.kind == "score" else 0
    if one.kind == "topk":
        yield Traffic("tp", "engine", "partial top-k and statistics", "all_gather", (8 * k + 20) * tp * own, tp)
        yield Traffic("cp", "engine", "ids of the rows", "all_gather", 8 * k * one.rows, cp)
    else:
        yield Traffic("tp", "engine", "statistics of the vocabulary", "all_gather", 20 * tp * own, tp)
        yield Traffic("tp", "engine", "logits at the ids", "all_reduce", 4 * (k + target) * own, tp)
    yield Traffic("cp", "engine", "scores of the rows", "all_gather", 4 * (k + 3 + target) * one.rows, cp)


def _layer_traffic(one: Pass, layout: Layout, stage: int, element: int) -> Iterable[Traffic]:
    """Hidden states through the layers of a stage, and the gradients back: Megatron's mappings and schedules."""
    shape, tp, cp, pp = one.shape, layout.tp, layout.cp, layout.pp
    layers, update = shape.num_layers / pp, one.kind == "update"
    hidden = one.positions / cp * shape.hidden_size * element
    wanted = one.rows / cp * shape.hidden_size * element
    first, last = stage == 0, stage == pp - 1
    if layout.splits_sequence:
        gathers = 2 * layers + last + update * (4 * layers + first)
        scatters = 2 * layers + first + update * 2 * layers
        yield Traffic("tp", "framework", "hidden states gathered", "all_gather", gathers * hidden, tp)
        yield Traffic("tp", "framework", "hidden states scattered", "reduce_scatter", scatters * hidden, tp)
    else:
        reduces = 2 * layers + first + update * 2 * layers
        yield Traffic("tp", "framework", "hidden states reduced", "all_reduce", reduces * hidden, tp)
    if update and last:
        yield Traffic("tp", "framework", "gradient of the head's input", "all_reduce", wanted, tp)
    keys = one.positions * 2 * shape.num_query_groups * shape.head_dim / tp * element
    yield Traffic("cp", "framework", "keys and values", "all_gather", layers * keys, cp)
    if update:
        yield Traffic("cp", "framework", "their gradients", "reduce_scatter", layers * keys, cp)
    boundary = hidden / (tp if layout.splits_sequence else 1)
    sends = (not last) + (update and not first)
    yield Traffic("pp", "framework", "hidden states and gradients between stages", "send", sends * boundary, pp)


def _gradient_traffic(shape: Shape, layout: Layout, stage: int, element: int) -> Iterable[Traffic]:
    """What a step sends once, however many tokens it has."""
    tp, pp, replicas = layout.tp, layout.pp, layout.dp * layout.cp
    own = parameters(shape, layout, stage)
    if layout.distributed_optimizer and layout.dp > 1:
        yield Traffic("dp", "framework", "gradients", "reduce_scatter", 4 * own, replicas)
        yield Traffic("dp", "framework", "parameters", "all_gather", element * own, replicas)
    else:
        yield Traffic("dp", "framework", "gradients", "all_reduce", 4 * own, replicas)
    replicated = shape.num_layers / pp * 2 * shape.head_dim if shape.qk_norm else 0.0
    if layout.splits_sequence:
        replicated = shape.num_layers / pp * norms(shape) + (shape.hidden_size if stage == pp - 1 else 0)
    yield Traffic("tp", "framework", "gradients of what all ranks hold", "all_reduce", 4 * replicated, tp)
    if shape.tied and pp > 1 and stage in (0, pp - 1):
        embedding = 4 * shape.vocab_size * shape.hidden_size / tp
        yield Traffic("pp", "framework", "gradient of the tied embedding", "all_reduce", embedding, 2)


def held_bytes(k: int, scored_by: int = 1) -> int:
    """Host bytes of a scored row: int32 ids once, then float32 log-probs and statistics of each teacher that scored it.

    scored_by: teachers a row has; under routing one, whatever the size of the pool
    """
    return 4 * k + scored_by * (4 * k + 4 * CACHE_ROW_FIELDS)


def moved_bytes(vocab_size: int, tp: int, *, scored_by: int = 1, logit_bytes: int = 2) -> dict[str, float]:
    """Bytes of logits a rank reads or writes per row that counts: those of the engine's ops, and of the products.

    The engine reads each shard once a pass and, in the backward, reads it once more and writes the gradient in place.
    """
    shard = vocab_size / tp * logit_bytes
    passes = 2 + scored_by  # the old policy, the teachers, the update
    return {"engine": (passes + 2) * shard, "products": (passes + 2) * shard}


def publish_bytes(shape: Shape, layout: Layout, element: int = 2) -> float:
    """What the rollout engine must be sent after a step, by each rank that holds a part of the weights once."""
    return element * parameters(shape) / (layout.tp * layout.pp)


def switch_bytes(shape: Shape, layout: Layout, teachers: int, element: int = 2) -> float:
    """What a rank copies to its device a step, teachers waiting on the host for their turns.

    Teachers that take the student's place bring one copy more, the student's return.
    """
    return teachers * element * parameters(shape, layout, layout.pp - 1)


def flops(passes: Sequence[Pass], layout: Layout) -> float:
    """Multiply-adds x 2 of the products on a rank: 2 a parameter a position forward, twice that backward."""
    total = 0.0
    for one in passes:
        vocabulary = one.shape.vocab_size * one.shape.hidden_size
        body = parameters(one.shape) - (1 if one.shape.tied else 2) * vocabulary
        total += (3 if one.kind == "update" else 1) * 2 * (body * one.positions + vocabulary * one.rows)
    return total / (layout.tp * layout.pp * layout.cp)
