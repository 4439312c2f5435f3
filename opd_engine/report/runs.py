"""What a run's folder says, for the report: settings, curves, samples and how far it came.

Everything is read from files that a run writes as it goes, so an unfinished or killed run reads like a finished one.
Settings are read as plain TOML: a run of another version shows all it has.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_engine.train.config import read_toml
from opd_engine.train.journal import METRICS_FILE, read_metrics
from opd_engine.train.samples import SAMPLES_FILE, read_samples
from opd_engine.train.settings import ConfigError, flatten_tables, show
from opd_engine.train.summary import SUMMARY_FILE

CONFIG_FILE = "config.toml"
_SECTIONS = {"run", "opd", "optimizer"}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One run.

    name: of its folder, made unique.  settings: dotted key -> text.  summary: None before the end.
    train, evaluations: the records of metrics.jsonl by kind.  written: when the metrics were last written, or None.
    """

    name: str
    directory: Path
    settings: dict[str, str]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: Mapping[str, Any] | None
    written: datetime.datetime | None

    @property
    def planned(self) -> int:
        """Steps the settings ask for."""
        text = self.settings.get("optimizer.steps", "0")
        return int(text) if text.isdigit() else 0

    @property
    def done(self) -> int:
        """Steps in the metrics."""
        return int(self.train[-1]["step"]) if self.train else 0

    @property
    def finished(self) -> bool:
        """Whether it came to its end: its summary is there, and all steps are in the metrics."""
        return self.summary is not None and self.done >= self.planned

    @property
    def backend(self) -> str:
        """hf or megatron, as the settings name it, without the quotes."""
        return self.settings.get("run.backend", '"hf"').strip('"')

    def series(self, kind: str, key: str) -> Points:
        """(step, value) of a metric, finite values alone; kind: "train" or "eval"."""
        records = self.train if kind == "train" else self.evaluations
        return [
            (float(record["step"]), float(record[key]))
            for record in records
            if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
        ]

    def names(self, kind: str, prefix: str) -> list[str]:
        """What follows `prefix` in the metrics' names, in order of first appearance."""
        records = self.train if kind == "train" else self.evaluations
        return list(dict.fromkeys(key[len(prefix) :] for r in records for key in r if key.startswith(prefix)))

    def total(self, key: str) -> float:
        """The sum of a metric over all steps."""
        return sum(value for _, value in self.series("train", key))

    @property
    def memory(self) -> list[dict[str, float]]:
        """Of each rank of a Megatron run at its end: its number, planned_bytes and measured_bytes; else nothing."""
        found = (self.summary or {}).get("memory")
        ranks = list(enumerate(found)) if isinstance(found, list) else []
        names = ("planned_bytes", "measured_bytes")
        return [
            {"rank": float(place), **{name: float(rank[name]) for name in names}}
            for place, rank in ranks
            if isinstance(rank, dict) and all(isinstance(rank.get(name), (int, float)) for name in names)
        ]

    def teacher_value(self, kind: str, name: str) -> float | None:
        """What a task's or text's own teacher reaches: kind "accuracy" or "perplexity"; None where nobody measured."""
        if self.summary is None:
            return None
        found = (
            self.summary.get("tasks", {}).get(name, {}).get("accuracy_teacher")
            if kind == "accuracy"
            else self.summary.get(kind, {}).get(name, {}).get("teacher")
        )
        return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def read_run(directory: Path, name: str) -> Run:
    """The run in a folder.

    Raises: ValueError where the folder is not one, with what is missing.
    """
    wanted = f"RUN: wanted the folder of a run (the run.output_dir of opd-engine train), got {str(directory)!r}"
    if not directory.exists():
        raise ValueError(f"{wanted}: there is no such folder")
    if not directory.is_dir():
        raise ValueError(f"{wanted}: it is a file")
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{wanted}: it holds no {CONFIG_FILE}")
    try:
        tables = read_toml(directory / CONFIG_FILE)
    except ConfigError as error:
        raise ValueError(f"{wanted}: {error}") from None
    if missing := sorted(_SECTIONS - tables.keys()):
        raise ValueError(f"{wanted}: its {CONFIG_FILE} has no section [{missing[0]}]")
    metrics = directory / METRICS_FILE
    records = [record for record in read_metrics(metrics) if {"step", "kind"} <= record.keys()]
    written = None
    if metrics.is_file():
        written = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, tz=datetime.timezone.utc)
    return Run(
        name=name,
        directory=directory,
        settings={key: show(value) for key, value in flatten_tables(tables).items()},
        train=[record for record in records if record["kind"] == "train"],
        evaluations=[record for record in records if record["kind"] == "eval"],
        samples=read_samples(directory / SAMPLES_FILE),
        summary=_read_summary(directory / SUMMARY_FILE),
        written=written,
    )


def read_runs(directories: Iterable[str | Path]) -> list[Run]:
    """Several runs, in order, each with a name of its own: as much of its path as tells it from the others."""
    paths = [Path(directory) for directory in directories]
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, full in zip(paths, resolved) if resolved.count(full) > 1)
        raise ValueError(f"RUN: wanted each run once, got {str(twice)!r} twice")
    deepest = max(len(path.parts) for path in resolved)
    parts = next(n for n in range(1, deepest + 1) if len({path.parts[-n:] for path in resolved}) == len(resolved))
    return [read_run(path, "/".join(full.parts[-parts:])) for path, full in zip(paths, resolved)]


def _read_summary(path: Path) -> Mapping[str, Any] | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def differing(runs: list[Run]) -> list[str]:
    """Keys of the settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
