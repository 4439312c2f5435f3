"""Calls of other libraries: named as absent where they do not run, and checked by their own definitions where they do.

The libraries need a GPU, so here stand-ins of the same signatures answer, in torch.
"""

import dataclasses
import types

import pytest
import torch

from opd_engine.bench.cases import build, competitors
from opd_engine.bench.record import ERROR_LIMIT
from opd_engine.bench.shapes import Shape, for_case

CPU = torch.device("cpu")
SMALL = Shape(12, 523, k=5)
SURE = dataclasses.replace(SMALL, k=1)


class WrittenOver(torch.autograd.Function):
    """Cross entropy summed over rows, its gradient written over the logits in the forward."""

    @staticmethod
    def forward(ctx, logits, target, weight, ignore_index, z_loss, smoothing, reduction):
        assert (weight, z_loss, smoothing, reduction) == (None, 0.0, 0.0, "sum")
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(target)), target.clamp(min=0)] -= 1
        logits.copy_(gradient.masked_fill((target == ignore_index)[:, None], 0))
        ctx.save_for_backward(logits.detach())
        return loss, None, None, None

    @staticmethod
    def backward(ctx, grad, *_):
        return (ctx.saved_tensors[0] * grad, *[None] * 6)


def by_torch(logits, target, *, ignore_index, reduction, inplace_backward):
    assert inplace_backward
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def linear(hidden, weight, target, tp_group=None, reduction="mean", ignore_index=-100, sequence_parallel=False):
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction).view(1)


STAND_INS = {
    "flashinfer": {"top_k": lambda logits, k, sorted: torch.topk(logits, k, sorted=sorted)},
    "liger_cross_entropy": {"LigerCrossEntropyFunction": WrittenOver},
    "quack_cross_entropy": {"cross_entropy": by_torch},
    "megatron_linear_ce": {"linear_cross_entropy": linear},
}
CALLS = [
    ("topk", SMALL, "flashinfer"),
    ("topk", SMALL, "flashinfer_topk_alone"),
    ("loss_fwd_bwd_inplace", SURE, "liger_cross_entropy"),
    ("loss_fwd_bwd_inplace", dataclasses.replace(SURE, mask_density=0.5), "liger_cross_entropy"),
    ("loss_fwd_bwd_inplace", dataclasses.replace(SURE, mask_density=0.5), "quack_cross_entropy"),
    ("linear_gather", for_case("linear_gather", SMALL), "megatron_linear_ce"),
]


def stand_in(name, device):
    if name in STAND_INS:
        return types.SimpleNamespace(**STAND_INS[name]), "1"
    return None, "nobody stands in"


def implementation(case, shape, name):
    workload = build(case, shape, CPU, compile_baselines=False)
    return workload, next(impl for impl in workload.impls if impl.name == name)


@pytest.mark.parametrize(("case", "shape", "name"), CALLS, ids=str)
def test_each_call_gives_the_answer_of_its_own_check_twice(case, shape, name, monkeypatch):
    monkeypatch.setattr(competitors, "find", stand_in)
    workload, impl = implementation(case, shape, name)
    for _ in range(2):  # what is written over the logits is put back
        assert (impl.error or workload.error)(impl.run(impl.prepare(0))) < ERROR_LIMIT["float32"]
        if impl.restore is not None:
            impl.restore(0)


def test_a_wrong_answer_of_another_library_is_caught(monkeypatch):
    monkeypatch.setattr(competitors, "find", stand_in)
    _, alone = implementation("topk", SMALL, "flashinfer_topk_alone")
    values, indices = alone.run(alone.prepare(0))
    assert alone.error((values, indices.to(torch.int32))) == 0
    assert alone.error((values.flip(-1), indices)) > 1e-3 and alone.error((values, indices.flip(-1))) > 1e-3
    _, impl = implementation("loss_fwd_bwd_inplace", SURE, "quack_cross_entropy")
    losses, gradient = impl.run(impl.prepare(0))
    assert impl.error((losses, gradient * 1.01)) > 1e-3
    _, half = implementation("loss_fwd_bwd_inplace", dataclasses.replace(SURE, mask_density=0.5), impl.name)
    assert half.error((None, gradient)) > 1e-3, "rows that do not count have no gradient"


@pytest.mark.parametrize(
    ("case", "shape", "names"),
    [
        ("topk", SMALL, ["flashinfer"]),
        ("loss_fwd_bwd_inplace", SURE, ["liger_cross_entropy", "quack_cross_entropy"]),
        ("linear_gather", SMALL, ["cut_cross_entropy", "megatron_linear_ce", "liger_linear_ce"]),
        ("linear_full", SMALL, ["liger_linear_jsd"]),
    ],
    ids=str,
)
def test_on_a_cpu_each_is_absent_with_the_reason(case, shape, names):
    absent = build(case, for_case(case, shape), CPU, compile_baselines=False).absent
    assert list(absent) == names and all("needs a CUDA device" in why for why in absent.values())


def test_what_does_not_import_says_so():
    pytest.importorskip("megatron.core")
    module, why = competitors.find("megatron_linear_ce", torch.device("cuda"))
    assert module is not None or ("megatron-core does not import here" in why and "Error" in why)


def test_cross_entropy_is_compared_where_the_support_is_one_id():
    assert build("loss_fwd_bwd_inplace", SMALL, CPU, compile_baselines=False).absent == {}
