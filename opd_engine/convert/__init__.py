"""F7: `opd-engine convert`: Hugging Face folders to Megatron checkpoints and back, and their logits compared."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: 0 done or equal, 1 when logits differ or the run fails, 2 for wrong usage or models."""
    from opd_engine.convert.command import run_command

    return run_command(argv)
