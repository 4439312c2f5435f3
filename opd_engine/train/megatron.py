"""The training loop on Megatron: the same settings, folders and journal, the model split over ranks.

Read `run` first, then MegatronTrainer.step. Rollouts come from the current weights by whole forwards, which fits small
models; weights that train, teachers' weights and what is written to disk go through one WeightStore. A run killed at
any moment continues when the same command is given again: bit for bit on the same ranks, to rounding on others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_engine.distillation.phases import Phases
from opd_engine.distillation.policy import group_advantages
from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.distillation.step import ScoredRollouts, row_divergences
from opd_engine.integrations.hf.models import load_tokenizer, token_to_id, torch_dtype
from opd_engine.integrations.megatron import BatchLayout, MegatronActor, MegatronScorer
from opd_engine.integrations.megatron.checkpoint import read_checkpoint
from opd_engine.integrations.megatron.gpt import RECOMPUTE, build_gpt
from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.loading import check_checkpoint, load_module, load_set
from opd_engine.integrations.megatron.rollout import generate
from opd_engine.integrations.megatron.teachers import own_teacher, switched_teacher
from opd_engine.integrations.megatron.training import make_trainable, start_megatron, stop_megatron
from opd_engine.parallel.collectives import all_reduce_max_, all_reduce_sum_, barrier, broadcast_
from opd_engine.parallel.launch import World, join_world
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.weight_store import WeightStore
from opd_engine.train.checkpoint import load_checkpoint, write_text
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import prepare
from opd_engine.train.journal import METRICS_FILE, Journal, read_metrics
from opd_engine.train.megatron_checkpoints import MegatronCheckpoints
from opd_engine.train.memory import RunMemory
from opd_engine.train.plots import draw_plots
from opd_engine.train.pretrain import learning_rate_factor
from opd_engine.train.progress import Progress
from opd_engine.train.prompts import Prompt, PromptCursor
from opd_engine.train.run_folder import CHECKPOINTS, RunFolder, folder_identity, opened
from opd_engine.train.samples import append_samples, choose
from opd_engine.train.settings import ConfigError
from opd_engine.train.summary import SUMMARY_FILE, make_summary

STUDENT = "student"


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as the configuration says, in the ranks that torchrun started.

    Returns: the summary on the first rank, nothing on the others.
    Raises: ConfigError or ValueError for what cannot run, before anything is trained.
    """
    started = time.monotonic()
    config.validate()
    _refuse(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = config.run.device.split(":")[0]
    with (
        join_world(device, timeout_s=config.run.timeout_s, group_when_alone=True) as world,
        opened(config, world) as folder,
    ):
        try:
            return MegatronTrainer(config, world, started, folder).train()
        finally:
            stop_megatron()


def _refuse(config: TrainConfig) -> None:
    for key, value, wanted, why in (
        ("run.cp", config.run.cp, 1, "its attention needs TransformerEngine; give MegatronActor a model that has it"),
    ):
        if value != wanted:
            raise ConfigError(f'{key}: wanted {wanted} for run.backend = "megatron", got {value}: {why}')


class MegatronTrainer:
    """One run on one rank."""

    def __init__(self, config: TrainConfig, world: World, started: float, folder: RunFolder) -> None:
        self.config, self.world, self.started, self.folder = config, world, started, folder
        self.directory = folder.path
        self.progress = Progress(shown=world.is_main and not config.run.quiet)
        self.groups = start_megatron(config.run.tp, config.run.pp, config.run.cp, seed=config.run.seed)
        if world.is_main:
            folder.discard_models()
            experiment = prepare(config, self.progress.supervised)
        barrier(world.group)
        self.experiment = experiment if world.is_main else prepare(config, self.progress.supervised, make=False)
        tasks = {prompt.task for prompt in (*self.experiment.train, *self.experiment.evaluation)}
        config.opd.tasks = config.opd.tasks or tuple(sorted(tasks))
        self._check_folders()
        self.memory = RunMemory(
            config,
            self.experiment.student,
            self.experiment.teachers,
            longest_prompt=max(len(prompt.token_ids) for prompt in self.experiment.train),
            world_size=world.world_size,
            stage=self.groups.pp.rank(),
            device=world.device,
            shown=world.is_main and not config.run.quiet,
        )
        self._load_models()
        self.cursor = PromptCursor(self.experiment.train, config.data.mixing, config.run.seed)
        self.generator = torch.Generator().manual_seed(config.run.seed)
        self.step_number = 0
        self.teacher_values: dict[str, dict[str, float]] = {}
        self.seconds_before = 0.0
        self.checkpoints = MegatronCheckpoints(
            folder.path / CHECKPOINTS, config.checkpoint.keep, world, self.actor, self.weights, self.token_map
        )
        self.teacher_set = {name: folder_identity(path) for name, path in self.experiment.teachers.items()}
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
    def _tokenizer(self, folder: Path, argument: str):
        trust = self.config.student.trust_remote_code
        return load_tokenizer(folder, trust_remote_code=trust, argument=argument)

    def _check_folders(self) -> None:
        """Refuse, before a model is built, folders that are not whole and teachers of another vocabulary."""
        self.tokenizer = self._tokenizer(self.experiment.student, "student")
        self.token_map = token_to_id(self.tokenizer)
        check_checkpoint(self.experiment.student, argument="student")
        self.teacher_maps: dict[str, Mapping[str, int]] = {}
        for name, folder in self.experiment.teachers.items():
            check_checkpoint(folder, argument=f"teacher {name!r}", token_map=self.token_map)
            own = token_to_id(self._tokenizer(folder, f"teacher {name!r}"))
            self.teacher_maps[name] = self.token_map if own == self.token_map else own

    def _load_models(self) -> None:
        config, groups, dtype = self.config, self.groups, torch_dtype(self.config.run.dtype)
        layout = BatchLayout(
            packed=False, max_seqs=config.optimizer.micro_batch or None, max_tokens=config.opd.score_batch_tokens
        )
        shape = GPTShape.read(self.experiment.student, argument="student")
        module = build_gpt(shape, groups, dtype=dtype, **RECOMPUTE[config.run.recompute])
        load_module(module, self.experiment.student, groups, argument="student")
        module.to(self.world.device)
        options = config.optimizer
        model, optimizer = make_trainable(
            module,
            lr=options.lr,
            beta1=options.beta1,
            beta2=options.beta2,
            weight_decay=options.weight_decay,
            clip=options.clip,
            distributed=True,  # also alone: its checkpoints are one format for every number of ranks
        )
        self.module = module
        self.weights = WeightStore(module, trainable=STUDENT)
        self.actor = MegatronActor(
            model,
            optimizer,
            config.opd,
            vocab_size=shape.vocab_size,
            groups=groups,
            layout=layout,
            token_map=self.token_map,
            workspace_bytes=config.run.workspace_bytes or None,
            guard=lambda: self.weights.check_trainable("MegatronActor"),
        )
        self.teachers: dict[str, MegatronScorer] = {}
        for name, folder in self.experiment.teachers.items():
            own = GPTShape.read(folder, argument=f"teacher {name!r}")
            common = {
                "vocab_size": own.vocab_size,
                "groups": groups,
                "layout": layout,
                "token_map": self.teacher_maps[name],
                "workspace_bytes": config.run.workspace_bytes or None,
            }
            if own == shape and config.run.teacher_weights == "switch":
                tag = f"teacher:{name}"
                load_set(self.weights, tag, module, folder, groups, argument=f"teacher {name!r}")
                self.teachers[name] = switched_teacher(model, self.weights, tag, **common)
                continue
            teacher = build_gpt(own, groups, dtype=dtype)
            load_module(teacher, folder, groups, argument=f"teacher {name!r}")
            resident = config.run.teacher_weights == "resident"
            self.teachers[name] = own_teacher(teacher, self.world.device, resident=resident, **common)
        self.pool = TeacherPool(self.teachers)
        self.pool.check_vocabulary(self.token_map)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def train(self) -> dict[str, Any]:
        """All steps, with evaluation and checkpoints."""
        steps, every = self.config.optimizer.steps, self.config.eval.every
        if self.folder.checkpoint is None:
            held_out = {name: self.accuracy(self.teachers[name], name) for name in self.teachers}
            self.teacher_values = {"accuracy": {t: v for found in held_out.values() for t, v in found.items()}}
            self._evaluate()
        with self.progress.training(steps, self.step_number) as bar:
            while self.step_number < steps:
                record = self.step()
                self.step_number += 1
                self._record("train", record)
                self.checkpoints.poll()
                bar.advance(record)
                last = self.step_number == steps
                if last or self.step_number % every == 0:
                    bar.note(self._evaluate())
                if last or self.step_number % self.config.checkpoint.every == 0:
                    self._save()
        self.checkpoints.finish()
        return self._finish()

    def step(self) -> dict[str, float]:
        """Fresh rollouts by the student as it is, their scores, and the optimizer steps that use them."""
        self.memory.look()
        config, phases = self.config, Phases(self.world.device, self.progress.phase)
        drawn = self.cursor.draw(config.rollout.prompts)
        prompts = [prompt for prompt in drawn for _ in range(config.rollout.samples)]
        uniforms = torch.rand(
            len(prompts), config.rollout.max_new_tokens, dtype=torch.float64, generator=self.generator
        )
        own = list(range(self.groups.dp.rank(), len(prompts), self.groups.dp.size()))
        with phases.phase("rollout"), self.weights.publishing():
            tokens, log_probs, finished, tops = generate(
                self.actor.student,
                [prompts[index].token_ids for index in own],
                max_new_tokens=config.rollout.max_new_tokens,
                end_ids=(self.tokenizer.eos_token_id,),
                temperature=config.rollout.temperature,
                top_k=config.rollout.top_k,
                top_p=config.rollout.top_p,
                uniforms=uniforms[own],
                top_logprobs=config.rollout.top_logprobs,
            )
        batch = pack_rollouts(
            [prompts[index].token_ids for index in own],
            tokens,
            response_log_probs=log_probs,
            response_top_logprobs=tops,
            teacher_names=[prompts[index].teacher for index in own],
            task_names=[prompts[index].task for index in own],
            sample_ids=own,
            rollout_ids=[index // config.rollout.samples for index in own],
            advantages=self._advantages(prompts, own, tokens),
            rewards=None if config.opd.reward_beta is None else self._rewards(prompts, own, tokens),
        )
        with phases.phase("score"):
            scored = self.actor.score_rollouts(batch, self.pool)
        if self.step_number % config.eval.every == 0 or self.step_number == config.optimizer.steps - 1:
            self._write_samples(batch, scored, prompts, dict(zip(own, finished)))
        for _ in range(config.opd.optimizer_steps_per_rollout):
            with phases.phase("update"):
                record = self._update(batch, scored)
        counts = torch.tensor([batch.num_tokens, sum(map(len, tokens)), sum(finished), len(own)], dtype=torch.float64)
        total, written, ended, number = self._over_samples(counts)
        record |= {"completion_tokens": written / number, "completion_ended": ended / number}
        return record | phases.measured(int(total), self._largest)

    def _write_samples(
        self, batch: RolloutBatch, scored: ScoredRollouts, prompts: Sequence[Prompt], finished: Mapping[int, bool]
    ) -> None:
        """A few of the first share's rollouts, as far from their teachers as the student is before it learns of them.

        Only the ranks of that share make the pass: the others wait where the step's gradients meet.
        """
        groups = self.groups
        if groups.dp.rank() != 0:
            return
        chosen = choose(batch)
        divergences = row_divergences(self.actor.student, chosen, scored, self.config.opd).to(self.world.device)
        # The last stage knows them, the first rank writes.
        broadcast_(divergences, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
        if self.journal is not None:
            append_samples(
                self.directory, self.step_number, chosen, divergences.cpu(), self.tokenizer, prompts, finished
            )

    def _update(self, batch: RolloutBatch, scored) -> dict[str, float]:
        options = self.config.optimizer
        factor = learning_rate_factor(self.step_number, options.steps, options.warmup_steps)
        lr = options.lr * (options.min_lr_fraction + (1.0 - options.min_lr_fraction) * factor)
        for group in self.actor.optimizer.param_groups:
            group["lr"] = lr
        with self.weights.training():
            report = self.actor.train_step(batch, scored)
        norm = float("nan") if report.grad_norm is None else report.grad_norm
        return report.metrics.means() | {
            "grad_norm": norm,
            "lr": lr,
            "skipped_step": float(not report.update_successful),
        }

    def _advantages(self, prompts: Sequence[Prompt], own: Sequence[int], tokens) -> list[float] | None:
        """Standardised over each prompt's samples, from 1 for a right answer; None where the loss reads none."""
        if self.config.opd.policy_coefficient == 0:
            return None
        if self.groups.dp.size() > 1 and self.config.rollout.samples > 1:
            raise ConfigError("rollout.samples: a prompt's samples lie on several data-parallel ranks; wanted 1 rank")
        rewards = torch.tensor(self._rewards(prompts, own, tokens), dtype=torch.float64)
        groups = torch.tensor([index // self.config.rollout.samples for index in own])
        return group_advantages(rewards, groups).tolist()

    def _rewards(self, prompts: Sequence[Prompt], own: Sequence[int], tokens) -> list[float]:
        """1 where a completion is the prompt's label, else 0."""
        return [float(right) for right in self.right(tokens, [prompts[index].label for index in own])]

    # ---- evaluation --------------------------------------------------------------------------------------------------
    def right(self, completions: Sequence[Sequence[int]], labels: Sequence[str | None]) -> list[bool]:
        """Whether each completion, its end token and outer white space left out, is the label."""
        end = self.tokenizer.eos_token_id
        bodies = [tokens[:-1] if tokens and tokens[-1] == end else tokens for tokens in completions]
        answers = self.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [label is not None and answer.strip() == label.strip() for answer, label in zip(answers, labels)]

    def accuracy(self, scorer: MegatronScorer, teacher: str | None = None) -> dict[str, float]:
        """Fraction of labelled held-out prompts answered exactly, greedily, by task; of one teacher's, if named."""
        found, limit = {}, self.config.eval.max_prompts or None
        for task in self.config.opd.tasks:
            prompts = [p for p in self.experiment.evaluation if p.task == task and p.label is not None][:limit]
            prompts = [p for p in prompts if teacher is None or p.teacher in ("", teacher)]
            if not prompts:
                continue
            own = prompts[self.groups.dp.rank() :: self.groups.dp.size()]
            tokens, *_ = generate(
                scorer,
                [prompt.token_ids for prompt in own],
                max_new_tokens=self.config.rollout.max_new_tokens,
                end_ids=(self.tokenizer.eos_token_id,),
                temperature=0.0,
            )
            right = sum(self.right(tokens, [prompt.label for prompt in own]))
            found[task] = self._over_samples(torch.tensor([float(right)]))[0] / len(prompts)
        return found

    def _evaluate(self) -> dict[str, float]:
        self.progress.phase("evaluate")
        self.weights.check_content("an evaluation")
        values = {f"accuracy/{task}": value for task, value in self.accuracy(self.actor.student).items()}
        self._record("eval", values)
        return values

    # ---- writing -----------------------------------------------------------------------------------------------------
    def _record(self, kind: str, values: dict[str, float]) -> None:
        if self.journal is not None:
            self.journal.record(self.step_number, kind, values | {"seconds": round(self._seconds(), 3)})

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _save(self) -> None:
        """Begins the checkpoint of this step; it is written while training goes on."""
        values = {
            "step": self.step_number,
            "cursor": self.cursor.state(),
            "teachers": self.teacher_set,
            "teacher_values": self.teacher_values,
            "journal_bytes": 0 if self.journal is None else self.journal.sync(),
            "seconds": self._seconds(),
        }
        self.memory.look()
        self.checkpoints.save(self.step_number, {"rollout_generator": self.generator.get_state()}, values)
        self.memory.saved()

    def _restore(self, checkpoint: Path) -> int:
        """Everything from the checkpoint; returns the size metrics.jsonl had."""
        tensors, values = load_checkpoint(checkpoint)
        for name, identity in self.teacher_set.items():
            if (saved := values["teachers"].get(name)) != identity:
                raise ConfigError(
                    f"teachers.{name}: {self.experiment.teachers[name]} is not what the run in {self.directory} began "
                    f"with: wanted {saved}, got {identity}"
                )
        read_checkpoint(self.actor, self.weights, checkpoint, seed=self.config.run.seed + values["step"])
        self.generator.set_state(tensors["rollout_generator"])
        self.cursor.restore(values["cursor"])
        self.step_number = values["step"]
        self.teacher_values = values["teacher_values"]
        self.seconds_before = values["seconds"]
        return values["journal_bytes"]

    def _finish(self) -> dict[str, Any]:
        memory = self.memory.over_ranks(self.world.group)
        if self.journal is None:
            return {}
        self.journal.sync()
        self.journal.close()
        draw_plots(self.directory, self.config.opd.divergence, self.teacher_values)
        records = read_metrics(self.directory / METRICS_FILE)
        summary = make_summary(self.config, records, self.teacher_values, self._seconds())
        summary["memory"] = memory
        write_text(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        return summary

    # ---- over ranks --------------------------------------------------------------------------------------------------
    def _over_samples(self, values: torch.Tensor) -> list[float]:
        """Summed over the ranks that hold other samples."""
        group = self.groups.dp if self.groups.dp.size() > 1 else None
        return all_reduce_sum_(values.to(self.world.device), group).tolist()

    def _largest(self, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_max_(values.to(self.world.device), self.world.group).cpu()
