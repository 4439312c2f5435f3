"""The memory plan of a Megatron run: printed before anything is loaded, and held to what was measured at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_engine.integrations.megatron.gpt_shape import PUBLISHED, GPTShape
from opd_engine.parallel.collectives import all_gather_stacked
from opd_engine.scaling.memory_plan import StagePlan, Work, plan_memory, plan_table
from opd_engine.train.config import TrainConfig
from opd_engine.train.settings import ConfigError
from opd_engine.train.validation import teacher_paths

if TYPE_CHECKING:
    from opd_engine.parallel.collectives import ProcessGroup

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def shape_of(path: str | Path, *, argument: str) -> GPTShape:
    """From the folder's config.json, or, without one, of the published model that the folder's name begins with.

    Raises: ValueError where neither says it.
    """
    if (Path(path) / "config.json").is_file():
        return GPTShape.read(path, argument=argument)
    name = Path(path).name.lower()
    for known in sorted(PUBLISHED, key=len, reverse=True):
        if name.startswith(known):
            return PUBLISHED[known]
    raise ValueError(
        f"{argument}: wanted a folder with a config.json, or a name that begins with one of {', '.join(PUBLISHED)}, "
        f"got {str(path)!r}"
    )


def work_of(config: TrainConfig, dp: int, longest_prompt: int | None = None) -> Work:
    """The largest step there can be: every completion as long as it may be, and every prompt.

    longest_prompt: tokens; None: as long as the settings allow
    """
    length = (longest_prompt or config.data.max_prompt_tokens) + config.rollout.max_new_tokens
    share = -(-config.rollout.prompts * config.rollout.samples // dp)
    seqs = max(1, min(share, config.optimizer.micro_batch or share, config.opd.score_batch_tokens // length))
    new = config.rollout.max_new_tokens
    return Work(
        seqs=seqs,
        length=length,
        rows=seqs * new,
        micro_batches=-(-share // seqs),
        share_seqs=share,
        share_rows=share * new,
        k=config.opd.k,
        scorers=1 if config.opd.mixture == "route" else max(1, len(config.teachers)),
    )


def plan_run(
    config: TrainConfig,
    student: str | Path,
    teachers: Mapping[str, str | Path],
    world_size: int,
    longest_prompt: int | None = None,
) -> list[StagePlan]:
    """The plan of a run on so many ranks. Raises: ValueError where they do not divide, or a shape is not known."""
    run = config.run
    if world_size % (run.tp * run.pp * run.cp):
        raise ConfigError(
            f"run.tp={run.tp}, run.pp={run.pp}, run.cp={run.cp}: wanted a divisor of {world_size} ranks, "
            f"got {run.tp * run.pp * run.cp}"
        )
    dp = world_size // (run.tp * run.pp * run.cp)
    return plan_memory(
        shape_of(student, argument="student"),
        {name: shape_of(path, argument=f"teacher {name!r}") for name, path in teachers.items()},
        work_of(config, dp, longest_prompt),
        tp=run.tp,
        pp=run.pp,
        dp=dp,
        itemsize=_ITEMSIZE[run.dtype],
        teacher_weights="switch" if run.teacher_weights == "auto" else run.teacher_weights,
        recompute=run.recompute,
        workspace_bytes=run.workspace_bytes or None,
        on_cpu=run.device.startswith("cpu"),
    )


def dry_run(config: TrainConfig, world_size: int) -> str:
    """The plan as text, for any size on any machine: reads config.json files where there are some, and nothing else."""
    if config.run.backend != "megatron":
        raise ConfigError(f'--dry-run: wanted run.backend = "megatron", got {config.run.backend!r}')
    if config.data.task != "prompts":
        raise ConfigError(f'--dry-run: wanted data.task = "prompts", models of one\'s own, got {config.data.task!r}')
    plans = plan_run(config, config.student.path, teacher_paths(config), world_size)
    return plan_table(plans, _title(config, world_size))


def _title(config: TrainConfig, world_size: int, longest_prompt: int | None = None) -> str:
    run = config.run
    dp = world_size // (run.tp * run.pp * run.cp)
    work = work_of(config, dp, longest_prompt)
    return (
        f"memory plan: {world_size} ranks, tp {run.tp}, pp {run.pp}, dp {dp}, {run.dtype}, micro-batches of "
        f"{work.seqs} x {work.length} tokens, {work.micro_batches} a step"
    )


class RunMemory:
    """One rank's plan, printed by the first rank; begin before models are built, read at the end.

    longest_prompt: tokens of the longest there is; stage: the rank's pipeline stage
    """

    def __init__(
        self,
        config: TrainConfig,
        student: str | Path,
        teachers: Mapping[str, str | Path],
        *,
        longest_prompt: int,
        world_size: int,
        stage: int,
        device: torch.device,
        shown: bool,
    ) -> None:
        plans = plan_run(config, student, teachers, world_size, longest_prompt)
        if shown:
            print(plan_table(plans, _title(config, world_size, longest_prompt)), flush=True)
        self._planned, self._device = plans[stage], device
        self._moves = device.type == "cuda"
        if self._moves:
            self._before = torch.cuda.memory_allocated(device)
        else:
            _reset_resident_peak()
            self._before = _status_bytes("VmRSS")
        self._peak = self._saving_peak = 0

    @property
    def is_one(self) -> bool:
        """Whether host and device are one memory, where a checkpoint that is being written takes the training's."""
        return not self._moves

    def look(self) -> None:
        """Note the peak so far; call before something resets what counts it, and before a save."""
        peak = torch.cuda.max_memory_allocated(self._device) if self._moves else _status_bytes("VmHWM")
        self._peak = max(self._peak, peak)

    def saved(self) -> None:
        """On a CPU: what was taken since `look` was a checkpoint's. On a GPU a checkpoint takes host memory only."""
        if not self._moves:
            self._saving_peak = max(self._saving_peak, _status_bytes("VmHWM"))
            _reset_resident_peak()

    def over_ranks(self, group: ProcessGroup | None) -> list[dict[str, float]]:
        """Of every rank planned_bytes and measured_bytes, what it took since the beginning at its peak while training.

        On a CPU saving_planned_bytes and saving_measured_bytes too.

        Communicates: 32 bytes a rank over the group, all of whose ranks call.
        """
        if self._moves or not self._peak:
            self.look()  # on a CPU the checkpoint of the last step, whose copy may still be there, was preceded by one
        values = [self._planned.peak, self._peak - self._before, self._planned.saving, self._saving_peak - self._before]
        ranks = all_gather_stacked(torch.tensor(values, dtype=torch.float64, device=self._device), group).tolist()
        names = ("planned_bytes", "measured_bytes", "saving_planned_bytes", "saving_measured_bytes")
        shown = 2 if self._moves or not self._saving_peak else 4
        return [dict(zip(names[:shown], map(int, values))) for values in ranks]


def _status_bytes(name: str) -> int:
    """Of /proc/self/status; 0 where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
