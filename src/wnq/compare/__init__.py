"""A comparison: every method at every width, from the same float starts, under the same recipe, over seeds.

``definition`` says what is compared, ``cells`` what has to be run for it, ``schedule`` when; ``jobs`` runs a cell here,
``workers`` and ``side_by_side`` several at once, ``running`` is the whole, ``intervals`` and ``outcome`` say what came of it,
``writing`` and ``chart`` show it.
"""

from wnq.compare.cells import ANCHOR, Cell, CellState, cells_of
from wnq.compare.definition import Comparison, Contender, Width, width_name
from wnq.compare.intervals import Interval, paired_interval, t_quantile, welch_interval
from wnq.compare.jobs import Outcome
from wnq.compare.outcome import table_rows
from wnq.compare.running import check, compare

__all__ = [
    "ANCHOR",
    "Cell",
    "CellState",
    "Comparison",
    "Contender",
    "Interval",
    "Outcome",
    "Width",
    "cells_of",
    "check",
    "compare",
    "paired_interval",
    "t_quantile",
    "table_rows",
    "welch_interval",
    "width_name",
]
