"""Held-out evaluation: greedy accuracy where prompts have labels, divergence to the teachers, perplexity of texts.

It draws with numbers of its own: when and how often a run is evaluated changes nothing of what it learns. Every rank
takes the prompts that are its share's; the numbers are those of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from opd_engine.distillation.full_rows import full_divergence
from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.distillation.rollout_engine import RolloutEngine, Sampling
from opd_engine.distillation.sampling import sample_seeds
from opd_engine.teachers.protocols import FullTeacher, Teacher, holds_scores
from opd_engine.train.assembly import Assembly
from opd_engine.train.config import EvalConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.prompts import Prompt


@dataclass(frozen=True)
class Evaluator:
    """Measures a student, or a teacher, on what was held out.

    sampling: of the rollouts.  temperature: of both sides in the divergence.
    seed: of the rollouts on which it is measured without passages.
    """

    experiment: Experiment
    config: EvalConfig
    parts: Assembly
    sampling: Sampling
    temperature: float
    seed: int

    def _held_out(self) -> dict[str, list[Prompt]]:
        by_task: dict[str, list[Prompt]] = {}
        for prompt in self.experiment.evaluation:
            by_task.setdefault(prompt.task, []).append(prompt)
        limit = self.config.max_prompts or None
        return {task: prompts[:limit] for task, prompts in sorted(by_task.items())}

    def accuracy(
        self, engine: RolloutEngine, tasks: Sequence[str] | None = None, teacher: str = ""
    ) -> dict[str, float]:
        """Fraction of labelled held-out prompts answered exactly, greedily, by task; no labels, no entry.

        teacher: whose engine it is, for the prompts that it sees; "" is the student's
        """
        found, shares = {}, self.parts.shares
        for task, prompts in self._held_out().items():
            labelled = [prompt for prompt in prompts if prompt.label is not None]
            if labelled and (tasks is None or task in tasks):
                own = [labelled[index] for index in shares.deal(len(labelled))]
                ids = [self.experiment.seen_by([teacher], p.token_ids) or p.token_ids for p in own]
                written = engine.generate(ids, self.sampling.greedy(), seed=[0] * len(own))
                right = sum(self.right(written.tokens, [p.label for p in own]))
                found[task] = shares.sum(torch.tensor([float(right)], dtype=torch.float64))[0] / len(labelled)
        return found

    def right(self, completions: Sequence[Sequence[int]], labels: Sequence[str | None]) -> list[bool]:
        """Whether each completion, its end token and outer white space left out, is the label."""
        ends = self.sampling.end_ids
        bodies = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in completions]
        answers = self.parts.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [label is not None and answer.strip() == label.strip() for answer, label in zip(answers, labels)]

    def _batches(self, teacher: str) -> Iterator[RolloutBatch]:
        """What divergence is measured on: the passages, or what the student samples after the held-out prompts."""
        limit, shares = self.config.max_prompts or None, self.parts.shares
        deal = shares.deal
        if passages := self.experiment.passages.get(teacher, [])[:limit]:
            total = len(passages)
            pairs = [(passages[index][:1], passages[index][1:]) for index in deal(total)]
        else:
            prompts = [
                p for prompts in self._held_out().values() for p in prompts if teacher in (p.teachers or (teacher,))
            ]
            total = len(prompts)
            own = deal(total)
            ids = [prompts[index].token_ids for index in own]
            written = self.parts.engine.generate(ids, self.sampling, seed=sample_seeds(self.seed, 0, own))
            pairs = list(zip(ids, written.tokens, strict=True))
        # As many batches on every rank: a sharded model takes all of them, also where one has no pair left.
        longest = -(-total // shares.size)
        for start in range(0, longest, self.config.batch_size):
            part = pairs[start : start + self.config.batch_size]
            shown = [self.experiment.seen_by([teacher], prompt) for prompt, _ in part]
            given = {"teacher_prompts": shown} if teacher in self.experiment.prefixes else {}
            yield pack_rollouts([prompt for prompt, _ in part], [tokens for _, tokens in part], **given)

    def divergence(self) -> dict[str, float]:
        """forward_kl over the full vocabulary, in nats a token, by teacher; absent where two models cannot be compared.

        A teacher that gives no logits, or whose shards of the vocabulary are cut elsewhere, cannot.
        """
        student, teachers, found = self.parts.actor.student, self.parts.teachers, {}
        for name in teachers.names:
            total, rows = 0.0, 0
            if not isinstance(teachers[name], FullTeacher) or not isinstance(student, FullTeacher):
                continue
            for batch in self._batches(name):
                seen = batch.teacher_view()[0] if name in self.experiment.prefixes else None
                values = full_divergence(student, teachers[name], batch, temperature=self.temperature, seen=seen)
                if values is None:
                    break
                total += float(values.double().sum())
                rows += values.numel()
            total, rows = self._over_shares(total, rows)
            if rows:
                found[name] = total / rows
        return found

    def perplexity(self, model: Teacher, names: Sequence[str] | None = None) -> dict[str, float]:
        """exp of the mean negative log-prob of the held-out passages' tokens, by teacher; absent without passages."""
        found = {}
        for name in self.experiment.passages:
            if names is not None and name not in names:
                continue
            total, rows = 0.0, 0
            for batch in self._batches(name):
                target = batch.next_tokens().masked_fill(~batch.loss_mask, -1)
                scores = model.score(batch, torch.empty(batch.num_tokens, 0, dtype=torch.int64), target=target)
                if holds_scores(model):
                    log_probs = scores.target_log_prob.cpu()[batch.loss_mask]
                    total -= float(log_probs.double().sum())
                    rows += log_probs.numel()
            total, rows = self._over_shares(total, rows)
            found[name] = math.exp(total / rows)
        return found

    def measure(self) -> dict[str, float]:
        """All of it for the student, as flat keys: accuracy/TASK, forward_kl/TEACHER, perplexity/TEACHER."""
        parts = self.parts
        return {
            **{f"accuracy/{task}": value for task, value in self.accuracy(parts.engine).items()},
            **{f"forward_kl/{name}": value for name, value in self.divergence().items()},
            **{f"perplexity/{name}": value for name, value in self.perplexity(parts.actor.student).items()},
        }

    def measure_teachers(self) -> dict[str, dict[str, float]]:
        """{"accuracy": {task: value}, "perplexity": {name: value}}, each task and text by its own teacher."""
        own = {task: prompts[0].teachers for task, prompts in self._held_out().items()}
        accuracy, perplexity = {}, {}
        for name in self.parts.teachers.names:
            if name in self.parts.teacher_engines:
                tasks = [task for task, teachers in own.items() if name in teachers]
                accuracy |= self.accuracy(self.parts.teacher_engines[name], tasks, name)
            perplexity |= self.perplexity(self.parts.teachers[name], [name])
        return {"accuracy": accuracy, "perplexity": perplexity}

    def _over_shares(self, total: float, rows: int) -> tuple[float, int]:
        """Of all shares, on every stage."""
        known = self.parts.shares.known(torch.tensor([total, rows], dtype=torch.float64))
        total, rows = self.parts.shares.sum(known)
        return total, int(rows)
