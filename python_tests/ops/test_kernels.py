"""The ops by themselves: shards merged by hand equal the whole, rows in any order, pieces, variants, refusals."""

import itertools
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from opd_engine.ops import build_info
from ranks import ROOT

OPS = torch.ops.opd_engine
# Uneven, one without a column, one narrower than k, one all padding.
SHARD_BOUNDS = [0, 3, 3, 700, 1500, 1800]
VOCAB_SIZE = 1500


def merged_topk(logits: Tensor, k: int, vocab_size: int, bounds: list[int], target: Tensor | None = None):
    shards = itertools.pairwise(bounds)
    parts = [OPS.topk_partials(logits[:, a:b], k, target, a, vocab_size, 0.8, None) for a, b in shards]
    return OPS.merge_topk(torch.stack(parts), k, target, vocab_size, 0.8, None)


def merged_gather(logits: Tensor, ids: Tensor, vocab_size: int, bounds: list[int], target: Tensor):
    shards = itertools.pairwise(bounds)
    parts = [OPS.gather_partials(logits[:, a:b], ids, target, a, vocab_size, 0.8, None) for a, b in shards]
    stats, support = (torch.stack(part) for part in zip(*parts, strict=True))
    return OPS.merge_gather(stats, support.sum(0), ids, target, vocab_size, 0.8, None)


@pytest.fixture
def logits() -> Tensor:
    rows = torch.randn(5, SHARD_BOUNDS[-1]) * 4
    rows[1] = rows[1].round()  # ties, across shard bounds too
    rows[2, ::3] = -torch.inf
    rows[3, 700:1500] = -torch.inf  # a fully masked shard
    rows[:, VOCAB_SIZE:] = torch.inf  # padding holds anything
    return rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 20, 1500], ids=["k1", "k20", "whole_vocabulary"])
def test_shards_merge_to_the_whole(logits, dtype, k):
    logits = logits.to(dtype)
    target = torch.tensor([0, 2, 699, 700, 1499])
    whole = merged_topk(logits, k, VOCAB_SIZE, [0, SHARD_BOUNDS[-1]], target)
    split = merged_topk(logits, k, VOCAB_SIZE, SHARD_BOUNDS, target)
    assert torch.equal(whole[0], split[0])
    order = torch.sort(logits[:, :VOCAB_SIZE].double(), dim=-1, descending=True, stable=True)
    expected = torch.where(order.values > -torch.inf, order.indices, -1)[:, :k]
    assert torch.equal(whole[0], expected)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(whole[1:], split[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    ids = whole[0]
    for a, b in zip(merged_gather(logits, ids, VOCAB_SIZE, SHARD_BOUNDS, target)[:5], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_logit_of_minus_infinity_weighs_nothing_beside_one_that_swallows_the_gap(dtype):
    """At 1e6 and t = 1e-6 the distance at which e^((z - m)/t) vanishes is far below one ulp of m."""
    logits = torch.full((1, 300), -torch.inf, dtype=dtype)
    logits[0, 5], logits[0, 7], logits[0, 9] = 1e6, 1e6 - 0.0625, -1e6
    stats, support = OPS.gather_partials(logits, torch.tensor([[5]]), None, 0, 300, 1e-6, None)
    log_probs, tail, _, entropy, *_ = OPS.merge_gather(stats[None], support, torch.tensor([[5]]), None, 300, 1e-6, None)
    assert (log_probs.item(), tail.item(), entropy.item()) == (0, -62_500, 0)


PATTERNS = {
    "random": lambda v: torch.randn(v),
    "ascending": lambda v: torch.arange(v) / v * 20.0,
    "descending": lambda v: torch.arange(v) / v * -20.0,
    "constant": lambda v: torch.ones(v),
    "periodic_in_the_number_of_maxima": lambda v: (torch.arange(v) % 512).float(),
    "spiky": lambda v: torch.where(torch.rand(v) < 1e-3, 20 * torch.rand(v), torch.randn(v)),
    "all_winners_adjacent": lambda v: torch.where((torch.arange(v) - v // 2).abs() < 700, 9 + torch.rand(v), 0.0),
    "signed_zeros": lambda v: torch.where(torch.rand(v) < 0.5, -0.0, 0.0),
    "few_finite": lambda v: torch.where(torch.arange(v) % 5000 == 7, 1.0, -torch.inf),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("k", [1, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_is_exact_whatever_the_row_holds(pattern, k, dtype):
    row = PATTERNS[pattern](50_257)[None].to(dtype)  # V % 8 != 0
    ids, log_probs, tail, *_ = OPS.topk_log_probs(row, k, None, 50_257, 1.0, None)
    order = torch.sort(row.double(), dim=-1, descending=True, stable=True)
    assert torch.equal(ids, torch.where(order.values > -torch.inf, order.indices, -1)[:, :k])
    reference = torch.log_softmax(row.double(), -1)
    off_support = reference.clone().scatter_(-1, order.indices[:, :k], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(tail.double(), off_support, rtol=4 * 1.2e-7, atol=4 * 1.2e-7)
    present = ids >= 0
    expected = reference.gather(-1, ids.clamp(min=0))
    torch.testing.assert_close(log_probs.double()[present], expected[present], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 40], ids=["cut_into_eight", "cut_into_two", "uncut"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_op_for_the_whole_vocabulary_is_partials_and_merge(rows, dtype):
    logits, vocab_size, target = torch.randn(rows, 140_000).to(dtype), 139_990, torch.arange(rows) * 1_000
    whole = OPS.topk_log_probs(logits, 30, target, vocab_size, 0.8, None)
    parts = OPS.topk_partials(logits, 30, target, 0, vocab_size, 0.8, None)
    merged = OPS.merge_topk(parts[None], 30, target, vocab_size, 0.8, None)
    assert torch.equal(whole[0], merged[0])
    for a, b in zip(whole[1:], merged[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
    with pytest.raises(RuntimeError, match="topk_log_probs: logits must hold the whole vocabulary of 140001"):
        OPS.topk_log_probs(logits, 30, target, 140_001, 0.8, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_rows_of_a_fused_loss_are_cut_and_give_what_many_give(dtype):
    """Three rows take passes over pieces, the same rows among twenty the fused kernel; one is masked."""
    score = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(3, 140_000).to(dtype)
    ids = OPS.topk_log_probs(logits, 30, None, 139_990, 1.0, None)[0]
    teacher = torch.log_softmax(torch.randn(3, 31, dtype=score), -1)
    given = (ids, teacher[:, :-1].contiguous(), teacher[:, -1].contiguous(), torch.tensor([0.5, 0.0, 1.5], dtype=score))
    options = ("jsd", 0.3, 0.1, "bucket", None, 139_990, 0.8, None)
    few, many = logits.clone(), logits.repeat(7, 1)
    loss = OPS.distill_loss_(few, *given, *options)
    losses = OPS.distill_loss_(many, *(part.repeat(7, *[1] * (part.dim() - 1)) for part in given), *options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss, losses[:3], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(few, many[:3], rtol=0.01 if dtype == torch.bfloat16 else tolerance, atol=tolerance)
    assert not few[1].any() and few[0].any()


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    logits, ids = torch.randn(3, 100_003), torch.arange(0, 90_000, 1000)[None].expand(3, -1).contiguous()
    upstream = torch.randn(3, ids.shape[1] + 4)

    def everything():
        gathered = OPS.gather_log_probs(logits, ids, None, 100_003, 1.0, None)
        gradient = OPS.scores_backward(logits, ids, None, gathered[5], upstream, 0, 100_003, 1.0, None)
        topk = OPS.topk_log_probs(logits, 9, None, 100_003, 1.0, None)
        return [OPS.topk_partials(logits, 9, None, 0, 100_003, 1.0, None), *topk, *gathered, gradient]

    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_in_place_equals_out_of_place_and_rows_without_gradient_are_not_read():
    logits = torch.randn(4, 7, 333).transpose(0, 1)  # [s, b, V] seen through a transpose
    ids = torch.randint(0, 300, (28, 1))
    stats = OPS.gather_log_probs(logits, ids, None, 300, 1.0, None)[5]
    upstream = torch.randn(28, 5)
    upstream[3] = 0
    logits[0, 3] = torch.nan  # row 3: neither its logits nor its statistics may matter
    stats[3] = torch.nan
    arguments = (ids, None, stats, upstream, 0, 300, 1.0, None)
    gradient = OPS.scores_backward(logits, *arguments)
    OPS.scores_backward_(logits, *arguments)
    assert torch.equal(gradient, logits)
    assert not gradient[0, 3].any() and not gradient[..., 300:].any()
    assert gradient.isfinite().all()


def test_refusals_name_the_op_the_argument_and_what_came():
    logits, ids = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"topk_partials: k must be in \[0, vocab_size = 8\], got 9"):
        OPS.topk_partials(logits, 9, None, 0, 8, 1.0, None)
    with pytest.raises(RuntimeError, match=r"gather_partials: indices must be int64, got int32"):
        OPS.gather_partials(logits, ids.int(), None, 0, 8, 1.0, None)
    with pytest.raises(RuntimeError, match=r"gather_partials: indices must have shape \[2, \*\], got \[3, 1\]"):
        OPS.gather_partials(logits, torch.zeros(3, 1, dtype=torch.int64), None, 0, 8, 1.0, None)
    with pytest.raises(RuntimeError, match=r"temperature must be finite and > 0, got 0"):
        OPS.gather_partials(logits, ids, None, 0, 8, 0.0, None)
    with pytest.raises(RuntimeError, match=r"in every row, got -1 in row 1"):
        OPS.gather_partials(logits, ids, None, 0, 8, 1.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(RuntimeError, match=r"logits must have contiguous columns .* got last stride 2"):
        OPS.topk_partials(torch.randn(8, 2).t(), 1, None, 0, 8, 1.0, None)
    with pytest.raises(RuntimeError, match=r"divergence must be .* got 'kl'"):
        scores = torch.zeros(2, 1)
        OPS.bucket_divergence(
            ids, scores, scores[:, 0].clone(), scores, scores[:, 0].clone(), "kl", 0.5, 0.1, "bucket", None
        )


def test_no_symbol_is_shared_between_instruction_sets():
    """A weak symbol from an AVX-512 object could be the copy the linker keeps for every processor."""
    objects = sorted(ROOT.glob("build/*/CMakeFiles/opd_cpu_*.dir/csrc/kernels/cpu/variant/*.o"))
    if shutil.which("nm") is None or not objects:
        pytest.skip("needs nm and the build folder's object files")
    listing = subprocess.run(["nm", "-C", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if " W " in line or " V " in line]
    assert [line for line in weak if "__gxx_personality" not in line] == []


def test_the_processor_runs_a_compiled_variant():
    info = build_info()
    assert info["cpu_variant"] in info["cpu_variants_available"].split(",")
    assert set(info["cpu_variants_available"].split(",")) <= set(info["cpu_variants_compiled"].split())
