"""What each rank runs for test_tensor_parallel.py: the engine on its shard; rank 0 compares the assembled result.

Real processes, real gloo. The oracle sees the whole logits in one process and knows nothing of shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import opd_engine
import oracles
import tolerances
from opd_engine import VocabShard
from tolerances import DTYPES, Mismatch, check
from truth import shapes
from truth.compare import FIELDS, check_scores, mixed_support, score_gradient, upstream_like

# name -> (case, bounds by tp size). Bounds end at the padded width; why each is there stands beside it.
LAYOUTS: dict[str, tuple[str, dict[int, list[int]]]] = {
    # 61 columns do not divide by 2, 3 or 4; bounds are unaligned
    "uneven": ("ragged", {1: [0, 61], 2: [0, 17, 61], 3: [0, 5, 58, 61], 4: [0, 1, 20, 47, 61]}),
    # a rank without a column, first or in the middle
    "zero_width": ("temperatures", {2: [0, 0, 90], 3: [0, 40, 40, 90], 4: [0, 30, 30, 60, 90]}),
    # the real vocabulary ends inside a shard, and the last shards are padding only
    "padding": ("padded", {1: [0, 44], 2: [0, 22, 44], 3: [0, 20, 39, 44], 4: [0, 11, 22, 40, 44]}),
    # a shard with no logit above -inf
    "masked_shard": ("shard_unused", {2: [0, 16, 64], 3: [0, 16, 48, 64], 4: [0, 16, 30, 48, 64]}),
    # k = 8 is larger than a shard
    "k_over_shard": ("few_finite", {2: [0, 3, 40], 3: [0, 2, 6, 40], 4: [0, 2, 4, 6, 40]}),
    # ties for the maximum and at the k-th place on both sides of every bound
    "ties": ("duplicate_maxima", {2: [0, 33, 70], 3: [0, 21, 42, 70], 4: [0, 15, 30, 45, 70]}),
    # the support is everything: the tail is empty on every shard
    "k_vocab": ("k_vocab", {1: [0, 24], 2: [0, 9, 24], 3: [0, 8, 16, 24], 4: [0, 6, 12, 18, 24]}),
    # a transposed [s, b, V] shard
    "transposed": ("transposed", {2: [0, 20, 40], 4: [0, 10, 20, 30, 40]}),
    # masked columns everywhere, one-hot rows, an offset that a division would round
    "masked": ("masked", {2: [0, 20, 40], 3: [0, 11, 30, 40]}),
    "one_hot": ("one_hot_teacher", {2: [0, 7, 30], 4: [0, 8, 16, 24, 30]}),
    "offset": ("offset", {2: [0, 100, 200], 4: [0, 50, 100, 150, 200]}),
}
# These run at every dtype and support; the others, which test how rows are cut, at two dtypes and supports.
THOROUGH = ("uneven", "padding", "masked_shard", "ties")
SETTINGS = [{"divergence": d, "tail": t} for d in oracles.DIVERGENCES for t in oracles.TAIL_MODES]
SETTINGS += [{"divergence": "jsd", "tail": "bucket", "beta": beta} for beta in (0.0, 0.1, 1.0)]
FULL_SETTINGS = [{"divergence": d} for d in oracles.DIVERGENCES] + [{"divergence": "jsd", "beta": 0.0}]


def own_shard(case: shapes.Case, bounds: list[int]) -> VocabShard:
    rank = dist.get_rank()
    return VocabShard(bounds[rank], bounds[rank + 1], case.vocab_size, dist.group.WORLD)


def own_columns(logits: Tensor, shard: VocabShard, case: shapes.Case) -> Tensor:
    """This rank's columns, in the case's memory layout, as a leaf."""
    local = logits[..., shard.vocab_start_index : shard.vocab_end_index].contiguous()
    if case.name == "transposed":
        local = local.transpose(0, 1).contiguous().transpose(0, 1)
    return local.detach().requires_grad_()


def on_rank_0(local: list[Tensor]) -> list[list[Tensor]] | None:
    """Every rank's tensors, on rank 0."""
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object([tensor.detach() for tensor in local], everyone)
    return everyone


def assembled(everyone: list[list[Tensor]], position: int) -> Tensor:
    return torch.cat([tensors[position] for tensors in everyone], -1)


def same_bits(everyone: list[list[Tensor]], position: int, where: str) -> Tensor:
    """The tensor that every rank must hold, bit for bit."""
    first = everyone[0][position]
    for rank, tensors in enumerate(everyone):
        if not torch.equal(first.nan_to_num(7.0), tensors[position].nan_to_num(7.0)):
            raise Mismatch(f"{where}: rank {rank} holds another value than rank 0")
    return first


def finite_weight(loss: Tensor) -> Tensor:
    """A weight for each row; rows of infinite loss are selected away. The same on every rank: so is the loss."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(loss.shape, generator=generator, dtype=torch.float64) * 16).round() / 16 + 0.5
    return torch.where(loss.detach().isfinite(), weight, 0.0).to(loss.dtype)


def supports_of(case: shapes.Case, logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    return {
        "student": oracles.topk_ids(logits, case.k, case.vocab_size),
        "teacher": oracles.topk_ids(teacher_logits, case.k, case.vocab_size),
        "mixed": mixed_support(min(case.k + 2, case.vocab_size), case.vocab_size, tuple(logits.shape[:-1])),
    }


def check_topk(where: str, case: shapes.Case, logits: Tensor, local: Tensor, shard: VocabShard) -> None:
    target = case.target.reshape(logits.shape[:-1])
    scores = opd_engine.topk_log_probs(local, case.k, target=target, temperature=case.temperature, shard=shard)
    everyone = on_rank_0([scores.indices] + [getattr(scores, name) for name in FIELDS])
    if everyone is None:
        return
    for position in range(1 + len(FIELDS)):
        same_bits(everyone, position, where)
    rest = (logits, case.k, target, case.vocab_size, case.temperature)
    oracle = oracles.topk_scores(*rest)
    if not torch.equal(scores.indices, oracle.indices):
        raise Mismatch(f"{where}: ids differ from a stable sort of the whole row")
    check_scores(where, logits.dtype, scores, oracle, oracles.topk_scores(*rest, oracles.score_dtype(logits.dtype)))


def check_gather(where: str, case: shapes.Case, logits: Tensor, local: Tensor, shard: VocabShard, ids: Tensor) -> None:
    target = case.target.reshape(logits.shape[:-1])
    scores = opd_engine.gather_log_probs(local, ids, target=target, temperature=case.temperature, shard=shard)
    grad = score_gradient(scores, local)
    everyone = on_rank_0([getattr(scores, name) for name in FIELDS] + [grad])
    if everyone is None:
        return
    for position in range(len(FIELDS)):
        same_bits(everyone, position, where)
    rest = (ids, target, case.vocab_size, case.temperature)
    true_leaf, eager_leaf = (z.detach().clone().requires_grad_() for z in (logits.double(), logits))
    oracle = oracles.gather_scores(true_leaf, *rest)
    eager = oracles.gather_scores(eager_leaf, *rest, oracles.score_dtype(logits.dtype))
    check_scores(where, logits.dtype, scores, oracle, eager)
    grads = assembled(everyone, -1), score_gradient(oracle, true_leaf), score_gradient(eager, eager_leaf)
    check("gradient", logits.dtype, *grads, where)


Loss = Callable[[Tensor, dict], Tensor]  # (local logits, setting) -> [T]
Definition = Callable[[Tensor, torch.dtype, dict], Tensor]  # (whole logits, computing dtype, setting) -> [T]


def check_losses(
    where: str, logits: Tensor, local: Tensor, settings: list[dict], ours: Loss, definition: Definition
) -> None:
    """Value and gradient of every setting; one gather for all of them, for messages cost more than the mathematics."""
    results = []
    for setting in settings:
        loss = ours(local, setting)
        results += [loss, torch.autograd.grad(loss, local, finite_weight(loss))[0]]
    everyone = on_rank_0(results)
    if everyone is None:
        return
    dtype = logits.dtype
    for number, setting in enumerate(settings):
        here = f"{where} {setting}"
        loss, grad = same_bits(everyone, 2 * number, here), assembled(everyone, 2 * number + 1)
        truths = []
        for at, compute in ((logits.double(), torch.float64), (logits, oracles.score_dtype(dtype))):
            at = at.detach().clone().requires_grad_()
            value = definition(at, compute, setting)
            truths.append((value, torch.autograd.grad(value, at, finite_weight(loss).to(compute))[0]))
        check("loss", dtype, loss, truths[0][0], truths[1][0], here)
        kept = finite_weight(loss) > 0
        check("gradient", dtype, grad[kept], truths[0][1][kept], truths[1][1][kept], here)
        if grad[~kept].any():
            raise Mismatch(f"{here}: a row of zero upstream has a gradient")


def conformance() -> list[list]:
    """Every layout of this world size x dtype x support x divergence x tail; returns the errors recorded on rank 0."""
    world = dist.get_world_size()
    for name, dtype in itertools.product(LAYOUTS, DTYPES):
        case, bounds = shapes.CASES[LAYOUTS[name][0]], LAYOUTS[name][1].get(world)
        thorough = name in THOROUGH
        if bounds is None or not (thorough or dtype in (torch.float32, torch.bfloat16)):
            continue
        where = f"tp={world} {name}"
        logits, teacher_logits = shapes.in_dtype(case, dtype)
        shard = own_shard(case, bounds)
        local, teacher_local = own_columns(logits, shard, case), own_columns(teacher_logits, shard, case).detach()
        check_topk(f"{where} topk", case, logits, local, shard)
        common = {"temperature": case.temperature, "shard": shard}
        for support, ids in supports_of(case, logits, teacher_logits).items():
            if support == "teacher" and not thorough:
                continue
            check_gather(f"{where} gather {support}", case, logits, local, shard, ids)
            teacher = opd_engine.gather_log_probs(teacher_local, ids, **common)

            def ours(z, setting, ids=ids, teacher=teacher, common=common):
                return opd_engine.distill_loss(opd_engine.gather_log_probs(z, ids, **common), teacher, **setting)

            def definition(z, compute, setting, ids=ids, case=case, teacher_logits=teacher_logits):
                rest = (None, case.vocab_size, case.temperature, compute)
                student, constant = (oracles.gather_scores(x, ids, *rest) for x in (z, teacher_logits))
                return oracles.distill(student, constant, **setting)

            check_losses(f"{where} {support}", logits, local, SETTINGS, ours, definition)
        for teacher_vocab_size in {case.vocab_size, case.vocab_size - 2}:
            check_losses(
                f"{where} full {teacher_vocab_size}",
                logits,
                local,
                FULL_SETTINGS,
                lambda z, setting, t=teacher_local, n=teacher_vocab_size, c=common: opd_engine.full_distill_loss(
                    z, t, teacher_vocab_size=n, **c, **setting
                ),
                lambda z, compute, setting, t=teacher_logits, n=teacher_vocab_size, case=case: oracles.full_distill(
                    z,
                    t,
                    temperature=case.temperature,
                    vocab_size=case.vocab_size,
                    teacher_vocab_size=n,
                    dtype=compute,
                    **setting,
                ),
            )
    return tolerances.recorded()


def partial() -> list[list]:
    """loss_reduction="partial": each rank's loss has only its own rows; the gradient is that of the whole sum."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case = shapes.CASES["ragged"]
    bounds = LAYOUTS["uneven"][1][world]
    for dtype in DTYPES:
        logits, _ = shapes.in_dtype(case, dtype)
        shard = own_shard(case, bounds)
        local = own_columns(logits, shard, case)
        ids = mixed_support(case.k, case.vocab_size, (logits.shape[0],))
        mine = torch.arange(logits.shape[0]) % (world + 1) == rank  # every (world + 1)th row has no loss anywhere
        scores = opd_engine.gather_log_probs(local, ids, target=case.target, shard=shard, loss_reduction="partial")
        values = [getattr(scores, name) for name in FIELDS]
        upstream = [w.to(v) * mine.reshape(-1, *[1] * (v.dim() - 1)) for v, w in zip(values, upstream_like(scores))]
        everyone = on_rank_0([torch.autograd.grad(values, local, upstream)[0]])
        if everyone is None:
            continue
        counted = torch.arange(logits.shape[0]) % (world + 1) != world
        grads = [assembled(everyone, 0)]
        for at, compute in ((logits.double(), torch.float64), (logits, oracles.score_dtype(dtype))):
            at = at.detach().clone().requires_grad_()
            true = oracles.gather_scores(at, ids, case.target, dtype=compute)
            values = [getattr(true, name) for name in FIELDS]
            weights = [w.to(v) * counted.reshape(-1, *[1] * (v.dim() - 1)) for v, w in zip(values, upstream_like(true))]
            grads.append(torch.autograd.grad(values, at, weights)[0])
        check("gradient", dtype, *grads, f"tp={world} partial")
        assert not grads[0][~counted].any()
    return tolerances.recorded()


def everything() -> list[list]:
    """What one launch of this world size runs."""
    partial()
    return conformance()
