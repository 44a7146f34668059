"""The protocol: which cells there are to run, in which order, and which learning rate a group is reported at.

The same for every method: each rate of its grid is run on the seeds that choose and are used for nothing else; while
the best is at the edge of those tried, the next one is tried, too; the best is run again on the seeds that are
reported. The best is the one with the fewest collapsed runs, and of these that with the best mean of the headline
metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from .grid import Cell, Grid, Group, next_rate
from .records import Record


def chosen_rate(grid: Grid, group: Group, records: Mapping[str, Record]) -> float | None:
    """The rate that a group is reported at; of two as good, the lower one. None while cells are missing, or when all
    rates lost.

    Args:
        records: by the folder of their cells.
    """
    if len(grid.rates(group.method)) == 1:
        return grid.rates(group.method)[0]
    return _best(grid, group, rates_to_try(grid, group, records), records)


def rates_to_try(grid: Grid, group: Group, records: Mapping[str, Record]) -> list[float]:
    """The rates of a group to choose from, as far as the records say: those of the grid, and those added to them."""
    rates = grid.rates(group.method)
    for _ in range(grid.extend if len(rates) > 1 else 0):
        best = _best(grid, group, rates, records)
        if best not in (rates[0], rates[-1]):
            break
        rates = sorted([*rates, next_rate(rates, best)])
    return rates


def _best(grid: Grid, group: Group, rates: Sequence[float], records: Mapping[str, Record]) -> float | None:
    """A run that failed or whose metric is not defined makes its rate lose to every other, at whichever seed."""
    standing = {}
    for rate in rates:
        found = [records.get(cell.folder) for cell in grid.choose_cells(group, [rate])]
        runs = [record for record in found if record is not None]
        if len(runs) < len(found):
            return None
        scores = [-record.score if record.lower_is_better else record.score for record in runs]
        if all(map(math.isfinite, scores)):
            standing[rate] = (-sum(record.collapsed for record in runs), fmean(scores))
    return max(sorted(standing), key=standing.__getitem__, default=None)


def _choosing(grid: Grid, group: Group, records: Mapping[str, Record]) -> list[Cell]:
    return list(grid.choose_cells(group, rates_to_try(grid, group, records)))


def cells_known(grid: Grid, records: Mapping[str, Record]) -> list[Cell]:
    """All cells that the records say are to be run, in the order to run them in: those that choose a rate, then those
    of the first seed, of the second and so on, so that what an interrupted bench leaves can be compared."""
    choosing = [_choosing(grid, group, records) for group in grid.groups]
    rates = {group: chosen_rate(grid, group, records) for group in grid.groups}
    reported = [list(grid.report_cells(group, rate)) for group, rate in rates.items() if rate is not None]
    return [*_across(choosing), *_across(reported)]


def lost_groups(grid: Grid, records: Mapping[str, Record]) -> list[Group]:
    """Groups of which no rate gave a result, so that nothing can be reported."""
    return [
        group
        for group in grid.groups
        if all(cell.folder in records for cell in _choosing(grid, group, records))
        and chosen_rate(grid, group, records) is None
    ]


def _across(lists: Iterable[list[Cell]]) -> Iterator[Cell]:
    """The first of each list, then the second of each."""
    remaining = [cells for cells in lists if cells]
    for position in range(max(map(len, remaining), default=0)):
        yield from (cells[position] for cells in remaining if position < len(cells))
