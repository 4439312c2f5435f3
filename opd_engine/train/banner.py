"""What a run is about to do, said before it does: models, prompts, template, tokens, ranks, and its folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opd_engine.parallel.launch import World
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.folders import ADAPTER
from opd_engine.train.prompts import Prompt
from opd_engine.train.teacher_settings import settings_of

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def banner(config: TrainConfig, world: World, experiment: Experiment, checkpoint: Path | None) -> list[str]:
    """The lines.

    checkpoint: that the run continues from
    """
    run = config.run
    rows = [("student", f"{_model(experiment.student)}; {_training(config)}")]
    for name, folder in experiment.teachers.items():
        own = settings_of(config.teachers.get(name, ""))
        rows.append((f"teacher {name}", f"{_model(folder)}; scores in {own.dtype or run.dtype}"))
    rows.append(("prompts", _prompts(experiment)))
    rows.append(("template", experiment.template))
    rows.append(("a step", _tokens(config, experiment.train)))
    ranks = f"{world.world_size} ranks of {world.device.type}" if world.world_size > 1 else str(world.device)
    axes = [f"{axis} {size}" for axis in ("tp", "pp", "cp") if (size := getattr(run, axis)) > 1]
    rows.append(("device", ", ".join([f"{run.backend} on {ranks}", *axes])))
    every, keep = config.checkpoint.every, config.checkpoint.keep
    writes = f"{run.output_dir}: metrics, samples, a summary with plots; a checkpoint every {every} steps, {keep} kept"
    rows.append(("writes", writes))
    if checkpoint is not None:
        rows.append(("continues", f"from {checkpoint}"))
    width = max(len(label) for label, _ in rows)
    return [f"{label.ljust(width)}  {text}" for label, text in rows]


def _training(config: TrainConfig) -> str:
    half = config.run.dtype in ("bfloat16", "float16")
    trained = f"trains in {config.run.dtype}" + (" with float32 weights beside" if half else "")
    return f"{trained}, adapters of rank {config.student.lora_rank}" if config.student.lora_rank else trained


def _model(folder: Path) -> str:
    """The folder and what its weights say of themselves: only headers are read."""
    from safetensors import SafetensorError, safe_open

    numbers, dtypes = 0, Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    size = math.prod(part.get_shape())
                    numbers += size
                    dtypes[part.get_dtype()] += size
        except (OSError, SafetensorError):
            return str(folder)  # what loads it says what is wrong
    if not numbers:
        return str(folder)
    dtype = dtypes.most_common(1)[0][0]
    kind = "an adapter of " if (folder / ADAPTER).is_file() else ""
    return f"{folder}, {kind}{_count(numbers)} parameters in {_DTYPES.get(dtype, dtype)}"


def _count(number: int) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return str(number)


def _prompts(experiment: Experiment) -> str:
    """Trained and held out, by who teaches them."""
    trained, held = (
        Counter("+".join(prompt.teachers) or "all" for prompt in part)
        for part in (experiment.train, experiment.evaluation)
    )
    names = list(dict.fromkeys([*trained, *held]))
    return "; ".join(f"{trained[name]:,} to train and {held[name]:,} held out for {name}" for name in names)


def _tokens(config: TrainConfig, prompts: Sequence[Prompt]) -> str:
    rollout = config.rollout
    samples = f" x {rollout.samples} samples" if rollout.samples > 1 else ""
    longest = max(prompt.num_tokens for prompt in prompts)
    most = rollout.prompts * rollout.samples * (longest + rollout.max_new_tokens)
    return (
        f"{rollout.prompts:,} prompts{samples}, up to {longest:,} tokens each and {rollout.max_new_tokens:,} new ones: "
        f"{most:,} tokens at the most; {config.optimizer.steps:,} steps"
    )
