"""What each rank runs for test_linear_tensor_parallel.py: the linear functions on its rows of the heads.

Real processes, real gloo; rank 0 compares the assembled result with the oracle, which sees whole heads in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import opd_engine
import oracles
import tolerances
from opd_engine import VocabShard
from opd_engine.functional import linear_full, linear_gradients, linear_losses, linear_scores
from tolerances import NAMES, Mismatch, check
from truth.compare import FIELDS, check_scores, mixed_support, upstream_like
from truth.linear_cases import (
    CASES,
    ROWS,
    K,
    LinearCase,
    check_gradients,
    distill_definition,
    full_definition,
    three_ways,
)
from truth.test_linear_losses import FULL_SETTINGS, row_weights, teacher_of
from truth.tp_checks import on_rank_0, same_bits

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# name -> (case, bounds by tp size). Bounds end at the padded width; why each is there stands beside it.
LAYOUTS: dict[str, tuple[str, dict[int, list[int]]]] = {
    # 61 columns do not divide by 2 or 3; a shard narrower than k
    "uneven": ("plain", {1: [0, 61], 2: [0, 17, 61], 3: [0, 5, 58, 61]}),
    # a rank without a column, with a soft-cap and a teacher's bias
    "zero_width": ("softcap", {2: [0, 0, 61], 3: [0, 40, 40, 61]}),
    # the real vocabulary ends inside a shard; a last shard of padding alone; the teacher's ends elsewhere
    "padding": ("padded", {1: [0, 61], 2: [0, 30, 61], 3: [0, 20, 53, 61]}),
    # temperatures of their own; the student's vocabulary wider than the teacher's, whose last shard is all padding
    "unequal": ("temperatures", {2: [0, 50, 61], 3: [0, 25, 50, 61]}),
}
TARGET = torch.tensor([0, -1, 5, 9, 52, 3, 7, 7, 1, 2, 40, 30])
BUCKET_SETTINGS = [{"divergence": d, "tail": t} for d in oracles.DIVERGENCES for t in oracles.TAIL_MODES]
BUCKET_SETTINGS += [{"divergence": "jsd", "tail": "bucket", "beta": beta} for beta in (0.0, 1.0)]


@dataclasses.dataclass
class OwnPart:
    """This rank's leaves of a case, and what its calls share."""

    hidden: Tensor  # all rows, or this rank's under sequence parallelism
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    common: dict[str, Any]
    case: LinearCase

    @property
    def leaves(self) -> list[Tensor]:
        return [part for part in (self.hidden, self.weight, self.bias) if part is not None]

    def teacher_rows(self, name: str) -> Tensor | None:
        whole = self.case.teacher[name]
        shard = self.common["shard"]
        return None if whole is None else whole[shard.vocab_start_index : shard.vocab_end_index].contiguous()


def own_part(case: LinearCase, bounds: list[int], sequence_parallel: bool, chunk_rows: int) -> OwnPart:
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = VocabShard(bounds[rank], bounds[rank + 1], case.vocab_size, dist.group.WORLD)
    mine = slice(bounds[rank], bounds[rank + 1])
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world) if sequence_parallel else slice(None)

    def leaf(whole: Tensor | None, part: slice) -> Tensor | None:
        return None if whole is None else whole[part].detach().clone().requires_grad_()

    columns = -(-case.vocab_size // world)
    return OwnPart(
        hidden=leaf(case.hidden, rows),
        weight=leaf(case.weight, mine),
        bias=leaf(case.bias, mine),
        teacher_hidden=case.teacher["hidden"][rows],
        common={
            "logit_softcap": case.softcap,
            "temperature": case.temperature,
            "shard": shard,
            "sequence_parallel": sequence_parallel,
            "workspace_bytes": chunk_rows * columns * case.hidden.element_size(),
        },
        case=case,
    )


def assembled(everyone: list[list[Tensor]], position: int, part: OwnPart, where: str) -> list[Tensor]:
    """The one-process gradients of hidden, weight and bias out of every rank's, which begin at position."""
    if part.common["sequence_parallel"]:
        hidden = torch.cat([tensors[position] for tensors in everyone])
    else:
        hidden = same_bits(everyone, position, f"{where} hidden gradient")
    rest = range(position + 1, position + len(part.leaves))
    return [hidden, *(torch.cat([tensors[number] for tensors in everyone]) for number in rest)]


def check_scores_of(where: str, dtype: torch.dtype, name: str, part: OwnPart) -> None:
    true, eager = three_ways(CASES[name], dtype)
    case = part.case
    ids = mixed_support(K, case.vocab_size, (ROWS,))
    head = {"bias": part.bias, **part.common}
    top = opd_engine.linear_topk_log_probs(part.hidden, part.weight, K, target=TARGET, **head)
    scores = opd_engine.linear_gather_log_probs(part.hidden, part.weight, ids, target=TARGET, **head)
    values = [getattr(scores, field) for field in FIELDS]
    upstream = [weight.to(value.dtype) for weight, value in zip(upstream_like(scores), values, strict=True)]
    grads = torch.autograd.grad(values, part.leaves, upstream)
    everyone = on_rank_0([top.indices, *(getattr(top, field) for field in FIELDS), *values, *grads])
    if everyone is None:
        return
    for position in range(1 + 2 * len(FIELDS)):
        same_bits(everyone, position, where)
    compute = oracles.score_dtype(dtype)
    rest = (TARGET, case.vocab_size, case.temperature)
    z = true.logits(dtype).detach()
    oracle = oracles.topk_scores(z, K, *rest)
    if not torch.equal(top.indices, oracle.indices):
        raise Mismatch(f"{where}: top-k ids differ from a stable sort of the whole row")
    check_scores(f"{where} topk", dtype, top, oracle, oracles.topk_scores(z, K, *rest, compute))
    oracle = oracles.gather_scores(true.logits(dtype), ids, *rest)
    plain = oracles.gather_scores(eager.logits(None), ids, *rest, compute)
    check_scores(f"{where} gather", dtype, scores, oracle, plain)
    wanted = [
        torch.autograd.grad(
            [getattr(one, field) for field in FIELDS], at.leaves(), [u.to(getattr(one, FIELDS[0])) for u in upstream]
        )
        for one, at in ((oracle, true), (plain, eager))
    ]
    check_gradients(f"{where} gather", dtype, assembled(everyone, 1 + 2 * len(FIELDS), part, where), *wanted)


def check_losses_of(
    where: str,
    dtype: torch.dtype,
    part: OwnPart,
    settings: list[dict],
    ours: Callable[[dict, Tensor], opd_engine.LinearLoss],
    definition: Callable[[dict, bool], tuple[Callable[[], Tensor], list[Tensor]]],
) -> None:
    """Value and gradient of every setting; definition(setting, in eager torch) -> (token losses, leaves)."""
    upstream = 0.5 if dtype.itemsize == 2 else 0.75
    results = []
    weights = [row_weights(definition(setting, False)[0]()) for setting in settings]
    for setting, weight in zip(settings, weights, strict=True):
        got = ours(setting, weight)
        results += [got.loss, got.token_losses, *torch.autograd.grad(got.loss * upstream, part.leaves)]
    everyone = on_rank_0(results)
    if everyone is None:
        return
    step = 2 + len(part.leaves)
    for number, (setting, weight) in enumerate(zip(settings, weights, strict=True)):
        here, position = f"{where} {setting}", number * step
        same_bits(everyone, position, here)
        losses, grads = [same_bits(everyone, position + 1, here)], [assembled(everyone, position + 2, part, here)]
        for is_eager in (False, True):
            define, leaves = definition(setting, is_eager)
            losses.append(define())
            total = torch.where(weight == 0, 0.0, losses[-1] * weight.to(losses[-1].dtype)).sum()
            grads.append(torch.autograd.grad(total * upstream, leaves))
        check("loss", dtype, *losses, here)
        check_gradients(here, dtype, *grads)


def check_bucket_losses(where: str, dtype: torch.dtype, name: str, part: OwnPart, every: int = 1) -> None:
    ids = mixed_support(K, part.case.vocab_size, (ROWS,))
    teacher, constant = teacher_of(part.case.cast(torch.float64), ids, dtype)
    versions = three_ways(CASES[name], dtype)

    def ours(setting: dict, weights: Tensor) -> opd_engine.LinearLoss:
        return opd_engine.linear_distill_loss(
            *(part.hidden, part.weight, teacher), token_weights=weights, bias=part.bias, **part.common, **setting
        )

    def definition(setting: dict, is_eager: bool):
        case = versions[is_eager]
        return distill_definition(case, ids, constant, None if is_eager else dtype, **setting), case.leaves()

    check_losses_of(f"{where} distill", dtype, part, BUCKET_SETTINGS[::every], ours, definition)


def check_full_losses(where: str, dtype: torch.dtype, name: str, part: OwnPart, every: int = 1) -> None:
    versions = three_ways(CASES[name], dtype)

    def ours(setting: dict, weights: Tensor) -> opd_engine.LinearLoss:
        return opd_engine.linear_full_distill_loss(
            *(part.hidden, part.weight, part.teacher_hidden, part.teacher_rows("weight")),
            token_weights=weights,
            bias=part.bias,
            teacher_bias=part.teacher_rows("bias"),
            teacher_logit_softcap=part.case.teacher["softcap"],
            teacher_vocab_size=part.case.teacher["vocab_size"],
            **part.common,
            **setting,
        )

    def definition(setting: dict, is_eager: bool):
        case = versions[is_eager]
        return full_definition(case, None if is_eager else dtype, **setting), case.leaves()

    check_losses_of(f"{where} full", dtype, part, FULL_SETTINGS[::every], ours, definition)


def conformance() -> list[list]:
    """Every layout of this world size x dtype x sequence parallelism; returns the errors recorded on rank 0."""
    world = dist.get_world_size()
    for name, dtype, sequence_parallel in itertools.product(LAYOUTS, DTYPES, (False, True)):
        case_name, bounds = LAYOUTS[name][0], LAYOUTS[name][1].get(world)
        if bounds is None:
            continue
        where = f"tp={world} linear {name}{' sp' if sequence_parallel else ''}"
        part = own_part(CASES[case_name].cast(dtype), bounds, sequence_parallel, chunk_rows=10)
        check_scores_of(where, dtype, case_name, part)
        every = 1 if name == "uneven" or dtype == torch.float64 else 4
        check_bucket_losses(where, dtype, case_name, part, every)
        check_full_losses(where, dtype, case_name, part, every)
    return tolerances.recorded()


# ---- controls --------------------------------------------------------------------------------------------------------


def _not_reduced(tensor: Tensor, group: Any) -> Tensor:
    return tensor


def _reduced_twice(tensor: Tensor, group: Any) -> Tensor:
    dist.all_reduce(tensor, group=group)
    dist.all_reduce(tensor, group=group)
    return tensor


def _own_block(tensor: Tensor, group: Any) -> Tensor:
    return tensor.chunk(group.size())[group.rank()].contiguous()


def _scattered_twice(tensor: Tensor, group: Any) -> Tensor:
    whole = tensor.clone()
    dist.all_reduce(whole, group=group)
    dist.all_reduce(whole, group=group)
    return _own_block(whole, group)


class _NotGathered:
    """A start_all_gather_stacked that sends nothing: every rank merges its own statistics alone."""

    def __init__(self, tensor: Tensor, group: Any) -> None:
        self.result, self.work = tensor.unsqueeze(0), None

    def wait(self) -> Tensor:
        return self.result


PLANTED: dict[str, tuple[bool, list[tuple[Any, str, Any]]]] = {
    "nothing": (False, []),
    "nothing, sequence parallel": (True, []),
    "no reduction of the hidden gradient": (False, [(linear_gradients, "all_reduce_sum_", _not_reduced)]),
    "two reductions of the hidden gradient": (False, [(linear_gradients, "all_reduce_sum_", _reduced_twice)]),
    "no reduce-scatter": (True, [(linear_gradients, "reduce_scatter_sum", _own_block)]),
    "two reductions before the scatter": (True, [(linear_gradients, "reduce_scatter_sum", _scattered_twice)]),
    "statistics not merged": (
        False,
        [(module, "start_all_gather_stacked", _NotGathered) for module in (linear_scores, linear_losses, linear_full)],
    ),
}


CHECKS = {check_scores_of: (), check_bucket_losses: (6,), check_full_losses: (4,)}  # with every sixth setting, ...


@contextlib.contextmanager
def planted(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, attribute, wrong in changes:
            stack.enter_context(mock.patch.object(module, attribute, wrong))
        yield


def controls() -> dict[str, bool]:
    """name of control, function and dtype -> whether the comparison was red (for "nothing": green)."""
    found: dict[str, bool] = {}
    bounds = LAYOUTS["uneven"][1][dist.get_world_size()]
    for (name, (sequence_parallel, changes)), dtype in itertools.product(PLANTED.items(), DTYPES):
        part = own_part(CASES["plain"].cast(dtype), bounds, sequence_parallel, chunk_rows=10)
        for run, some in CHECKS.items():
            seen = False
            try:
                with planted(changes):
                    run("control", dtype, "plain", part, *some)
            except Mismatch:
                seen = True  # rank 0 alone compares, after all collectives
            key = f"{name}: {run.__name__} {NAMES[dtype]}"
            found[key] = seen if changes else not seen
    return found


def everything() -> dict[str, Any]:
    """What one launch of this world size runs: the controls first, which leave nothing in the table."""
    red = controls() if dist.get_world_size() > 1 else {}
    tolerances.WORST.clear()
    return {"red": red, "errors": conformance()}
