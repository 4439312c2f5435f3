"""Packages beside torch: looked up, not imported, before anything is set up, and named with the extra that brings them.

A missing one otherwise ends a run where it is first used, which may be after the training.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable

EXTRAS = {
    "train": ("transformers", "tokenizers", "safetensors", "numpy", "matplotlib", "jinja2"),
    "megatron": ("megatron.core", "numpy", "psutil", "safetensors"),
    "lora": ("peft",),
    "bench": ("numpy", "tqdm"),
}
"""Extra -> what the commands that need it cannot do without."""

# Of commands with a parser of their own.
COMMANDS = {
    "bench": {"bench": EXTRAS["bench"]},
    "convert": {"megatron": EXTRAS["megatron"], "train": ("transformers", "tokenizers")},
    "report": {"train": ("jinja2",)},
}


class MissingPackageError(ValueError):
    """An optional package that is not installed; the message says who needs it and how it is installed."""


def is_installed(name: str) -> bool:
    """Whether a module could be imported; it is not."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a parent that is missing
        return False


def require(extra: str, names: Iterable[str], user: str) -> None:
    """Refuse to begin without these modules.

    extra: of this package, which brings them
    user: the command or setting that needs them, for the message

    Raises: MissingPackageError with the missing ones and the command that installs them.
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        what = f"{missing[0]} is" if len(missing) == 1 else f"{', '.join(missing)} are"
        raise MissingPackageError(f"{user}: {what} not installed; run: pip install 'opd_engine[{extra}]'")


def require_for_command(name: str) -> None:
    """`require` for a subcommand. Raises: MissingPackageError."""
    for extra, names in COMMANDS.get(name, {}).items():
        require(extra, names, f"opd-engine {name}")
