"""The training loop: rollouts by the student, scores by its teachers, one divergence, AdamW; evaluate, save, resume.

Read `run` first, then Trainer.step: everything above the loss is in these two. A resumed run continues bit for bit:
weights, optimizer, generators and the data cursor are in the checkpoint, metrics.jsonl is cut back to it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd_engine.distillation.metrics import add_metrics
from opd_engine.distillation.phases import Phases
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.distillation.step import ScoredRollouts, distillation_loss, row_divergences, score_rollouts
from opd_engine.integrations.hf.backend import HFBackend, even_shard, make_backend
from opd_engine.integrations.hf.models import (
    end_token_ids,
    load_model,
    load_tokenizer,
    padding_token_id,
    save_model,
    torch_dtype,
)
from opd_engine.integrations.hf.rollout import Completions
from opd_engine.parallel.collectives import all_gather_json, all_reduce_max_, barrier
from opd_engine.parallel.launch import ParallelGroups, World, join_world, parallel_groups
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.pool import TeacherPool
from opd_engine.train.checkpoint import load_checkpoint, save_checkpoint, write_text
from opd_engine.train.config import TrainConfig
from opd_engine.train.evaluation import Evaluator
from opd_engine.train.experiment import Experiment, prepare
from opd_engine.train.journal import METRICS_FILE, Journal, read_metrics
from opd_engine.train.plots import draw_plots
from opd_engine.train.pretrain import learning_rate_factor
from opd_engine.train.progress import Progress
from opd_engine.train.prompts import Prompt, PromptCursor
from opd_engine.train.rollouts import Writer
from opd_engine.train.run_folder import CHECKPOINTS, RunFolder, opened
from opd_engine.train.samples import append_samples, choose
from opd_engine.train.settings import ConfigError
from opd_engine.train.summary import SUMMARY_FILE, make_summary


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as the configuration says; the folder it writes is config.run.output_dir.

    Returns: the summary, as summary.json holds it.
    Raises: ConfigError or ValueError for what cannot run; CheckpointError where a checkpoint cannot be written.
    """
    started = time.monotonic()
    config.validate()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    _quiet_transformers()
    with join_world(config.run.device.split(":")[0], timeout_s=config.run.timeout_s) as world:
        if world.world_size != config.run.tp:
            raise ConfigError(
                f"run.tp: wanted the number of ranks that were started, {world.world_size}, got {config.run.tp} "
                "(start them with: torchrun --nproc-per-node TP -m opd_engine train ... --tp TP)"
            )
        with opened(config, world) as folder:
            return Trainer(config, world, started, folder).train()


def _quiet_transformers() -> None:
    """Its bars for every folder it reads or writes would drown ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Trainer:
    """One run on one rank: models, optimizer, cursor and generators, and the steps over them."""

    def __init__(self, config: TrainConfig, world: World, started: float, folder: RunFolder) -> None:
        self.config, self.world, self.started, self.folder = config, world, started, folder
        self.directory = folder.path
        self.groups = parallel_groups(world, config.run.tp)
        self.progress = Progress(shown=world.is_main and not config.run.quiet)
        self.experiment = self._prepare()
        tasks = {prompt.task for prompt in (*self.experiment.train, *self.experiment.evaluation)}
        config.opd.tasks = config.opd.tasks or tuple(sorted(tasks - {""}))
        self._load_models()
        self.optimizer = torch.optim.AdamW(
            self.student.module.parameters(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            weight_decay=config.optimizer.weight_decay,
        )
        self.cursor = PromptCursor(self.experiment.train, config.data.mixing, config.run.seed)
        self.generator = torch.Generator().manual_seed(config.run.seed)
        torch.manual_seed(config.run.seed)
        self.step_number = 0
        self.teacher_values: dict[str, dict[str, float]] = {}
        self.seconds_before = 0.0
        journal_size = self._restore(folder.checkpoint) if folder.checkpoint is not None else None
        if world.is_main:
            folder.begin(self.step_number)
        self.journal = (
            Journal(
                self.directory,
                size=journal_size,
                first_step=self.step_number + 1,
                wandb_project=config.run.wandb_project,
            )
            if world.is_main
            else None
        )

    # ---- starting ----------------------------------------------------------------------------------------------------
    def _prepare(self) -> Experiment:
        if self.world.is_main:
            self.folder.discard_models()
            experiment = prepare(self.config, self.progress.supervised)
        barrier(self.world.group)
        return experiment if self.world.is_main else prepare(self.config, self.progress.supervised, make=False)

    def _load_models(self) -> None:
        config, groups = self.config, self.groups
        source = self.folder.checkpoint or self.experiment.student
        self.tokenizer = load_tokenizer(
            source, trust_remote_code=config.student.trust_remote_code, argument="student.path"
        )
        self.student = self._backend(source, "student.path", groups)
        self.teachers = {
            name: self._backend(path, f"teachers.{name}", groups) for name, path in self.experiment.teachers.items()
        }
        for teacher in self.teachers.values():
            teacher.module.requires_grad_(False)
            teacher.share_token_map(self.student)
        self.pool = TeacherPool(
            {
                name: LocalTeacher(teacher, max_tokens=config.opd.score_batch_tokens)
                for name, teacher in self.teachers.items()
            }
        )
        self.pool.check_vocabulary(self.student.token_to_id())
        config.validate(self.student.vocab_size)
        self.writer = Writer(
            config.rollout,
            end_token_ids(self.student.module, self.tokenizer),
            padding_token_id(self.tokenizer),
            self.world,
        )
        self.evaluator = Evaluator(
            self.experiment, config.eval, self.writer, self.tokenizer, config.opd.temperature, config.run.seed + 1
        )

    def _backend(self, path: Path, argument: str, groups: ParallelGroups) -> HFBackend:
        trust = self.config.student.trust_remote_code
        dtype = torch_dtype(self.config.run.dtype)
        module = load_model(path, dtype=dtype, device=self.world.device, trust_remote_code=trust, argument=argument)
        tokenizer = load_tokenizer(path, trust_remote_code=trust, argument=argument)
        vocab_size = module.config.get_text_config().vocab_size
        shard = even_shard(vocab_size, groups.tp_group, groups.tp_size, groups.tp_rank)
        return make_backend(module, tokenizer, shard=shard)

    def _restore(self, checkpoint: Path) -> int:
        """Everything but the weights from the checkpoint; returns the size metrics.jsonl had."""
        tensors, values = load_checkpoint(checkpoint)
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.generator.set_state(tensors["rollout_generator"])
        torch.set_rng_state(tensors["torch_generator"])
        self.cursor.restore(values["cursor"])
        self.step_number = values["step"]
        self.teacher_values = values["teacher_values"]
        self.seconds_before = values["seconds"]
        return values["journal_bytes"]

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def train(self) -> dict[str, Any]:
        """All steps, with evaluation, checkpoints and plots; returns the summary."""
        steps = self.config.optimizer.steps
        if not self.teacher_values:
            self.teacher_values = self.evaluator.measure_teachers(self.teachers)
        if self.folder.checkpoint is None:
            self._evaluate()
            self._save()
        with self.progress.training(steps, self.step_number) as bar:
            while self.step_number < steps:
                record = self.step()
                self.step_number += 1
                self._record("train", record)
                bar.advance(record)
                last = self.step_number == steps
                if last or self.step_number % self.config.eval.every == 0:
                    bar.note(self._evaluate())
                if last or self.step_number % self.config.checkpoint.every == 0:
                    self._save()
        return self._finish()

    def step(self) -> dict[str, float]:
        """One step: fresh rollouts, their support and scores, and the optimizer steps that use them."""
        config, phases = self.config, Phases(self.world.device, self.progress.phase)
        prompts = [prompt for prompt in self.cursor.draw(config.rollout.prompts) for _ in range(config.rollout.samples)]
        with phases.phase("rollout"):
            completions = self.writer.write(self.student.module, prompts, self.generator)
        batch = pack_rollouts(
            [prompt.token_ids for prompt in prompts],
            completions.tokens,
            response_log_probs=completions.log_probs,
            response_top_logprobs=completions.top_log_probs,
            teacher_names=[prompt.teacher for prompt in prompts],
            task_names=[prompt.task for prompt in prompts],
            rollout_ids=[index // config.rollout.samples for index in range(len(prompts))],
            rewards=self._rewards(prompts, completions) if config.opd.reward_beta is not None else None,
        )
        with phases.phase("score"):
            scored = score_rollouts(batch, self.student, self.pool, config.opd)
        if self.step_number % config.eval.every == 0 or self.step_number == config.optimizer.steps - 1:
            self._write_samples(batch, scored, prompts, completions)
        for _ in range(config.opd.optimizer_steps_per_rollout):
            with phases.phase("update"):
                record = self._update(batch, scored)
        lengths = [len(tokens) for tokens in completions.tokens]
        record["completion_tokens"] = sum(lengths) / len(lengths)
        record["completion_ended"] = sum(completions.finished) / len(completions.finished)
        return record | phases.measured(batch.num_tokens, self._largest)

    def _write_samples(
        self, batch: RolloutBatch, scored: ScoredRollouts, prompts: Sequence[Prompt], completions: Completions
    ) -> None:
        """A few of the step's rollouts, as far from their teachers as the student is before it learns of them."""
        chosen, config = choose(batch), self.config.opd
        student = LocalTeacher(self.student, max_tokens=config.score_batch_tokens)
        divergences = row_divergences(student, chosen, scored, config)
        if self.journal is not None:
            finished = completions.finished
            append_samples(self.directory, self.step_number, chosen, divergences, self.tokenizer, prompts, finished)

    def _rewards(self, prompts: Sequence[Prompt], completions: Completions) -> list[float]:
        """1 where a completion is the prompt's label, else 0; for opd.reward_beta alone."""
        return [float(right) for right in self.evaluator.right(completions.tokens, [p.label for p in prompts])]

    def _update(self, batch: RolloutBatch, scored: ScoredRollouts) -> dict[str, float]:
        """One optimizer step on all of the batch, in micro-batches whose gradients add up."""
        optimizer, config = self.config.optimizer, self.config.opd
        parameters = [p for p in self.student.module.parameters() if p.requires_grad]
        factor = learning_rate_factor(self.step_number, optimizer.steps, optimizer.warmup_steps)
        lr = optimizer.lr * (optimizer.min_lr_fraction + (1.0 - optimizer.min_lr_fraction) * factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.student.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        denominators = Denominators.of(batch, config)
        parts = []
        for micro in batch.micro_batches(max_seqs=optimizer.micro_batch or None):
            logits = self.student.logits(micro)
            loss, metrics = distillation_loss(logits, micro, scored, config, self.student.shard, denominators)
            loss.backward()
            parts.append(metrics)
        scored.release(batch)
        norm = torch.nn.utils.clip_grad_norm_(parameters, optimizer.clip or math.inf)
        # A step on a gradient that is not finite would destroy the weights; it is left out and counted.
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.student.module.eval()
        return add_metrics(parts).means() | {"grad_norm": float(norm), "lr": lr, "skipped_step": float(not finite)}

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
        values = self.evaluator.measure(self.student, self.teachers)
        self._record("eval", values)
        return values

    def _save(self) -> None:
        """Writes the checkpoint of this step; the other ranks wait, and prove that their weights are the same."""
        total = sum(float(p.detach().double().sum()) for p in self.student.module.parameters())
        totals = all_gather_json(total.hex(), self.world.group, torch.device("cpu"))
        assert len(set(totals)) == 1, f"step {self.step_number}: the ranks' replicated weights differ: sums {totals}"
        if self.journal is not None:
            tensors = {
                "optimizer": self.optimizer.state_dict(),
                "rollout_generator": self.generator.get_state(),
                "torch_generator": torch.get_rng_state(),
            }
            values = {
                "step": self.step_number,
                "cursor": self.cursor.state(),
                "teacher_values": self.teacher_values,
                "journal_bytes": self.journal.sync(),
                "seconds": self._seconds(),
            }
            save_checkpoint(
                self.directory / CHECKPOINTS,
                self.step_number,
                lambda folder: save_model(self.student.module, self.tokenizer, folder),
                tensors,
                values,
                self.config.checkpoint.keep,
            )
        barrier(self.world.group)

    def _finish(self) -> dict[str, Any]:
        if self.journal is None:
            return {}
        self.journal.close()
        draw_plots(self.directory, self.config.opd.divergence, self.teacher_values)
        summary = make_summary(
            self.config, read_metrics(self.directory / METRICS_FILE), self.teacher_values, self._seconds()
        )
        write_text(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        return summary
