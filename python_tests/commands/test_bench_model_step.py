"""The step with its models: right answers, and memory that is counted where it cannot be run."""

import dataclasses

import pytest
import torch

from opd_engine.bench.cases import build
from opd_engine.bench.cases.model_step import longest_sequence, step_peak
from opd_engine.bench.memory import trace_allocations
from opd_engine.bench.record import ERROR_LIMIT
from opd_engine.bench.shapes import Shape

CPU = torch.device("cpu")
SHAPE = Shape(512, 5_003, k=8, hidden_size=128)  # long enough for activations to set the peak, as where memory ends
IMPLS = ("opd_engine", "opd_ablation_through_logits", "opd_ablation_models_alone", "torch_eager")


@pytest.fixture(scope="module")
def workload():
    pytest.importorskip("transformers")
    return build("step", SHAPE, CPU, compile_baselines=False)


def traced_peak(impl) -> int:
    number = impl.prepare(0)
    result, allocations = trace_allocations(lambda: impl.run(number), CPU, SHAPE.elements)
    del result
    return allocations.peak_bytes


def test_ours_give_the_float64_answer(workload):
    assert tuple(impl.name for impl in workload.impls) == IMPLS
    for impl in workload.impls[:3]:  # eager's log(1 - sum) may end at -inf: a record would be refused
        assert (impl.error or workload.error)(impl.run(impl.prepare(0))) <= ERROR_LIMIT["float32"], impl.name


def test_the_count_is_the_allocators_peak_whatever_ran_before(workload):
    for impl in (*workload.impls, *reversed(workload.impls)):
        measured, counted = traced_peak(impl), step_peak(SHAPE, impl.name, CPU) - weights_bytes()
        assert 0.99 < counted / measured < 1.01, (impl.name, counted, measured)


def weights_bytes() -> int:
    from opd_engine.integrations.hf.models import random_qwen3

    model = random_qwen3(SHAPE.hidden_size, SHAPE.vocab_size, seed=0)
    return 2 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    pytest.importorskip("transformers")
    wide, budget = dataclasses.replace(SHAPE, vocab_size=20_001), 192 << 20
    lengths = {name: longest_sequence(wide, name, CPU, budget) for name in IMPLS[:2]}
    for name, longest in lengths.items():
        within, beyond = (
            step_peak(dataclasses.replace(wide, num_tokens=length), name, CPU)
            for length in (longest, longest + longest // 50)
        )
        assert within <= budget < beyond, name
    assert lengths["opd_engine"] > 1.2 * lengths["opd_ablation_through_logits"], lengths
    assert longest_sequence(wide, "opd_engine", CPU, 1 << 20) == 0
