"""More of test_gradients.py's ranks: who chooses the ids, what is kept of teachers, and the head in chunks."""

from __future__ import annotations

import dataclasses

import torch

from megatron_actor import models
from megatron_actor.dense import Loss
from megatron_actor.gradient_ranks import Job, different
from megatron_actor.samples import MIXED, ROUTED, TEACHERS, rolled_out, with_teachers
from opd_engine.teachers import TeacherPool, TeacherSpec


def supports(job: Job) -> dict[str, float]:
    """Supports that teachers choose: their own top-k, and its union with the student's from one forward of the teacher.

    With activations computed again in the backward, which calls everything but the loss twice. Then the student's
    support, while the overlap with the teacher's is measured in the same forward.
    """
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    found = {}
    actor = job.actor(ROUTED, options={"measure_overlap": True})
    found["student, overlap measured"] = job.errors(actor, job.samples, job.reference(ROUTED).gradients())[1]
    assert 0 < job.metrics["topk_overlap/math"] < 1
    for support in ("teacher", "union"):
        loss = Loss("forward_kl", support, k=5)
        actor = job.actor(loss, model_options=again)
        found[support] = job.errors(actor, job.samples, job.reference(loss).gradients())[1]
    twice, few = loss_twice(), 3 * 4 * job.layout.padded_vocab_size // job.layout.tp
    truth = job.reference(ROUTED).gradients()
    for name, options in (("scores", {}), ("kept hidden", {"keep_teacher_hidden": True})):
        actor = job.actor(ROUTED, kind=twice, workspace_bytes=few, options=options)
        found[f"loss computed twice, {name}"] = job.errors(actor, job.samples, truth)[1]
    return found


def loss_twice():
    """An actor whose loss function runs twice a micro-batch: it frees nothing and adds to no gradient by itself."""
    from opd_engine.integrations.megatron import MegatronActor

    class Twice(MegatronActor):
        def _loss(self, *args):
            super()._loss(*args)
            return super()._loss(*args)

    return Twice


def engine_topk(job: Job) -> dict[str, float]:
    """The rollout engine's own ids, fewer in some rows; the student makes no pass before it trains."""
    loss = Loss("forward_kl", "rollout", k=8)
    found = {}
    for steps in (1, 2):
        actor = job.actor(loss, steps=steps)
        passes = counted_passes(actor)
        found[f"{steps} steps"] = job.errors(actor, job.samples, job.reference(loss).gradients())[1]
        assert not passes, passes
        assert 1 < job.metrics["support_size"] < 5
    return found


def counted_passes(actor) -> list[int]:
    """Grows by one with every pass of the student without gradient."""
    actor.student._head_is_checked = True
    walk, passes = actor.walk.forward, []

    def counted(*args, **options):
        passes.append(1)
        return walk(*args, **options)

    actor.walk.forward = counted
    return passes


ROWS_ALONE = Loss("forward_kl", "student", "arithmetic", "sample_mean", k=6, temperature=0.8)


def kept_hidden(job: Job) -> dict[str, float]:
    """Teachers kept as hidden states, the student's top-k chosen in training: against the reference and two passes."""
    found = {}
    policy = dataclasses.replace(ROWS_ALONE, state_cap=1.5, policy=0.7)
    few = 3 * 4 * job.layout.padded_vocab_size // job.layout.tp
    for name, loss, tied, workspace in (
        ("routed", ROUTED, True, None),
        ("two teachers, policy gradient", policy, False, None),
        ("two teachers, three products", ROWS_ALONE, False, few),
    ):
        shape = dataclasses.replace(job.shape, tied=tied)
        samples = rolled_out(with_teachers(job.samples, loss), shape, loss)
        truth = job.reference(loss, tied=tied, samples=samples).gradients()
        two = job.actor(loss, tied=tied, workspace_bytes=workspace)
        job.errors(two, samples, truth)
        metrics = job.metrics
        whole, _ = models.assemble(models.gradients(two.walk.model), job.groups)
        one = job.actor(loss, tied=tied, workspace_bytes=workspace, options={"keep_teacher_hidden": True})
        passes = counted_passes(one)
        for teacher in job.teachers.names:
            job.teachers[teacher].next_token_logits(job.share(samples))  # its head is looked at once, outside
        found[name] = job.errors(one, samples, truth)[1]
        assert not passes, passes
        own = models.gradients(one.walk.model)
        found[f"{name}, two passes"] = job.distance(own, {n: g.double() for n, g in whole.items()})
        found[f"{name}, metrics"] = different(job.metrics, metrics)
    batch = job.share(job.samples)
    actor = job.actor(ROUTED, options={"keep_teacher_hidden": True})
    scored = actor.score_rollouts(batch, job.teachers)
    kept = int(batch.loss_mask.sum()) * job.teacher_shape.hidden // job.layout.tp * 4
    assert scored.nbytes == (kept if job.groups.is_last_stage else 0), (scored.nbytes, kept)
    actor.train_step(batch.select(range(batch.num_seqs // 2)), scored)
    try:
        actor.train_step(batch.select(range(batch.num_seqs // 2, batch.num_seqs)), scored)
        found["a second step was taken"] = 1.0
    except ValueError as refusal:
        assert str(refusal).startswith("keep_teacher_hidden: the student has been updated"), refusal
    return found


def own_prompts(job: Job) -> dict[str, float]:
    """One teacher sees prompts of its own, longer and shorter: the same tokens at other positions."""
    generator = torch.Generator().manual_seed(5)
    samples = [
        dataclasses.replace(s, teacher_prompt=torch.randint(0, 61, (1 + s.number % 4 * 3,), generator=generator))
        if s.teachers == ("math",) and s.number != 6
        else s
        for s in job.samples
    ]
    truth, plain = job.reference(ROUTED, samples=samples).gradients(), job.teachers
    job.teachers = TeacherPool([(TeacherSpec(n, teacher_tokens=n == "math"), plain[n]) for n in TEACHERS])
    found = {}
    for name, options in (("scores", {}), ("kept hidden", {"keep_teacher_hidden": True})):
        found[name] = job.errors(job.actor(ROUTED, options=options), samples, truth)[1]
    job.teachers = plain
    return found


def chunked_head(job: Job) -> dict[str, float]:
    """The LM head a few rows at a time: three products where rows stand alone, four elsewhere; tied, then not."""
    from opd_engine.distillation.head import HiddenRows

    few = 3 * 4 * job.layout.padded_vocab_size // job.layout.tp
    found, used, plain = {}, [], HiddenRows.distill
    HiddenRows.distill = lambda *args, **options: used.append(1) or plain(*args, **options)
    for name, loss, tied in (("tied", ROUTED, True), ("untied", ROWS_ALONE, False), ("four products", MIXED, False)):
        samples = job.samples if tied else job.mixed_samples()
        truth = job.reference(loss, tied=tied, samples=samples).gradients()
        job.errors(job.actor(loss, tied=tied), samples, truth)
        metrics = job.metrics
        used.clear()
        found[name] = job.errors(job.actor(loss, tied=tied, workspace_bytes=few), samples, truth)[1]
        found[f"{name}, metrics"] = different(job.metrics, metrics)
        assert bool(used) == (job.groups.is_last_stage and loss is not MIXED), (name, used)
    half = job.actor(ROUTED, workspace_bytes=few, options={"coefficient": 0.5})
    truth = job.reference(ROUTED).gradients()[1]
    job.errors(half, job.samples, (0.0, truth))
    found["half the coefficient"] = job.distance(
        models.gradients(half.walk.model), {n: g / 2 for n, g in truth.items()}
    )
    overlapped = job.actor(ROUTED, workspace_bytes=few, overlapped=True)
    found["reduced during the backward"] = job.errors(overlapped, job.samples, job.reference(ROUTED).gradients())[1]
    averaged = job.actor(ROUTED, workspace_bytes=few, model_options={"calculate_per_token_loss": False})
    found["averaged"] = job.errors(averaged, job.samples, job.reference(ROUTED).gradients())[1]
    HiddenRows.distill = plain
    return found
