"""DTensors: the way in for logits that torch itself has spread over ranks, and the refusal of all others.

Two real gloo processes; meshes of (2,), (1, 2) and (2, 1). The reference is eager autograd in float64 on one process.
"""

import pytest
import torch

import opd_engine
from opd_engine import TokenScores, VocabShard, distill_loss, full_distill_loss, gather_log_probs, local_logits
from opd_engine.parallel.collectives import group_rank
from ranks import run_ranks

WORLD, ROWS, VOCAB, K = 2, 6, 13, 3
PLACED = [  # (mesh, placements by name, columns: even, uneven, one rank without any)
    ((2,), "S1", 14),
    ((2,), "S1", 13),
    ((1, 2), "R S1", 15),
    ((1, 2), "S0 S1", 14),
    ((2, 1), "S1 R", 13),
    ((2, 1), "S1 S0", 13),
    ((2, 1), "S0 S1", 13),  # each rank has half of the rows, and all columns
]


def inputs(width):
    generator = torch.Generator().manual_seed(width)
    logits, theirs = (torch.randn(ROWS, width, generator=generator, dtype=torch.float64) for _ in range(2))
    logits[:, VOCAB:] = 40.0  # padding that would win if anything read it
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(ROWS)])
    return logits, gather_log_probs(theirs[:, :VOCAB], ids), theirs


def place(tensor, mesh_shape, names):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape)
    return distribute_tensor(tensor, mesh, [Replicate() if name == "R" else Shard(int(name[1])) for name in names])


def eager(logits, teacher):
    """The definition of bucketed reverse_kl, by autograd."""
    log_q = logits[:, :VOCAB].log_softmax(-1)
    inside = torch.zeros_like(log_q, dtype=torch.bool).scatter(1, teacher.indices, True)
    tail = log_q.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, teacher.indices), tail], 1)
    log_p = torch.cat([teacher.log_probs, teacher.tail_log_prob[:, None]], 1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def check_value_and_gradient_are_those_of_one_process(group):
    for mesh, names, width in PLACED:
        names = names.split()
        logits, teacher, theirs = inputs(width)
        whole = logits.clone().requires_grad_()
        wanted = eager(whole, teacher)
        (gradient,) = torch.autograd.grad(wanted.square().sum(), whole)
        placed = place(logits, mesh, names).requires_grad_()
        local, shard = local_logits(placed * 1, VOCAB)
        assert isinstance(shard, VocabShard) and local.shape[-1] == shard.local_vocab_size
        shard.check_tiling()
        rows = place(torch.arange(ROWS)[:, None], mesh, [name if name == "S0" else "R" for name in names]).to_local()
        mine = teacher.select(rows[:, 0])
        assert torch.equal(local, logits[rows[:, 0], shard.vocab_start_index : shard.vocab_end_index])
        losses = distill_loss(gather_log_probs(local, mine.indices, shard=shard), mine)
        torch.testing.assert_close(losses, wanted.detach()[rows[:, 0]], rtol=1e-12, atol=1e-12)
        (got,) = torch.autograd.grad(losses.square().sum(), placed)
        assert got.placements == placed.placements
        torch.testing.assert_close(got.full_tensor(), gradient, rtol=1e-12, atol=1e-12)
        whole_loss = full_distill_loss(local, place(theirs, mesh, names).to_local(), shard=shard)
        expected = full_distill_loss(logits[:, :VOCAB], theirs[:, :VOCAB])[rows[:, 0]]
        torch.testing.assert_close(whole_loss, expected, rtol=1e-12, atol=1e-12)


def check_a_mistake_is_seen(group):
    """The control: a shard of the wrong columns."""
    logits, teacher, _ = inputs(14)
    local, shard = local_logits(place(logits, (2,), ["S1"]), VOCAB)
    other = VocabShard(7 - shard.vocab_start_index, 14 - shard.vocab_start_index, VOCAB, group)
    losses = distill_loss(gather_log_probs(local, teacher.indices, shard=other), teacher)
    assert (losses - eager(logits, teacher)).abs().max() > 1e-3


def check_a_rank_without_columns(group):
    local, shard = local_logits(place(torch.zeros(ROWS, 1), (2,), ["S1"]), 1)
    assert local.shape == (ROWS, 1 - group_rank(group))
    assert torch.equal(
        gather_log_probs(local, torch.zeros(ROWS, 1).long(), shard=shard).log_probs, torch.zeros(ROWS, 1)
    )


def raises(message):
    return pytest.raises(ValueError, match=message)


def check_placements_that_no_shard_can_say(group):
    from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2))
    logits = torch.zeros(4, 2, VOCAB)
    for placements, message in (
        ([Shard(2), Partial()], r"dtensor: wanted Shard\(-1\) on one .* got P\S* on mesh dimension 1; redistribute it"),
        ([Shard(2), Shard(2)], r"dtensor: wanted Shard\(-1\) on exactly one mesh dimension, got it on 2 of"),
        (
            [Shard(1), Shard(2)],
            r"dtensor: wanted .* Replicate or Shard\(0\) on the others, got S\(1\) on mesh dimension 0",
        ),
    ):
        placed = DTensor.from_local(logits, mesh, placements, run_check=False)
        with raises(message):
            local_logits(placed, VOCAB)
    for names in (["R", "R"], ["S0", "R"]):
        with raises("on exactly one mesh dimension, got it on 0 of"):
            local_logits(place(logits, (1, 2), names), VOCAB)
    placed = place(logits, (2,), ["S2"])
    for vocab_size in (0, VOCAB + 1, 1.0, True, None):
        with raises(rf"vocab_size: wanted an int in \[1, 13\], dtensor's columns, got {vocab_size}"):
            local_logits(placed, vocab_size)


def check_public_functions_refuse_a_dtensor(group):
    """By the argument's name, with the way in; before anything is sent."""
    plain = torch.zeros(ROWS, VOCAB)
    placed = place(plain, (2,), ["S1"])
    rows = place(torch.ones(ROWS), (2,), ["S0"])
    ids = torch.arange(K).repeat(ROWS, 1)
    placed_ids = place(ids, (2,), ["R"])
    teacher = gather_log_probs(plain, ids)
    hidden, weight = torch.zeros(ROWS, 4), torch.zeros(VOCAB, 4)
    placed_weight, placed_hidden = place(weight, (2,), ["S0"]), place(hidden, (2,), ["R"])
    way = r".* got a DTensor of shape \[.*\] placed \(S\(1\)\); opd_engine.local_logits\(dtensor, vocab_size\)"
    part = r": wanted a plain tensor, got a DTensor .*\.to_local\(\)"
    calls = [
        ("logits: wanted a plain tensor," + way, lambda: opd_engine.topk_log_probs(placed, K)),
        ("logits: wanted a plain tensor," + way, lambda: gather_log_probs(placed, ids)),
        ("student_logits: wanted a plain tensor," + way, lambda: full_distill_loss(placed, plain)),
        ("teacher_logits: wanted a plain tensor," + way, lambda: full_distill_loss(plain, placed)),
        ("indices" + part, lambda: gather_log_probs(plain, placed_ids)),
        ("target" + part, lambda: gather_log_probs(plain, ids, target=placed_ids[:, 0])),
        ("temperature" + part, lambda: gather_log_probs(plain, ids, temperature=rows)),
        ("weight" + part, lambda: opd_engine.linear_topk_log_probs(hidden, placed_weight, K)),
        ("hidden" + part, lambda: opd_engine.linear_gather_log_probs(placed_hidden, weight, ids)),
        ("weight" + part, lambda: opd_engine.linear_distill_loss(hidden, placed_weight, teacher)),
        ("token_weights" + part, lambda: opd_engine.linear_distill_loss(hidden, weight, teacher, token_weights=rows)),
        ("teacher_weight" + part, lambda: opd_engine.linear_full_distill_loss(hidden, weight, hidden, placed_weight)),
        (
            "log_probs" + part,
            lambda: TokenScores(indices=ids, log_probs=placed[:, :K], tail_log_prob=torch.zeros(ROWS)),
        ),
        ("tail_log_prob" + part, lambda: TokenScores(indices=ids, log_probs=plain[:, :K], tail_log_prob=rows)),
    ]
    for message, call in calls:
        with raises(message):
            call()


def test_a_plain_tensor_needs_no_way_in():
    with raises(r"dtensor: wanted a DTensor \[\*, padded_vocab_size\], got a plain tensor \[2, 13\]"):
        local_logits(torch.zeros(2, VOCAB), VOCAB)
    with raises("dtensor: wanted a DTensor .* got list"):
        local_logits([], VOCAB)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def worker():
    import torch.distributed as dist

    for name, check in CHECKS.items():
        print("check", name, flush=True)
        check(dist.group.WORLD)
    return list(CHECKS)


@pytest.fixture(scope="module")
def outcome():
    return run_ranks(__file__, "worker", WORLD, timeout=240)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(outcome, name):
    assert [name in done for done in outcome] == [True] * WORLD
