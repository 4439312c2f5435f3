"""Union supports against sets, and teachers of another vocabulary against the full distribution."""

import dataclasses
import math

import pytest
import torch

import oracles
from opd_engine import TokenScores, distill_loss, gather_log_probs, topk_log_probs
from opd_engine.teachers import check_token_maps, rebucket, union_support
from opd_engine.teachers.vocabularies import askable

VOCAB, ROWS = 19, 40


def models(count, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64) * 2 for _ in range(count)]


def expected_union(scores, row, cap):
    """(ids, dropped) of one row, with sets."""
    mass: dict[int, float] = {}
    for one in scores:
        for number, log_prob in zip(one.indices[row].tolist(), one.log_probs[row].tolist()):
            if number != -1:
                mass[number] = mass.get(number, 0.0) + math.exp(log_prob)
    ordered = sorted(mass, key=lambda number: (-mass[number], number))
    return ordered[:cap], len(ordered[cap:]) if cap is not None else 0


@pytest.mark.parametrize("cap", [None, 1, 5, 7, 100])
@pytest.mark.parametrize("members", [1, 2, 4])
def test_union_is_the_set_union_by_mass(cap, members):
    ks = [4, 6, 1, 3][:members]
    scores = [topk_log_probs(z, k) for z, k in zip(models(members), ks)]
    union = union_support(scores, cap)
    assert union.indices.shape == (ROWS, sum(ks) if cap is None else min(cap, sum(ks)))
    for row in range(ROWS):
        ids, dropped = expected_union(scores, row, cap)
        got = union.indices[row].tolist()
        assert got == ids + [-1] * (len(got) - len(ids))
        assert int(union.dropped[row]) == dropped
    if cap == 5 and members > 1:
        assert int(union.dropped.sum()) > 0


def test_equal_masses_are_ordered_by_id_and_absent_ids_ignored():
    indices = torch.tensor([[7, 2, -1, 5]])
    log_probs = torch.tensor([[0.25, 0.25, 0.0, 0.25]]).log()
    one = TokenScores(indices=indices, log_probs=log_probs, tail_log_prob=torch.tensor([0.25]).log())
    union = union_support([one, one], cap=2)
    assert union.indices.tolist() == [[2, 5]] and union.dropped.tolist() == [1]
    assert union_support([one]).indices.tolist() == [[2, 5, 7, -1]]
    # An id that a model lists with probability 0 is still listed; a broken row (ids -1, NaN) gives nothing.
    zero = dataclasses.replace(one, log_probs=torch.full((1, 4), -math.inf))
    assert union_support([zero]).indices.tolist() == [[2, 5, 7, -1]]
    broken = TokenScores(
        indices=torch.full((1, 4), -1), log_probs=torch.full((1, 4), math.nan), tail_log_prob=torch.tensor([math.nan])
    )
    assert union_support([broken, one]).indices[0, :4].tolist() == [2, 5, 7, -1]


def test_union_refusals():
    one = topk_log_probs(models(1)[0], 3)
    with pytest.raises(ValueError, match="scores: wanted at least one"):
        union_support([])
    with pytest.raises(ValueError, match="cap: wanted at least 1, got 0"):
        union_support([one], cap=0)
    with pytest.raises(ValueError, match=r"scores\[1\]: wanted rows \[40\]"):
        union_support([one, topk_log_probs(models(1)[0][:3], 3)])


@pytest.mark.parametrize("divergence", oracles.DIVERGENCES)
def test_loss_on_a_union_and_its_gradient(divergence):
    """Ids of the union through gather and loss, padded with -1, equal the same ids computed on the full vocabulary."""
    student, *teachers = models(3)
    student.requires_grad_()
    union = union_support([topk_log_probs(z.detach(), 4) for z in (student, *teachers)], cap=9)
    teacher = gather_log_probs(teachers[0], union.indices)
    loss = distill_loss(gather_log_probs(student, union.indices), teacher, divergence=divergence)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    for row in range(ROWS):
        ids = [number for number in union.indices[row].tolist() if number != -1]
        rest = [number for number in range(VOCAB) if number not in ids]
        z = student[row].detach().clone().requires_grad_()

        def buckets(logits, ids=ids, rest=rest):
            log_p = logits.log_softmax(-1)
            return torch.cat([log_p[ids], torch.logsumexp(log_p[rest], 0, keepdim=True)])

        truth = oracles.divergence_of(buckets(z), buckets(teachers[0][row]), divergence)
        torch.testing.assert_close(loss[row], truth, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(grad[row], torch.autograd.grad(truth, z)[0], rtol=1e-10, atol=1e-12)


def test_wider_teacher_loses_foreign_ids_to_its_tail():
    """Row by row: the teacher's full distribution over 23 ids, seen from a student that has 19."""
    teacher = models(1, vocab=23)[0]
    scores = topk_log_probs(teacher, 6)
    seen = rebucket(scores, vocab_size=VOCAB)
    assert int((scores.indices >= VOCAB).sum()) > 10
    log_p = teacher.log_softmax(-1)
    for row in range(ROWS):
        kept = [number for number in scores.indices[row].tolist() if number < VOCAB]
        assert [number for number in seen.indices[row].tolist() if number != -1] == kept
        off = [number for number in range(23) if number not in kept]
        torch.testing.assert_close(seen.tail_log_prob[row], torch.logsumexp(log_p[row, off], 0), rtol=1e-12, atol=1e-12)
    assert bool((seen.log_probs[seen.indices == -1] == -math.inf).all())
    mass = seen.log_probs.exp().sum(1) + seen.tail_log_prob.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-12, atol=0)
    # Control: without the foreign ids' mass in the tail the buckets do not sum to one.
    planted = seen.log_probs.exp().sum(1) + scores.tail_log_prob.exp()
    assert float((planted - 1).abs().max()) > 0.1


def test_narrower_teacher_gives_probability_zero():
    teacher = models(1, vocab=13)[0]
    asked = topk_log_probs(models(1)[0], 6).indices
    scores = rebucket(gather_log_probs(teacher, askable(asked, 13)), vocab_size=VOCAB, asked=asked)
    assert torch.equal(scores.indices, asked)
    lacking = asked >= 13
    assert bool(lacking.any()) and bool((scores.log_probs[lacking] == -math.inf).all())
    padded = torch.nn.functional.pad(teacher, (0, VOCAB - 13), value=-math.inf)
    truth = oracles.gather_scores(padded, asked)
    torch.testing.assert_close(scores.tail_log_prob, truth.tail_log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.log_probs, truth.log_probs, rtol=1e-12, atol=1e-12)


def test_disagreeing_token_maps_are_named():
    student = {"a": 0, "b": 1, "c": 2, "d": 3}
    check_token_maps(student, dict(student), teacher_name="t")
    check_token_maps(student, {**student, "extra": 4}, teacher_name="t")
    check_token_maps({**student, "<think>": 9}, student, teacher_name="t")
    with pytest.raises(ValueError, match="2 entries: token 'b' is 1 for student and 2 for teacher 'math'; token 'c'"):
        check_token_maps(student, {"a": 0, "b": 2, "c": 1, "d": 3}, teacher_name="teacher 'math'")
    with pytest.raises(ValueError, match="1 entries: id 3 is 'd' for student and 'D' for t"):
        check_token_maps(student, {"a": 0, "b": 1, "c": 2, "D": 3}, teacher_name="t")
    with pytest.raises(ValueError, match="no token in common"):
        check_token_maps({"a": 0}, {"x": 1}, teacher_name="t")
    many = {f"t{i}": i for i in range(50)}
    with pytest.raises(ValueError, match=r"on 50 entries: token 't0' is 0 .*; and 45 more"):
        check_token_maps(many, {f"t{i}": (i + 1) % 50 for i in range(50)}, teacher_name="t")
