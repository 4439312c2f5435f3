"""The step's definition in float64, in one place, and the small world that tests compare it in."""

import math

import torch

import oracles
from distillation_toys import ToyBackend, toy_batch
from opd_engine.distillation import (
    Denominators,
    add_metrics,
    distillation_loss,
    score_rollouts,
)
from opd_engine.teachers import LocalTeacher, TeacherPool, TeacherSpec

VOCAB = 29
WIDTHS = {"a": 29, "b": 33, "c": 24}
SPECS = (TeacherSpec("a"), TeacherSpec("b", weight=2.0, temperature=0.8), TeacherSpec("c", weight=0.5))


def world(num_seqs=6, mixture="route", **fields):
    """(batch, student backend, pool): three teachers, two of them of another width than the student."""
    names = (
        ["a", "b", "c", "b", "c", "a", "a", "c"] if mixture == "route" else ["", ("a", "b"), "c", "", "", "b", "", ""]
    )
    if num_seqs == 6 and "rollout_ids" not in fields:
        fields["rollout_ids"] = [4, 4, 5, 6, 6, 6]
    batch = toy_batch(num_seqs, teacher_names=names[:num_seqs], vocab=min(WIDTHS.values()), **fields)
    student = ToyBackend(VOCAB, seed=1, padding=3)
    pool = TeacherPool(
        [(spec, LocalTeacher(ToyBackend(WIDTHS[spec.name], seed=5 + i))) for i, spec in enumerate(SPECS)]
    )
    return batch, student, pool


def parameters_grad(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.module.parameters()))])


def ours(batch, student, pool, config, parts=None, old=None):
    """(loss, gradient of the student's parameters, metrics' means), as micro-batches."""
    scored = score_rollouts(batch, old or student, pool, config)
    denominators = Denominators.of(batch, config)
    total, grads, metrics = 0.0, 0.0, []
    for micro in parts or [batch]:
        loss, sums = distillation_loss(student.logits(micro), micro, scored, config, None, denominators)
        grads = grads + parameters_grad(loss, student)
        total += loss.item()
        metrics.append(sums)
    return total, grads, add_metrics(metrics).means()


def reference(batch, student, pool, config, old=None):
    """(loss, gradient) by definition; `pool` is asked for its models' logits only."""
    logits = student.module(batch)[:, :VOCAB]
    student_old = (old or student).module(batch)[:, :VOCAB].detach()
    teacher_logits = {name: pool[name].backend.module(batch).detach() for name in pool.names}
    bounds = batch.cu_seqlens.tolist()
    spec_weights = {spec.name: spec.weight for spec in SPECS}
    units, unit_of = {}, {}
    for s in range(batch.num_seqs):
        rows = [i for i in range(bounds[s], bounds[s + 1]) if batch.loss_mask[i]]
        unit = {"token_mean": 0, "sample_mean": s, "rollout_mean": int(batch.rollout_ids[s])}[config.reduction]
        for i in rows:
            unit_of[i] = unit
        units[unit] = units.get(unit, 0) + len(rows)
    units = {unit: count for unit, count in units.items() if count}
    loss = 0.0
    for s in range(batch.num_seqs):
        named = batch.teacher_names[s]
        named = (named,) if isinstance(named, str) else named
        named = pool.names if named == ("",) else [n for n in pool.names if n in named]
        for i in range(bounds[s], bounds[s + 1]):
            if not batch.loss_mask[i]:
                continue
            row_teachers = []
            for name in named:
                temperature = pool.temperature(name, config.temperature)
                row_teachers.append((teacher_logits[name][i] / temperature).log_softmax(-1))
            student_log_p = (student_old[i] / config.temperature).log_softmax(-1)
            ids = reference_support(student_log_p, row_teachers, int(batch.tokens[i + 1]), config)
            bucketed = [reference_buckets(log_p, ids) for log_p in row_teachers]
            weights = torch.tensor([1.0 if config.mixture == "route" else spec_weights[n] for n in named]).double()
            weights = weights / weights.sum()
            log_q = reference_buckets((logits[i] / config.temperature).log_softmax(-1), ids)

            def divergence(log_p, log_q=log_q):
                return oracles.divergence_of(log_q, log_p, config.divergence, config.beta, config.alpha)

            if config.mixture == "loss_sum":
                value = sum(w * divergence(b) for w, b in zip(weights, bucketed))
            elif config.mixture == "geometric":
                mixed = sum(w * b for w, b in zip(weights, bucketed))
                value = divergence(mixed - torch.logsumexp(mixed, 0))
            else:
                value = divergence(sum(w * b.exp() for w, b in zip(weights, bucketed)).log())
            loss = loss + value / units[unit_of[i]] / len(units)
    loss = loss * config.coefficient
    return loss.item(), parameters_grad(loss, student)


def reference_support(student_log_p, teachers, sampled, config):
    def top(log_p):
        return sorted(range(log_p.numel()), key=lambda v: -log_p[v].item())[: config.k]

    if config.support == "rollout":
        return [sampled]
    mass = {}
    sources = [student_log_p] if config.support in ("student", "union") else []
    sources += teachers if config.support in ("teacher", "union") else []
    for log_p in sources:
        for v in top(log_p):
            if v < VOCAB:
                mass[v] = mass.get(v, 0) + log_p[v].exp().item()
    return sorted(mass, key=lambda v: -mass[v])[: config.union_cap]


def reference_buckets(log_p, ids):
    inside = [log_p[v] if v < log_p.numel() else log_p.new_tensor(-math.inf) for v in ids]
    rest = [v for v in range(log_p.numel()) if v not in ids]
    return torch.stack([*inside, torch.logsumexp(log_p[rest], 0)])


def agree(got, truth, tolerance=1e-10):
    (loss, grad, *_), (true_loss, true_grad) = got, truth
    return abs(loss - true_loss) <= tolerance * max(1, abs(true_loss)) and float(
        (grad - true_grad).abs().max()
    ) <= tolerance * max(1.0, float(true_grad.abs().max()))
