"""Grids: what is laid over what, which cells come of it, and what is said about a faulty one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adalora.bench.grid import Group, laid_over, read_grid
from adalora.recipe import RecipeError

Write = Callable[[Mapping[str, Any]], Path]
RECIPES = Path(__file__).parents[2] / "recipes" / "bench"


def changed(grid: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """A copy of ``grid`` with the value at each key (``a__b``: at key b of section a) replaced."""
    result = copy.deepcopy(dict(grid))
    for key, value in keys.items():
        *parents, last = key.split("__")
        place = result
        for parent in parents:
            place[parent] = place.get(parent) or {}
            place = place[parent]
        place[last] = value
    return result


def test_later_parts_are_laid_over_earlier_ones() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 1}
    assert laid_over(base, {"a": {"y": 3}, "b": [4]}, {"a": {"z": 5}}) == {
        "a": {"x": 1, "y": 3, "z": 5},
        "b": [4],
        "c": 1,
    }
    assert base == {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 1}


def test_a_cell_is_base_task_method_and_what_the_grid_decides(tiny_grid: dict[str, Any], write: Write) -> None:
    found = changed(
        tiny_grid,
        base__adalora={"tfinal": 0.2},
        base__training__weight_decay=0.5,
        tasks__reviews={"training": {"weight_decay": 0.1, "warmup_steps": 0}},
        methods={"adalora": None, "uniform": {"method": "adalora", "adalora": {"policy": "uniform"}}, "lora": None},
    )
    grid = read_grid(write(found))
    cell = grid.cell(Group("reviews", "uniform", "rank 1"), 1e-3, 7, "report")
    recipe = cell.recipe
    assert (recipe.method, recipe.budget, recipe.seed) == ("adalora", "rank 1", 7)
    assert (recipe.adalora.policy, recipe.adalora.tfinal) == ("uniform", 0.2)
    assert recipe.training.learning_rate == 1e-3
    assert (recipe.training.weight_decay, recipe.training.warmup_steps) == (0.1, 0)
    assert cell.folder == "cells/reviews/uniform/rank-1/lr-0.001/seed-7"
    assert recipe.output == f"{grid.output}/{cell.folder}"
    assert "lora" not in recipe.model_fields_set  # its method does not read it
    assert str(cell) == "reviews, uniform, rank 1, learning rate 0.001, seed 7"


def test_a_method_without_a_size_to_choose_appears_once(tiny_grid: dict[str, Any], write: Write) -> None:
    grid = read_grid(write(changed(tiny_grid, budgets=["rank 1", 500])))
    assert grid.groups == [
        Group("reviews", "lora", "rank 1"),
        Group("reviews", "head", None),
        Group("reviews", "lora", 500),
    ]
    assert grid.total == 3 * (2 + 1)
    assert [str(group) for group in grid.groups][1:] == ["reviews, head", "reviews, lora, 500 parameters"]


def test_without_budgets_recipes_say_the_size(tiny_grid: dict[str, Any], write: Write) -> None:
    methods = {f"r{rank}": {"method": "lora", "lora": {"r": rank}} for rank in (1, 2)}
    grid = read_grid(write(changed(tiny_grid, budgets=[], methods=methods)))
    recipes = [grid.cell(group, 1e-3, 1, "report").recipe for group in grid.groups]
    assert [(recipe.budget, recipe.lora.r) for recipe in recipes] == [(None, 1), (None, 2)]


def test_a_method_may_have_rates_of_its_own(tiny_grid: dict[str, Any], write: Write) -> None:
    grid = read_grid(write(changed(tiny_grid, methods__full={"learning_rates": [2e-5, 1e-5]})))
    assert grid.rates("lora") == [1e-3, 5e-2] and grid.rates("full") == [1e-5, 2e-5]
    rates = [cell.learning_rate for cell in grid.choose_cells(Group("reviews", "full", None))]
    assert rates == [1e-5, 2e-5]


def test_with_one_rate_nothing_is_chosen(tiny_grid: dict[str, Any], write: Write) -> None:
    grid = read_grid(write(changed(tiny_grid, learning_rates=[1e-3])))
    assert grid.total == 2 and not list(grid.choose_cells(grid.groups[0]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"taks": {}}, "unknown key `taks`: did you mean `tasks`?"),
        ({"seeds__reports": [1]}, "unknown key `seeds.reports`: did you mean `seeds.report`?"),
        ({"base__training__lr": 1}, "reviews, lora, rank 1: unknown key `training.lr`"),
        ({"base__trainig": {}}, "unknown key `trainig`: did you mean `training`?"),
        ({"tasks__reviews": {"options": {"beams": 3}}}, "unknown key `options.beams`"),
        ({"tasks__reviews": {"task": "clasification"}}, "did you mean classification?"),
        ({"methods__adalroa": None}, "methods.adalroa: unknown method 'adalroa': did you mean adalora?"),
        ({"methods__lora": {"adalora": {"tfinal": 0.1}}}, "methods.lora.adalora has no meaning for this method"),
        ({"base__bottleneck": {"widht": 4}}, "base: unknown key `bottleneck.widht`: did you mean `bottleneck.width`?"),
        ({"base__training": 5}, "base.training: should be a section with keys of its own"),
        ({"base__seed": 3}, "base.seed is not for a part of a recipe: the seeds are in `seeds`"),
        ({"base__method": "lora"}, "base.method: a method is one of `methods`"),
        ({"base__training__learning_rate": 1e-3}, "learning_rate is chosen from `learning_rates`"),
        ({"methods__head": {"learning_rates": [1e-3]}}, "should be 2 different rates above 0"),
        ({"methods__head": {"learning_rates": [1e-3, 1e-3]}}, "should be 2 different rates above 0"),
        ({"methods__head": {"learning_rates": "1e-3"}}, "should be 2 different rates above 0"),
        ({"seeds": {"choose": 1, "report": [1, 2]}}, "the seed 1 chooses the learning rate"),
        ({"seeds": {"choose": 0, "report": [1, 1]}}, "seeds.report: holds 1 twice"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [0.0]}, "learning_rates.0"),
        ({"budgets": ["rank two"]}, "should be a number of parameters (100000), or a rank (`rank 8`, `rank 0.25`)"),
        ({"budgets": ["rank 0.0"]}, "should be a number of parameters"),
        ({"budgets": [0]}, "should be a number of parameters (100000), or a rank (`rank 8`, `rank 0.25`)"),
        ({"tasks": {"glue/mrpc": {}}}, "should be a name that a folder can have"),
        ({"reference": "dora"}, "reference should be one of the methods: lora, head"),
        ({"base__model": None}, "model"),
    ],
)
def test_faults_are_named(tiny_grid: dict[str, Any], write: Write, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_grid(write(changed(tiny_grid, **fault)))
    assert message in str(error.value) and "grid.yaml" in str(error.value)


def test_faults_of_parts_come_together(tiny_grid: dict[str, Any], write: Write) -> None:
    with pytest.raises(RecipeError, match=r"has 2 faults:\n  base\.seed .*\n  base\.method"):
        read_grid(write(changed(tiny_grid, base__seed=3, base__method="lora")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "is not a grid: expected keys such as"),
        (b"a: [", "not valid YAML at line 1"),
        (b"\xff\xfe", "YAML text"),
    ],
)
def test_what_is_not_a_grid(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "grid.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_grid(tmp_path / "grid.yaml")
    with pytest.raises(RecipeError, match="no grid at"):
        read_grid(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_grids_are_fine(path: Path) -> None:
    assert read_grid(path).name == path.stem


def test_the_smoke_grid_is_small() -> None:
    grid = read_grid(RECIPES / "smoke.yaml")
    assert set(grid.methods) == {"lora", "adalora"} and len(grid.tasks) == 1 and len(grid.seeds.report) == 2
    assert grid.total == 8
