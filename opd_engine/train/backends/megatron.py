"""A run on Megatron: the model split over ranks, teachers in the student's place or in modules of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_engine.integrations.hf.models import end_token_ids, load_tokenizer, token_to_id, torch_dtype
from opd_engine.integrations.megatron.actor import CAPABILITIES as CAPABILITIES
from opd_engine.integrations.megatron.actor import MegatronActor
from opd_engine.integrations.megatron.batches import BatchLayout
from opd_engine.integrations.megatron.gpt import RECOMPUTE, build_gpt
from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.loading import check_checkpoint, load_module, load_set
from opd_engine.integrations.megatron.rollout import MegatronEngine
from opd_engine.integrations.megatron.scorer import MegatronScorer
from opd_engine.integrations.megatron.teachers import own_teacher, switched_teacher
from opd_engine.integrations.megatron.training import make_trainable, start_megatron, stop_megatron
from opd_engine.parallel.launch import World
from opd_engine.parallel.shares import Shares
from opd_engine.teachers.weight_store import WeightStore
from opd_engine.train.assembly import Assembly, pooled
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.memory import RunMemory

NEEDS_GROUP = True


@contextlib.contextmanager
def assemble(config: TrainConfig, world: World, experiment: Experiment) -> Iterator[Assembly]:
    """The parts of the run, its groups taken down at the end.

    Raises: ValueError for ranks that do not divide, and for folders that are not whole or of another vocabulary, before
        a model is built.
    """
    groups = start_megatron(config.run.tp, config.run.pp, config.run.cp, seed=config.run.seed)
    try:
        yield _assembly(config, world, experiment, groups)
    finally:
        stop_megatron()


def _assembly(config: TrainConfig, world: World, experiment: Experiment, groups: MegatronGroups) -> Assembly:
    tokenizer, token_map, teacher_maps = _check_folders(config, experiment)
    memory = RunMemory(
        config,
        experiment.student,
        experiment.teachers,
        longest_prompt=max(len(prompt.token_ids) for prompt in experiment.train),
        world_size=world.world_size,
        stage=groups.pp.rank(),
        device=world.device,
        shown=world.is_main and not config.run.quiet,
    )
    layout = BatchLayout(
        packed=False, max_seqs=config.optimizer.micro_batch or None, max_tokens=config.opd.score_batch_tokens
    )
    common = {"groups": groups, "layout": layout, "workspace_bytes": config.run.workspace_bytes or None}
    actor = _student(config, world, experiment.student, token_map, common)
    scorers = _teachers(config, world, experiment, actor, teacher_maps, common)
    pool = pooled(config, scorers)
    pool.check_vocabulary(token_map)
    return Assembly(
        actor=actor,
        teachers=pool,
        engine=MegatronEngine(actor.student),
        tokenizer=tokenizer,
        end_ids=end_token_ids(experiment.student, tokenizer),
        teacher_engines={name: MegatronEngine(scorer) for name, scorer in scorers.items()},
        shares=Shares(
            rank=groups.dp.rank(),
            size=groups.dp.size(),
            group=groups.dp if groups.dp.size() > 1 else None,
            stages=groups.pp if groups.pp_size > 1 else None,
            last_stage=groups.pp_size - 1,
            device=world.device,
        ),
        memory=memory,
    )


def _check_folders(config: TrainConfig, experiment: Experiment) -> tuple[Any, Mapping[str, int], dict]:
    """The tokenizer, its map, and each teacher's. Raises: ValueError for folders that cannot be used."""

    def tokenizer_of(folder: Path, argument: str):
        return load_tokenizer(folder, trust_remote_code=config.student.trust_remote_code, argument=argument)

    tokenizer = tokenizer_of(experiment.student, "student")
    token_map = token_to_id(tokenizer)
    check_checkpoint(experiment.student, argument="student")
    teacher_maps: dict[str, Mapping[str, int]] = {}
    for name, folder in experiment.teachers.items():
        check_checkpoint(folder, argument=f"teacher {name!r}", token_map=token_map)
        own = token_to_id(tokenizer_of(folder, f"teacher {name!r}"))
        teacher_maps[name] = token_map if own == token_map else own
    return tokenizer, token_map, teacher_maps


def _student(
    config: TrainConfig, world: World, folder: Path, token_map: Mapping[str, int], common: dict[str, Any]
) -> MegatronActor:
    options, shape = config.optimizer, GPTShape.read(folder, argument="student")
    config.validate(shape.vocab_size)
    module = build_gpt(shape, common["groups"], dtype=torch_dtype(config.run.dtype), **RECOMPUTE[config.run.recompute])
    load_module(module, folder, common["groups"], argument="student")
    module.to(world.device)
    model, optimizer = make_trainable(
        module,
        lr=options.lr,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        clip=options.clip,
        distributed=True,  # also alone: its checkpoints are one format for every number of ranks
    )
    return MegatronActor(
        model,
        optimizer,
        config.opd,
        vocab_size=shape.vocab_size,
        token_map=token_map,
        weights=WeightStore(module, trainable="student"),
        **common,
    )


def _teachers(
    config: TrainConfig,
    world: World,
    experiment: Experiment,
    actor: MegatronActor,
    teacher_maps: Mapping[str, Mapping[str, int]],
    common: dict[str, Any],
) -> dict[str, MegatronScorer]:
    groups, found = common["groups"], {}
    shape = GPTShape.read(experiment.student, argument="student")
    for name, folder in experiment.teachers.items():
        own = GPTShape.read(folder, argument=f"teacher {name!r}")
        options = common | {"vocab_size": own.vocab_size, "token_map": teacher_maps[name]}
        if own == shape and config.run.teacher_weights in ("auto", "switch"):
            tag = f"teacher:{name}"
            load_set(actor.weights, tag, actor.student.module, folder, groups, argument=f"teacher {name!r}")
            found[name] = switched_teacher(actor.walk.model, actor.weights, tag, **options)
            continue
        module = build_gpt(own, groups, dtype=torch_dtype(config.run.dtype))
        load_module(module, folder, groups, argument=f"teacher {name!r}")
        resident = config.run.teacher_weights == "resident"
        found[name] = own_teacher(module, world.device, resident=resident, **options)
    return found
