"""What a run writes down: metrics.jsonl, TensorBoard events and, where asked for, Weights & Biases.

metrics.jsonl holds one JSON object a line: {"step": n, "kind": "train" | "eval", ...numbers}. Rank 0 writes alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


def _finite(value: Any) -> Any:
    """JSON has no word for infinities; they become strings, so that a reader cannot take them for numbers."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.append(
            {key: float(value) if value in ("inf", "-inf", "nan") else value for key, value in record.items()}
        )
    return records


def without_measurements(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without times, speed and memory: what two runs of the same settings share."""
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return {key: value for key, value in record.items() if key.partition("/")[0] not in measured}


class Journal:
    """Appends records to metrics.jsonl and, where tensorboard is installed, to its events."""

    def __init__(
        self, directory: Path, *, size: int | None = None, first_step: int = 0, wandb_project: str = ""
    ) -> None:
        """Opens the files; on resume cuts metrics.jsonl to `size` bytes, what it held at the checkpoint.

        wandb_project: also log there, which uploads the numbers; empty is off

        Raises: ValueError where a project is named and wandb is not installed.
        Mutates: directory.
        """
        # First: what cannot be logged as asked is refused before a file is touched.
        self._wandb = _open_wandb(directory, wandb_project)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(directory / METRICS_FILE, "ab")  # noqa: SIM115 (open for the whole run)
        self._file.truncate(size if size is not None else 0)
        self._file.seek(0, os.SEEK_END)
        self._events = _open_events(directory / EVENTS_FOLDER, first_step if size is not None else None)

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one line: step, kind and the values, and the numbers among them as events."""
        line = {"step": step, "kind": kind} | {key: _finite(value) for key, value in values.items()}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        if self._events is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def sync(self) -> int:
        """Forces the lines to disk; returns how many bytes there are, for the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()
        return self._file.tell()

    def close(self) -> None:
        """Closes all of them."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(directory: Path, project: str):
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"run.wandb_project: {project!r} needs the package wandb, which is not installed; the same numbers are in "
            f"{METRICS_FILE} and in TensorBoard's events"
        ) from None
    return wandb.init(project=project, name=directory.name, dir=str(directory), resume="allow")


def _open_events(directory: Path, purge_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is an extra; the same numbers are in metrics.jsonl
        return None
    return SummaryWriter(str(directory), purge_step=purge_step)
