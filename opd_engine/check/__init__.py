"""F7: `opd-engine check`, the conformance table on the user's own machine.

It starts N real processes on loopback, compares what the package exports with a float64 reference of its own
(reference.py), value and gradient, and shows that planted errors are seen. It measures no speed. Read cells.py first;
table.py lists what there is.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: 0 when every cell holds and every control is seen, 1 when not, 2 for wrong usage."""
    from opd_engine.check.command import run_command

    return run_command(argv)
