"""What every rank runs for test_refusals.py: what is refused, with its message, and what scoring leaves as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import torch

from megatron_actor import dense, models
from megatron_actor.dense import Loss
from megatron_actor.gradient_ranks import Job, start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED, as_batch
from opd_engine.distillation import RolloutBatch
from opd_engine.teachers.sentinel import DeadTeacherError

OPTIONS = {
    "virtual_pipeline_model_parallel_size": 2,
    "num_moe_experts": 4,
    "mtp_num_layers": 1,
    "defer_embedding_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "hybrid_context_parallel": True,
}


def message(action: Callable) -> str:
    """The error's text, or what came instead."""
    try:
        action()
    except (ValueError, DeadTeacherError) as problem:
        return str(problem)
    return "nothing was refused"


def everything(layout: str) -> dict[str, object]:
    job = start(LAYOUTS[layout])
    return {
        "options": refused_options(job),
        "launch": refused_at_launch(job),
        "step": refused_at_a_step(job),
        "modes": training_modes(job),
        "student_passes": student_passes(job),
        "bf16": in_bf16(job),
        "after the head": refused_after_the_head(job),
        "in the head": refused_in_the_head(job),
        "dead teacher": refused_dead_teacher(job),
    }


def at_a_step(layout: str) -> dict[str, object]:
    return {"step": refused_at_a_step(start(LAYOUTS[layout]))}


def refused_options(job: Job) -> dict[str, str]:
    """Each option alone, on a model that is fine otherwise."""
    actor = job.actor(ROUTED)
    model, optimizer, config = actor.walk.model, actor.optimizer, actor.walk.config
    found = {}
    for option, value in OPTIONS.items():
        before = getattr(config, option)
        setattr(config, option, value)
        found[option] = message(lambda: type(actor)(model, optimizer, actor.config, vocab_size=61))
        setattr(config, option, before)
    type(actor)(model, optimizer, actor.config, vocab_size=61)
    return found


def refused_at_launch(job: Job) -> dict[str, str]:
    actor = job.actor(ROUTED)
    kind, model, optimizer, config = type(actor), actor.walk.model, actor.optimizer, actor.config
    per_token = actor.walk.config

    def make(model=model, config=config, vocab_size=61, **options):
        return lambda: kind(model, optimizer, config, vocab_size=vocab_size, **options)

    found = {
        "two chunks": message(make([model, model])),
        "no language model": message(make(torch.nn.Linear(2, 2))),
        "without DDP": message(make(model.module)),
        "cannot distil": message(make(config=dataclasses.replace(config, tail="truncate"))),
        "other sizes": message(make(groups=dataclasses.replace(job.groups, tp=job.groups.pp, pp=job.groups.tp))),
    }
    model.ddp_config.overlap_param_gather = True
    found["late weights"] = message(make())
    model.ddp_config.overlap_param_gather = False
    if job.layout.tp > 1:
        marks = [p for p in model.parameters() if getattr(p, "tensor_model_parallel", False)]
        for parameter in marks:
            parameter.tensor_model_parallel = False
        found["weights without marks"] = message(make())
        for parameter in marks:
            parameter.tensor_model_parallel = True
    if job.groups.is_last_stage:
        found["vocabulary too large"] = message(make(vocab_size=job.layout.padded_vocab_size + 1))
    if job.groups.dp_cp.size() > 1:
        per_token.calculate_per_token_loss = False
        found["per-token changed"] = message(make())
    return found


def whole_batch(batch: RolloutBatch) -> RolloutBatch:
    """The batch with every field that there is."""
    rows, seqs = batch.num_tokens, batch.num_seqs
    return dataclasses.replace(
        batch,
        rewards=torch.ones(seqs),
        rollout_log_probs=torch.full((rows,), -1.0),
        rollout_topk_ids=torch.arange(2 * rows).view(rows, 2),
        rollout_topk_log_probs=torch.full((rows, 2), -1.0),
        teacher_weights={"first": torch.ones(seqs)},
        teacher_prompts=[torch.tensor([1, 2])] * seqs,
        sample_weights=torch.ones(seqs),
        advantages=torch.ones(seqs),
        task_names=["a"] * seqs,
    )


def changed(batch: RolloutBatch, field: dataclasses.Field) -> RolloutBatch:
    """Another value in one place of one field, of the same shape and dtype."""
    other, value = copy.copy(batch), copy.deepcopy(getattr(batch, field.name))
    if isinstance(value, torch.Tensor):
        value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype == torch.bool else value.view(-1)[-1] + 1
    elif isinstance(value, dict):
        next(iter(value.values()))[-1] += 1
    elif isinstance(value[-1], torch.Tensor):
        value[-1] = value[-1] + 1
    else:
        value[-1] = "other"
    setattr(other, field.name, value)  # not through the constructor: a wrong length would be refused there
    return other


def refused_at_a_step(job: Job) -> dict[str, str]:
    actor = job.actor(ROUTED)
    batch = job.share(job.samples)
    scored = actor.score_rollouts(batch, job.teachers)
    actor.train_step(batch, scored)
    found = {"freed": message(lambda: actor.train_step(batch, scored))}
    rank = torch.distributed.get_rank()
    other = as_batch(job.samples[rank : rank + 3])
    found["other batch"] = message(lambda: actor.score_rollouts(other, job.teachers))
    last = rank == torch.distributed.get_world_size() - 1
    full = whole_batch(batch)
    found["fields"] = {}
    for field in dataclasses.fields(full):
        own = changed(full, field) if last else full
        found["fields"][field.name] = message(functools.partial(actor._check_same, own))
    found["the same"] = message(lambda: actor._check_same(full))
    actor.config, before = dataclasses.replace(actor.config, coefficient=2.0 if last else 1.0), actor.config
    found["options"] = message(lambda: actor._check_same(batch))
    actor.config = before

    def guard():
        raise ValueError("the active weights are not the student's")

    actor._guard = guard
    found["guard while scoring"] = message(lambda: actor.score_rollouts(batch, job.teachers))
    found["guard while training"] = message(lambda: actor.train_step(batch, scored))
    found["guard before the update"] = message(actor.apply)
    return found


AFTER_THE_HEAD = {
    "soft-cap": lambda logits: 20 * torch.tanh(logits / 20),
    "a cap far above these logits": lambda logits: 2000 * torch.tanh(logits / 2000),
    "a scale near 1": lambda logits: logits * 1.00005,
}


def refused_after_the_head(job: Job) -> dict[str, str]:
    """Models that change their logits after their output layer."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    class Capped(GPTModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return self.change(output) if self.post_process else output

    actor, found = job.actor(ROUTED), {}
    actor.student.module.__class__ = Capped
    for name, change in AFTER_THE_HEAD.items():
        Capped.change = staticmethod(change)
        found[name] = message(lambda: actor.score_rollouts(job.share(job.samples), job.teachers))

    class Scaled(GPTModel):
        def _postprocess(self, hidden_states, *args, **kwargs):
            hidden_states = hidden_states * 1.00001 if self.post_process else hidden_states
            return super()._postprocess(hidden_states, *args, **kwargs)

    actor.student.module.__class__ = Scaled
    found["a scale before it"] = message(lambda: actor.score_rollouts(job.share(job.samples), job.teachers))
    return found


def refused_in_the_head(job: Job) -> dict[str, object]:
    """An output layer that is more than its weight, from the start or from a hook that comes later."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    class Capped(ColumnParallelLinear):
        def forward(self, *args, **kwargs):
            logits, bias = super().forward(*args, **kwargs)
            return 300 * torch.tanh(logits / 300), bias

    batch = job.share(job.samples)
    actor = job.actor(ROUTED, workspace_bytes=3 * 2 * 64)
    if job.groups.is_last_stage:
        actor.walk.head.output_layer.__class__ = Capped
    found = {"a cap": message(lambda: actor.score_rollouts(batch, job.teachers))}
    actor = job.actor(ROUTED, workspace_bytes=3 * 2 * 64)
    actor.student.hidden(batch)
    if job.groups.is_last_stage:
        hidden = torch.randn(2, 1, actor.walk.head.weight.shape[1], device=actor.walk.device)
        rows = torch.arange(2)
        actor.walk.head.output_layer.sequence_parallel = False
        kinds = [type(actor.walk.head.rows(hidden, rows)).__name__]
        actor.walk.head.output_layer.register_forward_hook(lambda layer, inputs, output: (output[0] * 2, output[1]))
        kinds.append(type(actor.walk.head.rows(hidden, rows)).__name__)
        found["kinds"] = kinds
    found["a hook"] = message(lambda: actor.student.hidden(batch))
    return found


def refused_dead_teacher(job: Job) -> str:
    """A teacher whose weights hold NaN, met for the first time."""
    actor = job.actor(ROUTED)
    name = job.teachers.names[0]
    teacher = job.teachers[name]
    kept, teacher._head_is_checked = [p.detach().clone() for p in teacher.module.parameters()], False
    with torch.no_grad():
        for parameter in teacher.module.parameters():
            parameter.fill_(float("nan"))
    try:
        return message(lambda: actor.score_rollouts(job.share(job.samples), job.teachers))
    finally:
        with torch.no_grad():
            for parameter, value in zip(teacher.module.parameters(), kept):
                parameter.copy_(value)


def training_modes(job: Job) -> dict[str, bool]:
    """Scoring is done in eval mode and leaves every submodule's own mode; a teacher that keeps eval stays there."""
    actor = job.actor(ROUTED)
    module = actor.student.module
    frozen = next(iter(module.decoder.layers))
    frozen.eval()
    before = [part.training for part in module.modules()]
    during = []
    hook = frozen.register_forward_pre_hook(lambda *args: during.append(any(m.training for m in module.modules())))
    actor.score_rollouts(job.share(job.samples), job.teachers)
    hook.remove()
    inside = made_inside_the_context(job, batch=job.share(job.samples))
    teachers = [job.teachers[name].module for name in job.teachers.names]
    return {
        "inputs made inside the scoring context": inside,
        "restored": before == [part.training for part in module.modules()],
        "eval while scoring": bool(during) and not any(during),
        "teachers stay in eval": not any(part.training for teacher in teachers for part in teacher.modules()),
        "teachers have no gradients": all(p.grad is None for teacher in teachers for p in teacher.parameters()),
    }


def made_inside_the_context(job: Job, batch) -> bool:
    """A teacher that waits on the host is on the device within its context alone: what is fed must be made there."""
    from opd_engine.integrations.megatron import MegatronScorer

    active, seen = [], []

    @contextlib.contextmanager
    def staged():
        active.append(1)
        yield
        active.pop()

    scorer = MegatronScorer(
        job.teachers["math"].walk.model, vocab_size=61, layout=job.batch_layout, scoring=staged, keep_eval=True
    )
    make = scorer.walk.micro_inputs

    def noted(*args):
        seen.append(bool(active))
        return make(*args)

    scorer.walk.micro_inputs = noted
    scorer.topk(batch, 3)
    scorer.next_token_logits(batch)
    return len(seen) >= 3 and all(seen) and not active


def student_passes(job: Job) -> dict[str, int]:
    """Passes of the old policy: only where its top-k is part of the support."""
    found = {}
    for support in ("student", "union", "teacher", "rollout"):
        actor = job.actor(ROUTED)
        actor.student._head_is_checked = True
        actor.config = dataclasses.replace(actor.config, support=support)
        walk, passes = actor.walk.forward, []

        def counted(*args, walk=walk, passes=passes):
            passes.append(1)
            return walk(*args)

        actor.walk.forward = counted
        actor.score_rollouts(job.share(job.samples), job.teachers)
        found[support] = len(passes)
    return found


def in_bf16(job: Job) -> dict[str, object]:
    """A bf16 student inside Float16Module, which would up-cast its logits: they stay bf16, gradients are as good."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from opd_engine.distillation import OPDConfig
    from opd_engine.integrations.megatron import MegatronActor

    loss = Loss("forward_kl", "teacher", k=8)
    weights = {name: w.bfloat16().float() for name, w in dense.make_weights(job.shape, 7).items()}
    low = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    config = OPDConfig(divergence=loss.divergence, support=loss.support, k=loss.k)
    options = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, clip_grad=0.0)

    def make(workspace_bytes: int | None) -> MegatronActor:
        model = job.build(job.shape, weights, calculate_per_token_loss=True, **low)
        ddp = models.data_parallel(Float16Module(model.config, model))
        optimizer, more = get_megatron_optimizer(options, [ddp]), {"workspace_bytes": workspace_bytes}
        return MegatronActor(ddp, optimizer, config, vocab_size=61, layout=job.batch_layout, **more)

    actor, chunked, seen = make(None), make(3 * 2 * 64), []
    if job.groups.is_last_stage:
        project = actor.walk.head.project

        actor.student._head_is_checked = True

        def noted(chosen):
            logits = project(chosen)
            seen.append((str(logits.dtype), logits.shape[0]))
            return logits

        actor.walk.head.project = noted
    reference = dense.Reference(
        job.shape, weights, job.teacher_shape, job.teacher_weights, job.samples, loss
    ).gradients()
    batch = job.share(job.samples)

    def error(one: MegatronActor) -> float:
        one.accumulate(batch, one.score_rollouts(batch, job.teachers))
        model = one.walk.language_model
        own = {models.whole_name(model, name): p.main_grad.clone() for name, p in model.named_parameters()}
        return job.distance(own, reference[1])

    wanted = int(batch.loss_mask.sum())
    return {
        "error": error(actor),
        "error in three products": error(chunked),
        "dtypes": sorted({dtype for dtype, _ in seen}),
        "projected": sum(rows for _, rows in seen),
        "wanted": wanted,
    }
