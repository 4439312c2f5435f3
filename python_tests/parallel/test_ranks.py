"""Collectives, their autograd, the vocab-parallel LM head and the groups, in three real gloo processes.

One launch, which ends at the first check that fails; its name is the last one printed.
"""

import pytest
import torch

from opd_engine import VocabShard
from opd_engine.parallel.collectives import (
    CollectiveRecord,
    all_gather_json,
    all_gather_rows,
    all_gather_stacked,
    all_reduce_max_,
    all_reduce_sum_,
    barrier,
    broadcast_,
    copy_to_group,
    count_collectives,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_rows,
)
from opd_engine.parallel.launch import World
from opd_engine.parallel.linear import vocab_parallel_lm_head
from opd_engine.parallel.meshes import mesh_group, split_world
from ranks import run_ranks

WORLD = 3


def ranked(group, *shape, dtype=torch.float64):
    """The tensors of all ranks, [WORLD, *shape]; this rank's is row group_rank(group)."""
    return torch.randn(WORLD, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def check_stacked_in_rank_order_for_any_layout(group):
    everybody = ranked(group, 4, 3)
    mine = everybody[group_rank(group)]
    torch.testing.assert_close(all_gather_stacked(mine, group), everybody, rtol=0, atol=0)
    torch.testing.assert_close(all_gather_stacked(mine.t(), group), everybody.transpose(1, 2), rtol=0, atol=0)
    assert all_gather_stacked(torch.empty(0, 5), group).shape == (WORLD, 0, 5)
    packed = torch.arange(6, dtype=torch.int32).view(2, 3) + group_rank(group)
    assert all_gather_stacked(packed, group)[2].equal(torch.arange(6, dtype=torch.int32).view(2, 3) + 2)


def check_sums_maxima_and_broadcasts(group):
    everybody = ranked(group, 5)
    mine = everybody[group_rank(group)]
    torch.testing.assert_close(all_reduce_sum_(mine.clone(), group), everybody.sum(0))
    torch.testing.assert_close(all_reduce_max_(mine.clone(), group), everybody.max(0).values, rtol=0, atol=0)
    torch.testing.assert_close(broadcast_(mine.clone(), group, source=1), everybody[1], rtol=0, atol=0)
    barrier(group)
    assert all_gather_json(
        {"rank": group_rank(group), "text": "é" * group_rank(group)}, group, torch.device("cpu")
    ) == [{"rank": rank, "text": "é" * rank} for rank in range(WORLD)]


def check_the_log_counts_what_was_sent(group):
    with count_collectives() as outer:
        all_gather_stacked(torch.zeros(4, 2), group)
        with count_collectives() as inner:
            all_reduce_sum_(torch.zeros(10, dtype=torch.float64), group)
            all_reduce_sum_(torch.zeros(0), group)
        reduce_scatter_rows(torch.zeros(6, 2), group)
        broadcast_(torch.zeros(3), group)
    all_reduce_sum_(torch.zeros(1), group)
    assert inner == [CollectiveRecord("all_reduce", 80, WORLD)]
    assert [(record.op, record.nbytes) for record in outer] == [
        ("all_gather", 4 * 2 * 4 * WORLD),
        ("all_reduce", 80),
        ("reduce_scatter", 48),
        ("broadcast", 12),
    ]
    assert (outer.nbytes(), outer.nbytes("all_gather")) == (96 + 80 + 48 + 12, 96)


def check_autograd_is_that_of_the_whole_program(group):
    """Each Function against autograd over the stacked program of all ranks, with non-contiguous gradients."""
    rank = group_rank(group)
    whole_weight = ranked(group, 6, 4)

    def compare(function, program, shape):
        everybody = ranked(group, *shape).requires_grad_()
        mine = everybody[rank].detach().requires_grad_()
        out = function(mine, group)
        wanted = program(everybody)
        torch.testing.assert_close(out, wanted[rank])
        weights = torch.randn(WORLD, *out.shape[::-1], generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        weights = weights.transpose(1, 2)  # non-contiguous gradients reach the backward
        grad = torch.autograd.grad((out * weights[rank]).sum(), mine)[0]
        expected = torch.autograd.grad((torch.stack(wanted) * weights).sum(), everybody)[0][rank]
        torch.testing.assert_close(grad, expected)

    compare(all_gather_rows, lambda x: [x.flatten(0, 1)] * WORLD, (2, 4))
    compare(reduce_scatter_rows, lambda x: list(x.sum(0).chunk(WORLD)), (6, 4))

    # copy and reduce bracket a sharded product: replicated in, replicated out, one loss
    x = whole_weight[0].clone().requires_grad_()
    mine = whole_weight[0].clone().requires_grad_()
    shards = ranked(group, 4, 4)
    out = reduce_from_group(copy_to_group(mine, group) @ shards[rank], group)
    wanted = x @ shards.sum(0)
    torch.testing.assert_close(out, wanted)
    weights = torch.arange(24, dtype=torch.float64).view(4, 6).t()
    grad = torch.autograd.grad((out * weights).sum(), mine, create_graph=True)[0]
    torch.testing.assert_close(grad, torch.autograd.grad((wanted * weights).sum(), x)[0])


def check_low_precision_is_summed_wide(group):
    # 256 + 1 + 1 in bfloat16 is 256 when summed in bfloat16 and 258 when summed in float32
    value = torch.full((4,), 256.0 if group_rank(group) == 0 else 1.0, dtype=torch.bfloat16)
    assert reduce_from_group(value, group).tolist() == [258.0] * 4
    assert reduce_scatter_rows(value.repeat(3), group).tolist() == [258.0] * 4
    assert reduce_from_group(value, group).dtype == torch.bfloat16


def check_the_lm_head(group):
    rank, bounds = group_rank(group), [(0, 5), (5, 5), (5, 12)]
    start, end = bounds[rank]
    shard = VocabShard(start, end, 11, group)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 1e-2)):
        generator = torch.Generator().manual_seed(5)
        hidden, weight, bias, upstream = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()
            for shape in ((2, 3, 8), (12, 8), (12,), (2, 3, 12))
        )
        for tensor in (hidden, weight, bias):
            tensor.requires_grad_()
        wanted = hidden @ weight.t() + bias
        expected = torch.autograd.grad((wanted * upstream).sum(), (hidden, weight, bias))
        mine = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight[start:end], bias[start:end])]
        with count_collectives() as log:
            out = vocab_parallel_lm_head(mine[0], mine[1], shard, mine[2])
            assert log == [], "the forward communicates nothing"
            grads = torch.autograd.grad((out * upstream[..., start:end].to(dtype)).sum(), mine)
        wide = 4 if dtype == torch.bfloat16 else 8
        assert log == [CollectiveRecord("all_reduce", 6 * 8 * wide, WORLD)]
        assert [grad.dtype for grad in grads] == [dtype] * 3
        slices = (expected[0], expected[1][start:end], expected[2][start:end])
        for got, want in zip((out, *grads), (wanted[..., start:end], *slices), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 4)
        if dtype == torch.bfloat16:  # rounded once, last: the sum of the float32 partials, not of rounded ones
            partial = upstream[..., start:end].float().flatten(0, 1) @ weight[start:end].detach().float()
            once = all_reduce_sum_(partial, group).view(2, 3, 8).bfloat16()
            torch.testing.assert_close(grads[0], once, rtol=0, atol=0)


def check_groups_of_the_world(group):
    rank = group_rank(group)
    world = World(rank, WORLD, rank, torch.device("cpu"), group)
    dp, tp = split_world(world, 3)
    assert dp is None and (group_rank(mesh_group(tp)), group_size(mesh_group(tp))) == (rank, 3)
    dp, tp = split_world(world, 1)
    assert tp is None and (group_rank(mesh_group(dp)), group_size(mesh_group(dp))) == (rank, 3)
    with pytest.raises(ValueError, match="tp_size: wanted a divisor of the 3 ranks that were started, got 2"):
        split_world(world, 2)


def check_tiling_faults_reach_every_rank_alike(group):
    rank = group_rank(group)
    VocabShard(*[(0, 4, 10), (4, 4, 10), (4, 12, 10)][rank], group).check_tiling()
    with pytest.raises(ValueError, match="a gap at id 4") as caught:
        VocabShard(*[(0, 4, 10), (5, 5, 10), (5, 12, 10)][rank], group).check_tiling()
    assert len(set(all_gather_json(str(caught.value), group, torch.device("cpu")))) == 1


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def worker():
    import torch.distributed as dist

    for name, check in CHECKS.items():
        print("check", name, flush=True)
        check(dist.group.WORLD)
    return list(CHECKS)


@pytest.fixture(scope="module")
def outcome():
    return run_ranks(__file__, "worker", WORLD, timeout=180)


@pytest.mark.parametrize("name", CHECKS)
def test_on_three_ranks(outcome, name):
    assert [name in done for done in outcome] == [True] * WORLD


def test_alone_every_collective_is_the_identity():
    tensor = torch.randn(4, 3)
    with count_collectives() as log:
        assert all_gather_stacked(tensor, None).equal(tensor.unsqueeze(0))
        assert all_gather_json([1], None, torch.device("cpu")) == [[1]]
        for function in (copy_to_group, reduce_from_group, all_gather_rows, reduce_scatter_rows):
            assert function(tensor, None) is tensor
        for function in (all_reduce_sum_, all_reduce_max_, broadcast_):
            assert function(tensor, None) is tensor
        barrier(None)
    assert log == []


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "message"),
    [
        ((2, 7), (12, 8), None, r"hidden: wanted \[\*, hidden_size = 8\], got shape \(2, 7\)"),
        ((2, 8), (12, 8, 1), None, r"weight_shard: wanted \[vocab_shard_size, hidden_size\], got shape \(12, 8, 1\)"),
        ((2, 8), (11, 8), None, "weight_shard: wanted 12 rows for the shard"),
        ((2, 8), (12, 8), (11,), r"bias: wanted \[vocab_shard_size = 12\], got shape \(11,\)"),
    ],
)
def test_an_lm_head_that_does_not_fit(hidden, weight, bias, message):
    shard = VocabShard(0, 12, 10)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_lm_head(
            torch.zeros(hidden), torch.zeros(weight), shard, None if bias is None else torch.zeros(bias)
        )
