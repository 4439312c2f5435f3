"""Actors and rollouts for tests of a transformers student."""

from __future__ import annotations

import torch

from fsdp.dense import make_batch, make_model
from opd_engine.distillation import OPDConfig
from opd_engine.integrations.fsdp import FSDPActor
from opd_engine.integrations.hf.backend import make_backend
from opd_engine.teachers import LocalTeacher, TeacherPool

TEACHERS = {"a": 5, "b": 6}
CONFIG = {"k": 8, "divergence": "forward_kl", "temperature": 0.9}


def teacher_models(vocab_size: int = 61) -> dict:
    return {name: make_model(seed=seed, vocab_size=vocab_size) for name, seed in TEACHERS.items()}


def local_pool(models: dict) -> TeacherPool:
    return TeacherPool({name: LocalTeacher(make_backend(model)) for name, model in models.items()})


def make_actor(model, lr: float = 1e-3, weight_decay: float = 0.0, config: dict | None = None, **options) -> FSDPActor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    return FSDPActor(model, optimizer, OPDConfig(**{**CONFIG, **(config or {})}), **options)


def state_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's training state."""
    from opd_engine.parallel.sharded_files import read_files, shapes_in

    found = {
        name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes_in(folder / "training_state").items()
    }
    read_files(folder / "training_state", found, None)
    return found


def batch_of_step(step: int, num_seqs: int = 7):
    names = [list(TEACHERS)[(step + s) % 2] for s in range(num_seqs)]
    return make_batch(num_seqs, seed=step, teacher_names=names)


def train(actor: FSDPActor, pool: TeacherPool, steps, lr: float | None = None) -> list:
    reports = []
    for step in steps:
        batch = batch_of_step(step)
        reports.append(actor.train_step(batch, actor.score_rollouts(batch, pool), lr=lr))
    return reports
