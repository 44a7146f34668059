"""The protocol: which rate is chosen, and in which order cells are run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adalora.bench.choose import cells_known, chosen_rate, lost_groups
from adalora.bench.grid import Cell, Grid, Group
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
