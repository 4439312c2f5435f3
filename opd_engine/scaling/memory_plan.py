"""What a distillation run takes of memory, rank by rank, from sizes alone: nothing is built, no framework is asked.

For Megatron's own layers as `build_gpt` makes them, DistributedDataParallel with float32 gradients and the distributed
Adam of `make_trainable`. The formulas count what autograd keeps of each layer; tests hold them to measured peaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_engine.integrations.megatron.gpt import RECOMPUTE, check_divides
from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.scaling.model import Layout, held_bytes, parameters

PARTS = ("weights", "gradients", "optimizer", "teachers", "cache", "activations", "workspace")
"""Of a rank's memory, as they are shown. workspace: what the fullest moment takes beside the activations."""


@dataclass(frozen=True)
class Work:
    """What one rank works on, at the most.

    seqs, length: of a micro-batch, padded; rows: of it that count in the loss; micro_batches: a step's, each stage
    share_seqs, share_rows: sequences, and rows that count, of the rank's share of a step
    k: ids a row; scorers: teachers that score each row
    """

    seqs: int
    length: int
    rows: int
    micro_batches: int
    share_seqs: int
    share_rows: int
    k: int
    scorers: int = 1

    @property
    def tokens(self) -> int:
        return self.seqs * self.length


@dataclass(frozen=True)
class StagePlan:
    """Bytes of one rank of a pipeline stage. On a CPU `host` is empty: there is one memory.

    device: by PARTS; its sum is the peak
    host: by what it is for
    fullest: the phase of the peak
    saving: on a CPU, the whole while a checkpoint is copied; on a GPU that is host memory
    """

    stage: int
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    fullest: str = "update"
    saving: int = 0

    @property
    def peak(self) -> int:
        return sum(self.device.values())


def stage_parameters(shape: GPTShape, *, tp: int, pp: int, stage: int) -> tuple[int, int]:
    """(parameters, those of the largest tensor) on a tensor-parallel rank of the stage."""
    h, d = shape.hidden_size, shape.head_dim
    qkv = (shape.num_heads + 2 * shape.num_query_groups) * d * h // tp
    projections = [qkv, shape.num_heads * d * h // tp, 2 * shape.ffn_hidden_size * h // tp]
    projections.append(shape.ffn_hidden_size * h // tp)
    has_table = stage == 0 or (stage == pp - 1 and (pp > 1 or not shape.tied))
    table = shape.padded_vocab_size(tp) // tp * h if has_table else 0
    padded = dataclasses.replace(shape, vocab_size=shape.padded_vocab_size(tp))
    return int(parameters(padded, Layout(tp=tp, pp=pp), stage)), max(*projections, table)


def layer_activation_bytes(shape: GPTShape, tokens: int, length: int, *, tp: int, itemsize: int, recompute: str) -> int:
    """What autograd keeps of one layer between its forward and its backward.

    Norms keep their input and the normalised one in float32, attention its queries, keys and values (repeated for their
    groups) and its [length, length] scores after the softmax, in float32 and again in the model's dtype.
    """
    h, e = shape.hidden_size, itemsize
    if recompute == "full":
        return tokens * h * e
    q, g = shape.num_heads * shape.head_dim // tp, shape.num_query_groups * shape.head_dim // tp
    heads, groups, ffn = shape.num_heads // tp, shape.num_query_groups // tp, shape.ffn_hidden_size // tp
    row = 2 * (8 * h + 4) + e * (2 * h + q) + 5 * ffn * e
    if shape.qk_norm:
        row += 8 * (q + g) + 4 * (heads + groups)
        if e == 4 and g < q:
            row += 4 * (q + g)
    if recompute == "selective":
        row += e * (q + 2 * g)
    else:
        row += 3 * e * q + (4 if e >= 4 else 4 + e) * heads * length
    if g == q:
        row += 2 * e * g  # without groups nothing is repeated: the values are a view of the whole projection
    return tokens * row + 4 * length * shape.head_dim * e


def passing_bytes(shape: GPTShape, tokens: int, length: int, *, tp: int, itemsize: int) -> int:
    """The most that one layer's forward holds at a time where nothing is kept."""
    heads, ffn = shape.num_heads // tp, shape.ffn_hidden_size // tp
    scores = (10 if itemsize >= 4 else 13) * heads * length
    return tokens * (max(scores, 4 * ffn * itemsize) + 24 * shape.hidden_size)


def plan_memory(
    student: GPTShape,
    teachers: Mapping[str, GPTShape],
    work: Work,
    *,
    tp: int,
    pp: int,
    dp: int,
    itemsize: int = 2,
    teacher_weights: str = "switch",
    recompute: str = "none",
    workspace_bytes: int | None = None,
    on_cpu: bool = False,
) -> list[StagePlan]:
    """One plan a pipeline stage; all ranks of a stage are alike.

    itemsize: bytes of a parameter; gradients are float32, and so are the optimizer's copy and its two moments
    teacher_weights: as run.teacher_weights; teachers of another shape than the student's are staged instead of switched
    recompute: none, selective (attention's scores) or full (all but each layer's input)
    workspace_bytes: of logits at a time; None: those of all rows of a micro-batch that count
    on_cpu: host and device are one memory, and gloo stages what it sends

    Raises: ValueError where the shape does not divide by the ranks, or for an unknown `recompute`.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: wanted one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    for shape in (student, *teachers.values()):
        check_divides(shape, tp=tp, pp=pp)
    return [
        _stage_plan(
            student, teachers, work, stage, tp, pp, dp, itemsize, teacher_weights, recompute, workspace_bytes, on_cpu
        )
        for stage in range(pp)
    ]


def _stage_plan(
    student: GPTShape,
    teachers: Mapping[str, GPTShape],
    work: Work,
    stage: int,
    tp: int,
    pp: int,
    dp: int,
    e: int,
    teacher_weights: str,
    recompute: str,
    workspace_bytes: int | None,
    on_cpu: bool,
) -> StagePlan:
    count, largest = stage_parameters(student, tp=tp, pp=pp, stage=stage)
    last = stage == pp - 1
    states = (12 if e < 4 else 8) * count // dp
    cache = 0
    if last:
        cache = work.share_rows * held_bytes(work.k, work.scorers)

    switched = {n for n, shape in teachers.items() if shape == student and teacher_weights == "switch"}
    sizes = {name: e * stage_parameters(shape, tp=tp, pp=pp, stage=stage)[0] for name, shape in teachers.items()}
    waiting = sum(sizes.values()) + (e * count if switched else 0)
    staged = sorted((size for name, size in sizes.items() if name not in switched), reverse=True)

    layers = student.num_layers // pp
    in_flight = min(work.micro_batches, pp - stage)
    sizes_of = {"tp": tp, "itemsize": e}
    kept = layer_activation_bytes(student, work.tokens, work.length, recompute=recompute, **sizes_of)
    activations = in_flight * layers * kept + (work.tokens * (8 * student.hidden_size + 4) if last else 0)
    activations += in_flight * work.tokens * 8
    if recompute != "none":  # one layer is whole again while its backward runs
        activations += layer_activation_bytes(student, work.tokens, work.length, recompute="none", **sizes_of)
    logits = 0
    if last:
        logits = work.rows * (student.padded_vocab_size(tp) // tp) * e
        logits = logits if workspace_bytes is None else min(logits, workspace_bytes)
    table = student.padded_vocab_size(tp) // tp * student.hidden_size
    # Gradients of one weight before they are added to the buffer; a CPU adds other dtypes through a float32 copy.
    pending = e if e >= 4 or not on_cpu else e + 4
    in_layer = 2 * student.ffn_hidden_size // tp * e * work.tokens
    head = logits + (pending * table if last else 0)
    passing = max(passing_bytes(s, work.tokens, work.length, **sizes_of) for s in (student, *teachers.values()))
    # Sampling looks at one row a sequence, in float64, on the host.
    sampling = 32 * work.share_seqs * student.vocab_size
    # Weights and the optimizer's float32 weights and moments, gathered over the data-parallel ranks, then the writer's
    # copy of this rank's share, and three twentieths of both on its way
    # (measured as large for weights in bfloat16 as in float32).
    checkpoint = 23 * (2 * max(e, 4) * count + 12 * count + 12 * count // dp) // 20
    here, host = 0, {}
    visiting = 0
    if on_cpu:
        here = waiting
    else:
        host = {"teachers": waiting, "cache": cache, "sampling": sampling, "checkpoint": checkpoint}
        cache = 0
        if teacher_weights == "resident":
            here = sum(staged)
        else:
            visiting = sum(staged[:2])  # the next one is brought while one scores
    # By phase: teachers on the device, activations, workspace.
    moments = {
        "rollout": (here, passing, sampling if on_cpu else 0),
        "score": (here + visiting, passing, 2 * logits),
        "update": (here, activations, max(head, in_layer)),
        "step": (here, 0, max(e * count if on_cpu else 4 * count // dp, 8 * largest // dp)),
    }
    fullest = max(moments, key=lambda name: sum(moments[name]))
    fixed = {"weights": e * count, "gradients": 4 * count, "optimizer": states, "cache": cache}
    device = fixed | dict(zip(("teachers", "activations", "workspace"), moments[fullest]))
    saving = sum(fixed.values()) + here + checkpoint if on_cpu else 0
    return StagePlan(stage, device, host, fullest, saving)


def plan_table(plans: list[StagePlan], title: str) -> str:
    """The plan as it is printed: GiB a rank, a column a pipeline stage."""
    parts = [part for part in PARTS if any(plan.device[part] for plan in plans)]
    host = sorted({name for plan in plans for name, size in plan.host.items() if size})
    lines = [title, "GiB a rank".ljust(24) + "".join(f"stage {plan.stage}".rjust(12) for plan in plans)]
    lines += [part.ljust(24) + "".join(_gib(plan.device[part]) for plan in plans) for part in parts]
    lines.append("peak".ljust(24) + "".join(_gib(plan.peak) for plan in plans))
    lines.append("  reached in".ljust(24) + "".join(plan.fullest.rjust(12) for plan in plans))
    lines += [f"host: {name}".ljust(24) + "".join(_gib(plan.host.get(name, 0)) for plan in plans) for name in host]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:12.3f}"
