"""F7: microbenchmarks. One record per case, implementation and shape; every number in the documents comes from one.

Read record.py (what is kept), timing.py (how it is measured), cases/ (what is measured, each baseline beside ours).
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`opd-engine bench ...`; returns its exit status: 0 done, 1 something failed, 2 wrong usage."""
    from opd_engine.bench.command import main as command_main

    return command_main(argv)


__all__ = ["main"]
