"""Writes docs/scaling.md and its plots into the checkout that this package lies in."""

from __future__ import annotations

from pathlib import Path

import opd_engine
from opd_engine.scaling.page import files

if __name__ == "__main__":
    for path, content in files(Path(opd_engine.__file__).parent.parent).items():
        path.write_text(content, encoding="utf-8")
        print(path)
