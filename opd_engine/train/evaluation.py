"""Held-out evaluation: greedy accuracy where prompts have labels, full-vocabulary divergence, perplexity of texts.

It draws from generators of its own: when and how often a run is evaluated changes nothing of what it learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.functional.full import full_distill_loss
from opd_engine.functional.scores import gather_log_probs
from opd_engine.integrations.hf.backend import HFBackend
from opd_engine.teachers.local import scoring_mode
from opd_engine.train.config import EvalConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.prompts import Prompt
from opd_engine.train.rollouts import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluator:
    """Measures a student, or a teacher, on what was held out.

    temperature: of both sides in the divergence.  seed: of the rollouts on which it is measured without passages.
    """

    experiment: Experiment
    config: EvalConfig
    writer: Writer
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    seed: int

    def _held_out(self) -> dict[str, list[Prompt]]:
        by_task: dict[str, list[Prompt]] = {}
        for prompt in self.experiment.evaluation:
            by_task.setdefault(prompt.task, []).append(prompt)
        limit = self.config.max_prompts or None
        return {task: prompts[:limit] for task, prompts in sorted(by_task.items())}

    def accuracy(self, model: HFBackend, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """Fraction of labelled held-out prompts answered exactly, greedily, by task; no labels, no entry."""
        found = {}
        for task, prompts in self._held_out().items():
            labelled = [prompt for prompt in prompts if prompt.label is not None]
            if labelled and (tasks is None or task in tasks):
                written = self.writer.write(model.module, labelled, greedy=True)
                found[task] = sum(self.right(written.tokens, [p.label for p in labelled])) / len(labelled)
        return found

    def right(self, completions: Sequence[Sequence[int]], labels: Sequence[str | None]) -> list[bool]:
        """Whether each completion, its end token and outer white space left out, is the label."""
        ends = self.writer.end_ids
        bodies = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in completions]
        answers = self.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [label is not None and answer.strip() == label.strip() for answer, label in zip(answers, labels)]

    def _batches(self, student: HFBackend, teacher: str) -> Iterator[RolloutBatch]:
        """What divergence is measured on: the passages, or what the student samples after the held-out prompts."""
        limit = self.config.max_prompts or None
        if passages := self.experiment.passages.get(teacher, [])[:limit]:
            pairs = [(passage[:1], passage[1:]) for passage in passages]
        else:
            prompts = [p for prompts in self._held_out().values() for p in prompts if p.teacher in ("", teacher)]
            generator = torch.Generator().manual_seed(self.seed)
            written = self.writer.write(student.module, prompts, generator)
            pairs = [(prompt.token_ids, tokens) for prompt, tokens in zip(prompts, written.tokens, strict=True)]
        for start in range(0, len(pairs), self.config.batch_size):
            part = pairs[start : start + self.config.batch_size]
            yield pack_rollouts([prompt for prompt, _ in part], [tokens for _, tokens in part])

    @torch.no_grad()
    def divergence(self, student: HFBackend, teachers: Mapping[str, HFBackend]) -> dict[str, float]:
        """forward_kl over the full vocabulary, in nats a token, by teacher."""
        found = {}
        for name, teacher in teachers.items():
            total, rows = 0.0, 0
            for batch in self._batches(student, name):
                with scoring_mode(student), scoring_mode(teacher):
                    ours, theirs = student.logits(batch), teacher.logits(batch)
                if student.shard is not None and student.vocab_size != teacher.vocab_size:
                    break  # the shards' boundaries differ, and a full-vocabulary loss needs the same
                mask = batch.loss_mask.to(ours.device)
                loss = full_distill_loss(
                    ours[mask],
                    theirs[mask],
                    divergence="forward_kl",
                    temperature=self.temperature,
                    shard=student.shard,
                    teacher_vocab_size=teacher.vocab_size,
                )
                total += float(loss.double().sum())
                rows += int(mask.sum())
            if rows:
                found[name] = total / rows
        return found

    @torch.no_grad()
    def perplexity(self, model: HFBackend, names: Sequence[str] | None = None) -> dict[str, float]:
        """exp of the mean negative log-prob of the held-out passages' tokens, by teacher; absent without passages."""
        found = {}
        for name in self.experiment.passages:
            if names is not None and name not in names:
                continue
            total, rows = 0.0, 0
            for batch in self._batches(model, name):
                with scoring_mode(model):
                    log_probs = next_token_log_probs(model, batch)
                total -= float(log_probs.double().sum())
                rows += log_probs.numel()
            found[name] = math.exp(total / rows)
        return found

    def measure(self, student: HFBackend, teachers: Mapping[str, HFBackend]) -> dict[str, float]:
        """All of it for the student, as flat keys: accuracy/TASK, forward_kl/TEACHER, perplexity/TEACHER."""
        return {
            **{f"accuracy/{task}": value for task, value in self.accuracy(student).items()},
            **{f"forward_kl/{name}": value for name, value in self.divergence(student, teachers).items()},
            **{f"perplexity/{name}": value for name, value in self.perplexity(student).items()},
        }

    def measure_teachers(self, teachers: Mapping[str, HFBackend]) -> dict[str, dict[str, float]]:
        """{"accuracy": {task: value}, "perplexity": {name: value}}, each task and text by its own teacher."""
        own = {task: prompts[0].teacher for task, prompts in self._held_out().items()}
        accuracy, perplexity = {}, {}
        for name, teacher in teachers.items():
            accuracy |= self.accuracy(teacher, [task for task, teacher_name in own.items() if teacher_name == name])
            perplexity |= self.perplexity(teacher, [name])
        return {"accuracy": accuracy, "perplexity": perplexity}


def next_token_log_probs(model: HFBackend, batch: RolloutBatch) -> Tensor:
    """log q of the token that follows, [rows that count], under the whole vocabulary at temperature 1."""
    logits = model.logits(batch)
    mask = batch.loss_mask.to(logits.device)
    target = batch.next_tokens().to(logits.device)[mask]
    support = torch.empty(int(mask.sum()), 0, dtype=torch.int64, device=logits.device)
    return gather_log_probs(logits[mask], support, target=target, shard=model.shard).target_log_prob
