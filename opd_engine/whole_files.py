"""Files and folders that are whole or absent: written aside, forced to disk, then given their name at one moment.

A full disk or a kill at any moment leaves what was there before as it was. What is half written or half removed has a
name that begins with a dot and ends with the process that wrote it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_WRITING = ".writing-"
_REMOVING = ".removing-"


@contextlib.contextmanager
def whole_or_absent(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a folder to fill; on success it becomes `target`, on any error it is removed and `target` stays as it was.

    replace: a folder that is there gives way, at the end and not before

    Raises: what the body raises; FileExistsError where target is there already and is not to be replaced.
    Mutates: the folder around target.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists")
    writing = half_written(target, os.getpid())
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
    """Makes a folder that is all written `target`; what has the name gives way. Mutates: the folder around target."""
    _sync_tree(writing)
    old = _set_aside(target) if target.is_dir() else None
    try:
        os.rename(writing, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


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


def remove_whole(folder: Path) -> None:
    """Removes a folder. Killed in between, what is left no longer has its name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Removes what killed processes left half written or half removed; what a living one is writing stays.

    name: of the file or folder that was being written; any by default

    Mutates: directory.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        prefix = next((p for p in (_WRITING, _REMOVING) if path.name.startswith(p + name)), None)
        if prefix is None or (name and path.name.rpartition("-")[0] != prefix + name):
            continue
        if path.name.rpartition("-")[2] == str(os.getpid()) or not _lives(path.name.rpartition("-")[2]):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    """Whether it runs on this machine; a folder shared by several may be cleaned by one of them alone."""
    return process.isdigit() and Path("/proc/self").exists() and Path("/proc", process).exists()


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{_REMOVING}{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Forces every file below, then the folders, to disk: a rename must not become visible before its content."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))
