"""Checkpoints that are whole or absent: written aside, forced to disk, then renamed into place.

A full disk or a kill at any moment leaves the previous checkpoint as it was. Each one is a folder that
`AutoModelForCausalLM.from_pretrained` reads, beside it the trainer's state; no pickle is read back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d{8})")
_WRITING = ".writing-"
_REMOVING = ".removing-"
_STATE_FILE = "trainer_state.pt"
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
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    free_mib = shutil.disk_usage(directory).free / 2**20
    return f"{lines[-1] if lines else type(error).__name__} ({free_mib:,.0f} MiB are free there)"


def save_checkpoint(
    directory: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Any],
    values: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step and removes all but the `keep` newest.

    directory: of the run's checkpoints.  step: optimizer steps done.
    write_model: writes the model's files into the folder it is given.
    tensors: nested dicts and lists of tensors and plain values (optimizer, generators).  values: for JSON.
    Returns: the checkpoint's folder. One that is there already is left as it is.
    Raises: CheckpointError where it cannot be written, a full disk included; earlier checkpoints stay whole.
    Mutates: directory.
    """
    target = checkpoint_folder(directory, step)
    if not target.exists():
        with told_as_checkpoint_error(directory, step), whole_or_absent(target) as folder:
            write_model(folder)
            write_state(folder, tensors, values)
    keep_newest(directory, keep)
    return target


def write_state(folder: Path, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """The trainer's part of a checkpoint, beside the model's. Mutates: the folder."""
    # A file of ours: given a path, torch's writer reports a full disk as a wrong position and no more.
    with open(folder / _STATE_FILE, "wb") as file:
        torch.save(dict(tensors), file)
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
        kept = (
            f"the previous one, {whole[-1][1]}, is whole: make room and give the same command again"
            if whole
            else "there is none yet"
        )
        target = checkpoint_folder(directory, step)
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {target}: {_reason(error, directory)}; {kept}"
        ) from error


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, values) of a checkpoint, as save_checkpoint was given them.

    Raises: CheckpointError where a file is missing or cannot be read.
    """
    try:
        tensors = torch.load(path / _STATE_FILE, map_location=device, weights_only=True)
        values = json.loads((path / _JSON_FILE).read_text(encoding="utf-8"))
    except Exception as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    return tensors, values
