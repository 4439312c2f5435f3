"""What every rank runs for test_teachers.py: weights that must not get mixed up, checkpoints, folders, metrics.

Each check returns what it found; pytest's own process judges. Two teachers have the student's shape and wear its model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch import nn

from megatron_actor import dense, models
from megatron_actor.gradient_ranks import Job, start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED, TEACHERS
from opd_engine.distillation import Denominators, OPDConfig, distillation_loss, score_rollouts
from opd_engine.parallel.collectives import all_reduce_max_, barrier
from opd_engine.teachers import LocalTeacher, TeacherPool, WeightStore


def refusal(attempt) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Home:
    """An actor whose guard asks a WeightStore, and teachers of its shape, loaded in the order given."""

    def __init__(self, job: Job, order=TEACHERS):
        from opd_engine.integrations.megatron import MegatronActor
        from opd_engine.integrations.megatron.teachers import own_teacher, switched_teacher

        self.job, self.weights = job, None
        guard = lambda: self.weights.check_trainable("MegatronActor")  # noqa: E731
        self.actor = job.actor(ROUTED, kind=functools.partial(MegatronActor, guard=guard))
        self.module = self.actor.walk.language_model
        self.weights = WeightStore(self.module)
        self.teacher_weights = {name: dense.make_weights(job.shape, 90 + i) for i, name in enumerate(TEACHERS)}
        self.others = {name: job.build(job.shape, weights) for name, weights in self.teacher_weights.items()}
        for name in order:
            self.weights.load(f"teacher:{name}", self.others[name].state_dict())
        common = {"vocab_size": 61, "layout": job.batch_layout}
        model = self.actor.walk.model
        self.switched = TeacherPool(
            {name: switched_teacher(model, self.weights, f"teacher:{name}", **common) for name in TEACHERS}
        )
        self.separate = TeacherPool({name: own_teacher(self.others[name], "cpu", **common) for name in TEACHERS})
        self.batch = job.share(job.samples)

    def gradients(self, pool) -> dict[str, torch.Tensor]:
        self.actor.accumulate(self.batch, self.actor.score_rollouts(self.batch, pool))
        return models.gradients(self.actor.walk.model)

    def student_weights_untouched(self) -> bool:
        fresh = self.job.build(self.job.shape, dense.make_weights(self.job.shape, 7))
        return all(torch.equal(a, b) for a, b in zip(self.module.parameters(), fresh.parameters(), strict=True))


def everything(layout: str, folder: str) -> dict[str, object]:
    job = start(LAYOUTS[layout])
    return {
        check.__name__: check(job, Path(folder))
        for check in (step_zero, self_distillation, guards, checkpoints, qwen3_folder, metrics_of_any_split)
    }


def step_zero(job: Job, folder: Path) -> dict[str, object]:
    """After teachers in any order, an evaluation and a failed pass: the student's weights and its first gradient."""
    found = {}
    for order in itertools.permutations(TEACHERS):
        home = Home(job, order)
        job_teachers = dense.make_weights(job.shape, 7)
        truth = dense.Reference(
            job.shape, job_teachers, job.shape, home.teacher_weights, job.samples, ROUTED
        ).gradients()
        home.actor.student.next_token_logits(home.batch)
        for name in order:
            home.switched[name].next_token_logits(home.batch)
        with home.weights.publishing() as sent:
            published = all(torch.equal(sent[n], p) for n, p in home.module.named_parameters())
        gradients = home.gradients(home.switched)
        found[" ".join(order)] = {
            "published": published and home.student_weights_untouched(),
            "gradient": job.distance(gradients, truth[1]),
            "as separate modules": job.distance(home.gradients(home.separate), truth[1]),
        }
        home.actor.config = dataclasses.replace(home.actor.config, keep_teacher_hidden=True)
        found[" ".join(order)]["kept as hidden states"] = max(
            job.distance(home.gradients(pool), truth[1]) for pool in (home.switched, home.separate)
        )
    for name in TEACHERS:
        home = Home(job)

        def failing(forward, *args, home=home, name=name, **options):
            forward(*args, **options)  # on every stage of a pipeline: a stage that fails alone ends the job
            if home.weights.active_tag == f"teacher:{name}":
                raise RuntimeError("planted")

        walk = home.switched[name].walk
        walk.forward = functools.partial(failing, walk.forward)
        text = refusal(lambda home=home: home.actor.score_rollouts(home.batch, home.switched))
        del walk.forward
        found[f"exception in {name}"] = {
            "raised": text,
            "asked": (name,) in home.batch.teacher_names,  # a data-parallel rank may hold none of its samples
            "tag": home.weights.active_tag,
            "untouched": home.student_weights_untouched(),
            "gradient": job.distance(home.gradients(home.switched), truth[1]),
        }
    teachers = [scorer.module for scorer in (home.separate[name] for name in TEACHERS)]
    found["inference only"] = all(
        not module.training and not p.requires_grad and p.grad is None and getattr(p, "main_grad", None) is None
        for module in teachers
        for p in module.parameters()
    )
    return found


def self_distillation(job: Job, folder: Path) -> dict[str, float]:
    """An earlier student and a running mean of it teach the student as it is after a step, in its own module."""
    from opd_engine.integrations.megatron.teachers import switched_teacher

    home = Home(job)
    home.weights.back_up("student:old")
    home.weights.blend("student:mean", decay=0.25)
    scored = home.actor.score_rollouts(home.batch, home.switched)
    with home.weights.training():
        home.actor.train_step(home.batch, scored)
    home.weights.blend("student:mean", decay=0.25)
    old = {name: weight.double() for name, weight in dense.make_weights(job.shape, 7).items()}
    new = {n: w.double() for n, w in models.assemble(models.parameters(home.actor.walk.model), job.groups)[0].items()}
    mean = {name: 0.25 * old[name] + 0.75 * new[name] for name in old}
    assert max(float((new[name] - old[name]).abs().max()) for name in old) > 1e-3
    found = {}
    common = {"vocab_size": 61, "layout": job.batch_layout}
    pool = TeacherPool(
        {n: switched_teacher(home.actor.walk.model, home.weights, f"student:{n}", **common) for n in ("old", "mean")}
    )
    samples = [dataclasses.replace(s, teachers=("old" if s.number % 2 else "mean",)) for s in job.samples]
    teachers = {"old": old, "mean": mean}
    truth = dense.Reference(job.shape, new, job.shape, teachers, samples, ROUTED).gradients()
    home.batch = job.share(samples)
    found["gradient"] = job.distance(home.gradients(pool), truth[1])
    same = TeacherPool({"old": home.actor.student, "mean": home.actor.student})
    found["of itself"] = max(float(g.abs().max()) for g in home.gradients(same).values())
    return found


def guards(job: Job, folder: Path) -> dict[str, str]:
    """Each fires while a teacher is live, and where weights were written behind the store's back."""
    home = Home(job)
    scored = home.actor.score_rollouts(home.batch, home.switched)
    found = {}
    with home.weights.active("teacher:code"):
        for what, attempt in {
            "score": lambda: home.actor.score_rollouts(home.batch, home.switched),
            "train": lambda: home.actor.train_step(home.batch, scored),
            "apply": home.actor.apply,
            "publish": lambda: home.weights.publishing().__enter__(),
            "save": lambda: home.weights.saving().__enter__(),
            "back up": lambda: home.weights.back_up("student:old"),
        }.items():
            found[what] = refusal(attempt)
    with home.weights.training():
        home.actor.train_step(home.batch, scored)
    with home.weights.publishing():
        pass
    home.module.load_state_dict(home.others["math"].state_dict())  # as checkpoint code does that knows one model only
    for what in ("training", "publishing", "saving"):
        found[f"{what} after a load through the live model"] = refusal(
            lambda what=what: getattr(home.weights, what)().__enter__()
        )
    return found


def checkpoints(job: Job, folder: Path) -> dict[str, object]:
    """Weights only, into host buffers, not through the live model; what is not whole or speaks other tokens refused."""
    from megatron.core import dist_checkpointing

    from opd_engine.integrations.megatron.loading import check_checkpoint, load_module, load_set, save_weights

    home, groups = Home(job), job.groups
    main, other = torch.distributed.get_rank() == 0, home.others["code"]
    tokens = {f"t{i}": i for i in range(61)}
    whole, mixed = folder / "whole", folder / "with optimizer"
    save_weights(other, whole, token_map=tokens if main else None)
    barrier(torch.distributed.group.WORLD)
    options = {"argument": "teacher 'code'"}
    check_checkpoint(whole, token_map=tokens, **options)
    home.weights.drop("teacher:code")
    versions = [p._version for p in home.module.parameters()]
    load_set(home.weights, "teacher:code", home.module, whole, groups, **options)
    found: dict[str, object] = {"live model not written": versions == [p._version for p in home.module.parameters()]}
    with home.weights.active("teacher:code"):
        pairs = zip(home.module.parameters(), other.parameters(), strict=True)
        found["loaded"] = all(torch.equal(a, b) for a, b in pairs)
    module = job.build(job.shape, dense.make_weights(job.shape, 3))
    load_module(module, whole, groups, **options)
    found["own module"] = all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))

    # A trainer's own checkpoint: of its optimizer, scheduler and generator nothing is read.
    if main:
        mixed.mkdir()
    barrier(torch.distributed.group.WORLD)
    with home.weights.training():  # Adam has no state before its first step
        home.actor.train_step(home.batch, home.actor.score_rollouts(home.batch, home.separate))
    state = home.module.sharded_state_dict()
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    optimizer = home.actor.optimizer.sharded_state_dict(dict(state), metadata=metadata)
    dist_checkpointing.save({**state, "optimizer": optimizer, "rng": [1, 2]}, str(mixed))
    read = []
    original = dist_checkpointing.load
    dist_checkpointing.load = lambda wanted, *args: read.append(list(wanted)) or original(wanted, *args)
    try:
        load_set(home.weights, "student:saved", home.module, mixed, groups, **options)
    finally:
        dist_checkpointing.load = original
    found["read of a trainer's checkpoint"] = sorted(
        set(read[0]) - {name for name, _ in home.module.named_parameters()}
    )

    broken = folder / "broken"
    shard = sorted(path.name for path in whole.glob("*.distcp") if path.stat().st_size)[0]
    plant = {
        "missing shard": lambda: (broken / shard).unlink(),
        "truncated": lambda: os.truncate(broken / shard, (broken / shard).stat().st_size - 1),
        "no metadata": lambda: (broken / ".metadata").unlink(),
        "metadata cut": lambda: os.truncate(broken / ".metadata", 40),
        "foreign code": lambda: (broken / ".metadata").write_bytes(pickle.dumps(Planted())),
        "other tokens": lambda: (broken / "token_to_id.json").write_text('{"t0": 1, "t1": 0}'),
    }
    for what, mistake in plant.items():
        if main:
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(whole, broken)
            mistake()
        barrier(torch.distributed.group.WORLD)
        found[what] = refusal(lambda: check_checkpoint(broken, token_map=tokens, **options))
        barrier(torch.distributed.group.WORLD)
    found["shard"] = shard
    found["ran foreign code"] = (folder / "ran").exists()
    return found


class Planted:
    """A pickle that would run a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def qwen3_folder(job: Job, folder: Path) -> dict[str, float]:
    """A transformers model's logits after each sample, from its folder, read part by part by every rank."""
    from opd_engine.integrations.megatron import BatchLayout, MegatronScorer
    from opd_engine.integrations.megatron.gpt import build_gpt
    from opd_engine.integrations.megatron.gpt_shape import GPTShape
    from opd_engine.integrations.megatron.loading import load_module

    if job.layout.cp > 1:
        return {}  # its attention needs TransformerEngine there
    found = {}
    batch = job.share(job.samples)
    for kind in ("tied", "untied"):
        path = folder.parent / kind
        shape = GPTShape.read(path, argument="teacher")
        module = build_gpt(shape, job.groups)
        for parameter in module.parameters():
            nn.init.constant_(parameter, float("nan"))
        load_module(module, path, job.groups, argument="teacher")
        scorer = MegatronScorer(module, vocab_size=shape.vocab_size, layout=BatchLayout(packed=False))
        got = scorer.next_token_logits(batch)
        wanted = torch.load(path / "logits.pt", weights_only=True)[batch.sample_ids]
        found[kind] = float((got.double() - wanted).abs().max() / wanted.abs().max())
    return found


class DenseBackend:
    """The float64 reference model as a ModelBackend of one process."""

    shard = None
    vocab_size = 61

    def __init__(self, shape, weights):
        self.shape, self.weights = shape, dense.double_leaves(weights)

    def token_to_id(self):
        return None

    def logits(self, batch):
        bounds = batch.cu_seqlens.tolist()
        return torch.cat(
            [dense.forward(self.weights, self.shape, batch.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        )


def metrics_of_any_split(job: Job, folder: Path) -> dict[str, float]:
    """The actor's sums over micro-batches, data-, context- and pipeline-parallel ranks against one process."""
    from megatron_actor.samples import as_batch

    samples = job.samples
    config = OPDConfig(k=8, measure_overlap=True, tasks=("x", "y"))
    whole = as_batch(samples)
    whole.task_names = ["x" if sample.number % 3 else "y" for sample in samples]
    student = DenseBackend(job.shape, dense.make_weights(job.shape, 7))
    pool = TeacherPool({n: LocalTeacher(DenseBackend(job.teacher_shape, w)) for n, w in job.teacher_weights.items()})
    scored = score_rollouts(whole, student, pool, config)
    with torch.no_grad():
        _, truth = distillation_loss(student.logits(whole), whole, scored, config, None, Denominators.of(whole, config))
    actor = job.actor(ROUTED, options={"measure_overlap": True})
    actor.config.tasks = config.tasks
    own = job.share(samples)
    own.task_names = [whole.task_names[number] for number in own.sample_ids.tolist()]
    metrics = actor.accumulate(own, actor.score_rollouts(own, job.teachers))
    assert metrics.names == truth.names
    error = (metrics.values - truth.values).abs() / truth.values.abs().clamp(min=1.0)
    spread = all_reduce_max_(metrics.values.clone(), torch.distributed.group.WORLD) - metrics.values
    worst = int(error.argmax())
    return {"error": float(error[worst]), "of": metrics.names[worst], "between ranks": float(spread.abs().max())}
