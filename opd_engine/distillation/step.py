"""One step of on-policy distillation: score a rollout once, then a differentiable loss for each micro-batch.

scored = score_rollouts(batch, student, teachers, config)
for step_batch in the optimizer steps of this rollout:
    denominators = Denominators.of(step_batch, config, stack_over_data_parallel_ranks)
    for micro in step_batch.micro_batches(max_tokens=...):
        loss, metrics = distillation_loss(student.logits(micro), micro, scored, config, student.shard, denominators)
        loss.backward()                      # gradients SUM over micro-batches and data-parallel ranks
    optimizer.step(); scored.release(step_batch)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opd_engine.distillation.cache import ScoreCache
from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.kept_hidden import keep_hidden, members_from_hidden
from opd_engine.distillation.members import load_members, one_teacher, owners_of, shares_of, taught_rows
from opd_engine.distillation.metrics import MetricSums, group_sums, row_sums
from opd_engine.distillation.off_policy import state_weights
from opd_engine.distillation.policy import policy_losses
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.row_losses import advantage_losses, divergence_losses, only_live
from opd_engine.distillation.support import asked, put_supports, scoring_batches
from opd_engine.functional.scores import gather_log_probs, topk_log_probs
from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers.limits import check_given, max_positions
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import ModelBackend, Teacher, TeacherHead
from opd_engine.teachers.sentinel import check_alive


@dataclasses.dataclass
class ScoredRollouts:
    """Frozen supports and teacher scores of a rollout batch, on the host.

    cache: ids and scores by sample
    teachers: the pool that scored, for its order and routing
    mixture: how several teachers combine
    vocab_size: the student's real vocabulary
    tasks: whose metrics are kept apart
    heads: the LM heads of teachers that are kept as hidden states, on the device for the length of a step
    keeps_hidden: whether teachers are kept as hidden states instead of scores
    stepped: whether an optimizer step was taken on any of it
    """

    cache: ScoreCache
    teachers: TeacherPool
    mixture: str
    vocab_size: int
    tasks: tuple[str, ...] = ()
    heads: dict[str, TeacherHead] = dataclasses.field(default_factory=dict)
    keeps_hidden: bool = False
    stepped: bool = False

    @property
    def metric_groups(self) -> tuple[str, ...]:
        """The groups of rows that metrics are kept of: the teachers, then the tasks."""
        return (*self.teachers.names, *(f"task:{task}" for task in self.tasks))

    def overlaps(self, batch: RolloutBatch) -> dict[str, tuple[float, int]]:
        """Group -> (sum over rows of the shared fraction of the two models' top-k, rows), where it was measured."""
        found: dict[str, tuple[float, int]] = {}
        names = batch.task_names or [""] * batch.num_seqs
        for sample, task in zip(batch.sample_ids.tolist(), names):
            for teacher, (total, count) in self.cache.overlap(sample).items():
                for group in (teacher, f"task:{task}"):
                    if group in self.metric_groups:
                        before = found.get(group, (0.0, 0))
                        found[group] = (before[0] + total, before[1] + count)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held now."""
        return self.cache.nbytes

    def support(self, batch: RolloutBatch, device: torch.device | str = "cpu") -> Tensor:
        """The frozen ids: [num_tokens, k] int64, -1 where absent and on rows that do not count."""
        return self.cache.support(batch, device)

    def teacher(self, name: str, batch: RolloutBatch, device: torch.device | str = "cpu") -> TokenScores:
        """One teacher's frozen scores of sequences it scored."""
        self.teachers.spec(name)
        return self.cache.scores(batch, [name] * batch.num_seqs, device)

    def require(self, batch: RolloutBatch) -> None:
        """Raise where anything that a loss on this batch reads is missing, freed or out of date. Moves nothing.

        For backends whose processes must all learn of it before any of them begins to wait for another.
        """
        if self.keeps_hidden and self.stepped:
            raise ValueError(
                "keep_teacher_hidden: the student has been updated since this rollout was scored, so its top-k is not "
                "the rollout's any more; wanted one optimizer step a rollout, or keep_teacher_hidden=False"
            )
        check_given(batch, model="student", vocab_size=self.vocab_size)
        shares = shares_of(batch, self.teachers.route(batch, self.mixture), self.teachers)
        self.cache.require(batch, list(shares.items()))

    def release(self, batch: RolloutBatch) -> int:
        """Call after an optimizer step, with its batch: frees what no later step uses. Returns the bytes freed."""
        self.stepped = True
        self.heads.clear()
        return self.cache.release(batch)

    def members_at(self, batch: RolloutBatch, indices: Tensor, rows: Tensor, config: OPDConfig) -> list[TokenScores]:
        """The teachers at ids the student has just chosen, from their kept hidden states; no gradient.

        indices: [n, k]; rows: [n] int64, the packed row of each, -1 for one that only fills

        Raises: ValueError after an optimizer step on this rollout: the ids would no longer be the old policy's.
        Communicates: as TeacherPool.score_hidden, teacher by teacher.
        """
        self.require(batch)
        owners, _ = owners_of(batch, self.teachers, self.mixture)
        for name in self.teachers.names:
            if name not in self.heads and any(name in owner for owner in owners):
                self.heads[name] = self.teachers[name].head_on(indices.device)
        options = {"vocab_size": self.vocab_size, "temperature": config.temperature}
        return members_from_hidden(batch, indices, rows, owners, self.cache, self.heads, self.teachers, **options)


def score_rollouts(
    batch: RolloutBatch, student: ModelBackend | Teacher, teachers: TeacherPool, config: OPDConfig
) -> ScoredRollouts:
    """Choose every row's support with the student as it is now, and let each sample's teachers score it. No gradient.

    batch: this rank's rollouts
    student: read for its top-k where the support needs it, and for its vocabulary; a backend, or what scores by itself

    Teachers score one after the other, each the samples that are its own.

    Raises:
        ValueError: a batch or config that is wrong, an unknown teacher, token -> id maps that disagree, an id or a
            length that the student or a teacher has no row for (of a teacher, in a prompt), before any of them runs.
        DeadTeacherError: with `config.check_teachers`, a teacher whose scores cannot teach, see `check_alive`.
    Communicates: as topk_log_probs and gather_log_probs, over the shards of the student and the local teachers.
    """
    batch.validate()
    config.validate(vocab_size=student.vocab_size)
    teachers.check_vocabulary(student.token_to_id())
    check_given(batch, model="student", vocab_size=student.vocab_size, max_positions=max_positions(student))
    weights = teachers.route(batch, config.mixture)
    shares = shares_of(batch, weights, teachers)
    for name, share in shares.items():
        teachers.check_given(name, batch.select(share))
    cache = ScoreCache(config.optimizer_steps_per_rollout)
    scored = ScoredRollouts(cache, teachers, config.mixture, student.vocab_size, tuple(config.tasks))
    if config.keep_teacher_hidden:
        keep_hidden(cache, batch, shares, teachers, config)
        scored.keeps_hidden = True
        return scored
    own = student if isinstance(student, Teacher) else LocalTeacher(student, max_tokens=config.score_batch_tokens)
    both = put_supports(cache, batch, shares, own, teachers, config)
    for name in teachers.turns(() if both else asked(shares, teachers)):
        for micro in scoring_batches(batch.select(shares[name]), teachers[name], config):
            ids, options = scored.support(micro), {"vocab_size": student.vocab_size, "temperature": config.temperature}
            measured = None
            if config.measure_overlap and config.support == "student":
                measured = teachers.score_and_overlap(name, micro, ids, config.k, target=micro.next_tokens(), **options)
            if measured is None:
                scores = teachers.score(name, micro, ids, target=micro.next_tokens(), **options)
            else:
                scores, shared = measured
                cache.put_overlap(name, micro, shared)
            cache.put_scores(name, micro, scores)
    if config.check_teachers:
        _check_teachers(batch, scored, shares, config)
    return scored


def _check_teachers(
    batch: RolloutBatch, scored: ScoredRollouts, shares: dict[str, list[int]], config: OPDConfig
) -> None:
    """Look at what every teacher answered, where it has a weight; on a pipeline, on the stage that holds it."""
    for position, (name, sequences) in enumerate(shares.items()):
        teacher = scored.teachers[name]
        if not getattr(teacher, "holds_scores", True):
            continue
        for micro in batch.select(sequences).micro_batches(max_tokens=config.score_batch_tokens):
            rows = micro.loss_mask & (scored.teachers.route(micro, scored.mixture)[position] > 0)
            if micro.sample_weights is not None:
                rows = rows & (micro.sample_weights > 0)[micro.row_sequence()]
            rows = rows.nonzero().flatten().cpu()
            samples = micro.sample_ids.cpu()[micro.row_sequence().cpu()[rows]]
            scores = scored.teacher(name, micro).select(rows)
            check_alive(name, scores, micro.tokens.cpu()[rows], samples, vocab_size=teacher.vocab_size)


def distillation_loss(
    logits: Tensor,
    batch: RolloutBatch,
    scored: ScoredRollouts,
    config: OPDConfig,
    shard: VocabShard | None,
    denominators: Denominators,
) -> tuple[Tensor, MetricSums]:
    """This micro-batch's part of the global batch's loss; parts add up over micro-batches and data-parallel ranks.

    logits: [num_tokens, vocab_shard_size] (any leading shape of num_tokens rows), of the current student, row-aligned
    batch: the micro-batch those logits belong to, any selection and packing of what was scored
    shard: the columns of this process, or None: all columns are here, those at or above the vocabulary are padding
    denominators: of this optimizer step's global batch

    Returns:
        loss: 0-dim float64, differentiable; sum the gradients over data-parallel ranks, do not average them.
        metrics: sums over this micro-batch's loss rows.
    Raises:
        ValueError: rows that do not fit the batch, samples that were not scored, or were freed.
    Communicates: as gather_log_probs.
    Mutates: the logits in the backward, with `config.inplace_backward`.
    Grad: for `logits`; rows of zero weight, and those no teacher can read (docs/math.md, "Vocabularies"), get exact
        zeros of the divergence, whatever they and their teachers' scores hold.
    """
    if logits.shape[:-1].numel() != batch.num_tokens:
        raise ValueError(f"logits: wanted {batch.num_tokens} rows, one a packed token, got shape {list(logits.shape)}")
    device, members = logits.device, None
    target = target_of_loss(batch, config, denominators, device)
    options = {
        "temperature": config.temperature,
        "shard": shard or VocabShard(0, logits.shape[-1], scored.vocab_size),
    }
    if config.keep_teacher_hidden:
        rows = torch.arange(batch.num_tokens, device=device)
        counts = batch.loss_mask.to(device)
        top = topk_log_probs(logits.detach(), config.k, **options).indices.flatten(0, -2)
        indices = top.masked_fill(~counts.unsqueeze(1), -1)
        members = scored.members_at(batch, indices, rows.masked_fill(~counts, -1), config)
    else:
        indices = scored.support(batch, device)
    student = gather_log_probs(logits, indices, target=target, inplace_backward=config.inplace_backward, **options)
    return distillation_loss_of_scores(student, batch, scored, config, denominators, members)


def target_of_loss(
    batch: RolloutBatch, config: OPDConfig, denominators: Denominators, device: torch.device | str
) -> Tensor | None:
    """The sampled token of rows with a weight, -1 elsewhere: [num_tokens] int64; None where the loss reads none."""
    live = denominators.of_rows(batch).to(device) > 0
    if not config.needs_student_target:
        return None
    return batch.next_tokens().to(device).masked_fill(~live, -1)


def distillation_loss_of_scores(
    student: TokenScores,
    batch: RolloutBatch,
    scored: ScoredRollouts,
    config: OPDConfig,
    denominators: Denominators,
    members: list[TokenScores] | None = None,
) -> tuple[Tensor, MetricSums]:
    """`distillation_loss` from the student's scores, for a backend that gathers them by itself.

    student: of `scored.support(batch)`, differentiable, with the target's log-prob where `target_of_loss` gives one;
        rows without weight may hold anything
    members: the teachers' scores at the student's ids where they were not frozen, as `ScoredRollouts.members_at` gives
        them, of all rows of the batch

    Grad: for the student's scores. Communicates: nothing.
    """
    device = student.log_probs.device
    row_weights = denominators.of_rows(batch).to(device)
    counted = row_weights > 0
    next_tokens = batch.next_tokens().to(device)
    indices = student.indices.flatten(0, -2)
    if members is None:
        members, weights = load_members(batch, scored.cache, scored.teachers, scored.mixture, indices)
    else:
        weights = scored.teachers.route(batch, scored.mixture).to(device)
    sampled = None if student.target_log_prob is None else student.target_log_prob.reshape(-1).where(counted, 0.0)
    live = counted & taught_rows(weights)
    student = only_live(student, indices, live)
    if config.loss_type == "advantage":
        losses, divergences = advantage_losses(student, members, weights, batch, config)
    else:
        losses, divergences = divergence_losses(student, members, weights, config)
    total = row_weights
    reached = torch.ones_like(row_weights)
    if config.state_weight_cap is not None:
        reached = state_weights(batch, sampled, config.state_weight_cap)
        total = row_weights * reached
    loss = config.coefficient * torch.where(live & (total > 0), losses.double() * total, 0.0).sum()
    policy: dict[str, Tensor | float] = {}
    if config.policy_coefficient > 0:
        on_policy, clipped = policy_losses(batch, sampled, config)
        term = config.policy_coefficient * torch.where(counted, on_policy * row_weights, 0.0).sum()
        loss = loss + term
        policy = {"policy_loss": term.detach(), "clipped_rows": (clipped & counted).sum()}
    with torch.no_grad():
        combined = one_teacher(members, weights, config.mixture)
        sums = row_sums(divergences[0], student, combined, live, next_tokens, reached)
        sums["loss"] = loss.detach()
        sums["unread_rows"] = (counted & ~live).sum()
        sums |= policy
        if config.tail != "renormalize":
            sums["short_support_rows"] = 0.0
        sums["union_dropped"] = float(scored.cache.dropped(batch))
        sums |= _sums_by_group(divergences, student, members, weights, combined, live, batch, scored)
    return loss, MetricSums.of(sums, scored.metric_groups, device)


@torch.no_grad()
def row_divergences(student: Teacher, batch: RolloutBatch, scored: ScoredRollouts, config: OPDConfig) -> Tensor:
    """How far the student, as it is now, is from its teachers at each row that counts: for looking at samples.

    student: scores its own rollouts, at the ids the teachers were asked for
    batch: any selection of what was scored

    Returns: [num_tokens] float64 on the host, before any weight; NaN on rows that do not count or that no teacher can
        read, and everywhere on ranks that hold no scores.
    Communicates: as gather_log_probs.
    """
    nothing = torch.full((batch.num_tokens,), torch.nan, dtype=torch.float64)
    if config.keep_teacher_hidden:
        return nothing
    if not getattr(student, "holds_scores", True):
        student.score(batch, torch.full((batch.num_tokens, 1), -1), temperature=config.temperature)
        return nothing
    ids = scored.support(batch)
    target = batch.next_tokens().masked_fill(~batch.loss_mask, -1) if config.needs_student_target else None
    own = student.score(batch, ids, target=target, temperature=config.temperature).to("cpu")
    members, weights = load_members(batch, scored.cache, scored.teachers, scored.mixture, ids)
    live = batch.loss_mask & taught_rows(weights).cpu()
    own = only_live(own, ids, live)
    if config.loss_type == "advantage":
        _, divergences = advantage_losses(own, members, weights, batch, config)
    else:
        _, divergences = divergence_losses(own, members, weights, config)
    return torch.where(live, divergences[0].double().cpu(), nothing)


def _sums_by_group(
    divergences: list[Tensor],
    student: TokenScores,
    members: list[TokenScores],
    weights: Tensor,
    combined: TokenScores,
    live: Tensor,
    batch: RolloutBatch,
    scored: ScoredRollouts,
) -> dict[str, Tensor | float]:
    """The metrics of each teacher, by its own scores where several score one row, and of each task."""
    names, next_tokens = scored.teachers.names, batch.next_tokens().to(live.device)
    rows = live & (weights > 0)
    if len(members) == 1:
        sums = group_sums(names, rows, divergences[0], student, members[0], next_tokens)
    else:
        sums = {}
        for position, name in enumerate(names):
            own = divergences[1 + position] if len(divergences) > 1 else divergences[0]
            sums |= group_sums([name], rows[position][None], own, student, members[position], next_tokens)
    if scored.tasks:
        of_row = batch.task_rows(scored.tasks).to(live.device) & live
        tasks = scored.metric_groups[len(names) :]
        sums |= group_sums(tasks, of_row, divergences[0], student, combined, next_tokens)
    for group, (total, count) in scored.overlaps(batch).items():
        sums[f"topk_overlap/{group}"], sums[f"topk_overlap_rows/{group}"] = total, float(count)
    return sums
