"""A rank of test_failures.py: two pipeline stages, of which the last fails in the middle of a training pass."""

from __future__ import annotations

import os
import signal
import sys

import torch

from megatron_actor.gradient_ranks import start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED
from opd_engine.parallel.launch import join_world


def main(fault: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    with join_world("cpu", timeout_s=timeout_s) as world:
        job = start(LAYOUTS["pp2"])
        actor = job.actor(ROUTED, max_seqs=1)
        batch = job.share(job.samples)
        scored = actor.score_rollouts(batch, job.teachers)
        print("scored", world.rank, flush=True)
        losses = []

        def divergence(student, teacher):
            losses.append(1)
            if len(losses) > 3 and fault == "raises":
                raise ValueError("row 3 is sour")
            if len(losses) > 3 and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return (student.log_probs - teacher.log_probs).square().sum(-1)

        actor.config.divergence = divergence
        actor.train_step(batch, scored)
        print("trained", world.rank, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
