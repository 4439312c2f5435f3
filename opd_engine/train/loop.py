"""The training loop: rollouts by the student, scores by its teachers, one divergence, one optimizer; evaluate, save.

Read `run` first, then Trainer.step: everything above the loss is in these two. The loop knows its parts by protocol
(opd_engine/train/assembly.py), so it is the same for every backend. A run killed at any moment continues when the same
command is given again: bit for bit on the same ranks, to rounding on others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd_engine.distillation.phases import Phases
from opd_engine.distillation.policy import group_advantages
from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.distillation.rollout_agreement import Agreement, compare_rollouts
from opd_engine.distillation.rollout_engine import Completions, Publication, Sampling
from opd_engine.distillation.sampling import sample_seeds
from opd_engine.distillation.step import ScoredRollouts
from opd_engine.integrations.hf.models import torch_dtype
from opd_engine.parallel.collectives import all_reduce_max_, barrier
from opd_engine.parallel.launch import World, join_world
from opd_engine.report.plots import draw_plots
from opd_engine.train.assembly import Assembly
from opd_engine.train.backends import backend, check_capabilities
from opd_engine.train.banner import banner
from opd_engine.train.checkpoint import load_state
from opd_engine.train.checkpoints import Checkpoints
from opd_engine.train.config import TrainConfig
from opd_engine.train.cursor import PromptCursor
from opd_engine.train.evaluation import Evaluator
from opd_engine.train.experiment import Experiment, prepare
from opd_engine.train.journal import METRICS_FILE, Journal, read_metrics
from opd_engine.train.learning_rate import learning_rate_factor
from opd_engine.train.progress import Progress
from opd_engine.train.prompts import Prompt
from opd_engine.train.run_folder import CHECKPOINTS, RunFolder, folder_identity, opened
from opd_engine.train.samples import append_samples, choose
from opd_engine.train.settings import ConfigError
from opd_engine.train.summary import SUMMARY_FILE, make_summary
from opd_engine.whole_files import write_text


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as the configuration says; the folder it writes is config.run.output_dir.

    Returns: the summary, as summary.json holds it, on the first rank; nothing on the others.
    Raises: ConfigError or ValueError for what cannot run, before anything is trained; CheckpointError where a
        checkpoint cannot be written.
    """
    started = time.monotonic()
    config.validate()
    config.require_packages()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    chosen, device = backend(config.run.backend), config.run.device.split(":")[0]
    with (
        join_world(device, timeout_s=config.run.timeout_s, group_when_alone=chosen.NEEDS_GROUP) as world,
        opened(config, world) as folder,
    ):
        progress = Progress(shown=world.is_main and not config.run.quiet)
        experiment = _prepare(config, world, folder, progress)
        tasks = {prompt.task for prompt in (*experiment.train, *experiment.evaluation)}
        config.opd.tasks = config.opd.tasks or tuple(sorted(tasks - {""}))
        progress.lines(banner(config, world, experiment, folder.checkpoint))
        with chosen.assemble(config, world, experiment) as parts:
            return Trainer(config, world, folder, experiment, parts, progress, started).train()


def _prepare(config: TrainConfig, world: World, folder: RunFolder, progress: Progress) -> Experiment:
    """Models and prompts; what an embedded example makes, the first rank makes and the others find."""
    if world.is_main:
        folder.discard_models()
        experiment = prepare(config, progress.supervised)
        folder.take(experiment)
    barrier(world.group)
    return experiment if world.is_main else prepare(config, progress.supervised, make=False)


class Trainer:
    """One run on one rank: its parts, the data cursor, and the steps over them."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        experiment: Experiment,
        parts: Assembly,
        progress: Progress,
        started: float,
    ) -> None:
        check_capabilities(config, parts.actor.capabilities)
        self.config, self.world, self.folder, self.started = config, world, folder, started
        self.directory, self.progress, self.experiment = folder.path, progress, experiment
        self.parts, self.actor, self.shares = parts, parts.actor, parts.shares
        rollout = config.rollout
        self.sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            end_ids=parts.end_ids,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            top_logprobs=rollout.top_logprobs,
        )
        self.evaluator = Evaluator(
            experiment, config.eval, parts, self.sampling, config.opd.temperature, config.run.seed + 1
        )
        self.cursor = PromptCursor(experiment.train, config.data.mixing, config.run.seed)
        self.step_number = 0
        self.teacher_set = {name: folder_identity(path) for name, path in experiment.teachers.items()}
        self.teacher_values: dict[str, dict[str, float]] = {}
        self.seconds_before = 0.0
        self._published = self._compared = False
        self.checkpoints = Checkpoints(
            self.directory / CHECKPOINTS, config.checkpoint.keep, world, self.actor, parts.tokenizer.save_pretrained
        )
        torch.manual_seed(config.run.seed)
        journal_size = None if folder.checkpoint is None else self._restore(folder.checkpoint)
        self.journal: Journal | None = None
        if world.is_main:
            folder.begin(self.step_number)
            first, project = self.step_number + 1, config.run.wandb_project
            self.journal = Journal(self.directory, size=journal_size, first_step=first, wandb_project=project)

    def _restore(self, checkpoint: Path) -> int:
        """Everything from the checkpoint; returns the size that metrics.jsonl had."""
        values = load_state(checkpoint)
        for name, identity in self.teacher_set.items():
            if (saved := values["teachers"].get(name)) != identity:
                raise ConfigError(
                    f"teachers.{name}: {self.experiment.teachers[name]} is not what the run in {self.directory} began "
                    f"with: wanted {saved}, got {identity}"
                )
        self.checkpoints.load(checkpoint)
        self.cursor.restore(values["cursor"])
        self.step_number = values["step"]
        self.teacher_values = values["teacher_values"]
        self.seconds_before = values["seconds"]
        return values["journal_bytes"]

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def train(self) -> dict[str, Any]:
        """All steps, with evaluation, checkpoints and plots; returns the summary."""
        steps = self.config.optimizer.steps
        if self.folder.checkpoint is None:
            self.teacher_values = self.evaluator.measure_teachers()
            self._evaluate()
            self._save()
        with self.progress.training(steps, self.step_number) as bar:
            while self.step_number < steps:
                record = self.step()
                self.step_number += 1
                self._record("train", record)
                self.checkpoints.poll()
                bar.advance(record)
                last = self.step_number == steps
                if last or self.step_number % self.config.eval.every == 0:
                    bar.note(self._evaluate())
                if last or self.step_number % self.config.checkpoint.every == 0:
                    self._save()
        self.checkpoints.finish()
        return self._finish()

    def step(self) -> dict[str, float]:
        """One step: fresh rollouts, their support and scores, and the optimizer steps that use them."""
        if self.parts.memory is not None:
            self.parts.memory.look()
        config, phases = self.config, Phases(self.world.device, self.progress.phase)
        drawn, samples = self.cursor.draw(config.rollout.prompts), config.rollout.samples
        # Whole prompts are dealt, so that all samples of one meet on one rank.
        own = [index * samples + copy for index in self.shares.deal(len(drawn)) for copy in range(samples)]
        prompts = [drawn[sample // samples] for sample in own]
        with phases.phase("rollout"):
            completions = self._write(prompts, own)
        batch = self._pack(prompts, own, completions)
        with phases.phase("score"):
            gap = self._compare(batch)
            scored = self.actor.score_rollouts(batch, self.parts.teachers)
        if self.step_number % config.eval.every == 0 or self.step_number == config.optimizer.steps - 1:
            self._write_samples(batch, scored, dict(zip(own, prompts)), dict(zip(own, completions.finished)))
        for _ in range(config.opd.optimizer_steps_per_rollout):
            with phases.phase("update"):
                record = self._update(batch, scored)
        lengths = [len(tokens) for tokens in completions.tokens]
        counts = [batch.num_tokens, sum(lengths), sum(completions.finished), len(own)]
        total, written, ended, number = self.shares.sum(torch.tensor(counts, dtype=torch.float64))
        record |= gap | {"completion_tokens": written / number, "completion_ended": ended / number}
        return record | phases.measured(int(total), self._largest)

    def _write(self, prompts: Sequence[Prompt], samples: Sequence[int]) -> Completions:
        """This share's completions, by the weights as they are now."""
        self._publish()
        seeds = sample_seeds(self.config.run.seed, self.step_number, samples)
        return self.parts.engine.generate([prompt.token_ids for prompt in prompts], self.sampling, seed=seeds)

    def _publish(self) -> None:
        """Hand the student's weights to the engine, once after each change of them."""
        if not self._published:
            weights = self.actor.weights
            with weights.publishing() as tensors:
                self.parts.engine.publish(Publication(version=weights.publications + 1, tensors=tensors))
            self._published = True

    def _pack(self, prompts: Sequence[Prompt], samples: Sequence[int], completions: Completions) -> RolloutBatch:
        config = self.config
        rollout_ids = [sample // config.rollout.samples for sample in samples]
        rewards = advantages = None
        if config.opd.reward_beta is not None or config.opd.policy_coefficient > 0:
            right = self.evaluator.right(completions.tokens, [prompt.label for prompt in prompts])
            rewards = [float(value) for value in right]
        if config.opd.policy_coefficient > 0:
            of_prompt = torch.tensor(rollout_ids, dtype=torch.int64)
            advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), of_prompt).tolist()
        return pack_rollouts(
            [prompt.token_ids for prompt in prompts],
            completions.tokens,
            response_log_probs=completions.log_probs,
            response_top_logprobs=completions.top_logprobs,
            teacher_names=[prompt.teacher for prompt in prompts],
            teacher_prompts=self._teacher_prompts(prompts),
            task_names=[prompt.task for prompt in prompts],
            sample_ids=list(samples),
            rollout_ids=rollout_ids,
            advantages=advantages,
            rewards=rewards if config.opd.reward_beta is not None else None,
        )

    def _compare(self, batch: RolloutBatch) -> dict[str, float]:
        """What wrote against what trains, on a few rollouts of each step; on all of the first after a start."""
        few = self._agreement(choose(batch))
        (few if self._compared else self._agreement(batch)).check(torch_dtype(self.config.run.dtype))
        self._compared = True
        return {"rollout_gap": few.mean, "rollout_gap_max": few.largest}

    def _agreement(self, batch: RolloutBatch) -> Agreement:
        shares = self.shares
        return compare_rollouts(
            batch,
            self.actor.student,
            temperature=self.sampling.temperature,
            known=shares.known,
            sum_over_shares=shares.sum,
            largest_over_shares=self._largest,
        )

    def _teacher_prompts(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None] | None:
        if not self.experiment.prefixes:
            return None
        return [self.experiment.seen_by(prompt.teachers, prompt.token_ids) for prompt in prompts]

    def _write_samples(
        self, batch: RolloutBatch, scored: ScoredRollouts, prompts: dict[int, Prompt], finished: dict[int, bool]
    ) -> None:
        """A few of the first share's rollouts, as far from their teachers as the student is before it learns of them.

        Every share makes the pass, since a sharded student takes all ranks; the first rank writes its own.
        """
        chosen = choose(batch)
        divergences = self.actor.row_divergences(chosen, scored)
        if self.journal is not None:
            tokenizer = self.parts.tokenizer
            append_samples(self.directory, self.step_number, chosen, divergences, tokenizer, prompts, finished)

    def _update(self, batch: RolloutBatch, scored: ScoredRollouts) -> dict[str, float]:
        """One optimizer step on all of the batch."""
        options = self.config.optimizer
        factor = learning_rate_factor(self.step_number, options.steps, options.warmup_steps)
        lr = options.lr * (options.min_lr_fraction + (1.0 - options.min_lr_fraction) * factor)
        report = self.actor.train_step(batch, scored, lr=lr)
        self._published = False
        norm = float("nan") if report.grad_norm is None else report.grad_norm
        return report.metrics.means() | {
            "grad_norm": norm,
            "lr": lr,
            "skipped_step": float(not report.update_successful),
        }

    # ---- writing -----------------------------------------------------------------------------------------------------
    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _record(self, kind: str, values: dict[str, float]) -> None:
        if self.journal is not None:
            self.journal.record(self.step_number, kind, values | {"seconds": round(self._seconds(), 3)})

    def _largest(self, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_max_(values.to(self.world.device), self.world.group).cpu()

    def _evaluate(self) -> dict[str, float]:
        self.progress.phase("evaluate")
        self._publish()
        values = self.evaluator.measure()
        self._record("eval", values)
        return values

    def _save(self) -> None:
        """Begins the checkpoint of this step."""
        memory = self.parts.memory
        if memory is not None:
            memory.look()
        values = {
            "step": self.step_number,
            "cursor": self.cursor.state(),
            "teachers": self.teacher_set,
            "teacher_values": self.teacher_values,
            "journal_bytes": 0 if self.journal is None else self.journal.sync(),
            "seconds": self._seconds(),
        }
        self.checkpoints.save(self.step_number, values)
        if memory is not None:
            if memory.is_one:
                self.checkpoints.finish()
            memory.saved()

    def _finish(self) -> dict[str, Any]:
        memory = None if self.parts.memory is None else self.parts.memory.over_ranks(self.world.group)
        if self.journal is None:
            return {}
        self.journal.sync()
        self.journal.close()
        records = read_metrics(self.directory / METRICS_FILE)
        summary = make_summary(self.config, records, self.teacher_values, self._seconds())
        if memory is not None:
            summary["memory"] = memory
        write_text(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        draw_plots(self.directory)
        return summary
