"""The functional API under tensor parallelism: gradients of the shards, bytes on the wire, and faults on every rank.

Three real gloo processes, float64, uneven shards with a zero-width one and padding; the reference is eager autograd on
one process. One launch, which ends at the first check that fails; its name is the last one printed.
"""

from unittest import mock

import pytest
import torch

import opd_engine
from opd_engine import VocabShard, distill_loss, full_distill_loss, gather_log_probs, topk_log_probs
from opd_engine.functional import scores as scores_module
from opd_engine.ops import DIVERGENCES
from opd_engine.parallel.collectives import CollectiveRecord, all_gather_json, count_collectives, group_rank
from ranks import run_ranks

WORLD, ROWS, VOCAB, PADDED, K = 3, 6, 37, 44, 5
TILINGS = (
    ((0, 20), (20, 20), (20, 44)),  # zero width in the middle
    ((0, 3), (3, 40), (40, 44)),  # narrower than k; all padding
    ((30, 44), (0, 9), (9, 30)),  # not in rank order
)
CPU = torch.device("cpu")


def shard_of(group, tiling, vocab_size=VOCAB):
    return VocabShard(*tiling[group_rank(group)], vocab_size, group)


def whole(seed=0, width=PADDED, dtype=torch.float64):
    logits = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    logits[:, VOCAB:] = 50.0  # padding that would win if anything read it
    return logits.to(dtype)


def columns(logits, shard):
    return logits[:, shard.vocab_start_index : shard.vocab_end_index]


def eager_scores(logits, indices, target, temperature=1.0):
    log_probs = torch.log_softmax(logits[:, :VOCAB] / temperature, -1)
    outside = torch.ones_like(log_probs, dtype=torch.bool).scatter(1, indices, False)
    tail = torch.logsumexp(log_probs.masked_fill(~outside, -torch.inf), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    lse = torch.logsumexp(logits[:, :VOCAB] / temperature, -1)
    return (log_probs.gather(1, indices), tail, lse, entropy, log_probs.gather(1, target.unsqueeze(1)).squeeze(1))


def as_tuple(scores):
    return (scores.log_probs, scores.tail_log_prob, scores.lse, scores.entropy, scores.target_log_prob)


def inputs():
    generator = torch.Generator().manual_seed(11)
    logits = whole()
    indices = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(ROWS)])
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    weights = [torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64) for shape in ((K,), (), (), (), ())]
    return logits, indices, target, weights


def weigh(outputs, weights):
    return sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))


def shard_gradient_error(group, tiling, *, reduction="replicated", inplace=False, temperature=1.0):
    """(largest error of the values, of this shard's gradient) against eager autograd on the whole."""
    logits, indices, target, weights = inputs()
    reference = logits.clone().requires_grad_()
    expected = eager_scores(reference, indices, target, temperature)
    wanted = torch.autograd.grad(weigh(expected, weights), reference)[0]
    shard = shard_of(group, tiling)
    local = columns(logits, shard).clone().requires_grad_()
    scores = gather_log_probs(
        local * 1.0,
        indices,
        target=target,
        temperature=temperature,
        shard=shard,
        inplace_backward=inplace,
        loss_reduction=reduction,
    )
    value_error = max(float((got - want).abs().max()) for got, want in zip(as_tuple(scores), expected, strict=True))
    if reduction == "partial":  # each rank holds the rows that are its own
        own = (torch.arange(ROWS) % WORLD == group_rank(group)).double()
        weights = [weight * own.view(-1, *([1] * (weight.dim() - 1))) for weight in weights]
    grad = torch.autograd.grad(weigh(as_tuple(scores), weights), local)[0]
    assert grad[:, shard.valid_local_size :].eq(0).all(), "padding receives no gradient"
    error = (grad - columns(wanted, shard)).abs()
    return value_error, float(error.max()) if error.numel() else 0.0


def check_each_shard_gets_its_columns_of_the_gradient(group):
    for tiling in TILINGS:
        for reduction in ("replicated", "partial"):
            for inplace in (False, True):
                errors = shard_gradient_error(group, tiling, reduction=reduction, inplace=inplace, temperature=0.7)
                assert max(errors) < 1e-12, (tiling, reduction, inplace, errors)


def check_planted_mistakes_are_seen(group):
    """A missing sum, a missing merge, a loss divided by tp_size, and a partial loss taken for a replicated one."""

    def worst(**kwargs):
        errors = all_gather_json(shard_gradient_error(group, TILINGS[0], **kwargs), group, CPU)
        return max(max(pair) for pair in errors)

    assert worst() < 1e-12
    with mock.patch.object(scores_module, "all_reduce_sum_", lambda tensor, _: tensor):
        assert worst() > 1e-2
        assert worst(reduction="partial") > 1e-2
    with mock.patch.object(
        scores_module, "all_gather_stacked", lambda tensor, _: tensor.unsqueeze(0).repeat(WORLD, 1, 1)
    ):
        assert worst() > 1e-2


def check_topk_is_that_of_the_whole(group):
    logits = whole()
    logits[:, 2:VOCAB:7] = 3.0  # ties across shard bounds
    target = torch.arange(ROWS)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        alone = topk_log_probs(logits.to(dtype), K, target=target, shard=VocabShard(0, PADDED, VOCAB))
        for tiling in TILINGS:
            shard = shard_of(group, tiling)
            ours = topk_log_probs(columns(logits, shard).to(dtype), K, target=target, shard=shard)
            assert ours.indices.equal(alone.indices)
            tolerance = 1e-13 if dtype == torch.float64 else 1e-5
            for got, want in zip(as_tuple(ours), as_tuple(alone), strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            bits = [value.flatten().tolist() for value in as_tuple(ours)]
            assert all(other == bits for other in all_gather_json(bits, group, CPU)), "the same bits on every rank"


def check_bytes_of_topk(group):
    shard = shard_of(group, TILINGS[0])
    for dtype, score_bytes in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        local = columns(whole(dtype=dtype), shard)
        for target in (None, torch.arange(ROWS)):
            with count_collectives() as log:
                topk_log_probs(local, K, target=target, shard=shard)
            a_token = (score_bytes + 4) * K + 5 * score_bytes + (score_bytes if target is not None else 0)
            assert log == [CollectiveRecord("all_gather", a_token * WORLD * ROWS, WORLD)]
    assert (4 + 4) * K + 5 * 4 == 8 * K + 20


def check_bytes_of_gather_and_its_backward(group):
    shard = shard_of(group, TILINGS[0])
    indices = torch.arange(K).repeat(ROWS, 1)
    for dtype, score_bytes in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for target in (None, torch.arange(ROWS)):
            for reduction in ("replicated", "partial"):
                local = columns(whole(dtype=dtype), shard).clone().requires_grad_()
                with count_collectives() as log:
                    scores = gather_log_probs(local, indices, target=target, shard=shard, loss_reduction=reduction)
                assert log == [
                    CollectiveRecord("all_gather", 5 * score_bytes * WORLD * ROWS, WORLD),
                    CollectiveRecord("all_reduce", (K + (target is not None)) * score_bytes * ROWS, WORLD),
                ]
                with count_collectives() as log:
                    scores.log_probs.sum().backward()
                partial = [CollectiveRecord("all_reduce", ROWS * (K + 4) * score_bytes, WORLD)]
                assert log == (partial if reduction == "partial" else [])


def check_bytes_of_the_full_loss(group):
    shard = shard_of(group, TILINGS[0])
    local = columns(whole(dtype=torch.float32), shard).clone().requires_grad_()
    with count_collectives() as log:
        loss = full_distill_loss(local, columns(whole(1, dtype=torch.float32), shard), shard=shard)
        loss.sum().backward()
    assert log == [
        CollectiveRecord("all_gather", (10 * ROWS + 5) * 4 * WORLD, WORLD),
        CollectiveRecord("all_gather", 2 * ROWS * 4 * WORLD, WORLD),
    ]


def check_bucket_and_full_losses_against_one_process(group):
    """Through both models' scores, padding and shards: value on every rank, this shard's gradient."""
    student, teacher = whole(), whole(1)
    indices = topk_log_probs(student, K, shard=VocabShard(0, PADDED, VOCAB)).indices
    weights = torch.randn(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def losses(logits, teacher_logits, shard):
        ours, theirs = (gather_log_probs(part, indices, shard=shard) for part in (logits, teacher_logits))
        for divergence in DIVERGENCES:
            yield divergence, distill_loss(ours, theirs, divergence=divergence, beta=0.3)
            yield (
                f"full {divergence}",
                full_distill_loss(
                    logits, teacher_logits, divergence=divergence, beta=0.3, temperature=0.8, shard=shard
                ),
            )

    reference = student.clone().requires_grad_()
    shard = shard_of(group, TILINGS[2])
    local = columns(student, shard).clone().requires_grad_()
    alone = losses(reference, teacher, VocabShard(0, PADDED, VOCAB))
    split = losses(local, columns(teacher, shard), shard)
    for (name, wanted), (_, got) in zip(alone, split, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad((wanted * weights).sum(), reference, retain_graph=True)[0]
        grad = torch.autograd.grad((got * weights).sum(), local, retain_graph=True)[0]
        torch.testing.assert_close(grad, columns(expected, shard), rtol=0, atol=1e-12, msg=name)


def check_a_wider_teacher_keeps_the_boundaries(group):
    """Only the shard that holds the end may differ in width; the surplus ids are left out."""
    tiling = ((0, 20), (20, 20), (20, 37))
    shard = shard_of(group, tiling)
    start = shard.vocab_start_index
    teacher = torch.randn(ROWS, 41, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = teacher[:, start : 41 if group_rank(group) == 2 else shard.vocab_end_index]
    student = whole()[:, :VOCAB]
    for divergence in DIVERGENCES:
        got = full_distill_loss(
            columns(student, shard), theirs, divergence=divergence, shard=shard, teacher_vocab_size=41
        )
        wanted = full_distill_loss(student, teacher[:, :VOCAB], divergence=divergence)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def raises_alike(group, message, function):
    """The function raises a ValueError that matches, with the same text on every rank."""
    with pytest.raises(ValueError, match=message) as caught:
        function()
    texts = all_gather_json(str(caught.value), group, CPU)
    assert len(set(texts)) == 1, texts


def check_teachers_of_other_boundaries_raise_everywhere(group):
    rank = group_rank(group)
    shard = shard_of(group, ((0, 20), (20, 30), (30, 44)))
    local = columns(whole(), shard)
    for widths in ((22, 10, 12), (20, 10, 3), (19, 11, 14)):
        teacher = torch.zeros(ROWS, widths[rank], dtype=torch.float64)
        raises_alike(
            group,
            r"teacher_logits: wanted the student's shard boundaries, \[0, 20\), \[20, 30\), \[30, 44\)",
            lambda teacher=teacher: full_distill_loss(local, teacher, shard=shard),
        )


def check_debug_raises_on_every_rank_what_one_finds(group):
    rank = group_rank(group)
    shard = shard_of(group, TILINGS[0])
    local, indices = columns(whole(), shard), torch.arange(K).repeat(ROWS, 1)
    with opd_engine.debug():
        gather_log_probs(local, indices, shard=shard)
        off = indices.clone()
        off[2, 1] = VOCAB if rank == 1 else 1
        raises_alike(
            group,
            r"indices: wanted ids in \[0, vocab_size = 37\) .* got 37 in row 2 \(on rank 1 of tp_group\)",
            lambda: gather_log_probs(local, off, shard=shard),
        )
        other = indices.clone()
        other[0, 0] = 9 if rank == 2 else 0
        raises_alike(
            group,
            "indices: wanted the same on every rank",
            lambda: gather_log_probs(local, other, shard=shard),
        )
        raises_alike(
            group,
            "k: wanted the same on every rank",
            lambda: topk_log_probs(local, K + (rank == 0), shard=shard),
        )
        raises_alike(
            group,
            "logits: wanted the same on every rank",
            lambda: topk_log_probs(local[: ROWS - (rank == 0)], K, shard=shard),
        )
        raises_alike(
            group,
            "temperature: wanted the same on every rank",
            lambda: topk_log_probs(local, K, temperature=1.0 + rank, shard=shard),
        )
        bad = VocabShard(*((0, 20), (20, 20), (21, 44))[rank], VOCAB, group)
        raises_alike(
            group,
            "a gap at id 20",
            lambda: topk_log_probs(torch.zeros(ROWS, bad.local_vocab_size), K, shard=bad),
        )


def check_debug_compares_upstream_gradients(group):
    """Planted: the loss on one rank only, one divided by the rank, one 1% off; partial ones may differ."""
    rank = group_rank(group)
    shard = shard_of(group, TILINGS[0])
    indices = torch.arange(K).repeat(ROWS, 1)
    teacher = columns(whole(1), shard)

    def backward(scale, reduction="replicated", full=False):
        local = columns(whole(), shard).clone().requires_grad_()
        with opd_engine.debug():
            if full:
                loss = full_distill_loss(local, teacher, shard=shard).sum()
            else:
                loss = gather_log_probs(local, indices, shard=shard, loss_reduction=reduction).log_probs.sum()
        (loss * scale).backward()  # outside the block: a backward checks what its forward ran under

    for full in (False, True):
        backward(2.0, full=full)
        for scale in (1.0 if rank == 0 else 0.0, 1.0 / (1 + rank), 1.01 if rank == 2 else 1.0):
            raises_alike(
                group,
                "wanted equal upstream gradients on every rank",
                lambda scale=scale, full=full: backward(scale, full=full),
            )
    backward(1.0 / (1 + rank), "partial")


def check_no_rows_and_no_ids(group):
    shard = shard_of(group, TILINGS[0])
    local = columns(whole(), shard)
    for rows, k in ((0, K), (0, 0), (ROWS, 0)):
        part = local[:rows].clone().requires_grad_()
        indices = torch.zeros(rows, k, dtype=torch.int64)
        scores = gather_log_probs(part, indices, shard=shard, loss_reduction="partial")
        (scores.tail_log_prob.sum() + scores.log_probs.sum() + scores.entropy.sum()).backward()
        assert part.grad.shape == part.shape
        assert full_distill_loss(part, part.detach(), shard=shard).shape == (rows,)
        assert topk_log_probs(part, 2, shard=shard).log_probs.shape == (rows, 2)


def check_compiled_graphs_may_hold_the_collectives(group):
    shard = shard_of(group, TILINGS[0])
    indices = torch.arange(K).repeat(ROWS, 1)

    def loss(local):
        return gather_log_probs(local * 1.5, indices, shard=shard).log_probs.sum()

    local = columns(whole(), shard).clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager")
    got, wanted = (torch.autograd.grad(function(local), local)[0] for function in (compiled, loss))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


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
def test_on_three_ranks(outcome, name):
    assert [name in done for done in outcome] == [True] * WORLD
