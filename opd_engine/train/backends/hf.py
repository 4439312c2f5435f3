"""A run with transformers models: one process, or ranks that share the LM head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from opd_engine.integrations.fsdp.actor import CAPABILITIES, FSDPActor
from opd_engine.integrations.fsdp.adapters import base_of, is_adapter, load_adapter, merged
from opd_engine.integrations.fsdp.precision import HALF
from opd_engine.integrations.hf.backend import HFBackend, even_shard, make_backend
from opd_engine.integrations.hf.engine import InlineEngine
from opd_engine.integrations.hf.models import (
    end_token_ids,
    load_model,
    load_tokenizer,
    padding_token_id,
    torch_dtype,
)
from opd_engine.parallel.collectives import group_rank, group_size
from opd_engine.parallel.launch import World
from opd_engine.parallel.meshes import mesh_group, split_world
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.staging import StagedWeights
from opd_engine.train.assembly import Assembly, pooled
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.settings import ConfigError
from opd_engine.train.teacher_settings import settings_of

__all__ = ["CAPABILITIES", "NEEDS_GROUP", "assemble"]
NEEDS_GROUP = False


@contextlib.contextmanager
def assemble(config: TrainConfig, world: World, experiment: Experiment) -> Iterator[Assembly]:
    """The parts of the run.

    Raises: ValueError for folders that cannot be used, and ConfigError for ranks that do not fit.
    """
    if world.world_size != config.run.tp:
        raise ConfigError(
            f"run.tp: wanted the number of ranks that were started, {world.world_size}, got {config.run.tp} "
            "(start them with: torchrun --nproc-per-node TP -m opd_engine train ... --tp TP)"
        )
    _, tp_mesh = split_world(world, config.run.tp)
    group = mesh_group(tp_mesh)
    tokenizer = load_tokenizer(
        experiment.student, trust_remote_code=config.student.trust_remote_code, argument="student.path"
    )
    options = config.optimizer
    dtype = torch_dtype(config.run.dtype)
    # Half precision trains float32 weights: the folder's own, not yet rounded.
    trained = torch.float32 if dtype in HALF else dtype
    model = _model(config, world, experiment.student, "student.path", trained)
    config.validate(model.config.get_text_config().vocab_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay
    )
    actor = FSDPActor(
        model,
        optimizer,
        config.opd,
        tp_mesh=tp_mesh,
        dtype=dtype,
        workspace_bytes=config.run.workspace_bytes or None,
        recompute=config.run.recompute,
        tokenizer=tokenizer,
        max_tokens=None,
        max_seqs=options.micro_batch or None,
        clip=options.clip,
    )
    teachers = {name: _teacher(config, world, name, path, actor) for name, path in experiment.teachers.items()}
    pool = pooled(config, teachers)
    pool.check_vocabulary(actor.token_to_id())
    writing = {"pad_id": padding_token_id(tokenizer), "batch_size": config.rollout.batch_size, "group": group}
    yield Assembly(
        actor=actor,
        teachers=pool,
        engine=InlineEngine(model, **writing),
        tokenizer=tokenizer,
        end_ids=end_token_ids(experiment.student, tokenizer),
        teacher_engines={name: InlineEngine(teacher.backend.module, **writing) for name, teacher in teachers.items()},
    )


def _model(config: TrainConfig, world: World, path: Path, argument: str, dtype: torch.dtype):
    return load_model(
        path,
        dtype=dtype,
        device=world.device,
        trust_remote_code=config.student.trust_remote_code,
        argument=argument,
    )


def _teacher(config: TrainConfig, world: World, name: str, path: Path, actor: FSDPActor) -> LocalTeacher:
    """A module of its own, in eval mode for good; staged, on the host between its turns. An adapter's, merged."""
    argument = f"teachers.{name}"
    base = base_of(path, argument) if is_adapter(path) else path
    dtype = settings_of(config.teachers.get(name, "")).dtype or config.run.dtype
    module = _model(config, world, base, argument, torch_dtype(dtype))
    if base != path:
        module = merged(load_adapter(module, path, trains=False, argument=argument))
    tokenizer = load_tokenizer(base, trust_remote_code=config.student.trust_remote_code, argument=argument)
    group = actor.tp_group
    vocab_size = module.config.get_text_config().vocab_size
    shard = even_shard(vocab_size, group, group_size(group), group_rank(group))
    backend: HFBackend = make_backend(module.requires_grad_(False), tokenizer, shard=shard)
    backend.share_token_map(actor)
    options = {"max_tokens": config.opd.score_batch_tokens}
    if config.run.teacher_weights == "staged":
        staged = StagedWeights(module, world.device)
        return LocalTeacher(backend, scoring=staged.on_device, prefetch=staged.prefetch, **options)
    return LocalTeacher(backend, **options)
