"""What every rank runs for test_gradients.py: one layout, every check, each compared on all ranks with the reference.

Loss and every parameter's gradient come out of MegatronActor through Megatron's schedules, DDP and optimizers in
float32; the reference (megatron_actor.dense) is float64 torch in one process. Errors are over the largest gradient.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from megatron_actor import dense, models, on_cpu
from megatron_actor.dense import Loss, Reference, Sample, Shape
from megatron_actor.layouts import CHECKS, LAYOUTS, Layout
from megatron_actor.samples import MIXED, ROUTED, TEACHERS, as_batch, make_samples, rolled_out, with_teachers
from opd_engine.distillation import OPDConfig, RolloutBatch
from opd_engine.teachers import TeacherPool

LR, STEPS = 0.1, 4
ADAM = {"betas": (0.9, 0.95), "eps": 1.0}  # so large an epsilon keeps Adam from turning noise near 0 into full steps


class Job:
    """One layout on this rank: the groups, the reference, and actors on fresh models with the same weights."""

    def __init__(self, layout: Layout):
        from opd_engine.integrations.megatron import BatchLayout, MegatronGroups, MegatronScorer

        self.layout, self.groups = layout, MegatronGroups.from_parallel_state()
        self.batch_layout = BatchLayout(context=layout.context, max_tokens=24)
        rotary = layout.context == "zigzag"  # Megatron cuts rotary positions for zigzag only
        vocab = {"padded_vocab_size": layout.padded_vocab_size, "rotary": rotary}
        self.shape = Shape(**vocab)
        self.teacher_shape = Shape(hidden=24, heads=6, ffn=48, tied=False, **vocab)
        self.teacher_weights = {name: dense.make_weights(self.teacher_shape, 50 + i) for i, name in enumerate(TEACHERS)}
        self.samples = make_samples()
        self.teachers = TeacherPool(
            {
                name: MegatronScorer(
                    self.build(self.teacher_shape, weights), vocab_size=61, layout=self.batch_layout, keep_eval=True
                )
                for name, weights in self.teacher_weights.items()
            }
        )

    def build(self, shape: Shape, weights: dict[str, Tensor], context: str | None = "", **options):
        context = self.layout.context if context == "" else context
        options = {"sequence_parallel": self.layout.sequence_parallel, **options}
        return models.build(shape, weights, self.groups, context=context, **options)

    def actor(
        self,
        loss: Loss,
        *,
        kind=None,
        tied: bool = True,
        steps: int = 1,
        context: str | None = "",
        workspace_bytes: int | None = None,
        model_options: dict | None = None,
        overlapped: bool = False,
        options: dict | None = None,
        **layout,
    ):
        """A MegatronActor (or a `kind` of it) on a fresh model with the reference's weights."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from opd_engine.integrations.megatron import MegatronActor

        shape = dataclasses.replace(self.shape, tied=tied)
        model_options = {"calculate_per_token_loss": True, **(model_options or {})}
        model = self.build(shape, dense.make_weights(shape, 7), context, **model_options)
        spread = self.layout.distributed_optimizer
        ddp = models.data_parallel(model, use_distributed_optimizer=spread, overlap_grad_reduce=overlapped)
        adam = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            adam_beta1=ADAM["betas"][0],
            adam_beta2=ADAM["betas"][1],
            adam_eps=ADAM["eps"],
            weight_decay=0.0,
            clip_grad=0.0,
            use_distributed_optimizer=spread,
        )
        config = OPDConfig(
            divergence=loss.divergence,
            support=loss.support,
            mixture=loss.mixture,
            reduction=loss.reduction,
            k=loss.k,
            temperature=loss.temperature,
            state_weight_cap=loss.state_cap,
            policy_coefficient=loss.policy,
            optimizer_steps_per_rollout=steps,
            **(options or {}),
        )
        return (kind or MegatronActor)(
            ddp,
            get_megatron_optimizer(adam, [ddp]),
            config,
            vocab_size=61,
            layout=dataclasses.replace(self.batch_layout, **layout),
            workspace_bytes=workspace_bytes,
        )

    def reference(self, loss: Loss, tied: bool = True, samples: list[Sample] | None = None) -> Reference:
        shape = dataclasses.replace(self.shape, tied=tied)
        samples = with_teachers(self.samples if samples is None else samples, loss)
        return Reference(shape, dense.make_weights(shape, 7), self.teacher_shape, self.teacher_weights, samples, loss)

    def mixed_samples(self) -> list[Sample]:
        """The samples with several teachers and an engine's log-probs, for an untied head."""
        shape = dataclasses.replace(self.shape, tied=False)
        return rolled_out(with_teachers(self.samples, MIXED), shape, MIXED)

    def share(self, samples: list[Sample]) -> RolloutBatch:
        """This data-parallel rank's samples."""
        return as_batch(samples[self.groups.dp.rank() :: self.layout.dp])

    def errors(self, actor, samples: list[Sample], truth: tuple[float, dict[str, Tensor]]) -> tuple[float, float]:
        """(error of the loss, error of the worst gradient or disagreement of replicas), of one accumulation."""
        batch = self.share(samples)
        scored = actor.score_rollouts(batch, self.teachers)
        metrics = actor.accumulate(batch, scored)
        self.metrics = metrics.means()
        loss = self.metrics["loss"]
        own = models.gradients(actor.walk.model)
        return abs(loss - truth[0]) / max(1.0, abs(truth[0])), self.distance(own, truth[1])

    def distance(self, own: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
        whole, replicas = models.assemble(own, self.groups)
        assert set(whole) == set(truth), sorted(set(whole) ^ set(truth))
        largest = max(float(gradient.abs().max()) for gradient in truth.values())
        errors = [float((whole[name].double() - truth[name]).abs().max()) for name in truth]
        return max(replicas, max(errors) / max(largest, 1e-30))


def different(metrics: dict[str, float], others: dict[str, float]) -> float:
    """The largest difference of two reports; what one has no value for, neither has."""
    assert metrics.keys() == others.keys()
    gaps = [abs(metrics[name] - others[name]) for name in metrics if metrics[name] == metrics[name]]
    assert len(gaps) == sum(value == value for value in others.values())
    return max(gaps)


def start(layout: Layout) -> Job:
    warnings.filterwarnings("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_model  # noqa: F401  (what install() replaces must be there)
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    on_cpu.install()

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
    )
    model_parallel_cuda_manual_seed(1)
    return Job(layout)


def everything(layout: str) -> dict[str, dict[str, float]]:
    """Every check of a layout: its name -> what it measured, each to be at most its bound, or, of controls, above."""
    from megatron_actor import support_ranks

    job, checks = start(LAYOUTS[layout]), {**globals(), **vars(support_ranks)}
    return {name: checks[name](job) for name in (*CHECKS, "controls")}


def scores(job: Job) -> dict[str, float]:
    """Old policy and teachers against the reference's logits, on the last stage."""
    actor = job.actor(ROUTED)
    batch, samples = job.share(job.samples), job.samples[job.groups.dp.rank() :: job.layout.dp]
    walked = walked_samples(job)
    scored = actor.score_rollouts(batch, job.teachers)
    for name, numbers in walked.items():
        own = {sample.number for sample in samples if sample.teachers == (name,) and sample.mask.any()}
        assert numbers == own, (name, numbers, own)
    following = actor.student.next_token_logits(batch)  # the same on every rank, so checked on every stage
    last = torch.stack([dense_logits(job, sample)[-1] for sample in samples])
    relative = _gap(following, last) / float(last.abs().max())
    worst = {"teacher": 0.0, "student": 0.0, "tail": 0.0, "next token logits": relative}
    if not job.groups.is_last_stage:
        return worst
    ids = scored.support(batch)
    own = actor.student.topk(batch, ROUTED.k) if job.layout.pp == 1 else None
    bounds = batch.cu_seqlens.tolist()
    for sample, start_row, end in zip(samples, bounds, bounds[1:]):
        rows, mask = slice(start_row, end), sample.mask
        weights = dense.double_leaves(job.teacher_weights[sample.teachers[0]])
        with torch.no_grad():
            teacher = dense.forward(weights, job.teacher_shape, sample.tokens).log_softmax(1)
        truth = dense_logits(job, sample).log_softmax(1)
        if not mask.any():
            continue
        one = batch.select([samples.index(sample)])
        found = scored.teacher(sample.teachers[0], one)
        here = ids[rows][mask]
        worst["teacher"] = max(worst["teacher"], _gap(found.log_probs[mask], teacher[mask].gather(1, here)))
        tail = teacher[mask].scatter(1, here, -torch.inf).logsumexp(1)
        worst["tail"] = max(worst["tail"], _gap(found.tail_log_prob[mask], tail))
        top = truth[mask].topk(ROUTED.k, dim=1)
        worst["student"] = max(worst["student"], float((top.indices.sort(1).values != here.sort(1).values).any()))
        if own is not None:
            worst["student"] = max(worst["student"], _gap(own.log_probs[rows][mask], top.values))
    return worst


def walked_samples(job: Job) -> dict[str, set[int]]:
    """Fills with the samples that each teacher is fed from now on, its look at its own head left out."""
    found: dict[str, set[int]] = {}
    for name in job.teachers.names:
        job.teachers[name].next_token_logits(job.share(job.samples))
        walk, numbers = job.teachers[name].walk, found.setdefault(name, set())
        make = type(walk).micro_inputs

        def noted(batch, wanted=None, walk=walk, numbers=numbers, make=make):
            numbers |= set(batch.sample_ids.tolist())
            return make(walk, batch, wanted)

        walk.micro_inputs = noted
    return found


def dense_logits(job: Job, sample: Sample) -> Tensor:
    with torch.no_grad():
        return dense.forward(dense.double_leaves(dense.make_weights(job.shape, 7)), job.shape, sample.tokens)


def _gap(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max())


def routed(job: Job) -> dict[str, float]:
    loss, gradient = job.errors(job.actor(ROUTED), job.samples, job.reference(ROUTED).gradients())
    return {"loss": loss, "gradient": gradient}


def averaged(job: Job) -> dict[str, float]:
    """calculate_per_token_loss off: Megatron divides by micro-batches and ranks instead of tokens."""
    actor = job.actor(ROUTED, model_options={"calculate_per_token_loss": False})
    loss, gradient = job.errors(actor, job.samples, job.reference(ROUTED).gradients())
    return {"loss": loss, "gradient": gradient}


def mixed(job: Job) -> dict[str, float]:
    """Untied head, two teachers, union support, temperature, sample means, visited-state weights, policy gradient."""
    samples = job.mixed_samples()
    truth = job.reference(MIXED, tied=False, samples=samples).gradients()
    loss, gradient = job.errors(job.actor(MIXED, tied=False), samples, truth)
    return {"loss": loss, "gradient": gradient, "clipped": abs(job.metrics["clipped_rows"] - clipped(job, samples))}


def clipped(job: Job, samples: list[Sample]) -> int:
    """Rows where the policy gradient is cut off, by definition."""
    shape, count = dataclasses.replace(job.shape, tied=False), 0
    weights = dense.double_leaves(dense.make_weights(shape, 7))
    for sample in samples:
        with torch.no_grad():
            q = (dense.forward(weights, shape, sample.tokens) / MIXED.temperature).log_softmax(1)
        ratio = (q.gather(1, sample.tokens.roll(-1)[:, None])[:, 0] - sample.log_probs.double()).exp()[sample.mask]
        count += int((ratio > 1.2).sum() if sample.advantage > 0 else (ratio < 0.8).sum())
    assert count > 0
    return count


def splits(job: Job) -> dict[str, float]:
    """Micro-batch sizes, packing and padding change nothing, in the gradients or in what is reported."""
    truth = job.reference(ROUTED).gradients()
    ways = {
        "one micro-batch": {"max_tokens": None},
        "one sequence each": {"max_seqs": 1},
        "padded": {"packed": False, "max_seqs": 3},
        "rows padded to 8": {"pad_to": 8},
        "gradients reduced during the backward": {"overlapped": True},
    }
    if job.layout.pp > 1:
        # Megatron's check of this option reads that of experts, which the model has none of.
        exchange = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
        ways["stages that exchange shapes"] = {"model_options": exchange}
        ways["outputs freed once sent"] = {"model_options": {"deallocate_pipeline_outputs": True}}
    if job.layout.cp == 1:
        ways["padded, Megatron's own attention"] = {"packed": False, "context": None}
    found, first = {}, None
    for name, way in ways.items():
        found[name] = job.errors(job.actor(ROUTED, **way), job.samples, truth)[1]
        first = first or job.metrics
        found[f"metrics, {name}"] = different(job.metrics, first)
    everybody: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybody, job.metrics)
    found["metrics of the ranks"] = max(different(metrics, everybody[0]) for metrics in everybody)
    assert job.metrics["rows"] == sum(int(sample.mask.sum()) for sample in job.samples)
    return found


def no_loss_token(job: Job) -> dict[str, float]:
    """Rows that count on some ranks only, a data-parallel rank without samples, and a batch where nothing counts.

    By scores and logits, then by kept hidden states and the head in chunks.
    """
    lone = [dataclasses.replace(s, mask=s.mask & False) for s in job.samples]
    lone[6].mask[12] = True
    single = [dataclasses.replace(job.samples[2], number=0)]
    nothing = [dataclasses.replace(s, mask=s.mask & False) for s in job.samples]
    few = 3 * 4 * job.layout.padded_vocab_size // job.layout.tp
    kept = {"options": {"keep_teacher_hidden": True}, "workspace_bytes": few}
    found = {}
    for way, options in (("scores", {}), ("kept hidden", kept)):
        for name, samples in (("one row", lone), ("one sample", single)):
            truth = job.reference(ROUTED, samples=samples).gradients()
            found[f"{name}, {way}"] = job.errors(job.actor(ROUTED, **options), samples, truth)[1]
        actor = job.actor(ROUTED, **options)
        batch = job.share(nothing)
        actor.accumulate(batch, actor.score_rollouts(batch, job.teachers))
        found[f"nothing, {way}"] = max(float(g.abs().max()) for g in models.gradients(actor.walk.model).values())
    return found


def steps(job: Job) -> dict[str, float]:
    """One and four optimizer steps on one rollout, whose support and teacher scores stay those of its beginning."""
    found = {}
    for count in (1, STEPS):
        actor = job.actor(ROUTED, steps=count)
        batch = job.share(job.samples)
        scored = actor.score_rollouts(batch, job.teachers)
        rows = int(batch.loss_mask.sum()) if job.groups.is_last_stage else 0
        assert scored.nbytes == rows * (8 * ROUTED.k + 16), (scored.nbytes, rows)
        norms = []
        for _ in range(count):
            report = actor.train_step(batch, scored)
            assert report.update_successful
            norms.append(report.grad_norm)
        reference = job.reference(ROUTED)
        norm = sum(float(gradient.square().sum()) for gradient in reference.gradients()[1].values()) ** 0.5
        found[f"norm of the gradient, of {count}"] = abs(norms[0] - norm) / norm
        before = {name: weight.detach().clone() for name, weight in reference.weights.items()}
        optimizer = torch.optim.Adam(reference.weights.values(), lr=LR, **ADAM)
        for _ in range(count):
            optimizer.zero_grad()
            reference.loss().backward()
            optimizer.step()
        moved = {name: weight.detach() - before[name] for name, weight in reference.weights.items()}
        own = {
            name: p - models.split(name, before[name], job.layout.tp)[job.groups.tp_rank].float()
            for name, p in models.parameters(actor.walk.model).items()
        }
        found[f"bytes held after {count}"] = float(scored.nbytes)
        found[f"{count} steps"] = job.distance(own, moved)
    return found


def controls(job: Job) -> dict[str, float]:
    """Planted errors; every one must be far above the bound."""
    from opd_engine.integrations.megatron import MegatronActor

    groups = job.groups
    alone = groups.tp_rank == groups.cp_rank == groups.dp.rank() == 0

    def scaled(factor: float):
        class Scaled(MegatronActor):
            def _loss(self, *args):
                loss, metrics = super()._loss(*args)
                return loss * factor, metrics

        return Scaled

    class RowBefore(MegatronActor):
        def _loss(self, micro, *args):
            moved = dataclasses.replace(micro, output_rows=(micro.output_rows - 1).clamp(min=0))
            return super()._loss(moved, *args)

    truth = job.reference(ROUTED).gradients()
    kinds = {"loss / 2": scaled(0.5), "1% more": scaled(1.01), "row before": RowBefore}
    if job.layout.tp * job.layout.cp * job.layout.dp > 1:
        kinds["loss on rank 0 only"] = scaled(1.0 if alone else 0.0)
    found = {name: job.errors(job.actor(ROUTED, kind=kind), job.samples, truth)[1] for name, kind in kinds.items()}
    actor = job.actor(ROUTED)
    if job.layout == LAYOUTS["tp2"] or job.layout == LAYOUTS["tp3 padded vocabulary"]:
        head = actor.walk.head.output_layer
        head.allreduce_dgrad, head.disable_grad_reduce = False, True
    else:
        actor.walk.config.finalize_model_grads_func = lambda *args, **kwargs: None
    found["missing reduction"] = job.errors(actor, job.samples, truth)[1]
    return found
