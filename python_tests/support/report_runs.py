"""Folders of runs as `opd-engine train` writes them, made up: every metric, and output that wants to break out."""

from __future__ import annotations

import json
import math
from pathlib import Path

from opd_engine.distillation.metrics import GROUP_COUNTS, GROUP_MEANS
from opd_engine.train.config import TrainConfig, config_to_toml

HOSTILE = (
    "<script>document.title='taken'</script>",
    "]]></style></title><img src=x onerror=alert(1)>",
    "&amp; &#x3c; \"'`",
    "\x00\x1b[31m\x7f\x85\r",
    "\ud800 alone \udfff",
    "\ufffe\uffff\U0001fffe",
    "\u202eright to left\u2066",
    "{{ 7 * 7 }}{% raw %}",
    "日本語 🦙 \n\t",
    "",
)


def write_run(
    folder: Path,
    *,
    backend: str = "hf",
    steps: int = 40,
    planned: int | None = None,
    teachers: tuple[str, ...] = ("math", "code"),
    finished: bool = True,
    tokens: tuple[str, ...] = ("4", "2", ";"),
    lr: float = 1e-3,
) -> Path:
    """A run's folder; planned: steps the settings ask for, finished: whether its summary is there."""
    folder.mkdir(parents=True)
    config = TrainConfig()
    config.run.output_dir, config.run.backend = str(folder), backend
    config.optimizer.steps = steps if planned is None else planned
    config.optimizer.lr = lr
    config.teachers = {name: f"models/{name}" for name in teachers}
    (folder / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    records = []
    for step in range(steps + 1):
        if step:
            records.append({"step": step, "kind": "train", **train_values(step, teachers)})
        if step % 10 == 0:
            values = {f"accuracy/{name}": 0.5 + step / (2 * steps + 1) for name in teachers}
            values |= {f"forward_kl/{name}": 1 / (1 + step) for name in teachers}
            values |= {f"perplexity/{name}": 90.0 - step for name in teachers}
            records.append({"step": step, "kind": "eval", **values, "seconds": float(step)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = [
        {
            "step": step,
            "sample": index,
            "teacher": name,
            "task": name,
            "prompt": f"{name}: 40 + 2 = ",
            "tokens": list(tokens),
            "divergence": [10.0 ** (place % 5 - 3) for place in range(len(tokens))],
            "ended": True,
            "label": "42",
        }
        for step in (0, 10, 20, 39)
        for index, name in enumerate(teachers)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if finished:
        summary = {
            "tasks": {name: {"accuracy_teacher": 0.9} for name in teachers},
            "perplexity": {name: {"teacher": 40.0} for name in teachers},
        }
        if backend == "megatron":
            summary["memory"] = [{"planned_bytes": 5 * 2**20, "measured_bytes": (4 + r) * 2**20} for r in range(12)]
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def train_values(step: int, teachers: tuple[str, ...]) -> dict[str, float | str]:
    """All that both loops write for a step; an infinity and a number that is none are written as they are there."""
    values: dict[str, float | str] = {
        "loss": 1.0 / step,
        "policy_loss": 0.01,
        "divergence": "inf" if step == 3 else 1.0 / step,
        "grad_norm": "nan" if step == 4 else 1.0 + math.sin(step) / 2,
        "lr": 1e-3 / step,
        "support_size": 8.0,
        "completion_tokens": 12.0,
        "completion_ended": 0.5,
        "skipped_step": float(step == 4),
        "tokens_per_second": 1e4 + step,
        "peak_memory_bytes": 2.0**30,
        "seconds": float(step),
        **{f"seconds/{name}": 0.1 * step for name in ("rollout", "score", "update", "evaluate")},
    }
    for place, group in enumerate((*teachers, *(f"task:{name}" for name in teachers))):
        values |= {f"{kind}/{group}": 0.1 * (place + 1) + 0.5 / step for kind in (*GROUP_COUNTS, *GROUP_MEANS)}
    return values
