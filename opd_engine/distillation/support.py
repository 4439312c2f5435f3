"""Which ids are compared at each row: the student's top-k, the teachers', their union, or the rollout engine's.

The student's are the old policy's, taken before any optimizer step on the rollout, and frozen with the scores.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine.distillation.cache import ScoreCache
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.rollout_topk import rollout_support
from opd_engine.functional.token_scores import TokenScores
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import Teacher, asked_together
from opd_engine.teachers.union import shared_fraction, union_support

STUDENT = ""
"""Key of the student among the sources of a union; no teacher can have an empty name."""


def asked(shares: dict[str, list[int]], teachers: TeacherPool) -> list[str]:
    """Who is asked on this rank: whoever has a share here, and whoever every rank must ask."""
    return [name for name, share in shares.items() if share or asked_together(teachers[name])]


def scoring_batches(batch: RolloutBatch, teacher: Teacher, config: OPDConfig) -> list[RolloutBatch]:
    """What a model is asked about at a time: pieces of `score_batch_tokens`, or all of it where it splits by itself.

    A pipeline of several stages is full only when it is given everything at once.
    """
    if getattr(teacher, "splits_itself", False):
        return [batch] if batch.num_seqs or asked_together(teacher) else []
    return batch.micro_batches(max_tokens=config.score_batch_tokens)


def put_supports(
    cache: ScoreCache,
    batch: RolloutBatch,
    shares: dict[str, list[int]],
    student: Teacher,
    teachers: TeacherPool,
    config: OPDConfig,
) -> bool:
    """Store every sample's support in the cache.

    shares: teacher name -> the sequences it scores

    Returns:
        True when the teachers' scores at the support are stored too: with one teacher a sample, one pass of it gives
        both its own top-k and the scores.
    """
    if config.support == "rollout":
        cache.put_support(batch, _rollout_ids(batch, student.vocab_size, config))
        return False
    if config.support == "student":
        for micro in scoring_batches(batch, student, config):
            cache.put_support(micro, student.topk(micro, config.k, temperature=config.temperature).indices)
        return False
    if config.support == "teacher" and config.mixture == "route" and config.union_cap is None:
        for name, micro, scores in _teacher_topk(batch, shares, student.vocab_size, teachers, config):
            cache.put_support(micro, scores.indices)
            cache.put_scores(name, micro, scores)
        _put_idle(cache, batch, shares)
        return True
    if config.support == "union" and config.mixture == "route":
        _put_unions_with_one(cache, batch, shares, student, teachers, config)
        return True
    _put_unions(cache, batch, shares, student, teachers, config)
    return False


def _rollout_ids(batch: RolloutBatch, vocab_size: int, config: OPDConfig) -> Tensor:
    """The rollout engine's own top-k where it gave one; else, and for a policy gradient, the sampled token."""
    if batch.rollout_topk_ids is None or config.loss_type == "advantage":
        return batch.next_tokens().unsqueeze(1)
    rows = batch.loss_mask.nonzero().flatten()
    samples = batch.sample_ids[batch.row_sequence()]
    ids, log_probs = batch.rollout_topk_ids, batch.rollout_topk_log_probs
    return rollout_support(ids, log_probs, config.k, rows=rows, samples=samples, vocab_size=vocab_size)


def _put_unions_with_one(
    cache: ScoreCache,
    batch: RolloutBatch,
    shares: dict[str, list[int]],
    student: Teacher,
    teachers: TeacherPool,
    config: OPDConfig,
) -> None:
    """The student's top-k, then each sample's one teacher adds its own and scores both: one forward, if it can."""
    own = ScoreCache()
    for micro in scoring_batches(batch, student, config):
        scores = student.topk(micro, config.k, temperature=config.temperature)
        own.put_support(micro, scores.indices)
        own.put_scores(STUDENT, micro, scores)
    options = {"vocab_size": student.vocab_size, "temperature": config.temperature}
    for name in teachers.turns(asked(shares, teachers)):
        for micro in scoring_batches(batch.select(shares[name]), teachers[name], config):
            students = own.scores(micro, [STUDENT] * micro.num_seqs)
            target = micro.next_tokens()
            both = teachers.score_union(name, micro, config.k, students, cap=config.union_cap, target=target, **options)
            if both is None:
                top = teachers.topk(name, micro, config.k, **options)
                union = union_support([students, top.to("cpu")], config.union_cap)
                scores = teachers.score(name, micro, union.indices, target=target, **options)
                both = scores, union.dropped, shared_fraction(students.indices, top.indices.cpu())
            scores, dropped, shared = both
            kept = _trimmed(scores.indices)
            scores = dataclasses.replace(scores, indices=kept, log_probs=scores.log_probs[:, : kept.shape[1]])
            cache.put_support(micro, scores.indices, dropped)
            cache.put_scores(name, micro, scores)
            cache.put_overlap(name, micro, shared)
    _put_idle(cache, batch, shares)


def _put_idle(cache: ScoreCache, batch: RolloutBatch, shares: dict[str, list[int]]) -> None:
    """An empty support for the sequences that no teacher scores: they have no row that counts."""
    rest = batch.select(sorted(set(range(batch.num_seqs)) - {s for share in shares.values() for s in share}))
    cache.put_support(rest, torch.empty(rest.num_tokens, 1, dtype=torch.int64))


def _put_unions(
    cache: ScoreCache,
    batch: RolloutBatch,
    shares: dict[str, list[int]],
    student: Teacher,
    teachers: TeacherPool,
    config: OPDConfig,
) -> None:
    """Every source's top-k first, one model after the other, so that one model at a time need be resident."""
    sources: dict[str, ScoreCache] = {}
    if config.support == "union":
        sources[STUDENT] = ScoreCache()
        for micro in scoring_batches(batch, student, config):
            scores = student.topk(micro, config.k, temperature=config.temperature)
            sources[STUDENT].put_support(micro, scores.indices)
            sources[STUDENT].put_scores(STUDENT, micro, scores)
    for name, micro, scores in _teacher_topk(batch, shares, student.vocab_size, teachers, config):
        source = sources.setdefault(name, ScoreCache())
        source.put_support(micro, scores.indices)
        source.put_scores(name, micro, scores)
    scored_by = {name: set(share) for name, share in shares.items()}
    first = 0
    for micro in batch.micro_batches(max_tokens=config.score_batch_tokens):
        here = range(first, first + micro.num_seqs)
        first += micro.num_seqs
        lists: list[TokenScores] = []
        for name, source in sources.items():
            owners = [name if name == STUDENT or sequence in scored_by[name] else None for sequence in here]
            if any(owner is not None for owner in owners):
                lists.append(source.scores(micro, owners))
        if not lists:
            cache.put_support(micro, torch.full((micro.num_tokens, 1), -1, dtype=torch.int64))
            continue
        if config.support == "union":
            for name, source in sources.items():
                owned = [place for place, sequence in enumerate(here) if sequence in scored_by.get(name, ())]
                if owned:
                    part = micro.select(owned)
                    cache.put_overlap(name, part, shared_fraction(sources[STUDENT].support(part), source.support(part)))
        union = union_support(lists, config.union_cap)
        cache.put_support(micro, _trimmed(union.indices), union.dropped)


def _teacher_topk(
    batch: RolloutBatch, shares: dict[str, list[int]], vocab_size: int, teachers: TeacherPool, config: OPDConfig
):
    """Yields (teacher, micro-batch, its top-k there), teacher by teacher."""
    for name in teachers.turns(asked(shares, teachers)):
        for micro in scoring_batches(batch.select(shares[name]), teachers[name], config):
            scores = teachers.topk(
                name,
                micro,
                config.k,
                vocab_size=vocab_size,
                target=micro.next_tokens(),
                temperature=config.temperature,
            )
            yield name, micro, scores


def _trimmed(indices: Tensor) -> Tensor:
    """Without the columns that no row of this micro-batch uses."""
    widest = int((indices != -1).sum(-1).max()) if indices.numel() else 1
    return indices[:, : max(widest, 1)]
