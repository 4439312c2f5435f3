"""The list of all cells. A test fails where something exported, or a parameter of it, is in none of them."""

from __future__ import annotations

from opd_engine.check.cells import Cell
from opd_engine.check.linear_cells import linear_bucket_cells, linear_full_cells, linear_score_cells
from opd_engine.check.loss_cells import bucket_cells, full_cells
from opd_engine.check.op_cells import op_cells
from opd_engine.check.score_cells import mixture_cells, score_cells


def list_cells(full: bool) -> list[Cell]:
    """In the order of the table. full: combinations that otherwise take turns are all there."""
    return [
        *score_cells(),
        *bucket_cells(full),
        *full_cells(full),
        *mixture_cells(),
        *linear_score_cells(full),
        *linear_bucket_cells(full),
        *linear_full_cells(full),
        *op_cells(),
    ]
