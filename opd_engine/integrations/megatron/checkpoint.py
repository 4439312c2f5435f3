"""A Megatron run's state in megatron.core.dist_checkpointing: written while training goes on, read at any layout.

Bound by storage; training waits for one copy to host memory. Student, optimizer, scheduler, running means of the
student and torch's generators are here; what the loop above counts (steps, data, teachers) it keeps beside. The folder
is not whole before the write is done: who owns it gives it its name then.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_engine.integrations.megatron.actor import MegatronActor
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.loading import TOKEN_MAP, check_distributed_checkpoint
from opd_engine.parallel.collectives import group_rank, group_size

# Optimizer states lie under the names and shapes of the weights they belong to, so that any layout finds its part.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_AXES = ("tp", "pp", "cp", "dp")


class CheckpointWriter:
    """Writes checkpoints in processes of their own, one at a time. Every rank makes the same calls.

    The entry script must hold its work behind `if __name__ == "__main__"`: Megatron's writers start it once more.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("psutil") is None:
            raise ValueError(
                "checkpoint: Megatron's checkpoint writers need the package psutil, which is not installed"
            )
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._queue = AsyncCallsQueue()

    def save(self, actor: MegatronActor, directory: Path) -> PendingWrite:
        """Copy the state to host memory and have it written; a checkpoint still being written is waited for.

        directory: empty, there on every rank; the token map is kept beside, so that it can be a teacher's too

        Raises: WrongWeightsError where the live weights are not the student's; what writing raises.
        Communicates: the plan of who writes what, and the optimizer's states over the data-parallel ranks.
        """
        from megatron.core import dist_checkpointing

        self._queue.maybe_finalize_async_calls(blocking=True)
        weights, pending = actor.weights, PendingWrite(self._queue)
        copies = weights.copies()
        with weights.saving():
            state = _state(actor, is_loading=False) | {
                "copies": {tag: _copy_entries(actor, tag, held) for tag, held in copies.items()},
                "copy_dtypes": {tag: _float_dtype(held) for tag, held in copies.items()},
                "scheduler": None if actor.scheduler is None else actor.scheduler.state_dict(),
                "publications": weights.publications,
                "layout": _layout(actor.groups),
            }
            request = dist_checkpointing.save(state, str(directory), async_sharded_save=True, content_metadata=_FORMAT)
            request.add_finalize_fn(pending.done)
            self._queue.schedule_async_request(request)
        is_first = all(group_rank(getattr(actor.groups, name)) == 0 for name in _AXES)
        if is_first and (token_map := actor.token_to_id()) is not None:
            (directory / TOKEN_MAP).write_text(json.dumps(dict(token_map)), encoding="utf-8")
        return pending


class PendingWrite:
    """Implements PendingSave. Communicates: one integer a question, while something is being written."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._done = queue, False

    def done(self) -> None:
        """Called where all ranks' parts are on disk."""
        self._done = True

    def is_done(self) -> bool:
        if not self._done:
            self._queue.maybe_finalize_async_calls(blocking=False)
        return self._done

    def wait(self) -> None:
        if not self._done:
            self._queue.maybe_finalize_async_calls(blocking=True)


def read_checkpoint(actor: MegatronActor, directory: Path) -> None:
    """The run's state out of a checkpoint, whatever the layout it was written at.

    Where the layout is another one, torch's generators begin anew from this process's seed and the number of
    publications: theirs are not to be had.

    Raises: ValueError where the folder is not whole, by the file's name, or holds another model.
    Communicates: the reader's own.
    Mutates: the student, its optimizer and scheduler, the store's running means, torch's generators.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    check_distributed_checkpoint(directory, argument="checkpoint")
    common = dist_checkpointing.load_common_state_dict(str(directory))
    same_layout = common["layout"] == _layout(actor.groups)
    wanted = _state(actor, is_loading=True)
    wanted["copies"] = {
        tag: _copy_entries(actor, tag, _host_places(actor, dtype)) for tag, dtype in common["copy_dtypes"].items()
    }
    if not same_layout:
        del wanted["random"]
    found = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False)
    actor.walk.language_model.load_state_dict(found["model"])
    _load_optimizer(actor.optimizer, found["optimizer"])
    if actor.scheduler is not None:
        if hasattr(actor.scheduler, "num_steps"):
            actor.scheduler.num_steps = 0  # Megatron's adds what it loads to what it has
        actor.scheduler.load_state_dict(common["scheduler"])
    weights = actor.weights
    weights.accept_live()
    for tag, tensors in found.get("copies", {}).items():
        weights.restore_copy(tag, tensors)
    weights.publications = common["publications"]
    if same_layout:
        _set_random_state(found["random"])
    else:
        seed = (torch.initial_seed() + weights.publications) % 2**31
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)


def _layout(groups: MegatronGroups) -> dict[str, int]:
    return {name: group_size(getattr(groups, name)) for name in _AXES}


def _float_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())


def _state(actor: MegatronActor, *, is_loading: bool) -> dict[str, Any]:
    """Megatron's description of what every run has: tensors and where each part of them lies."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    model = actor.walk.language_model.sharded_state_dict(metadata=_FORMAT)
    for part in _parts(actor.optimizer):
        _make_moments(part)
    groups = [getattr(actor.groups, name) for name in _AXES]
    sizes, ranks = tuple(map(group_size, groups)), tuple(map(group_rank, groups))
    return {
        "model": model,
        "optimizer": actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_FORMAT),
        "random": ShardedObject("opd_engine.random", _random_state(), sizes, ranks),
    }


def _host_places(actor: MegatronActor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Host tensors of the parameters' shapes, to be read into."""
    parameters = actor.walk.language_model.named_parameters()
    return {name: torch.empty_like(parameter, dtype=dtype, device="cpu").detach() for name, parameter in parameters}


def _copy_entries(actor: MegatronActor, tag: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The student's places with other tensors in them, under keys of the tag's own."""
    entries = {}
    for name, entry in actor.walk.language_model.sharded_state_dict(metadata=_FORMAT).items():
        if isinstance(getattr(entry, "data", None), torch.nn.Parameter):
            data = tensors[name]
            changed = {"data": data, "key": f"opd_engine.copies.{tag}.{entry.key}"}
            if hasattr(entry, "dtype"):
                changed["dtype"] = data.dtype
            entries[name] = dataclasses.replace(entry, **changed)
    return entries


# ---- the optimizer ---------------------------------------------------------------------------------------------------
def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chained, those without parameters left out."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _steps_lie_with_moments(part: Any) -> bool:
    """torch's Adam counts steps for each parameter; those of Apex and TransformerEngine for each group."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _make_moments(part: Any) -> None:
    """Zero moments where no step was taken yet: Megatron cannot describe an optimizer that has none."""
    part.init_state_fn(part.optimizer, part.config)
    if _steps_lie_with_moments(part):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))


def _load_optimizer(optimizer: Any, found: Any) -> None:
    parts = _parts(optimizer)
    states = [found] if len(getattr(optimizer, "chained_optimizers", [optimizer])) == 1 else [found[i] for i in found]
    for part, state in zip(parts, states, strict=True):
        if not _steps_lie_with_moments(part):
            part.load_state_dict(state)
            continue
        moments = state.pop("param_state", None)
        state.pop("param_state_sharding_type", None)
        part.load_state_dict(state)
        inner = part.optimizer.state
        # The reader of moments takes a step beside them for a tensor that it should have found. And the steps that it
        # set are one tensor, which each parameter would count up: Adam's correction would run ahead unseen.
        steps = {parameter: of_one.pop("step").clone() for parameter, of_one in inner.items()}
        if moments is not None:
            part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            inner[parameter]["step"] = step


# ---- generators ------------------------------------------------------------------------------------------------------
def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["host"])
    get_cuda_rng_tracker().set_states(state["tracker"])
