"""The Megatron run's checkpoints: written in the background, whole or absent, like the plain loop's on disk.

Beside what Megatron writes lie the trainer's own files (opd_engine/train/checkpoint.py); the folder has its name once
every rank's part is on disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_engine.integrations.megatron.actor import MegatronActor
from opd_engine.integrations.megatron.checkpoint import CheckpointWriter
from opd_engine.parallel.collectives import all_gather_json, barrier
from opd_engine.parallel.launch import World
from opd_engine.teachers.weight_store import WeightStore
from opd_engine.train.checkpoint import (
    checkpoint_folder,
    complete,
    half_written,
    keep_newest,
    told_as_checkpoint_error,
    write_state,
)


class MegatronCheckpoints:
    """Every rank makes the same calls.

    directory: of the run's checkpoints
    keep: how many of the newest stay
    token_map: of the student, kept in each so that it can be a teacher
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        world: World,
        actor: MegatronActor,
        weights: WeightStore,
        token_map: Mapping[str, int],
    ) -> None:
        self._directory, self._keep, self._world = directory, keep, world
        self._actor, self._weights, self._token_map = actor, weights, token_map
        self._writer = CheckpointWriter()
        self._step = 0

    def save(self, step: int, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Begin the checkpoint of a step; one that is still being written is waited for.

        tensors, values: as opd_engine.train.checkpoint.save_checkpoint; the first rank's are written
        Raises: CheckpointError where one cannot be written, this or the one before.
        """
        self.finish()
        self._step = step
        target = checkpoint_folder(self._directory, step)
        process = all_gather_json(os.getpid(), self._world.group, self._world.device)[0]
        writing = half_written(target, process)
        with self._told():
            if self._world.is_main:
                writing.mkdir(parents=True)
            barrier(self._world.group)
            self._writer.start(
                self._actor,
                self._weights,
                writing,
                token_map=self._token_map if self._world.is_main else None,
                on_done=lambda: self._whole(writing, target),
            )
            # After: Megatron wants the folder empty.
            if self._world.is_main:
                write_state(writing, tensors, values)

    def poll(self) -> None:
        """Between steps: a checkpoint that is all written gets its name."""
        with self._told():
            self._writer.poll()

    def finish(self) -> None:
        """Wait for the one that is being written."""
        with self._told():
            self._writer.finish()

    def _whole(self, writing: Path, target: Path) -> None:
        if self._world.is_main:
            complete(writing, target)
            keep_newest(self._directory, self._keep)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        with told_as_checkpoint_error(self._directory, self._step):
            yield
