"""The cells of the conformance table: what each rank computes, and how the main rank judges it.

A cell is a dtype x support x divergence x tail mode (or the full vocabulary); it holds where value and gradient,
assembled from all ranks, are as near to the float64 reference as the rule allows and every rank holds the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import opd_engine
from opd_engine.check import reference
from opd_engine.parallel.collectives import all_gather_stacked
from opd_engine.parallel.launch import World

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SUPPORTS = ("student", "teacher", "mixed")
# error <= FACTOR x the error of the same formula in eager torch + FLOOR, relative to the largest element and to the
# norm. A half dtype's gradient is rounded last: its floor is an eighth of an eps, so that 1% is seen.
FACTOR = 2.0
SCORE_FLOOR = {torch.float64: 1e-11, torch.float32: 5e-6}
GRADIENT_FLOOR = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-3, torch.float16: 1.3e-4}
# Planted errors that the judge must see; the second needs several ranks.
CONTROLS = (
    "loss / tp",
    "loss on rank 0 only",
    "1% gradient error",
    "1% value error",
    "off-by-one row",
    "gradient in a padding column",
)
BETA, ALPHA, TEMPERATURE = 0.5, 0.1, 0.8
NUM_ROWS, VOCAB_SIZE, PADDED_VOCAB_SIZE, K = 24, 1031, 1048, 16


@dataclass
class Cell:
    """One judged cell. error and allowed belong to the worse of value and gradient."""

    dtype: str
    support: str
    tail: str
    divergence: str
    error: float
    allowed: float
    passed: bool
    reason: str = ""


@dataclass
class Control:
    """A planted error, and whether it was seen."""

    dtype: str
    name: str
    seen: bool


@dataclass
class Rows:
    """Inputs of one dtype, whole on every rank; only this rank's columns go to the engine."""

    student: Tensor  # [T, padded]
    teacher: Tensor  # [T, padded]
    shard: opd_engine.VocabShard
    weights: Tensor  # [T]

    def own(self, logits: Tensor) -> Tensor:
        return logits[:, self.shard.vocab_start_index : self.shard.vocab_end_index].contiguous()


def make_rows(dtype: torch.dtype, world: World, seed: int) -> Rows:
    """Flat, ordinary and peaked rows on a grid (so that ties abound), padding columns full of large numbers."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 3.0, 6.0]).repeat(NUM_ROWS // 4)[:, None]

    def logits() -> Tensor:
        rows = (torch.randn(NUM_ROWS, PADDED_VOCAB_SIZE, generator=generator) * spread * 8).round() / 8
        rows[:, VOCAB_SIZE:] = 1000.0
        return rows.to(dtype).to(world.device)

    student, teacher = logits(), logits()
    cuts = torch.rand(world.world_size - 1, generator=generator).mul(PADDED_VOCAB_SIZE).long().sort().values.tolist()
    bounds = [0, *cuts, PADDED_VOCAB_SIZE]
    shard = opd_engine.VocabShard(bounds[world.rank], bounds[world.rank + 1], VOCAB_SIZE, world.group)
    weights = (torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64) + 0.5).to(world.device)
    return Rows(student, teacher, shard, weights)


def make_ids(support: str, rows: Rows, seed: int) -> Tensor:
    """[T, K] ids: the student's or the teacher's first, or any, unordered and with absent slots."""
    if support != "mixed":
        return reference.top_ids(rows.student if support == "student" else rows.teacher, K, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:K] for _ in range(NUM_ROWS)])
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return ids.to(rows.student.device)


def assemble(local: Tensor, world: World) -> Tensor:
    """The whole gradient from every rank's columns; uneven shards are padded to one width for the wire."""
    if world.group is None:
        return local
    widths = all_gather_stacked(torch.tensor([local.shape[1]], device=local.device), world.group).flatten().tolist()
    padded = torch.nn.functional.pad(local, (0, max(widths) - local.shape[1]))
    parts = all_gather_stacked(padded, world.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths)], 1)


def same_everywhere(loss: Tensor, world: World) -> bool:
    parts = all_gather_stacked(loss.detach(), world.group)
    return all(torch.equal(part, parts[0]) for part in parts)


Definition = Callable[[Tensor, torch.dtype], Tensor]


def truth_and_eager(rows: Rows, definition: Definition) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) of the float64 reference and of the same text at the dtype users compute in."""
    dtype = rows.student.dtype
    results = []
    for leaf_dtype, compute in ((torch.float64, torch.float64), (dtype, score_dtype(dtype))):
        at = rows.student.detach().to(leaf_dtype).requires_grad_()
        loss = definition(at, compute)
        results.append((loss.detach(), torch.autograd.grad(loss, at, rows.weights.to(loss.dtype))[0]))
    return results


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def judge(ours: tuple[Tensor, Tensor], truths: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[float, float]:
    """(error, allowed) of the measure that comes nearest to its limit, or exceeds it most."""
    worst = (0.0, 1.0)
    floors = (SCORE_FLOOR[score_dtype(dtype)], GRADIENT_FLOOR[dtype])
    for got, true, eager, floor in zip(ours, *truths, floors):
        true, got, eager = true.double(), got.double(), eager.double()
        for order in (torch.inf, 2):
            size = max(torch.linalg.vector_norm(true, order).item(), 1e-3)
            error = torch.linalg.vector_norm(got - true, order).item() / size
            allowed = FACTOR * torch.linalg.vector_norm(eager - true, order).item() / size + floor
            if not error / allowed <= worst[0] / worst[1]:  # a NaN is the worst of all
                worst = (error, allowed)
    return worst


def bucket_cells(dtype_name: str, world: World, seed: int, plant: str | None) -> Iterator[Cell | None]:
    """Every support x tail x divergence; None on the ranks that do not judge."""
    dtype = DTYPES[dtype_name]
    rows = make_rows(dtype, world, seed)
    for support in SUPPORTS:
        ids = make_ids(support, rows, seed)
        common = {"temperature": TEMPERATURE, "shard": rows.shard}
        if support == "student":
            chosen = opd_engine.topk_log_probs(rows.own(rows.student), K, **common).indices
        else:
            chosen = ids
        teacher = opd_engine.gather_log_probs(rows.own(rows.teacher), chosen, **common)
        for tail in reference.TAIL_MODES:
            for name in reference.DIVERGENCES:
                at = rows.own(rows.student).requires_grad_()
                student = opd_engine.gather_log_probs(at, chosen, **common)
                loss = opd_engine.distill_loss(student, teacher, divergence=name, beta=BETA, alpha=ALPHA, tail=tail)

                def definition(z: Tensor, compute: torch.dtype, tail=tail, name=name, ids=ids) -> Tensor:
                    both = (reference.log_probabilities(x, VOCAB_SIZE, TEMPERATURE, compute) for x in (z, rows.teacher))
                    return reference.distill_loss(*both, ids, tail, name, BETA, ALPHA)

                cell = judged(world, rows, at, loss, definition, plant)
                if cell is not None and not torch.equal(chosen, ids):
                    cell = (cell[0], cell[1], "top-k ids differ from a stable sort's")
                yield None if cell is None else finished(dtype_name, support, tail, name, *cell)


def full_cells(dtype_name: str, world: World, seed: int, plant: str | None) -> Iterator[Cell | None]:
    """The full vocabulary, every divergence."""
    rows = make_rows(DTYPES[dtype_name], world, seed)
    for name in reference.DIVERGENCES:
        at = rows.own(rows.student).requires_grad_()
        setting = {"divergence": name, "beta": BETA, "alpha": ALPHA, "temperature": TEMPERATURE, "shard": rows.shard}
        loss = opd_engine.full_distill_loss(at, rows.own(rows.teacher), **setting)

        def definition(z: Tensor, compute: torch.dtype, name=name) -> Tensor:
            both = (reference.log_probabilities(x, VOCAB_SIZE, TEMPERATURE, compute) for x in (z, rows.teacher))
            return reference.full_loss(*both, name, BETA, ALPHA)

        cell = judged(world, rows, at, loss, definition, plant)
        yield None if cell is None else finished(dtype_name, "all", "(full)", name, *cell)


def finished(dtype: str, support: str, tail: str, name: str, error: float, allowed: float, reason: str) -> Cell:
    passed = error <= allowed and not reason
    return Cell(
        dtype, support, tail, name, error, allowed, passed, reason or ("" if passed else "error over the limit")
    )


def judged(
    world: World, rows: Rows, at: Tensor, loss: Tensor, definition: Definition, plant: str | None
) -> tuple[float, float, str] | None:
    """(error, allowed, reason) on the main rank. Every rank takes part in the assembling."""
    loss, grad = spoil(plant, world, rows, at, loss)
    same = same_everywhere(loss, world)
    whole = assemble(grad, world)
    if not world.is_main:
        return None
    error, allowed = judge((loss, whole), truth_and_eager(rows, definition), rows.student.dtype)
    return error, allowed, "" if same else "ranks hold different values"


def spoil(plant: str | None, world: World, rows: Rows, at: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and this rank's gradient, with one planted error (None: honest)."""
    weights = rows.weights.to(loss.dtype)
    if plant == "loss / tp":
        weights = weights / max(world.world_size, 2)
    elif plant == "loss on rank 0 only" and not world.is_main:
        weights = torch.zeros_like(weights)
    (grad,) = torch.autograd.grad(loss, at, weights)
    if plant == "1% gradient error":
        grad = (grad.double() * 1.01).to(grad.dtype)
    elif plant == "off-by-one row":
        grad = grad.roll(1, 0)
    elif plant == "1% value error":
        loss = loss * 1.01
    elif plant == "gradient in a padding column" and rows.shard.vocab_end_index == PADDED_VOCAB_SIZE and grad.shape[1]:
        grad[:, -1] += 0.05
    return loss.detach(), grad


def controls(dtype_name: str, world: World, seed: int) -> Iterator[Control | None]:
    """One cell under every planted error: each must fail."""
    for plant in CONTROLS:
        if world.world_size == 1 and plant == "loss on rank 0 only":
            continue
        rows = make_rows(DTYPES[dtype_name], world, seed)
        ids = make_ids("student", rows, seed)
        common = {"temperature": TEMPERATURE, "shard": rows.shard}
        at = rows.own(rows.student).requires_grad_()
        teacher = opd_engine.gather_log_probs(rows.own(rows.teacher), ids, **common)
        loss = opd_engine.distill_loss(opd_engine.gather_log_probs(at, ids, **common), teacher)

        def definition(z: Tensor, compute: torch.dtype, rows=rows, ids=ids) -> Tensor:
            both = (reference.log_probabilities(x, VOCAB_SIZE, TEMPERATURE, compute) for x in (z, rows.teacher))
            return reference.distill_loss(*both, ids, "bucket", "reverse_kl", BETA, ALPHA)

        cell = judged(world, rows, at, loss, definition, plant)
        yield None if cell is None else Control(dtype_name, plant, not cell[0] <= cell[1])


def as_json(item: Cell | Control) -> dict:
    return asdict(item)
