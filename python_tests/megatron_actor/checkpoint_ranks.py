"""What every rank runs for test_checkpoint.py: a student's whole state saved, read into a fresh one, and trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_actor.gradient_ranks import Job, start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED

MEAN = "student:mean"


class Student:
    """An actor with its weight store and Megatron's own scheduler, dropping out a tenth of everything."""

    def __init__(self, job: Job) -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        self.job, self.actor = job, job.actor(ROUTED, steps=8, context=None, packed=False, model_options=dropout)
        self.weights = self.actor.weights
        self.actor.scheduler = OptimizerParamScheduler(
            self.actor.optimizer,
            init_lr=0.0,
            max_lr=0.1,
            min_lr=0.0,
            lr_warmup_steps=10,  # each step has its own learning rate
            lr_decay_steps=20,
            lr_decay_style="cosine",
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=20,
            wd_incr_style="constant",
        )
        self.batch = job.share(job.samples)

    def step(self) -> None:
        scored = self.actor.score_rollouts(self.batch, self.job.teachers)
        self.actor.train_step(self.batch, scored)
        self.weights.blend(MEAN, 0.9)
        with self.weights.publishing():
            pass

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that a step changes."""
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        found = {f"live {name}": tensor.clone() for name, tensor in self.weights.live_tensors().items()}
        found |= {f"mean {name}": tensor.clone() for name, tensor in self.weights.copies()[MEAN].items()}
        for part in self.actor.optimizer.chained_optimizers:
            for place, (parameter, moments) in enumerate(part.optimizer.state.items()):
                found[f"main {place}"] = parameter.detach().clone()
                found |= {f"{name} {place}": torch.as_tensor(value).clone() for name, value in moments.items()}
        found["lr"] = torch.tensor([group["lr"] for group in self.actor.optimizer.param_groups])
        found["publications"] = torch.tensor(self.weights.publications)
        found["drawn"] = torch.cat([torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()])
        return found


def different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def everything(layout: str, folder: str) -> dict:
    """Save after two steps, go on to the fourth; the same from what was saved, in a fresh student."""
    job, directory = start(LAYOUTS[layout]), Path(folder)
    student = Student(job)
    student.step()
    student.step()
    saved = student.state()
    pending = student.actor.save(directory)
    at_once = student.state()
    student.step()  # while it is being written
    student.step()
    pending.wait()
    assert pending.is_done()
    after = student.state()
    assert different(saved, at_once) == []

    again = Student(job)
    again.step()  # whatever it did before is gone
    torch.manual_seed(99)
    again.actor.load(directory)
    read = different(again.state(), saved)
    again.step()
    again.step()
    later = different(again.state(), after)
    refusals = {}
    again.weights.back_up("earlier")
    try:
        with again.weights.active("earlier"):
            again.actor.save(directory)
    except RuntimeError as error:
        refusals["teacher live"] = f"{type(error).__name__}: {error}"
    changed = [name for name in after if not torch.equal(after[name], saved[name])]
    return {"read": read, "later": later, "refusals": refusals, "changed": len(changed), "of": len(after)}
