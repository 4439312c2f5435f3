"""The policy gradient on the divergence's own forward, and metrics kept apart by teacher and task, by definition."""

import math

import pytest
import torch

from distillation.step_reference import VOCAB, agree, ours, parameters_grad, world
from distillation_toys import ToyBackend
from opd_engine.distillation import (
    Denominators,
    OPDConfig,
    add_metrics,
    distillation_loss,
    group_advantages,
    score_rollouts,
)
from opd_engine.distillation.config import MIXTURES

ADVANTAGES = [1.0, -0.7, 0.4, -1.2, 0.0, 2.0]
TASKS = ["x", "y", "x", "", "y", "x"]


def policy_world(mixture="route"):
    batch, student, pool = world(mixture=mixture, advantages=ADVANTAGES, task_names=TASKS)
    old = ToyBackend(VOCAB, seed=1, padding=3)
    with torch.no_grad():
        old.module.own += 0.5 * torch.randn(old.module.own.shape, generator=torch.Generator().manual_seed(3))
        log_q = old.module(batch)[:, :VOCAB].log_softmax(-1)
    batch.rollout_log_probs = log_q.gather(1, batch.next_tokens().clamp(min=0)[:, None]).squeeze(1)
    return batch, student, pool


def by_definition(batch, student, config):
    log_q = (student.module(batch)[:, :VOCAB] / config.temperature).log_softmax(-1)
    loss, clipped, rows = 0.0, 0, batch.loss_mask.nonzero().flatten().tolist()
    for i in rows:
        advantage = float(batch.advantages[batch.row_sequence()[i]])
        ratio = (log_q[i, batch.tokens[i + 1]] - batch.rollout_log_probs[i]).exp()
        low, high = 1 - config.clip_low, 1 + config.clip_high
        loss = loss - torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage) / len(rows)
        clipped += int((advantage > 0 and ratio > high) or (advantage < 0 and ratio < low))
    return loss * config.policy_coefficient, clipped


@pytest.mark.parametrize("options", [{}, {"coefficient": 0.0}, {"temperature": 0.7, "clip_low": 0.1, "clip_high": 0.3}])
def test_both_terms_from_one_forward_are_the_definitions(options):
    batch, student, pool = policy_world()
    alone = OPDConfig(k=4, divergence="forward_kl", **options)
    both = OPDConfig(k=4, divergence="forward_kl", policy_coefficient=0.7, **options)
    without = ours(batch, student, pool, alone)
    term, clipped = by_definition(batch, student, both)
    student.forward_rows.clear()
    got = ours(batch, student, pool, both)
    assert student.forward_rows == [batch.num_tokens] * 2  # the support's pass, and one forward for both terms
    truth = (without[0] + term.item(), without[1] + parameters_grad(term, student))
    assert (
        agree(got, truth, 1e-12)
        and float(parameters_grad(by_definition(batch, student, both)[0], student).abs().max()) > 1e-3
    )
    assert got[2]["policy_loss"] == pytest.approx(term.item()) and 0 < got[2]["clipped_rows"] == clipped
    assert without[2]["clipped_rows"] == 0 and without[2]["policy_loss"] == 0.0
    parts = [batch.select([4, 0]), batch.select([5]), batch.select([3, 2, 1])]
    split = ours(batch, student, pool, both, parts)
    assert agree(split, got[:2], 1e-12)
    assert {k: v for k, v in split[2].items() if not math.isnan(v)} == pytest.approx(
        {k: v for k, v in got[2].items() if not math.isnan(v)}
    )


def test_several_steps_a_rollout_follow_the_current_policy_and_free_scores_after_the_last():
    """Frozen: support, teachers, rollout log-probs. Moving: the student, so the ratio leaves 1 after the first step."""
    batch, student, pool = policy_world()
    config = OPDConfig(k=4, divergence="forward_kl", policy_coefficient=1.0, optimizer_steps_per_rollout=3)
    with torch.no_grad():
        log_q = student.module(batch)[:, :VOCAB].log_softmax(-1)
    batch.rollout_log_probs = log_q.gather(1, batch.next_tokens().clamp(min=0)[:, None]).squeeze(1)
    scored = score_rollouts(batch, student, pool, config)
    held, clipped = scored.nbytes, []
    frozen = scored.support(batch).clone()
    optimizer = torch.optim.SGD(student.module.parameters(), lr=30.0)
    for step in range(3):
        optimizer.zero_grad()
        denominators = Denominators.of(batch, config)
        metrics = []
        for micro in batch.micro_batches(max_seqs=2):
            for _ in range(2):  # recompute may call the loss twice: nothing is freed in it
                loss, sums = distillation_loss(student.logits(micro), micro, scored, config, None, denominators)
            loss.backward()
            metrics.append(sums)
        fresh = distillation_loss(student.logits(batch), batch, scored, config, None, denominators)[0]
        term = by_definition(batch, student, config)[0]
        config.policy_coefficient = 0.0
        divergence = distillation_loss(student.logits(batch), batch, scored, config, None, denominators)[0]
        config.policy_coefficient = 1.0
        assert fresh.item() == pytest.approx(divergence.item() + term.item(), rel=1e-12)
        clipped.append(add_metrics(metrics).means()["clipped_rows"])
        scored.require(batch)
        assert scored.nbytes == held and torch.equal(scored.support(batch), frozen)
        optimizer.step()
        assert scored.release(batch) == (held if step == 2 else 0)
    assert clipped[0] == 0 and clipped[2] > 0
    for read in (scored.support, scored.require):
        with pytest.raises(ValueError, match="freed after 3 optimizer step"):
            read(batch)


def test_group_advantages_are_standardised_in_each_group():
    rewards = torch.tensor([1.0, 0.0, 5.0, 0.0, 3.0, 3.0, 2.0])
    groups = torch.tensor([7, 7, 1, 7, 2, 2, 1])
    got = group_advantages(rewards, groups)
    for group in (1, 2, 7):
        own = rewards[groups == group].double()
        spread = own.std(correction=0)
        truth = (own - own.mean()) / spread if spread > 0 else own * 0
        assert torch.allclose(got[groups == group], truth)
    assert torch.equal(group_advantages(rewards, groups, scale=False)[[2, 6]], torch.tensor([1.5, -1.5]).double())
    with pytest.raises(ValueError, match="groups: wanted one a reward"):
        group_advantages(rewards, groups[:3])


def test_policy_refusals():
    batch, student, pool = policy_world()
    for name in ("advantages", "rollout_log_probs"):
        kept = getattr(batch, name)
        setattr(batch, name, None)
        with pytest.raises(ValueError, match=f"{name}: policy_coefficient 0.5 needs them"):
            ours(batch, student, pool, OPDConfig(k=4, policy_coefficient=0.5, divergence="forward_kl"))
        setattr(batch, name, kept)
    for options, words in [
        ({"policy_coefficient": -1.0}, "policy_coefficient: wanted a finite number >= 0"),
        ({"clip_low": 1.0}, r"clip_low: wanted a number in \[0, 1\)"),
        ({"policy_coefficient": 1.0, "reward_beta": 1.0}, "would count twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            OPDConfig(**options).validate()


@pytest.mark.parametrize("support", ["student", "union"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_metrics_of_teachers_and_tasks_are_what_they_say(mixture, support):
    batch, student, pool = policy_world(mixture)
    config = OPDConfig(k=4, divergence="forward_kl", mixture=mixture, support=support, measure_overlap=True)
    config.tasks = ("x", "y", "never")
    means = ours(batch, student, pool, config)[2]
    scored = score_rollouts(batch, student, pool, config)
    weights, sequence = pool.route(batch, mixture), batch.row_sequence()
    log_q = student.module(batch)[:, :VOCAB].detach().log_softmax(-1)
    ids = scored.support(batch)
    on_support = torch.where(ids >= 0, log_q.gather(1, ids.clamp(min=0)).exp(), 0.0).sum(1)
    top = log_q.topk(4).indices
    entropy = -(log_q.exp() * log_q).sum(1)
    overlaps = {}
    for position, name in enumerate(pool.names):
        rows = batch.loss_mask & (weights[position] > 0)
        theirs = pool[name].backend.module(batch).detach() / pool.temperature(name, 1.0)
        log_p = theirs.log_softmax(-1)
        known = torch.where(
            (ids >= 0) & (ids < log_p.shape[1]), log_p.gather(1, ids.clamp(0, log_p.shape[1] - 1)).exp(), 0.0
        )
        their_top = log_p.topk(4).indices
        shared = torch.tensor(
            [len(set(a) & set(b) & set(range(VOCAB))) / 4 for a, b in zip(top.tolist(), their_top.tolist())]
        )
        overlaps[name] = shared.double()
        truth = {
            "rows": float(rows.sum()),
            "student_support_mass": on_support[rows].mean().item(),
            "student_tail_mass": (1 - on_support)[rows].mean().item(),
            "teacher_support_mass": known.sum(1)[rows].mean().item(),
            "teacher_tail_mass": (1 - known.sum(1))[rows].mean().item(),
            "student_entropy": entropy[rows].mean().item(),
            "teacher_entropy": -(log_p.exp() * log_p).sum(1)[rows].mean().item(),
            "topk_overlap": overlaps[name][rows].mean().item(),
        }
        for kind, value in truth.items():
            assert means[f"{kind}/{name}"] == pytest.approx(value, rel=1e-9, abs=1e-12), (kind, name)
    for task in ("x", "y"):
        own = torch.tensor([t == task for t in TASKS])[sequence] & batch.loss_mask
        assert means[f"rows/task:{task}"] == float(own.sum())
        assert means[f"student_support_mass/task:{task}"] == pytest.approx(on_support[own].mean().item(), rel=1e-9)
        values = torch.cat([overlaps[n][own & (weights[p] > 0)] for p, n in enumerate(pool.names)])
        assert means[f"topk_overlap/task:{task}"] == pytest.approx(values.mean().item(), rel=1e-9)
    assert means["rows/task:never"] == 0 and math.isnan(means["divergence/task:never"])
    without = ours(batch, student, pool, OPDConfig(k=4, divergence="forward_kl", mixture=mixture))
    assert math.isnan(without[2]["topk_overlap/a"])
    batch.task_names = ["z"] * 6
    with pytest.raises(ValueError, match="task_names: wanted tasks among x, y, never, got 'z'"):
        ours(batch, student, pool, config)


def test_measuring_overlap_changes_no_score():
    batch, student, pool = policy_world()
    plain = OPDConfig(k=4, divergence="forward_kl")
    measured = OPDConfig(k=4, divergence="forward_kl", measure_overlap=True)
    assert agree(ours(batch, student, pool, measured), ours(batch, student, pool, plain)[:2], 1e-15)
