"""The protocol: which rate is chosen, and in which order cells are run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from adalora.bench.choose import cells_known, chosen_rate, lost_groups, rates_to_try
from adalora.bench.grid import Cell, Grid, Group, next_rate
from adalora.bench.records import Record

LORA, FULL = Group("reviews", "lora", "rank 1"), Group("reviews", "full", None)


@pytest.fixture
def grid() -> Grid:
    return Grid.model_validate(
        {
            "name": "g",
            "output": "out",
            "base": {"model": "m", "data": {"train": "t"}},
            "tasks": {"reviews": None},
            "methods": {"lora": None, "full": None},
            "budgets": ["rank 1"],
            "learning_rates": [1e-2, 1e-4, 1e-3],
            "extend": 0,
            "seeds": {"choose": 9, "report": [1, 2]},
        }
    )


def records(cells: list[Cell], scores: list[float | None], lower_is_better: bool = False) -> dict[str, Record]:
    """One for each cell; a score of None is a cell that failed."""
    found = {}
    for cell, score in zip(cells, scores, strict=True):
        outcome: dict[str, Any] = {"state": "failed"} if score is None else {"metrics": {"it": score}}
        found[cell.folder] = Record(
            **{"state": "done"} | outcome,
            task=cell.group.task,
            method=cell.group.method,
            budget=cell.group.budget,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            role=cell.role,
            folder=cell.folder,
            headline="it",
            lower_is_better=lower_is_better,
        )
    return found


@pytest.mark.parametrize(
    ("scores", "lower_is_better", "rate"),
    [
        ([0.1, 0.3, 0.2], False, 1e-3),  # of 1e-4, 1e-3, 1e-2
        ([0.3, 0.1, 0.3], False, 1e-4),  # the lower of two as good
        ([0.3, None, 0.4], False, 1e-2),
        ([math.nan, -0.5, None], False, 1e-3),  # what is not defined loses as a failure does
        ([30.0, 12.0, 15.0], True, 1e-3),
        ([None, 12.0, 12.0], True, 1e-3),
        ([None, math.nan, None], False, None),
    ],
)
def test_the_best_rate_is_chosen(
    grid: Grid, scores: list[float | None], lower_is_better: bool, rate: float | None
) -> None:
    cells = list(grid.choose_cells(LORA))
    found = records(cells, scores, lower_is_better)
    assert chosen_rate(grid, LORA, found) == rate
    assert lost_groups(grid, found) == ([LORA] if rate is None else [])
    assert chosen_rate(grid, LORA, dict(list(found.items())[:2])) is None  # not before the last has ended


@pytest.fixture
def lucky(grid: Grid) -> Grid:
    """Two seeds to choose on, and one rate that may be added."""
    raw = grid.model_dump() | {"learning_rates": [1e-4, 1e-3, 1e-2], "extend": 1}
    return Grid.model_validate(raw | {"seeds": {"choose": [8, 9], "report": [1]}})


@pytest.mark.parametrize(
    ("first", "second", "collapsed", "rate"),
    [
        ([0.2, 0.5, 0.9], [0.2, 0.6, 0.1], [], 1e-3),  # the mean, not the luck of one seed
        ([0.2, 0.5, 0.9], [0.2, 0.4, None], [], 1e-3),  # one run that broke
        ([0.2, 0.5, 0.9], [0.2, 0.4, math.nan], [], 1e-3),
        ([0.2, 0.5, 0.9], [0.2, 0.4, 0.3], [5], 1e-3),  # the mean of the highest is better, but one run collapsed
        ([0.2, 0.5, 0.9], [0.2, 0.4, 0.3], [1, 2, 4, 5], 1e-4),
    ],
)
def test_a_rate_is_good_at_all_seeds_that_choose(
    lucky: Grid, first: list[float | None], second: list[float | None], collapsed: list[int], rate: float
) -> None:
    cells = list(lucky.choose_cells(LORA))
    assert [(cell.seed, cell.learning_rate) for cell in cells] == [
        (seed, rate) for seed in (8, 9) for rate in (1e-4, 1e-3, 1e-2)
    ]
    found = records(cells, [*first, *second])
    for index in collapsed:
        found[cells[index].folder] = replace(found[cells[index].folder], collapsed=True)
    if rate == 1e-3:
        assert chosen_rate(lucky, LORA, found) == rate and rates_to_try(lucky, LORA, found) == [1e-4, 1e-3, 1e-2]
    else:  # at the edge, so that another is tried
        assert chosen_rate(lucky, LORA, found) is None and rates_to_try(lucky, LORA, found)[0] == 1e-5


@pytest.mark.parametrize(
    ("scores", "added", "score", "rate"),
    [
        ([0.1, 0.2, 0.3], 1e-1, 0.4, 1e-1),
        ([0.1, 0.2, 0.3], 1e-1, 0.2, 1e-2),
        ([0.3, 0.2, 0.1], 1e-5, None, 1e-4),
        ([0.1, 0.3, 0.2], None, None, 1e-3),
    ],
)
def test_rates_are_added_at_the_edge(
    lucky: Grid, scores: list[float], added: float | None, score: float | None, rate: float
) -> None:
    """One after the other, up to the limit; nothing is lost or chosen while the added one runs."""
    found = records(list(lucky.choose_cells(LORA)), [*scores, *scores])
    more = [rate for rate in rates_to_try(lucky, LORA, found) if rate not in lucky.rates("lora")]
    assert more == ([] if added is None else [added]) and set(more) <= set(lucky.possible_rates("lora"))
    if more:
        assert chosen_rate(lucky, LORA, found) is None and lost_groups(lucky, found) == []
        waiting = [cell for cell in cells_known(lucky, found) if cell.group == LORA and cell.folder not in found]
        assert [(cell.learning_rate, cell.seed, cell.role) for cell in waiting] == [
            (added, 8, "choose"),
            (added, 9, "choose"),
        ]
        found |= records(waiting, [score, score])
    assert chosen_rate(lucky, LORA, found) == rate and lost_groups(lucky, found) == []
    none = Grid.model_validate(lucky.model_dump() | {"extend": 0})
    assert rates_to_try(none, LORA, found) == none.rates("lora") == none.possible_rates("lora")


def test_the_next_rate_is_by_the_grids_own_step() -> None:
    assert (next_rate([3e-4, 1e-3, 3e-3], 3e-3), next_rate([3e-4, 1e-3, 3e-3], 3e-4)) == (9e-3, 9e-5)


def test_the_order(grid: Grid) -> None:
    """Rates are chosen first, methods in turn; then one seed after the other, each for all methods whose rate is
    known."""
    choosing = cells_known(grid, {})
    assert [(cell.group.method, cell.learning_rate, cell.seed) for cell in choosing] == [
        *[("lora", 1e-4, 9), ("full", 1e-4, 9), ("lora", 1e-3, 9), ("full", 1e-3, 9), ("lora", 1e-2, 9)],
        ("full", 1e-2, 9),
    ]
    of_lora = [cell for cell in choosing if cell.group == LORA]
    found = records(of_lora, [0.1, 0.2, 0.3])
    assert [str(cell) for cell in cells_known(grid, found)[6:]] == [
        "reviews, lora, rank 1, learning rate 0.01, seed 1",  # without waiting for full
        "reviews, lora, rank 1, learning rate 0.01, seed 2",
    ]
    found |= records([cell for cell in choosing if cell.group == FULL], [0.3, 0.2, None])
    reported = cells_known(grid, found)[6:]
    assert [(cell.group.method, cell.learning_rate, cell.seed, cell.role) for cell in reported] == [
        *[("lora", 1e-2, 1, "report"), ("full", 1e-4, 1, "report")],
        *[("lora", 1e-2, 2, "report"), ("full", 1e-4, 2, "report")],
    ]


def test_a_single_rate_is_reported_at_once(grid: Grid) -> None:
    single = Grid.model_validate(grid.model_dump() | {"learning_rates": [1e-3]})
    assert [(cell.group.method, cell.seed) for cell in cells_known(single, {})] == [
        *[("lora", 1), ("full", 1), ("lora", 2), ("full", 2)]
    ]
    assert lost_groups(single, {}) == []
