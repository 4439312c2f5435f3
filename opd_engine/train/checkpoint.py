"""Checkpoints of a run: their names, the loop's state beside what the actor writes, and what is said when one fails."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_engine.teachers.weight_store import WrongWeightsError
from opd_engine.whole_files import remove_whole

_NAME = re.compile(r"step_(\d{8})")
_JSON_FILE = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what is still whole."""


def checkpoint_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, once it is whole."""
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if path.is_dir())


def keep_newest(directory: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints. Mutates: directory."""
    for _, old in list_checkpoints(directory)[:-keep]:
        remove_whole(old)


def _reason(error: BaseException, directory: Path) -> str:
    """The operating system's own words where the error came from them, else the last line and how full the disk is."""
    if isinstance(error, WrongWeightsError):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return f"{link} (make room)" if link.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else str(link)
        link = link.__cause__ or link.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    free_mib = shutil.disk_usage(directory).free / 2**20
    return f"{lines[-1] if lines else type(error).__name__} ({free_mib:,.0f} MiB are free there)"


def write_state(folder: Path, values: Mapping[str, Any]) -> None:
    """The loop's part of a checkpoint, beside the actor's. Mutates: the folder."""
    (folder / _JSON_FILE).write_text(json.dumps(dict(values), indent=1), encoding="utf-8")


@contextlib.contextmanager
def told_as_checkpoint_error(directory: Path, step: int) -> Iterator[None]:
    """Around writing: any error becomes a CheckpointError that says why, and which checkpoint is still whole."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's distributed checkpoints raise what is no Exception
        whole = list_checkpoints(directory)
        kept = f"the previous one, {whole[-1][1]}, is whole" if whole else "there is none yet"
        target = checkpoint_folder(directory, step)
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {target}: {_reason(error, directory)}; {kept}; what is "
            "whole is continued by the same command"
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """What write_state was given.

    Raises: CheckpointError where the file is missing or cannot be read.
    """
    try:
        return json.loads((path / _JSON_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
