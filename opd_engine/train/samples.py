"""samples.jsonl: a few of a run's rollouts, token by token, with how far the student was from its teachers at each.

One JSON object a line: {"step", "sample", "teacher", "task", "prompt", "tokens": [text], "divergence": [nats or
"inf"/"nan"], "ended", "label"}. `step` counts the optimizer steps that the student had behind it. Rank 0 writes alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.train.prompts import Prompt
from opd_engine.whole_files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_FILE = "samples.jsonl"
COUNT = 6
"""Rollouts kept of a step that is sampled; one a teacher at least."""


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a run, oldest first; none where there is no file, and without a line that a kill cut short."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def forget_after(directory: Path, step: int) -> None:
    """Drops what was sampled at `step` or later: a resumed run samples it again. Mutates: the file."""
    path = directory / SAMPLES_FILE
    kept = [sample for sample in read_samples(path) if sample["step"] < step]
    if path.is_file():
        write_text(path, "".join(json.dumps(sample) + "\n" for sample in kept))


def choose(batch: RolloutBatch) -> RolloutBatch:
    """The first rollouts of each teacher, COUNT in all, or one a teacher where there are more teachers."""
    by_teacher: dict[Any, list[int]] = {}
    for sequence, name in enumerate(batch.teacher_names):
        by_teacher.setdefault(name, []).append(sequence)
    each = max(1, COUNT // max(1, len(by_teacher)))
    return batch.select(sorted(sequence for own in by_teacher.values() for sequence in own[:each]))


def append_samples(
    directory: Path,
    step: int,
    batch: RolloutBatch,
    divergences: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    finished: Sequence[bool] | Mapping[int, bool],
) -> None:
    """Writes the rollouts of a batch down.

    batch: what `choose` chose
    divergences: [num_tokens], of each row that counts
    prompts, finished: by sample id

    Mutates: samples.jsonl in the directory.
    """
    bounds, mask = batch.cu_seqlens.tolist(), batch.loss_mask.tolist()
    tokens, values = batch.tokens.tolist(), divergences.tolist()
    lines = []
    for sequence, sample in enumerate(batch.sample_ids.tolist()):
        rows = [row for row in range(bounds[sequence], bounds[sequence + 1]) if mask[row]]
        first = rows[0] + 1 if rows else bounds[sequence + 1]
        names = batch.teacher_names[sequence]
        line = {
            "step": step,
            "sample": sample,
            "teacher": names if isinstance(names, str) else " + ".join(names),
            "task": prompts[sample].task,
            "prompt": tokenizer.decode(tokens[bounds[sequence] : first]),
            "tokens": [tokenizer.decode([tokens[row + 1]]) for row in rows],
            "divergence": [values[row] if math.isfinite(values[row]) else str(values[row]) for row in rows],
            "ended": finished[sample],
            "label": prompts[sample].label,
        }
        lines.append(json.dumps(line) + "\n")
    with open(directory / SAMPLES_FILE, "a", encoding="utf-8") as file:
        file.writelines(lines)
