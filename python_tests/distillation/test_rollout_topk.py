"""The rollout engine's own top-k as the support: SGLang's answers aligned, checked, used without a student pass."""

import math
from itertools import pairwise

import pytest
import torch

import oracles
from distillation.step_reference import agree, ours, parameters_grad
from distillation_toys import ToyBackend, toy_batch
from opd_engine.distillation import Denominators, OPDConfig, concat_rollouts, pack_rollouts, score_rollouts
from opd_engine.distillation.step import distillation_loss
from opd_engine.teachers import LocalTeacher, TeacherPool

VOCAB = 29


def answered(log_probs, k, drop=()):
    """[rows, vocab] as SGLang answers them: (log-prob, id, text) likeliest first, shorter where dropped."""
    top = log_probs.topk(k, dim=1)
    rows = [[(v, i, None) for v, i in zip(vs, ids)] for vs, ids in zip(top.values.tolist(), top.indices.tolist())]
    return [row[:1] if place in drop else row for place, row in enumerate(rows)]


def with_topk(batch, student, k, drop=()):
    """The batch packed anew, as an engine with the student's weights would have answered it."""
    log_probs = student.module(batch).detach()[:, : student.vocab_size].log_softmax(1)
    answers = answered(log_probs, k, drop)
    bounds = batch.cu_seqlens.tolist()
    prompts = [batch.tokens[a : a + 1].tolist() for a in bounds[:-1]]  # all after the first token is a response
    masks = [batch.loss_mask[a : b - 1].tolist() for a, b in pairwise(bounds)]
    tops = [
        [row if keep else None for row, keep in zip(answers[a : b - 1], mask)]
        for a, b, mask in zip(bounds, bounds[1:], masks, strict=False)
    ]
    packed = pack_rollouts(
        prompts,
        [batch.tokens[a + 1 : b].tolist() for a, b in pairwise(bounds)],
        response_masks=masks,
        response_top_logprobs=tops,
        teacher_names=batch.teacher_names,
    )
    assert torch.equal(packed.loss_mask, batch.loss_mask) and torch.equal(packed.tokens, batch.tokens)
    return packed


def world():
    batch = toy_batch(6, teacher_names=["a", "b", "a", "b", "b", "a"])
    pool = TeacherPool({name: LocalTeacher(ToyBackend(VOCAB, seed=5 + i)) for i, name in enumerate("ab")})
    return batch, ToyBackend(VOCAB, seed=1, padding=3), pool


def test_entries_stand_in_the_row_that_predicts_their_token():
    batch = pack_rollouts(
        [[1, 2, 3], [4]],
        [[5, 6], [7, 8, 9]],
        response_masks=[[True, True], [True, False, True]],
        response_top_logprobs=[[[(-0.1, 5, "e"), (-3.0, 6, "f")], [(-0.2, 6)]], [[(-0.3, 7, None)], None, [(-0.4, 2)]]],
    )
    assert batch.rollout_topk_ids.tolist() == [[-1] * 2] * 2 + [
        [5, 6],
        [6, -1],
        [-1] * 2,
        [7, -1],
        [-1] * 2,
        [2, -1],
    ] + [[-1] * 2]
    assert batch.rollout_topk_log_probs[2].tolist() == pytest.approx([-0.1, -3.0])
    assert batch.rollout_topk_log_probs[3, 1] == -math.inf
    for part in (batch.select([1, 0]), concat_rollouts([batch.select([1]), batch.select([0])])):
        assert part.rollout_topk_ids.tolist() == batch.rollout_topk_ids[[5, 6, 7, 8, 0, 1, 2, 3, 4]].tolist()
    assert torch.equal(batch.to("cpu").rollout_topk_ids, batch.rollout_topk_ids)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_students_own_top_k_from_the_engine_is_the_students_support(steps):
    """And the student makes no pass for it, nor after another optimizer step: the ids are the rollout's."""
    batch, student, pool = world()
    batch = with_topk(batch, student, 4)
    truth = ours(batch, student, pool, OPDConfig(k=4, optimizer_steps_per_rollout=steps))
    student.forward_rows.clear()
    config = OPDConfig(k=4, support="rollout", optimizer_steps_per_rollout=steps)
    scored = score_rollouts(batch, student, pool, config)
    assert student.forward_rows == []
    denominators = Denominators.of(batch, config)
    for _ in range(steps):
        loss, metrics = distillation_loss(student.logits(batch), batch, scored, config, None, denominators)
        assert agree((loss.item(), parameters_grad(loss, student)), truth[:2], 1e-14)
        assert metrics.means()["support_size"] == 4
        scored.release(batch)
    assert scored.nbytes == 0


def test_ragged_answers_agree_with_the_definition():
    batch, student, pool = world()
    drop = tuple(range(0, batch.num_tokens, 3))
    batch = with_topk(batch, ToyBackend(VOCAB, seed=77), 5, drop)  # an engine that lags behind the student
    config = OPDConfig(k=8, support="rollout", divergence="forward_kl")
    loss, gradient, means = ours(batch, student, pool, config)
    log_q = student.module(batch)[:, :VOCAB].log_softmax(1)
    truth, rows = 0.0, batch.loss_mask.nonzero().flatten().tolist()
    sequence = batch.row_sequence().tolist()
    for row in rows:
        ids = [i for i in batch.rollout_topk_ids[row].tolist() if i >= 0]
        assert len(ids) == (1 if row in drop else 5)
        rest = [v for v in range(VOCAB) if v not in ids]
        log_p = pool[batch.teacher_names[sequence[row]]].backend.module(batch)[row].detach().log_softmax(0)
        p, q = (torch.cat([x[ids], x[rest].logsumexp(0)[None]]) for x in (log_p, log_q[row]))
        truth = truth + oracles.divergence_of(q, p, "forward_kl", 0.5, 0.1) / len(rows)
    truth = truth.item(), parameters_grad(truth, student)
    assert agree((loss, gradient), truth)
    assert means["support_size"] == pytest.approx(sum(1 if r in drop else 5 for r in rows) / len(rows))
    # Control: another row's ids are seen.
    batch.rollout_topk_ids = batch.rollout_topk_ids.roll(1, 0).where(batch.loss_mask[:, None], -1).clamp(min=-1)
    batch.rollout_topk_ids[batch.loss_mask & (batch.rollout_topk_ids < 0).all(1), 0] = 0
    assert not agree(ours(batch, student, pool, config), truth, 1e-4)


def test_more_ids_than_wanted_are_cut_to_the_likeliest():
    batch, student, pool = world()
    wide = with_topk(batch, student, 9)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    wide.rollout_topk_ids = wide.rollout_topk_ids[:, shuffled]
    wide.rollout_topk_log_probs = wide.rollout_topk_log_probs[:, shuffled]
    config = OPDConfig(k=4, support="rollout")
    truth = ours(with_topk(batch, student, 4), student, pool, config)
    assert agree(ours(wide, student, pool, config), truth[:2], 1e-14)


def test_a_policy_gradient_keeps_to_the_sampled_token():
    batch, student, pool = world()
    batch = with_topk(batch, student, 4)
    batch.rollout_log_probs = -torch.ones(batch.num_tokens)
    config = OPDConfig(loss_type="advantage", support="rollout")
    scored = score_rollouts(batch, student, pool, config)
    rows = batch.loss_mask
    assert torch.equal(scored.support(batch)[rows], batch.next_tokens()[rows, None])


def planted(change):
    batch, student, pool = world()
    batch = with_topk(batch, student, 4)
    row = int(batch.loss_mask.nonzero()[3])
    change(batch, row)
    return lambda: score_rollouts(batch, student, pool, OPDConfig(k=4, support="rollout"))


def put(name, column, value):
    return lambda batch, row: getattr(batch, name)[row].__setitem__(column, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("rollout_topk_ids", slice(None), -1), r"sample \d+, row \d+ counts, but the rollout engine gave no id"),
        (
            put("rollout_topk_ids", slice(None), 7),
            r"rollout_topk_ids: wanted distinct ids in a row, got 7 twice at row",
        ),
        (put("rollout_topk_ids", 1, -2), r"rollout_topk_ids: wanted ids >= 0, or -1 for none, got -2 at row"),
        (put("rollout_topk_ids", 2, VOCAB), rf"ids below the student's vocabulary of {VOCAB}, got {VOCAB} \(first in"),
        (put("rollout_topk_log_probs", 0, 0.1), "rollout_topk_log_probs: wanted log-probs <= 0, got 0.1"),
        (put("rollout_topk_log_probs", 0, math.nan), "rollout_topk_log_probs: wanted log-probs <= 0, got nan"),
        (put("rollout_topk_log_probs", slice(None), -0.1), "wanted a mass of at most 1 in a row, got 3.6"),
        (
            lambda batch, row: setattr(batch, "rollout_topk_log_probs", None),
            "rollout_topk_log_probs: wanted beside rollout_topk_ids, got None",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        planted(change)()


@pytest.mark.parametrize(
    ("entry", "words"),
    [((5, -0.1), "wanted \\(log-prob, token id\\), got \\(5, -0.1\\)"), ((-0.1,), "wanted \\(log-prob, token id\\)")],
)
def test_entries_in_another_order_are_refused(entry, words):
    with pytest.raises(ValueError, match=rf"response_top_logprobs\[0\]\[1\]: {words}"):
        pack_rollouts([[1]], [[2, 3]], response_top_logprobs=[[[(-0.1, 2)], [entry]]])
    with pytest.raises(ValueError, match=r"response_top_logprobs\[0\]: wanted 2 entries, one a response token, got 1"):
        pack_rollouts([[1]], [[2, 3]], response_top_logprobs=[[[(-0.1, 2)]]])
