"""The linear functions under tensor parallelism: bytes on the wire, order of messages, main_grad, faults on every rank.

Three real gloo processes, uneven shards and a zero-width one; values and gradients are in truth/. One launch.
"""

from unittest import mock

import pytest
import torch

import opd_engine
from opd_engine import (
    VocabShard,
    gather_log_probs,
    linear_distill_loss,
    linear_full_distill_loss,
    linear_gather_log_probs,
    linear_topk_log_probs,
)
from opd_engine.functional import linear_full, linear_losses, linear_scores
from opd_engine.functional.linear_chunks import ChunkLogits
from opd_engine.parallel.collectives import (
    CollectiveRecord,
    PendingTensor,
    all_gather_json,
    count_collectives,
    group_rank,
    start_all_gather_stacked,
)
from ranks import run_ranks

WORLD, ROWS, HIDDEN, VOCAB, PADDED, K = 3, 12, 8, 37, 44, 5
TILING = ((0, 20), (20, 20), (20, 44))
COLUMNS = 13  # ceil(37 / 3): what chunks are cut by, whatever a rank's own width
CPU = torch.device("cpu")


def shard_of(group, tiling=TILING):
    return VocabShard(*tiling[group_rank(group)], VOCAB, group)


def inputs(group, dtype=torch.float32, *, sequence_parallel=False):
    """(hidden states of this rank, its rows of the head, shard and so on, the teacher's scores)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(ROWS, VOCAB, generator=generator)
    teacher = gather_log_probs(logits, torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in hidden]))
    shard = shard_of(group)
    if sequence_parallel:
        hidden = hidden.chunk(WORLD)[group_rank(group)]
    mine = weight[shard.vocab_start_index : shard.vocab_end_index]
    common = {"shard": shard, "sequence_parallel": sequence_parallel}
    return hidden.clone().requires_grad_(), mine.clone().requires_grad_(), common, teacher


def check_bytes_of_scores(group):
    """Four chunks of three rows: what the functions on logits send, packed into one message a chunk."""
    for dtype, score_bytes in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for sequence_parallel in (False, True):
            hidden, weight, common, teacher = inputs(group, dtype, sequence_parallel=sequence_parallel)
            common["workspace_bytes"] = 3 * COLUMNS * dtype.itemsize
            gathered = [CollectiveRecord("all_gather", ROWS * HIDDEN * dtype.itemsize, WORLD)] * sequence_parallel
            with count_collectives() as log:
                linear_topk_log_probs(hidden, weight, K, **common)
            a_row = ((score_bytes + 4) * K + 5 * score_bytes) * WORLD
            assert log == [*gathered, *[CollectiveRecord("all_gather", 3 * a_row, WORLD)] * 4]
            with count_collectives() as log:
                scores = linear_gather_log_probs(hidden, weight, teacher.indices, **common)
            a_row = (K + 5) * score_bytes * WORLD
            assert log == [*gathered, *[CollectiveRecord("all_gather", 3 * a_row, WORLD)] * 4]
            with count_collectives() as log:
                scores.log_probs.sum().backward()
            op = "reduce_scatter" if sequence_parallel else "all_reduce"
            assert log == [*gathered, CollectiveRecord(op, ROWS * HIDDEN * score_bytes, WORLD)]


def check_bytes_of_losses(group):
    """Two chunks in flight share the workspace; the hidden gradient is reduced once, of the computed rows alone."""
    kept = torch.tensor([1, 2, 5, 7, 8, 11])
    for sequence_parallel in (False, True):
        for rows in (None, kept):
            hidden, weight, common, teacher = inputs(group, sequence_parallel=sequence_parallel)
            common["workspace_bytes"] = 2 * 3 * COLUMNS * 4
            count = ROWS if rows is None else len(rows)
            gathered = [CollectiveRecord("all_gather", ROWS * HIDDEN * 4, WORLD)] * sequence_parallel
            with count_collectives() as log:
                got = linear_distill_loss(hidden, weight, teacher, loss_rows=rows, **common)
            chunk = CollectiveRecord("all_gather", 3 * (K + 5) * 4 * WORLD, WORLD)
            assert log == [*gathered, *[chunk] * (count // 3)]
            with count_collectives() as log:
                got.loss.backward()
            if sequence_parallel:
                assert log == [CollectiveRecord("reduce_scatter", ROWS * HIDDEN * 4, WORLD)]
            else:
                assert log == [CollectiveRecord("all_reduce", count * HIDDEN * 4, WORLD)]
            common["workspace_bytes"] *= 2
            theirs = hidden.detach(), weight.detach()
            with count_collectives() as log:
                linear_full_distill_loss(hidden, weight, *theirs, loss_rows=rows, **common)
            sent = [record for record in log if record.op == "all_gather"]
            sizes = sorted(record.nbytes for record in sent[2 * sequence_parallel :])
            assert sizes == sorted([3 * 10 * 4 * WORLD, 3 * 2 * 4 * WORLD] * (count // 3))


def events_of(module, call):
    """Products, sends and waits of a call, in the order that this rank came to them."""
    events = []
    compute = ChunkLogits.compute

    class Traced(PendingTensor):
        def wait(self):
            events.append("wait")
            return super().wait()

    def start(tensor, group, **more):
        pending = start_all_gather_stacked(tensor, group, **more)
        events.append("send")
        return Traced(pending.result, pending.work, pending.sent)

    def traced(self, *arguments, **more):
        events.append("product")
        return compute(self, *arguments, **more)

    with (
        mock.patch.object(module, "start_all_gather_stacked", start),
        mock.patch.object(ChunkLogits, "compute", traced),
    ):
        call()
    return events


def check_messages_overlap_with_products(group):
    """Three chunks of four rows: a message is waited for after the next chunk's product, nothing for its own at once.

    Of the full divergence a chunk has two products and two messages: the next chunk's products hide the first message
    of the one before, its kernels the second.
    """
    hidden, weight, common, teacher = inputs(group)
    one_chunk = 4 * COLUMNS * 4
    theirs = hidden.detach(), weight.detach()
    calls = {
        "distill": (
            linear_losses,
            lambda: linear_distill_loss(hidden, weight, teacher, workspace_bytes=2 * one_chunk, **common),
        ),
        "topk": (
            linear_scores,
            lambda: linear_topk_log_probs(hidden, weight, K, workspace_bytes=one_chunk, **common),
        ),
        "gather": (
            linear_scores,
            lambda: linear_gather_log_probs(hidden, weight, teacher.indices, workspace_bytes=one_chunk, **common),
        ),
    }
    once = ["product", "send", "product", "send", "wait", "product", "send", "wait", "wait"]
    for name, (module, call) in calls.items():
        assert events_of(module, call) == once, name
    events = events_of(
        linear_full,
        lambda: linear_full_distill_loss(hidden, weight, *theirs, workspace_bytes=4 * one_chunk, **common),
    )
    chunk = ["product", "product", "send"]
    steps = [*chunk, *chunk, "wait", "send", "wait", "send", "wait", *chunk, "wait", "wait", "send", "wait"]
    assert events == steps, events


def check_gradients_do_not_depend_on_chunks_or_rows(group):
    hidden, weight, common, teacher = inputs(group, torch.float64)
    kept = torch.tensor([11, 2, 5, 0])
    weights = torch.zeros(ROWS, dtype=torch.float64)
    weights[kept] = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    whole = linear_distill_loss(hidden, weight, teacher, token_weights=weights, **common)
    wanted = torch.autograd.grad(whole.loss, (hidden, weight))
    for sequence_parallel in (False, True):
        local, mine, common, _ = inputs(group, torch.float64, sequence_parallel=sequence_parallel)
        for workspace_bytes in (1, 2 * 3 * COLUMNS * 8, None):
            got = linear_distill_loss(
                *(local, mine, teacher),
                token_weights=weights,
                loss_rows=kept,
                workspace_bytes=workspace_bytes,
                **common,
            )
            torch.testing.assert_close(got.loss, whole.loss, rtol=1e-13, atol=1e-13)
            grads = torch.autograd.grad(got.loss, (local, mine))
            part = wanted[0].chunk(WORLD)[group_rank(group)] if sequence_parallel else wanted[0]
            torch.testing.assert_close(grads[0], part, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[1], wanted[1], rtol=1e-12, atol=1e-12)


def check_main_grad_takes_a_shards_rows(group):
    for sequence_parallel in (False, True):
        for scale in (None, torch.tensor(0.5)):
            hidden, weight, common, teacher = inputs(group, sequence_parallel=sequence_parallel)
            (linear_distill_loss(hidden, weight, teacher, **common).loss * 0.5).backward()
            wanted = weight.grad, hidden.grad
            hidden, weight, common, teacher = inputs(group, sequence_parallel=sequence_parallel)
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
            loss = linear_distill_loss(hidden, weight, teacher, grad_scale=scale, **common).loss
            assert bool(weight.main_grad.any()) == (scale is not None and weight.numel() > 0)
            (loss * 0.5).backward()
            torch.testing.assert_close(weight.main_grad, wanted[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hidden.grad, wanted[1], rtol=1e-5, atol=1e-6)


def raises_alike(group, message, function):
    """The function raises a ValueError that matches, with the same text on every rank."""
    with pytest.raises(ValueError, match=message) as caught:
        function()
    texts = all_gather_json(str(caught.value), group, CPU)
    assert len(set(texts)) == 1, texts


def check_heads_of_other_boundaries_raise_everywhere(group):
    hidden, weight, common, _ = inputs(group)
    rank = group_rank(group)
    for widths in ((22, 0, 22), (20, 0, 10)):
        raises_alike(
            group,
            r"teacher_weight: wanted the student's shard boundaries, \[0, 20\), \[20, 20\), \[20, 44\)",
            lambda widths=widths: linear_full_distill_loss(
                hidden, weight, hidden.detach(), torch.zeros(widths[rank], HIDDEN), **common
            ),
        )


def check_debug_raises_on_every_rank_what_one_finds(group):
    rank = group_rank(group)
    hidden, weight, common, teacher = inputs(group)
    with opd_engine.debug():
        linear_distill_loss(hidden, weight, teacher, **common)
        other = hidden.detach().clone()
        other[3, 3] += rank == 1
        linear_distill_loss(hidden, weight, teacher, divergence=lambda ours, theirs: ours.entropy, **common)
        raises_alike(
            group, "hidden: wanted the same on every rank", lambda: linear_topk_log_probs(other, weight, K, **common)
        )
        raises_alike(
            group,
            "workspace_bytes: wanted the same on every rank",
            lambda: linear_topk_log_probs(hidden, weight, K, workspace_bytes=1_000 + rank, **common),
        )
        raises_alike(
            group,
            "token_weights: wanted the same on every rank",
            lambda: linear_distill_loss(hidden, weight, teacher, token_weights=torch.ones(ROWS) + rank, **common),
        )
        raises_alike(
            group,
            "logit_softcap: wanted .* got -1.0 .on rank 2",
            lambda: linear_gather_log_probs(
                hidden, weight, teacher.indices, logit_softcap=-1.0 if rank == 2 else 1.0, **common
            ),
        )
        loss = linear_distill_loss(hidden, weight, teacher, **common).loss
        scores = linear_gather_log_probs(hidden, weight, teacher.indices, **common)
    for value in (loss, scores.log_probs.sum()):
        raises_alike(
            group,
            "wanted equal upstream gradients on every rank",
            lambda value=value: (value / (1 + rank)).backward(),
        )


def check_no_rows(group):
    hidden, weight, common, teacher = inputs(group)
    none = hidden[:0]
    got = linear_distill_loss(none, weight, teacher.select(torch.arange(0)), **common)
    got.loss.backward()
    assert got.loss == 0 and not weight.grad.any()
    assert linear_topk_log_probs(none, weight, K, **common).indices.shape == (0, K)
    scores = linear_gather_log_probs(none, weight, teacher.indices[:0], **common)
    scores.tail_log_prob.sum().backward()


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


@pytest.mark.ranks
@pytest.mark.parametrize("name", CHECKS)
def test_on_three_ranks(outcome, name):
    assert [name in done for done in outcome] == [True] * WORLD
