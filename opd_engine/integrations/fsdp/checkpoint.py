"""Checkpoints of an FSDPActor: a folder that transformers loads, and beside it the state that training continues from.

What trains is written as it is trained, float32 for a half model, each rank its part, and read on any number of ranks.
Bound: the disk, behind training; the state is on the host, and the whole weights on the first rank's, until written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.integrations.fsdp.adapters import BASE
from opd_engine.parallel.collectives import all_gather_json, group_rank, group_size
from opd_engine.parallel.sharded_files import PendingFiles, read_files, shapes_in
from opd_engine.parallel.tensors import local_tensor, whole_tensor
from opd_engine.teachers.fingerprint import fingerprint

if TYPE_CHECKING:
    from opd_engine.integrations.fsdp.actor import FSDPActor

STATE = "training_state"
VALUES = "actor.json"
_CPU = torch.device("cpu")
_SHOWN = 4


def save_checkpoint(actor: FSDPActor, folder: Path) -> PendingFiles:
    """See FSDPActor.save."""
    first = group_rank(actor.group) == 0 and group_rank(actor.tp_group) == 0
    _check_finite(actor)
    _check_replicas(actor)
    with actor.weights.saving():
        whole = _whole_weights(actor, keep=first)
        tensors = _trained_state(actor) | _random_state(actor)
        values = {
            "steps": actor.steps,
            "skipped_steps": actor.skipped_steps,
            "loss_scale": [actor.scale.value, actor.scale.good_steps],
            "publications": actor.weights.publications,
            "base": actor.base,
            "ranks": [group_size(actor.group), group_size(actor.tp_group)],
        }

    def product() -> None:
        if first:
            if actor.adapted is None:
                actor.model.save_pretrained(folder, state_dict=whole)
            else:
                actor.adapted.save_pretrained(str(folder), state_dict=whole)
                (folder / BASE).write_text(json.dumps({"content": actor.base}), encoding="utf-8")
            if actor.tokenizer is not None:
                actor.tokenizer.save_pretrained(folder)
            (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")

    # Replicas of one shard hold the same; the first of them writes.
    writes = group_rank(actor.tp_group) == 0
    return actor.writer.start(folder / STATE if writes else None, tensors, product)


def load_checkpoint(actor: FSDPActor, folder: Path) -> None:
    """See FSDPActor.load."""
    if not (folder / VALUES).is_file() or not (folder / STATE / ".metadata").is_file():
        raise ValueError(f"folder: wanted a checkpoint with {VALUES} and {STATE}, got {str(folder)!r} without one")
    values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    if values["base"] != actor.base:
        raise ValueError(
            f"folder: {str(folder)!r} is of an adapter on another base: wanted content {actor.base}, "
            f"got {values['base']}"
        )
    held = shapes_in(folder / STATE)
    _check_same_model(actor, held, folder)
    _prepare_moments(actor, held)
    tensors = _trained_state(actor)
    same_ranks = values["ranks"] == [group_size(actor.group), group_size(actor.tp_group)]
    random = {name: state for name, state in _random_state(actor).items() if same_ranks and name in held}
    actor.weights.check_trainable("load")
    with torch.no_grad():
        read_files(folder / STATE, tensors | random, actor.group)
    if actor.masters is not None:
        actor.masters.write()
    for name, state in random.items():
        _set_random(name, state)
    actor.steps, actor.skipped_steps = values["steps"], values["skipped_steps"]
    actor.scale.value, actor.scale.good_steps = values["loss_scale"]
    actor.weights.accept_live()
    actor.weights.publications = values["publications"]


def _trained_state(actor: FSDPActor) -> dict[str, Tensor]:
    """What a step changes: trained weights, the optimizer's states, and buffers that belong into a checkpoint."""
    found = {f"weights/{name}": parameter.detach() for name, parameter in actor.trained.items()}
    for name, parameter in actor.trained.items():
        for key, value in actor.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer/{name}/{key}"] = value
    parameters = dict(actor.model.named_parameters(remove_duplicate=False))
    for name, tensor in actor.model.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(tensor, Tensor):
            found[f"buffers/{name}"] = tensor
    return found


def _random_state(actor: FSDPActor) -> dict[str, Tensor]:
    rank = f"{group_rank(actor.group)}.{group_rank(actor.tp_group)}"
    found = {f"random/{rank}/host": torch.get_rng_state()}
    if actor.device.type == "cuda":
        found[f"random/{rank}/device"] = torch.cuda.get_rng_state(actor.device)
    return found


def _set_random(name: str, state: Tensor) -> None:
    if name.endswith("/device"):
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _prepare_moments(actor: FSDPActor, held: dict) -> None:
    """Places for the optimizer's states of the folder: an optimizer makes them at its first step only."""
    for name, parameter in actor.trained.items():
        prefix = f"optimizer/{name}/"
        own = actor.optimizer.state[parameter]
        for full, (size, dtype) in held.items():
            if full.startswith(prefix) and full.removeprefix(prefix) not in own:
                like = (
                    torch.zeros_like(parameter, dtype=dtype)
                    if size == parameter.shape
                    else torch.zeros(size, dtype=dtype)
                )
                own[full.removeprefix(prefix)] = like.detach()


def _check_same_model(actor: FSDPActor, held: dict, folder: Path) -> None:
    own = {f"weights/{name}": parameter.shape for name, parameter in actor.trained.items()}
    theirs = {name: size for name, (size, _) in held.items() if name.startswith("weights/")}
    for what, names in (("lacks", sorted(set(own) - set(theirs))), ("also has", sorted(set(theirs) - set(own)))):
        if names:
            shown = ", ".join(name.removeprefix("weights/") for name in names[:_SHOWN])
            raise ValueError(f"folder: {str(folder)!r} is of another model: it {what} {shown}, {len(names)} in all")
    for name, shape in own.items():
        if tuple(theirs[name]) != tuple(shape):
            raise ValueError(
                f"folder: {str(folder)!r} is of another model: {name.removeprefix('weights/')}: wanted shape "
                f"{list(shape)}, got {list(theirs[name])}"
            )


def _check_finite(actor: FSDPActor) -> None:
    """Raises: ValueError on every rank where a weight of any is not finite."""
    broken = [name for name, value in actor.trained.items() if not bool(local_tensor(value).isfinite().all())]
    for group in (actor.group, actor.tp_group):
        broken = [name for part in all_gather_json(broken[:_SHOWN], group, _CPU) for name in part]
    if broken:
        raise ValueError(
            f"the weights {broken[0]} are not finite (NaN or infinite) after {actor.steps} steps; nothing is written "
            "of them, the checkpoint before stays as it is"
        )


def _check_replicas(actor: FSDPActor) -> None:
    """What the ranks of a tensor-parallel group hold is the same, bit for bit."""
    if group_size(actor.tp_group) > 1:
        numbers = fingerprint(local_tensor(value) for value in actor.trained.values()).tolist()
        found = all_gather_json(numbers, actor.tp_group, _CPU)
        assert all(other == found[0] for other in found), (
            f"after step {actor.steps} the ranks' replicated weights differ"
        )


def _whole_weights(actor: FSDPActor, *, keep: bool) -> dict[str, Tensor]:
    """The model's state, or its adapter's, on the host of the rank that keeps it. Communicates: gathers, if sharded."""
    trained, seen, found = actor.trained, {}, {}
    if actor.adapted is not None:
        ours = {id(parameter): name for name, parameter in actor.model.named_parameters()}
        for name, tensor in actor.adapted.named_parameters():
            if ours[id(tensor)] in trained:
                whole = whole_tensor(trained[ours[id(tensor)]].detach())
                found[name] = whole.to("cpu", copy=True) if keep else None
        return found
    names = {id(parameter): name for name, parameter in actor.model.named_parameters()}
    for name, tensor in actor.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            first = names.get(id(tensor))
            whole = whole_tensor(trained.get(first, tensor).detach())
            seen[id(tensor)] = whole.to("cpu", copy=True) if keep else None
        found[name] = seen[id(tensor)]
    return found
