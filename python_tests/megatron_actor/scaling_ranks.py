"""What a step on a small Megatron run hands to torch.distributed, and the tokens it had, for test_scaling.py."""

from __future__ import annotations

from megatron_actor.gradient_ranks import Job, start
from megatron_actor.layouts import LAYOUTS
from megatron_actor.samples import ROUTED
from wire import Wire


def messages(layout: str) -> dict:
    """Bytes by op of large messages: of a step's scoring, of its update and of its optimizer step."""
    job = start(LAYOUTS[layout])
    actor, batch = job.actor(ROUTED), job.share(job.samples)
    actor.accumulate(batch, actor.score_rollouts(batch, job.teachers))  # the first pass looks at the head
    with Wire() as wire:
        actor.train_step(batch, actor.score_rollouts(batch, job.teachers))
    return {
        "messages": [[m.op, m.nbytes, m.group_size] for m in wire.messages],
        "passes": passes(job, actor, batch),
        "stage": job.groups.pp.rank(),
        "vocabulary": job.shape.padded_vocab_size,
    }


def passes(job: Job, actor, batch) -> list[list]:
    """(model, positions, rows, own rows, kind) of each pass, padding counted.

    rows: those of the context rank that has most, for all of them; own rows: this rank's, for all of them
    """
    counts = batch.loss_row_counts().tolist()
    shares = {
        name: batch.select([i for i, own in enumerate(batch.teacher_names) if name in own and counts[i]])
        for name in job.teachers.names
    }
    found = [["student", *_size(job, actor.student, batch), kind] for kind in ("topk", "update")]
    return found + [["teacher", *_size(job, job.teachers[name], share), "score"] for name, share in shares.items()]


def _size(job: Job, scorer, batch) -> tuple[int, int, int]:
    if batch.num_seqs == 0:
        return 0, 0, 0
    inputs = scorer.walk.micro_inputs(batch)
    cp = job.layout.cp
    positions = sum(micro.input_ids.numel() * cp for micro in inputs)
    rows = sum(max(own.numel() for own in micro.packed_rows) * cp for micro in inputs)
    own = sum(micro.packed_rows[job.groups.cp_rank].numel() * cp for micro in inputs)
    return positions, rows, own
