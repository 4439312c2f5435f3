"""What every rank runs for test_options.py: gradients under recompute, overlap and dropout; what is refused instead.

Without dropout the truth is the dense float64 reference. With dropout it is the loss itself: its slope along the
gradient, from two evaluations with the generators set alike, is the gradient's norm.
"""

from __future__ import annotations

import warnings

import torch

from megatron_actor import models
from megatron_actor.gradient_ranks import Job, start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
EXACT = {
    "selective recompute": {"model_options": SELECTIVE},
    "full recompute, uniform": {"model_options": FULL},
    "full recompute, block": {"model_options": BLOCK},
    "gradient reduction overlapped": {"overlapped": True},
    "gradient reduction overlapped, full recompute": {"overlapped": True, "model_options": FULL},
}


def everything(layout: str) -> dict[str, dict[str, float] | str]:
    warnings.filterwarnings("ignore")
    job = start(LAYOUTS[layout])
    truth = job.reference(ROUTED).gradients()
    found: dict = {}
    for name, way in EXACT.items():
        loss, gradient = job.errors(job.actor(ROUTED, **way), job.samples, truth)
        found[name] = {"loss": loss, "gradient": gradient}
    found["dropout"] = dropout(job)
    found["dropout, planted"] = {"a gradient 2% too long": dropout(job, planted=1.02)["slope"]}
    found |= refusals(job)
    return found


def dropped(job: Job, **more):
    """An actor whose training forward drops a fifth of activations and attention; Megatron's own attention."""
    options = {**DROPOUT, **more}
    return job.actor(ROUTED, context=None, packed=False, max_seqs=3, max_tokens=None, model_options=options)


def seeded(job: Job, actor, batch, scored) -> float:
    """The loss and its gradient, every time with the same drops."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(11 + 100 * job.groups.dp.rank() + 1000 * job.groups.is_last_stage)
    return actor.accumulate(batch, scored).means()["loss"]


def dropout(job: Job, planted: float = 1.0) -> dict[str, float]:
    """Old policy and teachers see no dropout, the training forward does, and its gradient is that of its own loss."""
    batch = job.share(job.samples)
    plain = job.actor(ROUTED, context=None, packed=False, max_seqs=3, max_tokens=None)
    actor = dropped(job)
    without, scored = plain.score_rollouts(batch, job.teachers), actor.score_rollouts(batch, job.teachers)
    found = {"old policy's ids": 0.0}
    if job.groups.is_last_stage:  # the others only count what it holds
        found["old policy's ids"] = float((without.support(batch) != scored.support(batch)).any())
    loss = seeded(job, actor, batch, scored)
    dry = plain.accumulate(batch, without).means()["loss"]
    found["drops nothing"] = float(abs(loss - dry) < 1e-4)
    gradient, replicas = models.assemble(models.gradients(actor.walk.model), job.groups)
    found["replicas"] = replicas
    found["another draw"] = abs(seeded(job, actor, batch, scored) - loss)

    for name, options in (("selective recompute", SELECTIVE), ("full recompute", FULL)):
        again = dropped(job, **options)
        recomputed = seeded(job, again, batch, scored)
        found[name] = abs(recomputed - loss) + job.distance(
            models.gradients(again.walk.model), {key: value.double() for key, value in gradient.items()}
        )

    norm = sum(float(value.double().pow(2).sum()) for value in gradient.values()) ** 0.5
    live = dict(actor.walk.language_model.named_parameters())
    whole = {name: models.whole_name(actor.walk.language_model, name) for name in live}
    before = {name: parameter.detach().clone() for name, parameter in live.items()}
    ends, width = [], 0.002
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, parameter in live.items():
                part = models.split(name, gradient[whole[name]], job.groups.tp_size)[job.groups.tp_rank]
                parameter.copy_(before[name] + sign * width * part / norm)
        ends.append(seeded(job, actor, batch, scored))
    slope = (ends[0] - ends[1]) / (2 * width)
    found["slope"] = abs(planted * norm / slope - 1.0)
    return found


def refusals(job: Job) -> dict[str, str]:
    def message(change, back) -> str:
        actor = job.actor(ROUTED)
        change(actor.walk)
        try:
            type(actor)(actor.walk.model, actor.optimizer, actor.config, vocab_size=61)
        except ValueError as error:
            return str(error)
        finally:
            back(actor.walk)
        return "accepted"

    def set_to(where: str, option: str, value):
        return lambda walk: setattr(walk.config if where == "model" else walk.model.ddp_config, option, value)

    return {
        name: message(set_to(where, option, value), set_to(where, option, before))
        for name, where, option, value, before in (
            ("virtual pipeline", "model", "virtual_pipeline_model_parallel_size", 2, None),
            ("parameter gather overlapped", "ddp", "overlap_param_gather", True, False),
        )
    }
