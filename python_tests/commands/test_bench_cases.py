"""Every case measures what it says: answers are right, wrong ones are caught, rows hold their pattern."""

import dataclasses
import math

import pytest
import torch

from opd_engine import TokenScores
from opd_engine.bench.cases import build, linear_inputs, linear_topk
from opd_engine.bench.cases.workload import score_fields
from opd_engine.bench.goals import GOALS, LINEAR_GOALS, PATTERN_PLAN, PLAN
from opd_engine.bench.logits import checked_rows, cold_copies, make_logits, take_rows
from opd_engine.bench.record import ERROR_LIMIT
from opd_engine.bench.shapes import CASES, DTYPES, PATTERNS, SETS, Shape, for_case, measures, plan

CPU = torch.device("cpu")
SMALL = Shape(12, 523, k=5)  # 523: prime, so that rows are misaligned and 8 shards uneven


def shape_of(case: str, **changes) -> Shape:
    return dataclasses.replace(for_case(case, SMALL), **changes)


def run(workload, impl):
    result = impl.run(impl.prepare(0))
    error = (impl.error or workload.error)(result)
    if impl.restore is not None:
        impl.restore(0)
    return result, error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_gives_the_float64_answer(case, dtype):
    workload = build(case, shape_of(case, dtype=dtype), CPU, compile_baselines=False)
    assert workload.impls[0].name == "opd_engine" and workload.bytes_moved > 0 and workload.flops > 0
    for impl in workload.impls:
        for _ in range(2):  # an in-place backward must leave the next sample what the first one had
            assert run(workload, impl)[1] <= ERROR_LIMIT[dtype], impl.name


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("topk", {"tp_size": 8}),
        ("gather", {"tp_size": 8}),
        ("topk", {"layout": "sbv"}),
        ("gather", {"layout": "sbv"}),
        ("loss_fwd_bwd", {"layout": "sbv"}),
        ("loss_fwd_bwd_inplace", {"layout": "sbv"}),
        ("full_divergence", {"layout": "sbv"}),
        ("loss_fwd_bwd", {"mask_density": 0.1}),
        ("loss_fwd_bwd_inplace", {"mask_density": 0.5}),
        ("step", {"mask_density": 0.5}),
        ("linear_distill", {"mask_density": 0.5}),
        ("linear_full", {"mask_density": 0.5}),
        ("linear_gather", {"tp_size": 8}),
        ("topk", {"num_tokens": 1}),
        ("topk", {"k": 100}),
        *(("topk", {"pattern": pattern}) for pattern in PATTERNS[1:]),
    ],
    ids=str,
)
def test_every_kind_of_shape_is_measured_right(case, changes):
    shape = shape_of(case, **{"baselines": "pattern" not in changes, **changes})
    workload = build(case, shape, CPU, compile_baselines=False)
    for impl in workload.impls:
        assert run(workload, impl)[1] <= ERROR_LIMIT["float32"], impl.name


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_answer_is_caught(case):
    workload = build(case, shape_of(case), CPU, compile_baselines=False)
    right, error = run(workload, workload.impls[0])
    assert error < 1e-4
    if isinstance(right, TokenScores):
        right = score_fields(right)
    if isinstance(right, dict):
        for name, value in right.items():
            if (case, name) == ("gather", "indices"):  # given, not found
                continue
            wrong = value.flip(-1) if name == "indices" else value * 1.01
            assert workload.error({**right, name: wrong}) > 1e-3, name
    else:
        gradient = right[1]
        scale = 1.01 if case != "step" else 1.1
        assert workload.error((right[0], gradient * scale, *right[2:])) > 1e-3
        assert workload.error((right[0] + 0.01, gradient, *right[2:])) > 1e-3


def test_a_missing_number_is_an_infinite_error():
    workload = build("topk", SMALL, CPU, compile_baselines=False)
    right = score_fields(run(workload, workload.impls[0])[0])
    entropy = right["entropy"].clone()
    entropy[0] = math.nan
    assert workload.error({**right, "entropy": entropy}) == math.inf


def test_rows_hold_their_pattern():
    def rows(pattern):
        return make_logits(dataclasses.replace(SMALL, pattern=pattern, vocab_size=1_024), CPU)

    assert torch.equal(rows("ascending").sort(-1).values, rows("ascending"))
    assert torch.equal(rows("descending").sort(-1, descending=True).values, rows("descending"))
    assert rows("constant").unique().numel() == 1
    assert torch.equal(rows("periodic")[:, :256], rows("periodic")[:, 256:512])
    assert ((rows("spiky") > 10).sum(-1) == 20).all()
    assert (rows("clustered")[:, -20:] > 10).all() and (rows("clustered")[:, :-20] < 10).all()


def test_strides_of_a_transposed_layout_hold_the_same_rows():
    plain, strided = make_logits(SMALL, CPU), make_logits(dataclasses.replace(SMALL, layout="sbv"), CPU)
    assert strided.shape == (3, 4, 523) and not strided.is_contiguous()
    every = torch.arange(12)
    assert torch.equal(take_rows(strided, every), plain)
    copies = cold_copies(strided).copies
    assert len(copies) > 1 and all(copy.stride() == strided.stride() for copy in copies)


def test_checked_rows_include_the_ends_and_stay_affordable():
    many = Shape(100_000, 151_936)
    rows = checked_rows(many)
    assert rows[0] == 0 and rows[-1] == 99_999 and rows.numel() * 151_936 <= 4_000_000
    assert checked_rows(Shape(1, 8)).tolist() == [0]


@pytest.mark.parametrize("name", SETS)
def test_sets_hold_only_what_their_cases_measure(name):
    chosen = plan(name, (), ())
    assert chosen and len(set(chosen)) == len(chosen)
    assert [entry for entry in chosen if measures(*entry) is not None] == []


def test_the_sweep_covers_what_it_is_for():
    shapes = [shape for _, shape in plan("sweep", (), ())]
    assert {shape.vocab_size for shape in shapes} >= {32_000, 50_257, 128_256, 151_936, 262_144}
    assert {shape.num_tokens for shape in shapes} >= {1, 32_768} and {shape.k for shape in shapes} >= {1, 1_024}
    assert {shape.mask_density for shape in shapes} == {0.1, 0.5, 1.0} and {shape.tp_size for shape in shapes} == {1, 8}
    assert {shape.dtype for shape in shapes} == set(DTYPES) and {shape.layout for shape in shapes} == {"rows", "sbv"}


def test_goals_can_fail_and_read_only_what_is_measured():
    for goal in (*GOALS, *LINEAR_GOALS.values()):
        assert goal.met(goal.target) and goal.met(goal.half, half=True)
        assert goal.half <= goal.target if goal.at_least else goal.half >= goal.target
        assert not goal.met(goal.half * 0.99 if goal.at_least else goal.half + 1.0, half=True)
        assert goal.measure([]) is None
    readme = plan("readme", (), ())
    assert [entry for entry in PLAN if entry not in readme] == []
    assert sorted(map(str, PATTERN_PLAN)) == sorted(map(str, plan("patterns", (), ())))
    head = Shape(2_048, 65_536, hidden_size=512)
    wanted = [("linear_distill", dataclasses.replace(head, mask_density=density)) for density in LINEAR_GOALS]
    assert [entry for entry in wanted if entry not in plan("linear", (), ())] == []


def test_what_reads_once_has_the_floor_of_one_read():
    workload = build("loss_fwd_bwd_inplace", SMALL, CPU, compile_baselines=False)
    work = {impl.name: impl.least_work for impl in workload.impls}
    ids = SMALL.num_tokens * 24 * SMALL.k
    assert workload.bytes_moved == 3 * SMALL.logits_bytes + ids and work["opd_engine"] is None
    assert work["opd_ablation_one_pass"] == (2 * SMALL.logits_bytes + ids, workload.flops)
    half = build("loss_fwd_bwd_inplace", dataclasses.replace(SMALL, mask_density=0.5), CPU, compile_baselines=False)
    assert half.impls[1].least_work[0] == 1.5 * SMALL.logits_bytes + ids
    copy = build("topk", SMALL, CPU, compile_baselines=False).impls[1]
    assert (copy.name, copy.least_work) == ("torch_copy", (2 * SMALL.logits_bytes, 0))
    wide = build("topk", dataclasses.replace(SMALL, k=100, baselines=False), CPU)
    narrow = build("topk", dataclasses.replace(SMALL, k=64, baselines=False), CPU)
    assert wide.impls[-1].name == "opd_ablation_k64"
    assert wide.impls[-1].least_work == (narrow.bytes_moved, narrow.flops) != (wide.bytes_moved, wide.flops)


@pytest.mark.parametrize(("case", "products"), [("linear_topk", 1), ("linear_gather", 3), ("linear_distill", 3)])
def test_the_least_of_a_case_from_hidden_states_is_its_products(case, products):
    shape = shape_of(case)
    product = 2 * shape.num_tokens * shape.vocab_size * shape.hidden_size
    assert build(case, shape, CPU, compile_baselines=False).flops == products * product


def test_one_of_eight_shards_is_measured_with_its_own_workspace(monkeypatch):
    monkeypatch.setattr(linear_inputs, "default_workspace_bytes", lambda device, tp_size: (1280 << 20) // tp_size)
    given, real = [], linear_topk.linear_topk_log_probs

    def spied(*arguments, workspace_bytes):
        given.append(workspace_bytes)
        return real(*arguments, workspace_bytes=workspace_bytes)

    monkeypatch.setattr(linear_topk, "linear_topk_log_probs", spied)
    ours = build("linear_topk", shape_of("linear_topk", tp_size=8, baselines=False), CPU).impls[0]
    run_once = ours.run(ours.prepare(0))
    assert run_once.k == SMALL.k and given == [160 << 20]
