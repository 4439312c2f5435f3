"""What ranks of a sharded student find, against dense float64: everything of one launch."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch

from fsdp.dense import distance, make_model, reference
from fsdp.steps import CONFIG, TEACHERS, batch_of_step, local_pool, make_actor, teacher_models, train
from opd_engine.distillation import OPDConfig
from opd_engine.integrations.fsdp import ModelScorer, shard_model
from opd_engine.integrations.fsdp.forward import CausalForward
from opd_engine.parallel.launch import World
from opd_engine.parallel.meshes import mesh_group, split_world
from opd_engine.parallel.tensors import local_tensor, whole_tensor
from opd_engine.teachers import TeacherPool, WeightStore

FEW_ROWS = 4 * 61 * 3
WAYS = {
    "sharded": {},
    "offloaded": {"offload": True},
    "recomputed": {"recompute": "full"},
    "packed": {"packed": True},
    "hidden states": {"workspace_bytes": FEW_ROWS},
    "a sequence at a time": {"max_seqs": 1},
    "few tokens": {"max_tokens": 12, "workspace_bytes": FEW_ROWS},
}


def meshes(tp: int = 1):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return split_world(World(rank, world, rank, torch.device("cpu"), torch.distributed.group.WORLD), tp)


def share(batch, mesh):
    """Unequal shares: the first rank has most, the last next to nothing."""
    rank, size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    order = [sequence for sequence in range(batch.num_seqs) if min(sequence // 2, size - 1) == size - 1 - rank]
    return batch.select(order)


def gradients(folder: str) -> dict:
    """way -> (loss, distance) against the reference; and planted errors."""
    mesh, _ = meshes()
    teachers = teacher_models()
    pool, batch, found = local_pool(teachers), batch_of_step(3), {}
    for tied in (False, True):
        name = "tied" if tied else "untied"
        loss, truth = reference(make_model(tied=tied), teachers, batch, OPDConfig(**CONFIG))
        for way, options in WAYS.items():
            actor = make_actor(make_model(tied=tied), mesh=mesh, **options)
            for again in ("", ", again"):
                scored = actor.score_rollouts(share(batch, mesh), pool)
                metrics = actor.accumulate(share(batch, mesh), scored).means()
                got = actor.gradients()
                found[f"{name}, {way}{again}"] = [abs(metrics["loss"] / loss - 1), distance(got, truth)]
            if (way, tied) == ("sharded", False):
                found |= planted(actor, got, truth, pool, batch, mesh)
    found["LoRA"] = lora(mesh, teachers, pool, batch)
    found["tensor-parallel head"] = tensor_parallel(teachers, pool, batch)
    found["reduced early"] = reduced_early(mesh, pool, batch)
    found["staged bytes"] = staged_bytes(mesh)
    found["two phases"] = two_phases(mesh, teachers, batch)
    found["general head"] = general_head(mesh, teachers, pool, batch)
    found["sharded teachers"] = sharded_teachers(mesh, teachers, batch)
    return found


def planted(actor, right, truth, pool, batch, mesh) -> dict:
    world = mesh.size()
    found = {"planted: averaged": distance({n: g / world for n, g in right.items()}, truth)}
    own = copy.deepcopy(actor.config)
    alone = make_actor(make_model(), config={"reduction": own.reduction})
    part = share(batch, mesh)
    if part.num_seqs:
        from opd_engine.distillation import Denominators

        whole = Denominators.of(batch, own)
        with torch.enable_grad():
            scored = alone.score_rollouts(part, pool)
            alone.optimizer.zero_grad()
            value, _ = alone._loss(part, scored, whole)
            value.backward()
        found["planted: not reduced"] = distance(alone.gradients(), truth)
    shifted = copy.copy(batch)
    shifted.loss_mask = batch.loss_mask.roll(1) & (batch.next_tokens() >= 0)
    scored = actor.score_rollouts(share(shifted, mesh), pool)
    actor.accumulate(share(shifted, mesh), scored)
    found["planted: row off by one"] = distance(actor.gradients(), truth)
    return found


def reduced_early(mesh, pool, batch) -> list:
    """Parameters whose shard has a gradient before the last micro-batch: none, where it is reduced once a step."""
    actor = make_actor(make_model(), mesh=mesh, max_seqs=1)
    scored, plain, counts = actor.score_rollouts(share(batch, mesh), pool), actor.forward.at_head, []

    def watched(*arguments):
        counts.append(sum(p.grad is not None for p in actor.model.parameters()))
        return plain(*arguments)

    actor.forward.at_head = watched
    actor.accumulate(share(batch, mesh), scored)
    assert len(counts) > 1, counts
    return [float(sum(counts)), 0.0]


def staged_bytes(mesh) -> list:
    """What a rank counts as held of a sharded teacher: its part; and what moves is refused by name."""
    from opd_engine.teachers import StagedWeights

    model = shard_model(make_model(), mesh)
    held = StagedWeights(model, "cpu").nbytes
    parts = (*model.parameters(), *model.buffers())
    own = sum(local_tensor(t.detach()).numel() * t.element_size() for t in parts)
    try:
        StagedWeights(shard_model(make_model(), mesh), "meta")
        return [1.0, 1.0]
    except ValueError as refused:
        return [float(held != own), float("ones that ranks share" not in str(refused))]


def two_phases(mesh, teachers, batch) -> list:
    """Student and teachers sharded, never two of them here."""
    loss, truth = reference(make_model(), teachers, batch, OPDConfig(**CONFIG))
    actor = make_actor(make_model(), mesh=mesh, two_phase=True)
    pool = TeacherPool({name: actor.teacher(make_model(seed=seed)) for name, seed in TEACHERS.items()})
    models, alone = [actor.model, *(pool[name].module for name in pool)], []

    def look(*_):
        held = [sum(local_tensor(p.detach()).untyped_storage().nbytes() for p in shards[id(m)]) for m in models]
        alone.append(sum(size > 0 for size in held) == 1)

    # While a model runs its names lead to whole weights: what it holds between is what it was sharded into.
    shards = {id(model): list(model.parameters()) for model in models}
    for model in models:
        model.model.register_forward_hook(look)
    for _ in range(2):
        scored = actor.score_rollouts(share(batch, mesh), pool)
        metrics = actor.accumulate(share(batch, mesh), scored).means()
    return [abs(metrics["loss"] / loss - 1), distance(actor.gradients(), truth), 0.0 if alone and all(alone) else 1.0]


def lora(mesh, teachers, pool, batch) -> list:
    """Frozen base and adapters in one group; the base alone as a teacher beside."""
    from fsdp.test_lora import student

    loss, truth = reference(student().get_base_model(), teachers, batch, OPDConfig(**CONFIG))
    worst = []
    for dtype in (None, torch.bfloat16):
        actor = make_actor(student(), mesh=mesh, dtype=dtype)
        scored = actor.score_rollouts(share(batch, mesh), pool)
        metrics = actor.accumulate(share(batch, mesh), scored).means()
        worst += [abs(metrics["loss"] / loss - 1), distance(actor.gradients(), truth)] if dtype is None else []
        actor.base_teacher().score(share(batch, mesh), scored.support(share(batch, mesh)))
    return worst


def tensor_parallel(teachers, pool, batch) -> list:
    """All ranks split the head, or two of four with the others sharded over."""
    world, worst = torch.distributed.get_world_size(), []
    dp_mesh, tp_mesh = meshes(2)
    for tied in (False, True):
        loss, truth = reference(make_model(tied=tied), teachers, batch, OPDConfig(**CONFIG))
        for options in ({}, {"workspace_bytes": FEW_ROWS}):
            for mesh in (None, dp_mesh) if world == 2 else (dp_mesh,):
                actor = make_actor(make_model(tied=tied), mesh=mesh, tp_mesh=tp_mesh, **options)
                part = batch if mesh is None else share(batch, mesh)
                scored = actor.score_rollouts(part, pool)
                metrics = actor.accumulate(part, scored).means()
                worst += [abs(metrics["loss"] / loss - 1), distance(actor.gradients(), truth)]
    return worst


def general_head(mesh, teachers, pool, batch) -> list:
    loss, truth = reference(make_model("gemma2"), teachers, batch, OPDConfig(**CONFIG))
    actor = make_actor(make_model("gemma2"), mesh=mesh)
    scored = actor.score_rollouts(share(batch, mesh), pool)
    metrics = actor.accumulate(share(batch, mesh), scored).means()
    return [abs(metrics["loss"] / loss - 1), distance(actor.gradients(), truth)]


def sharded_teachers(mesh, teachers, batch) -> list:
    """Teachers that are sharded too, one of which has nothing to score on some rank."""
    loss, truth = reference(make_model(), teachers, batch, OPDConfig(**CONFIG))
    scorers = {}
    for name, seed in TEACHERS.items():
        model = shard_model(make_model(seed=seed).requires_grad_(False), mesh)
        scorers[name] = ModelScorer(CausalForward(model, torch.device("cpu")), group=mesh_group(mesh))
    actor = make_actor(make_model(), mesh=mesh)
    part = share(batch, mesh)
    rank = mesh.get_local_rank()
    scored = actor.score_rollouts(part, TeacherPool(scorers))
    metrics = actor.accumulate(part, scored).means()
    # Only the first rank has samples of this teacher: the others go along.
    alone = [s for s, name in enumerate(part.teacher_names) if name == "b"] if rank == 0 else []
    actor.score_rollouts(part.select(alone), TeacherPool(scorers))
    return [abs(metrics["loss"] / loss - 1), distance(actor.gradients(), truth)]


# ---- precision, weights, checkpoints ---------------------------------------------------------------------------------
def steps_taken(folder: str) -> dict:
    """Two steps, a checkpoint, two more; resumed from the checkpoint: the same bits."""
    mesh, _ = meshes()
    world, pool, found = mesh.size(), local_pool(teacher_models()), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(dtype).split(".")[1]
        actor = make_actor(make_model(), dtype=dtype, mesh=mesh)
        found[f"{kind}: stored"] = sorted({str(p.dtype) for p in actor.trained.values()})
        walk(actor, pool, range(2), mesh)
        place = Path(folder) / f"{kind}-{world}"
        place.mkdir(exist_ok=True)
        pending = actor.save(place)
        walk(actor, pool, range(2, 4), mesh)
        pending.wait()
        resumed = make_actor(make_model(seed=9), dtype=dtype, mesh=mesh)
        resumed.load(place)
        walk(resumed, pool, range(2, 4), mesh)
        whole = {name: whole_tensor(p.detach()) for name, p in actor.trained.items()}
        other = {name: whole_tensor(p.detach()) for name, p in resumed.trained.items()}
        found[f"{kind}: resumed"] = all(torch.equal(value, other[name]) for name, value in whole.items())
        if mesh.get_local_rank() == 0:
            torch.save(whole, Path(folder) / f"{kind}-{world}-end.pt")
    found |= weight_store(mesh, pool)
    found["not finite"] = broken_weights(mesh, folder)
    return found


def walk(actor, pool, steps, mesh) -> None:
    for step in steps:
        part = share(batch_of_step(step), mesh)
        actor.train_step(part, actor.score_rollouts(part, pool))


def weight_store(mesh, pool) -> dict:
    """A teacher in the sharded student's place: scores as that model's own, and nothing is left of it."""
    actor, other = make_actor(make_model(), mesh=mesh), make_model(seed=5)
    before = [local_tensor(p.detach()).clone() for p in actor.model.parameters()]
    actor.weights.load("teacher", other.state_dict())
    part = share(batch_of_step(3), mesh)
    with actor.weights.active("teacher"):
        worn = actor.student.topk(part, 5)
    plain = ModelScorer(CausalForward(other, torch.device("cpu"))).topk(part, 5)
    close = torch.allclose(worn.log_probs[part.loss_mask], plain.log_probs[part.loss_mask], atol=1e-5)
    same = all(torch.equal(a, local_tensor(p)) for a, p in zip(before, actor.model.parameters(), strict=True))
    walk(actor, pool, range(1), mesh)
    actor.weights.back_up("first")
    copies = actor.weights.copies()["first"]
    again = WeightStore(actor.model)
    again.restore_copy("first", copies)
    with torch.no_grad():
        local_tensor(next(actor.model.parameters())).add_(1)
    try:
        actor.weights.check_content("a publish")
        seen = False
    except RuntimeError as problem:
        seen = "written outside a train step" in str(problem)
    return {"worn": close, "restored": same, "a foreign write is seen": seen}


def broken_weights(mesh, folder: str) -> str:
    actor = make_actor(make_model(), mesh=mesh)
    place = Path(folder) / "broken"
    place.mkdir(exist_ok=True)
    with torch.no_grad():  # on one rank only: all must refuse
        if mesh.get_local_rank() == mesh.size() - 1:
            local_tensor(actor.trained["model.norm.weight"])[0] = float("nan")
    try:
        actor.save(place)
    except ValueError as refused:
        return str(refused)
    return "written"


def continued(folder: str, start: int) -> dict:
    """From a checkpoint of `start` ranks on these: how far two more steps lead from theirs, of their length."""
    mesh = meshes()[0]
    pool, found = local_pool(teacher_models()), {}
    for kind in ("float32", "bfloat16"):
        actor = make_actor(make_model(seed=9), dtype=getattr(torch, kind), mesh=mesh)
        actor.load(Path(folder) / f"{kind}-{start}")
        begun = {name: whole_tensor(p.detach()).clone() for name, p in actor.trained.items()}
        if mesh is None:
            train(actor, pool, range(2, 4))
        else:
            walk(actor, pool, range(2, 4), mesh)
        end = torch.load(Path(folder) / f"{kind}-{start}-end.pt", weights_only=True)
        moved = {name: (whole_tensor(p.detach()) - end[name]).norm() for name, p in actor.trained.items()}
        found[kind] = max(float(moved[name] / (end[name] - begun[name]).norm()) for name in end)
    return found
