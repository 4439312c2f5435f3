"""Checkpoints that are whole or absent: written aside, forced to disk, then renamed into place.

A full disk or a kill at any moment leaves the previous checkpoint as it was. What the actor writes is its own; beside
it lies the loop's state as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_engine.teachers.weight_store import WrongWeightsError

_NAME = re.compile(r"step_(\d{8})")
_WRITING = ".writing-"
_REMOVING = ".removing-"
_JSON_FILE = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what is still whole."""


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Forces every file below, then the folders, to disk: a rename must not become visible before its content."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync_file(Path(parent) / name)
        _sync_file(Path(parent))


@contextlib.contextmanager
def whole_or_absent(target: Path):
    """Yields a folder to fill; on success it becomes `target`, on any error it is removed and `target` stays absent.

    Raises: what the body raises; FileExistsError where target is there already.
    Mutates: the folder around target.
    """
    writing = half_written(target, os.getpid())
    if target.exists():
        raise FileExistsError(f"{target} exists")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        complete(writing, target)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def half_written(target: Path, process: int) -> Path:
    """The folder to fill before it becomes `target`; the process id keeps two apart that write the same at once."""
    return target.parent / f"{_WRITING}{target.name}-{process}"


def complete(writing: Path, target: Path) -> None:
    """Makes a folder that is all written `target`, at one moment. Mutates: the folder around target."""
    _sync_tree(writing)
    os.rename(writing, target)
    _sync_file(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by its new content at one moment."""
    writing = path.with_name(f"{_WRITING}{path.name}-{os.getpid()}")
    try:
        with open(writing, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def checkpoint_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, once it is whole."""
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if path.is_dir())


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process left half written or half removed. Mutates: directory."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith((_WRITING, _REMOVING)):
                shutil.rmtree(path, ignore_errors=True)


def keep_newest(directory: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints. Mutates: directory."""
    for _, old in list_checkpoints(directory)[:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    # Renamed first: killed in between, what is left is no longer taken for a whole checkpoint.
    aside = path.with_name(f"{_REMOVING}{path.name}-{os.getpid()}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


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
