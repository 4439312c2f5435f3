"""Shapes, and the named sets of them that `--shapes` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

LINEAR_CASES = ("linear_topk", "linear_gather", "linear_distill", "linear_full")  # from hidden states and the LM head
LOGIT_CASES = ("topk", "gather", "loss_fwd_bwd", "loss_fwd_bwd_inplace", "full_divergence", "tp_merge", "step")
CASES = LOGIT_CASES + LINEAR_CASES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
PATTERNS = ("random", "ascending", "descending", "constant", "periodic", "spiky", "clustered")
LAYOUTS = ("rows", "sbv")  # [T, V] contiguous, or [s, b, V] as Megatron lays it out: a transposed [b, s, V]

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
TOKENS = (1, 16, 256, 4_096, 32_768)
SUPPORTS = (1, 8, 64, 256, 1_024)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One rank's work: [num_tokens, vocab_size / tp_size, rounded up] logits of `dtype`, a support of k ids a row."""

    num_tokens: int
    vocab_size: int
    k: int = 64
    tp_size: int = 1
    dtype: str = "float32"
    pattern: str = "random"
    mask_density: float = 1.0
    layout: str = "rows"
    baselines: bool = True  # a plot of our own scaling needs none
    hidden_size: int = 0  # of cases that contain the LM head

    @property
    def shard_size(self) -> int:
        return -(-self.vocab_size // self.tp_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def elements(self) -> int:
        return self.num_tokens * self.shard_size

    @property
    def logits_bytes(self) -> int:
        return self.elements * self.itemsize


def shape_text(of: Any) -> str:
    """A Shape's or a record's shape, for people; what is usual is left out."""
    text = f"{of.num_tokens:,} x {of.vocab_size:,}"
    if of.hidden_size:
        text += f", H={of.hidden_size:,}"
    if of.k:
        text += f", k={of.k:,}"
    if of.tp_size > 1:
        text += f", 1 of {of.tp_size} shards"
    if of.pattern not in (None, "random"):
        text += f", {of.pattern} rows"
    if of.mask_density not in (None, 1.0):
        text += f", {of.mask_density:.0%} of rows count"
    if of.layout not in (None, "rows"):
        text += f", {of.layout} strides"
    return text


Plan = list[tuple[str, Shape]]


def plan(name: str, cases: tuple[str, ...], dtypes: tuple[str, ...]) -> Plan:
    """(case, shape) in the order they run.

    name: of a set
    cases: those asked for; empty means all
    dtypes: those asked for; empty means the set's own
    Raises: ValueError for a name that does not exist.
    """
    if name not in SETS:
        raise ValueError(f"--shapes: wanted one of {', '.join(SETS)}, got {name!r}")
    chosen: Plan = []
    for case, shape in SETS[name][1]():
        if cases and case not in cases:
            continue
        for dtype in dtypes or (shape.dtype,):
            entry = (case, dataclasses.replace(shape, dtype=dtype))
            if entry not in chosen:
                chosen.append(entry)
    return chosen


def _tiny() -> Plan:
    return [(case, for_case(case, Shape(8, 1_000, k=4))) for case in CASES]


def _quick() -> Plan:
    return [(case, for_case(case, Shape(32, 32_000, dtype=d))) for case in CASES for d in ("float32", "bfloat16")]


def _readme() -> Plan:
    head = Shape(256, 151_936)
    both = [head, dataclasses.replace(head, dtype="bfloat16")]
    chosen: Plan = [(case, for_case(case, shape)) for case in CASES[:5] for shape in both]
    chosen += [("topk", dataclasses.replace(shape, k=1_024)) for shape in both]
    chosen += [("topk", Shape(1, 151_936)), ("gather", Shape(1, 151_936))]
    chosen += [("topk", Shape(256, 151_936, tp_size=8)), ("gather", Shape(256, 151_936, tp_size=8))]
    chosen += [(case, dataclasses.replace(head, mask_density=0.1)) for case in CASES[2:4]]
    chosen += [("topk", dataclasses.replace(head, layout="sbv"))]
    return [*chosen, ("tp_merge", Shape(4_096, 151_936, tp_size=8)), ("step", head)]


def _gpu() -> Plan:
    """8,192 tokens, whole and one of 8 shards, a wide support and the smallest, one row alone.

    What is expected to hurt comes first, beside the head of each: time may end before the list does.
    """
    head = Shape(8_192, 151_936, dtype="bfloat16")
    wide = dataclasses.replace(head, k=1_024)
    chosen: Plan = [
        ("topk", shape) for shape in (head, wide, *(dataclasses.replace(s, tp_size=8) for s in (head, wide)))
    ]
    chosen += [(case, dataclasses.replace(head, num_tokens=1)) for case in ("topk", "gather")]
    chosen += [("tp_merge", for_case("tp_merge", shape)) for shape in (head, wide)]
    chosen += [(case, for_case(case, head)) for case in LOGIT_CASES[1:5]]
    chosen += [("gather", dataclasses.replace(head, tp_size=8)), ("topk", dataclasses.replace(head, dtype="float32"))]
    return [*chosen, ("loss_fwd_bwd_inplace", dataclasses.replace(head, k=1))]


def _scaling() -> Plan:
    ours = {"baselines": False}
    chosen: Plan = []
    for case in ("topk", "gather", "loss_fwd_bwd_inplace"):
        chosen += [(case, Shape(10**n // 151_936 + 1, 151_936, **ours)) for n in (6, 7, 8, 9)]
        chosen += [(case, Shape(1_000, 10**n, **ours)) for n in (3, 4, 5, 6)]
    return chosen


def _patterns() -> Plan:
    cases = [("topk", 64), ("topk", 1_024), ("gather", 64)]
    return [(case, Shape(256, 151_936, k=k, pattern=p, baselines=False)) for case, k in cases for p in PATTERNS[1:]]


def _sweep() -> Plan:
    """One dimension at a time around 256 x 151,936, k=64, in every dtype."""
    shapes = [Shape(256, vocab_size) for vocab_size in VOCABULARIES]
    shapes += [Shape(num_tokens, 151_936) for num_tokens in TOKENS]
    shapes += [Shape(256, 151_936, k=k) for k in SUPPORTS]
    shapes += [Shape(256, 151_936, tp_size=8, k=k) for k in (64, 1_024)]
    shapes += [Shape(256, 151_936, layout="sbv"), Shape(256, 151_936, pattern="ascending")]
    shapes += [Shape(256, 151_936, mask_density=density) for density in (0.1, 0.5)]
    chosen: Plan = []
    for dtype in DTYPES:
        for case in LOGIT_CASES:
            for shape in shapes:
                entry = (case, for_case(case, dataclasses.replace(shape, dtype=dtype)))
                if entry not in chosen and measures(case, shape) is None:
                    chosen.append(entry)
    return chosen


def _linear() -> Plan:
    """What a CPU can do in minutes; the share of rows that count is what loss_rows saves."""
    head = Shape(2_048, 65_536, hidden_size=512)
    half = dataclasses.replace(head, dtype="bfloat16")
    chosen: Plan = [(case, for_case(case, shape)) for case in LINEAR_CASES[:3] for shape in (head, half)]
    chosen += [("linear_distill", dataclasses.replace(head, mask_density=density)) for density in (0.8, 0.5)]
    chosen += [("linear_distill", dataclasses.replace(head, num_tokens=tokens)) for tokens in (256, 512, 1_024)]
    return [*chosen, ("linear_full", for_case("linear_full", dataclasses.replace(head, num_tokens=512)))]


def _model() -> Plan:
    """Two lengths, as long as a CPU does in minutes; what a long sequence holds is counted."""
    head = Shape(64, 151_936, hidden_size=1_024)
    return [("step", head), ("step", dataclasses.replace(head, num_tokens=256))]


def _model_gpu() -> Plan:
    head = Shape(8_192, 151_936, dtype="bfloat16", hidden_size=1_024)
    return [("step", head), ("step", dataclasses.replace(head, num_tokens=16_384))]


def _linear_gpu() -> Plan:
    """One rank of 1 and of 8 at three hidden sizes, T from 1,024 to 16,384, half of the rows."""
    head = Shape(8_192, 151_936, dtype="bfloat16", hidden_size=4_096)
    shapes = [dataclasses.replace(head, hidden_size=size) for size in (4_096, 2_048, 1_024)]
    shapes += [dataclasses.replace(head, tp_size=8)]
    shapes += [dataclasses.replace(head, num_tokens=tokens) for tokens in (1_024, 2_048, 4_096, 16_384)]
    # The first shape in every case first: time may end before the list does.
    chosen: Plan = [(case, for_case(case, shape)) for shape in shapes for case in LINEAR_CASES]
    return [*chosen, ("linear_distill", dataclasses.replace(head, mask_density=0.5))]


def for_case(case: str, shape: Shape) -> Shape:
    """The shape as a case has it: a merge has shards, a full-vocabulary loss has no support."""
    if case in LINEAR_CASES and not shape.hidden_size:
        shape = dataclasses.replace(shape, hidden_size=64)
    if case == "tp_merge":
        return dataclasses.replace(shape, tp_size=8)
    return dataclasses.replace(shape, k=0) if case in ("full_divergence", "linear_full") else shape


def measures(case: str, shape: Shape) -> str | None:
    """Why a case has nothing to say at a shape; None where it has."""
    if case in LINEAR_CASES:
        if shape.layout != "rows" or shape.pattern != "random":
            return "it is measured on plain rows"
        if case in LINEAR_CASES[:2] and shape.mask_density < 1:
            return "it has no loss mask"
        return None
    if case not in ("topk", "gather", "tp_merge") and shape.tp_size > 1:
        return "its merges are those of gather; shards are measured there"
    if case not in ("loss_fwd_bwd", "loss_fwd_bwd_inplace", "step") and shape.mask_density < 1:
        return "it has no loss mask"
    if case in ("tp_merge", "step") and (shape.layout != "rows" or shape.pattern != "random"):
        return "it is measured on plain rows"
    return None


SETS: dict[str, tuple[str, Callable[[], Plan]]] = {
    "tiny": ("8 x 1,000: a second, to see that it runs", _tiny),
    "quick": ("32 x 32,000 in two dtypes: half a minute", _quick),
    "readme": ("256 x 151,936 and its neighbours: the tables of README.md and docs/performance.md", _readme),
    "gpu": ("8,192 x 151,936 and its neighbours: what `make gpu` records, four minutes of a GPU", _gpu),
    "scaling": ("ours alone, 1e6 to 1e9 logits in T and in V; needs 10 GiB", _scaling),
    "patterns": ("ours alone, rows that hurt a threshold: sorted, constant, periodic, spiky", _patterns),
    "linear": ("2,048 x 65,536 from hidden states of 512: the LM head and the loss, ten minutes", _linear),
    "linear-gpu": ("8,192 x 151,936 from hidden states of 1,024 to 4,096, whole and one of 8 shards", _linear_gpu),
    "model": ("a step of a Qwen3-0.6B's shape on 64 and 256 tokens, logits made or not: ten minutes", _model),
    "model-gpu": ("the same on 8,192 and 16,384 tokens in bfloat16", _model_gpu),
    "sweep": ("every vocabulary, T, k, dtype, mask and layout: hours; resume with --out", _sweep),
}
