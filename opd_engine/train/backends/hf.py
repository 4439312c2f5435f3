"""A run with transformers models: one process, or FSDP2 over data-parallel ranks and a shared LM head."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_engine.distillation.parameter_groups import parameter_groups
from opd_engine.integrations.fsdp.actor import CAPABILITIES, FSDPActor
from opd_engine.integrations.fsdp.adapters import add_adapter, base_of, is_adapter, load_adapter, merged
from opd_engine.integrations.fsdp.precision import HALF
from opd_engine.integrations.fsdp.scorer import ModelScorer
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
from opd_engine.parallel.shares import Shares
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.staging import StagedWeights
from opd_engine.train.assembly import Assembly, pooled
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.settings import ConfigError
from opd_engine.train.teacher_settings import settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opd_engine.parallel.meshes import DeviceMesh

__all__ = ["CAPABILITIES", "NEEDS_GROUP", "assemble"]
NEEDS_GROUP = False


@contextlib.contextmanager
def assemble(config: TrainConfig, world: World, experiment: Experiment) -> Iterator[Assembly]:
    """The parts of the run.

    Raises: ValueError for folders that cannot be used, and ConfigError for ranks that do not fit.
    """
    if world.world_size % config.run.tp:
        raise ConfigError(
            f"run.tp: wanted a divisor of the {world.world_size} ranks that were started, got {config.run.tp} "
            "(start more with: torchrun --nproc-per-node N -m opd_engine train ... --tp TP)"
        )
    dp_mesh, tp_mesh = split_world(world, config.run.tp)
    if config.run.offload and dp_mesh is None:
        raise ConfigError(
            "run.offload: wanted data-parallel ranks, over which the parts on the host are brought, got 1"
        )
    tokenizer = load_tokenizer(
        _student_folder(config, experiment),
        trust_remote_code=config.student.trust_remote_code,
        argument="student.path",
    )
    actor, replica = _student(config, world, experiment, dp_mesh, tp_mesh, tokenizer)
    folder = _student_folder(config, experiment)
    teachers = {name: _teacher(config, world, name, path, folder, actor) for name, path in experiment.teachers.items()}
    pool = pooled(config, teachers)
    pool.check_vocabulary(actor.token_to_id())
    group = mesh_group(tp_mesh)
    writing = {"pad_id": padding_token_id(tokenizer), "batch_size": config.rollout.batch_size, "group": group}
    whole = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, LocalTeacher)}
    shares = mesh_group(dp_mesh)
    yield Assembly(
        actor=actor,
        teachers=pool,
        engine=InlineEngine(replica, **writing),
        tokenizer=tokenizer,
        end_ids=end_token_ids(experiment.student, tokenizer),
        teacher_engines={name: InlineEngine(teacher.backend.module, **writing) for name, teacher in whole.items()},
        shares=Shares(rank=group_rank(shares), size=group_size(shares), group=shares, device=world.device),
    )


def _student_folder(config: TrainConfig, experiment: Experiment) -> Path:
    """Of the whole model: an adapter folder names its base."""
    return base_of(experiment.student, "student.path") if is_adapter(experiment.student) else experiment.student


def _student(
    config: TrainConfig,
    world: World,
    experiment: Experiment,
    dp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[FSDPActor, PreTrainedModel]:
    """The actor, and the model that writes its rollouts: the live one, or a copy where that is sharded or leaves."""
    options, dtype = config.optimizer, torch_dtype(config.run.dtype)
    # Half precision trains float32 weights: the folder's own, not yet rounded.
    trained = torch.float32 if dtype in HALF else dtype
    folder = _student_folder(config, experiment)
    model = _model(config, world, folder, "student.path", trained)
    config.validate(model.config.get_text_config().vocab_size)
    if folder != experiment.student:
        model = load_adapter(model, experiment.student, trains=True, argument="student.path")
    elif config.student.lora_rank:
        torch.manual_seed(config.run.seed)  # on every rank the same beginning
        model = add_adapter(
            model,
            rank=config.student.lora_rank,
            alpha=config.student.lora_alpha or 2.0 * config.student.lora_rank,
            targets=config.student.lora_targets.split(",") if config.student.lora_targets else _linear_layers(model),
            dropout=config.student.lora_dropout,
        )
    replica = model
    if dp_mesh is not None or config.run.two_phase:
        replica = copy.deepcopy(model).to(dtype).requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), options.weight_decay)
    actor = FSDPActor(
        model,
        torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2)),
        config.opd,
        mesh=dp_mesh,
        tp_mesh=tp_mesh,
        dtype=dtype,
        offload=config.run.offload,
        two_phase=config.run.two_phase,
        workspace_bytes=config.run.workspace_bytes or None,
        recompute=config.run.recompute,
        tokenizer=tokenizer,
        max_tokens=None,
        max_seqs=options.micro_batch or None,
        clip=options.clip,
    )
    return actor, getattr(replica, "get_base_model", lambda: replica)()


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """The last names of all linear layers but the head."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found[name.rsplit(".", 1)[-1]] = True
    return list(found)


def _model(config: TrainConfig, world: World, path: Path, argument: str, dtype: torch.dtype):
    return load_model(
        path,
        dtype=dtype,
        device=world.device,
        trust_remote_code=config.student.trust_remote_code,
        argument=argument,
    )


def _teacher(
    config: TrainConfig, world: World, name: str, path: Path, student: Path, actor: FSDPActor
) -> LocalTeacher | ModelScorer:
    """A module of its own, in eval mode for good. An adapter's is merged; the base of a student that trains an adapter
    is that base, the adapter off.

    Sharded with the student where that is; staged or in turns, on the host between them.
    """
    argument = f"teachers.{name}"
    if actor.adapted is not None and path.resolve() == student.resolve():
        return actor.base_teacher()
    base = base_of(path, argument) if is_adapter(path) else path
    dtype = settings_of(config.teachers.get(name, "")).dtype or config.run.dtype
    module = _model(config, world, base, argument, torch_dtype(dtype))
    if base != path:
        module = merged(load_adapter(module, path, trains=False, argument=argument))
    tokenizer = load_tokenizer(base, trust_remote_code=config.student.trust_remote_code, argument=argument)
    if actor.mesh is not None or config.run.two_phase:
        return actor.teacher(module, tokenizer=tokenizer)
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
