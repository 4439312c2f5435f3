"""A run's checkpoints: the actor's state with the loop's beside it, whole or absent, written while training goes on.

A folder has its name once every rank's part is on disk. The actor decides what its part is and how long it takes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_engine.distillation.actor import Actor, PendingSave
from opd_engine.parallel.collectives import all_gather_json, barrier
from opd_engine.parallel.launch import World
from opd_engine.train.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    keep_newest,
    load_state,
    told_as_checkpoint_error,
    write_state,
)
from opd_engine.whole_files import complete, half_written


class Checkpoints:
    """Every rank makes the same calls.

    directory: of the run's checkpoints
    keep: how many of the newest stay
    write_beside: the first rank's part beside the actor's, such as a tokenizer
    """

    def __init__(
        self, directory: Path, keep: int, world: World, actor: Actor, write_beside: Callable[[Path], None]
    ) -> None:
        self._directory, self._keep, self._world, self._actor = directory, keep, world, actor
        self._write_beside = write_beside
        self._pending: tuple[int, Path, PendingSave] | None = None

    def load(self, folder: Path) -> dict[str, Any]:
        """The actor continues from a checkpoint. Returns: the values it was saved with.

        Raises: CheckpointError where it cannot be read, with the reason.
        """
        values = load_state(folder)
        try:
            self._actor.load(folder)
        except Exception as error:  # readers of files raise many types; which folder it was, none of them says
            raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error
        return values

    def save(self, step: int, values: Mapping[str, Any]) -> None:
        """Begin the checkpoint of a step; one that is still being written is waited for.

        values: the loop's own state, for JSON; the first rank's are written
        Raises: CheckpointError where one cannot be written, this or the one before.
        """
        self.finish()
        process = all_gather_json(os.getpid(), self._world.group, self._world.device)[0]
        target = checkpoint_folder(self._directory, step)
        if target.exists():
            return
        writing = half_written(target, process)
        with self._told(step, writing):
            if self._world.is_main:
                writing.mkdir(parents=True)
            barrier(self._world.group)
            pending = self._actor.save(writing)
            # After: some actors want the folder empty.
            if self._world.is_main:
                self._write_beside(writing)
                write_state(writing, values)
        self._pending = (step, writing, pending)
        self.poll()

    def poll(self) -> None:
        """Between steps: a checkpoint that is all written gets its name."""
        if self._pending is not None:
            step, writing, pending = self._pending
            with self._told(step, writing):
                if pending.is_done():
                    self._complete(step, writing)

    def finish(self) -> None:
        """Wait for the one that is being written."""
        if self._pending is not None:
            step, writing, pending = self._pending
            with self._told(step, writing):
                pending.wait()
                self._complete(step, writing)

    def _complete(self, step: int, writing: Path) -> None:
        self._pending = None
        barrier(self._world.group)
        if self._world.is_main:
            complete(writing, checkpoint_folder(self._directory, step))
            keep_newest(self._directory, self._keep)
        barrier(self._world.group)

    @contextlib.contextmanager
    def _told(self, step: int, writing: Path) -> Iterator[None]:
        """What goes wrong is a CheckpointError, and nothing half written is left."""
        try:
            with told_as_checkpoint_error(self._directory, step):
                yield
        except CheckpointError:
            self._pending = None
            if self._world.is_main:
                shutil.rmtree(writing, ignore_errors=True)
            raise
