"""`opd-engine report`: one or several runs as one HTML page that needs no script and no network."""

from __future__ import annotations

from opd_engine.report.command import main

__all__ = ["main"]
