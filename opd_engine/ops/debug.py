"""The debug switch: checks that would synchronise with the device or communicate run only under it."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_override: ContextVar[bool | None] = ContextVar("opd_engine_debug", default=None)


def debug_enabled() -> bool:
    """True inside `with debug():`, else where the environment says OPD_DEBUG=1."""
    override = _override.get()
    return os.environ.get("OPD_DEBUG", "0") == "1" if override is None else override


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check ids, shard tiling, equal supports and equal upstream gradients over ranks, and raise what is wrong.

    Costs host synchronisations and, under tensor parallelism, collectives: every rank must switch it alike. A backward
    checks if its forward ran under it.

    enabled: False switches the checks off inside a block that has them on
    Returns: a context manager, of this thread's or task's context.
    Raises: nothing itself; inside, the ops raise ValueError for what the checks find.
    """
    token = _override.set(enabled)
    try:
        yield
    finally:
        _override.reset(token)
