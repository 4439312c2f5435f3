"""A run's folder: whose run it holds, who writes it now, and whether this start continues it or begins one.

The same command given again continues where the newest checkpoint was written; with other settings it is refused. One
process at a time writes: a start waits for what a killed one has left behind to end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from opd_engine.parallel.collectives import barrier
from opd_engine.parallel.launch import World
from opd_engine.report.plots import PLOTS_FOLDER
from opd_engine.train.checkpoint import list_checkpoints
from opd_engine.train.config import TrainConfig, config_from_toml, config_to_toml, differences
from opd_engine.train.examples.workshop import MODELS
from opd_engine.train.experiment import Experiment
from opd_engine.train.journal import EVENTS_FOLDER, METRICS_FILE
from opd_engine.train.prompts import Prompt, content_of
from opd_engine.train.samples import SAMPLES_FILE, forget_after
from opd_engine.train.settings import ConfigError
from opd_engine.train.summary import SUMMARY_FILE
from opd_engine.whole_files import remove_leftovers, write_text

CONFIG_FILE = "config.toml"
CHECKPOINTS = "checkpoints"
DATA_FILE = "prompts.json"
"""How many prompts, and a hash of them, to train on and held out."""
HELD_OUT_FILE = "held_out.jsonl"
"""The prompts that are evaluated on: their line in the prompts file (0: not of one), teachers, label and token ids."""
_LOCK_FILE = ".lock"
# A killed run's other ranks need seconds to notice; the processes that write its checkpoint end by themselves.
_WAIT_S = 60.0
_ENDS_BYTES = 1 << 20


@contextlib.contextmanager
def written_alone(directory: Path) -> Iterator[None]:
    """For the length of the block no other process writes the run.

    Raises: ConfigError naming who holds it, where that one does not end within a minute.
    Mutates: the folder, which is made where it is absent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _WAIT_S
    # Processes forked from this one hold it too: a checkpoint that is being written outlives its killed trainer.
    with open(directory / _LOCK_FILE, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ConfigError(
                        f"run.output_dir: {directory} is being written by {file.read().strip() or 'another process'}"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks: whoever starts two at once is on their own
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def folder_identity(folder: Path) -> str:
    """A number of a model folder, to tell it from another: names, sizes, small files whole, large ones by their ends.

    It finds a teacher that was trained further or mixed up, not a single changed weight.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            if size > 2 * _ENDS_BYTES:
                file.seek(-_ENDS_BYTES, os.SEEK_END)
            digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()[:16]


class RunFolder:
    """The folder of the run that is starting, on one rank.

    path: of the folder
    checkpoint: where the run continues from; None where it begins
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.run.output_dir)
        self.checkpoint: Path | None = None
        self._config = config
        self._is_new = False
        self._data: dict[str, dict] | None = None
        self._held_out: list[Prompt] = []

    def require(self) -> None:
        """Where a run is to be resumed there is one; a mistyped folder is not made. Raises: ConfigError."""
        if self._config.run.resume and not (self.path / CONFIG_FILE).is_file():
            raise ConfigError(f"run.resume: wanted a run in {self.path}, got none (no {CONFIG_FILE})")

    def enter(self) -> None:
        """Refuses a folder whose run would be lost, or is another one. Changes nothing of a run that is there.

        Where there is none, its settings are written at once, so that from here on it can be continued.

        Raises: ConfigError that says what differs.
        """
        saved, config = self.path / CONFIG_FILE, self._config
        if not saved.is_file():
            write_text(saved, config_to_toml(config))
            self._is_new = True
        elif not config.run.overwrite and (changed := self._changed(config_from_toml(saved))):
            raise ConfigError(
                f"run.output_dir: {self.path} already holds a run of other settings ({'; '.join(changed)}); continue "
                "it with its own, discard it with --overwrite, or choose another folder"
            )

    def _changed(self, saved: TrainConfig) -> list[str]:
        """What keeps the saved run from going on; one that ended may be given more steps."""
        changed = differences(saved, self._config)
        steps, given = saved.optimizer.steps, self._config.optimizer.steps
        ended = any(step == steps for step, _ in list_checkpoints(self.path / CHECKPOINTS)[-1:])
        return [line for line in changed if not (ended and given > steps and line.startswith("optimizer.steps:"))]

    def take(self, experiment: Experiment) -> None:
        """Remember the prompts for `begin`, which writes down what they are and which of them are held out.

        Raises: ConfigError where the run that is to go on began with others, whatever their file is called.
        """
        self._data = {
            name: {"prompts": len(prompts), "content": content_of(prompts)}
            for name, prompts in (("train", experiment.train), ("held_out", experiment.evaluation))
        }
        self._held_out = experiment.evaluation
        saved = self.path / DATA_FILE
        if self.checkpoint is None or not saved.is_file():
            return
        began = json.loads(saved.read_text(encoding="utf-8"))
        for name, key in (("train", "data.prompts"), ("held_out", "data.eval_prompts")):
            if began[name] != self._data[name]:
                wanted, got = (f"{d[name]['prompts']} prompts ({d[name]['content']})" for d in (began, self._data))
                raise ConfigError(
                    f"{key}: the {name.replace('_', '-')} prompts are not those that the run in {self.path} began "
                    f"with: wanted {wanted}, got {got}; give it the file as it was, or begin anew with --overwrite"
                )

    def find_checkpoint(self) -> None:
        """Every rank looks, once the first has entered."""
        checkpoints = [] if self._config.run.overwrite else list_checkpoints(self.path / CHECKPOINTS)
        self.checkpoint = checkpoints[-1][1] if checkpoints else None

    def discard_models(self) -> None:
        """Forgets the models that a run made which is being discarded. Mutates: the folder."""
        if self._config.run.overwrite:
            shutil.rmtree(self.path / MODELS, ignore_errors=True)

    def begin(self, step: int) -> None:
        """Makes the folder this run's, once all that the run reads was found good. The first rank calls.

        step: that the checkpoint was written at, 0 without one
        Mutates: the folder.
        """
        if self.checkpoint is None:
            for name in (CHECKPOINTS, EVENTS_FOLDER, PLOTS_FOLDER):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, CONFIG_FILE, DATA_FILE, HELD_OUT_FILE):
                (self.path / name).unlink(missing_ok=True)
        forget_after(self.path, step)
        remove_leftovers(self.path / CHECKPOINTS)
        write_text(self.path / CONFIG_FILE, config_to_toml(self._config))
        if self._data is not None and not (self.path / DATA_FILE).is_file():
            lines = [
                json.dumps({"line": p.line, "teacher": p.teacher, "task": p.task, "label": p.label, "ids": p.token_ids})
                for p in self._held_out
            ]
            write_text(self.path / HELD_OUT_FILE, "".join(line + "\n" for line in lines))
            write_text(self.path / DATA_FILE, json.dumps(self._data, indent=2) + "\n")
        self._is_new = False

    def leave_without_a_trace(self) -> None:
        """After a mistake before anything began: corrected, the command must not find a run that never was."""
        if self._is_new:
            (self.path / CONFIG_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def opened(config: TrainConfig, world: World) -> Iterator[RunFolder]:
    """The run's folder for the length of the run. Every rank calls; the first holds it and writes.

    Raises: ConfigError as RunFolder.enter, and where another process is writing the run.
    """
    folder = RunFolder(config)
    with contextlib.ExitStack() as stack:
        if world.is_main:
            folder.require()
            stack.enter_context(written_alone(folder.path))
            folder.enter()
        barrier(world.group)
        folder.find_checkpoint()
        barrier(world.group)
        try:
            yield folder
        except BaseException:
            folder.leave_without_a_trace()
            raise
