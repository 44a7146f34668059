"""The protocol: which cells there are to run, in which order, and which learning rate a group is reported at.

The same for every method: each rate of its grid is run once, on a seed that is used for nothing else; the rate with the
best headline metric is run again on the seeds that are reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from .grid import Cell, Grid, Group
from .records import Record


def chosen_rate(grid: Grid, group: Group, records: Mapping[str, Record]) -> float | None:
    """The rate that a group is reported at; of two as good, the lower one. A cell that failed, or whose metric is not
    defined, loses to every other. None while cells are missing, or when all of them lost.

    Args:
        records: by the folder of their cells.
    """
    cells = list(grid.choose_cells(group))
    if not cells:
        return grid.rates(group.method)[0]
    if any(cell.folder not in records for cell in cells):
        return None
    found = [records[cell.folder] for cell in cells]
    scores = {
        record.learning_rate: -record.score if record.lower_is_better else record.score
        for record in found
        if math.isfinite(record.score)
    }
    return max(sorted(scores), key=scores.__getitem__, default=None)


def cells_known(grid: Grid, records: Mapping[str, Record]) -> list[Cell]:
    """All cells that the records say are to be run, in the order to run them in: those that choose a rate, then those
    of the first seed, of the second and so on, so that what an interrupted bench leaves can be compared."""
    choosing = [list(grid.choose_cells(group)) for group in grid.groups]
    rates = {group: chosen_rate(grid, group, records) for group in grid.groups}
    reported = [list(grid.report_cells(group, rate)) for group, rate in rates.items() if rate is not None]
    return [*_across(choosing), *_across(reported)]


def lost_groups(grid: Grid, records: Mapping[str, Record]) -> list[Group]:
    """Groups of which no rate gave a result, so that nothing can be reported."""
    return [
        group
        for group in grid.groups
        if all(cell.folder in records for cell in grid.choose_cells(group))
        and chosen_rate(grid, group, records) is None
    ]


def _across(lists: Iterable[list[Cell]]) -> Iterator[Cell]:
    """The first of each list, then the second of each."""
    remaining = [cells for cells in lists if cells]
    for position in range(max(map(len, remaining), default=0)):
        yield from (cells[position] for cells in remaining if position < len(cells))
