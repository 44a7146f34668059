"""A grid of cells in one YAML file: partial recipes that are laid over each other, and the lists to go through.

``base`` is laid under each of ``tasks``, that under each of ``methods``, and that under the cell's own budget, learning
rate, seed and folder. Every recipe that can come out is validated before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from .. import methods, tasks
from ..reading import completed
from ..recipe import (
    METHOD_SECTIONS,
    AdaLoraSection,
    BottleneckSection,
    LoraSection,
    Recipe,
    RecipeError,
    validate,
    validated,
)
from ..recipe_text import parse_yaml
from .records import Budget, Role

_SET_BY_THE_GRID = {
    "output": "`output` at the top is the folder of all cells",
    "seed": "the seeds are in `seeds`",
    "budget": "the budgets are in `budgets`",
    "facts": "a run writes them",
}


class Group(NamedTuple):
    """Cells that differ in nothing but learning rate and seed."""

    task: str
    method: str
    budget: Budget

    def __str__(self) -> str:
        return f"{self.task}, {self.method}" + ("" if self.budget is None else f", {budget_name(self.budget)}")


class Cell(NamedTuple):
    """One run of the grid."""

    group: Group
    learning_rate: float
    seed: int
    role: Role
    recipe: Recipe

    def __str__(self) -> str:
        return f"{self.group}, learning rate {self.learning_rate:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Its folder, relative to the grid's output folder, by which it is known."""
        return cell_folder(self.group, self.learning_rate, self.seed)


def cell_folder(group: Group, learning_rate: float, seed: int) -> str:
    """Where a cell's run is, relative to the grid's output folder."""
    task, method, budget = group
    size = "no-budget" if budget is None else budget_name(budget).replace(" ", "-")
    return f"cells/{task}/{method}/{size}/lr-{learning_rate!r}/seed-{seed}"


def budget_name(budget: int | str) -> str:
    """A budget for people: ``rank 8``, ``100000 parameters``."""
    return budget if isinstance(budget, str) else f"{budget} parameters"


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise ValueError("should be a name that a folder can have: letters, digits and _ . + -")
    return name


def _check_budget(budget: int | str) -> int | str:
    if isinstance(budget, int) and budget > 0:
        return budget
    if isinstance(budget, str) and re.fullmatch(r"rank (?=.*[1-9])[0-9]+(\.[0-9]+)?", budget):
        return budget
    raise ValueError(
        "should be a number of parameters (100000), or a rank (`rank 8`, `rank 0.25`): as many as LoRA of that rank has"
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


def _check_distinct(values: list[Any]) -> list[Any]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"holds {twice[0]} twice")
    return values


Name = Annotated[str, AfterValidator(_check_name)]
Partial = dict[str, Any]
"""Some keys of a recipe."""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, ignored_types=(cached_property,))


_Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], AfterValidator(_check_distinct)]


class Seeds(_Keys):
    """Which seeds are for what."""

    choose: Annotated[_Seeds, BeforeValidator(_as_list)] = Field(
        [11, 12],
        min_length=1,
        description="Seeds over which learning rates are chosen by their mean; not reported. One may stand alone.",
    )
    report: _Seeds = Field([1, 2, 3, 4, 5], min_length=1, description="Seeds that are reported, at the chosen rate.")

    @model_validator(mode="after")
    def _check(self) -> Seeds:
        for seed in self.choose:
            if seed in self.report:
                raise ValueError(f"the seed {seed} chooses the learning rate, so it cannot be reported, too")
        return self


class Resources(_Keys):
    """What one cell may use."""

    cpus: int = Field(1, ge=1, description="Cores of a cell on a Ray cluster. (Locally workers share all cores.)")
    gpus: float = Field(0, ge=0, description="GPUs of a cell; 0.5: two cells on one; 0: it sees none.")
    minutes: float | None = Field(None, gt=0, description="A cell that takes longer is stopped, and counts as broken.")


class Grid(_Keys):
    """What a bench runs."""

    name: Name = Field(description="What it is called in tables and plots.")
    output: str = Field(description="Folder of everything that it writes.")
    base: Partial = Field({}, description="The part of a recipe that all cells share.")
    tasks: dict[Name, Partial | None] = Field(min_length=1, description="For each task, its part of a recipe.")
    methods: dict[Name, Partial | None] = Field(
        min_length=1,
        description="For each method, its part of a recipe. `method` defaults to the name; `learning_rates` of its "
        "own, as many as the others have, is for a method that trains at another scale, such as full.",
    )
    budgets: Annotated[list[Annotated[int | str, AfterValidator(_check_budget)]], AfterValidator(_check_distinct)] = (
        Field([], description="Sizes to compare at, for methods whose size can be chosen. Left out: as recipes say.")
    )
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_check_distinct)] = Field(
        min_length=1, description="Rates to choose from, the same for every task. With a single one nothing is chosen."
    )
    extend: int = Field(
        2,
        ge=0,
        le=10,
        description="How many rates may be added, one after the other, while the best is the lowest or the highest of "
        "those tried: the next by the same factor, of each method alike. 0: none.",
    )
    seeds: Seeds = Field(Seeds.model_validate({}), description="Which seeds are for what.")
    reference: str | None = Field(None, description="Method that others are compared with. Default: lora, if there.")
    records: str | None = Field(
        None,
        description="A JSON file with records of finished cells, committed perhaps on another machine: these cells are "
        "not run again, and the file is brought up to date as cells finish.",
    )
    ours: str | None = Field(
        None,
        description="Method that the table over all tasks compares with each other one. Default: adalora, if there.",
    )
    resources: Resources = Field(Resources.model_validate({}), description="What one cell may use.")
    _cells: dict[str, Cell] = PrivateAttr(default_factory=dict)  # a recipe takes a while to validate

    @model_validator(mode="after")
    def _check(self) -> Grid:
        if self.reference is None and "lora" in self.methods:
            self.reference = "lora"
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference should be one of the methods: {', '.join(self.methods)}")
        if self.ours is None and "adalora" in self.methods:
            self.ours = "adalora"
        if self.ours is not None and self.ours not in self.methods:
            raise ValueError(f"ours should be one of the methods: {', '.join(self.methods)}")
        return self

    @cached_property
    def groups(self) -> list[Group]:
        """All groups: budgets change slowest, methods fastest."""
        budgets: list[Budget] = [*self.budgets] or [None]
        found = {
            Group(task, method, budget if methods.get(self.method_of(method)).takes_budget else None): None
            for budget in budgets
            for task in self.tasks
            for method in self.methods
        }
        return list(found)

    def method_of(self, name: str) -> str:
        """The method behind a name in ``methods``."""
        return str((self.methods[name] or {}).get("method", name))

    def rates(self, method: str) -> list[float]:
        """The learning rates to choose from, the lowest first."""
        own = (self.methods[method] or {}).get("learning_rates")
        return sorted(map(float, own or self.learning_rates))

    @property
    def folder(self) -> Path:
        """The folder of everything that it writes."""
        return Path(self.output).expanduser()

    def possible_rates(self, method: str) -> list[float]:
        """All rates that a method could come to be run at, those that may be added on either side included."""
        low = high = self.rates(method)
        for _ in range(self.extend if len(low) > 1 else 0):
            low, high = [next_rate(low, low[0]), *low], [*high, next_rate(high, high[-1])]
        return sorted({*low, *high})

    @property
    def total(self) -> int:
        """Cells in all, if no rate is added."""
        return sum(len(list(self.choose_cells(group))) + len(self.seeds.report) for group in self.groups)

    def choose_cells(self, group: Group, rates: Sequence[float] | None = None) -> Iterator[Cell]:
        """The cells that choose a group's learning rate among ``rates`` (default: those of the grid); none where there
        is nothing to choose."""
        rates = self.rates(group.method) if rates is None else rates
        for seed in self.seeds.choose if len(self.rates(group.method)) > 1 else ():
            for rate in rates:
                yield self.cell(group, rate, seed, "choose")

    def report_cells(self, group: Group, rate: float) -> Iterator[Cell]:
        """The cells that are reported, at the chosen rate."""
        for seed in self.seeds.report:
            yield self.cell(group, rate, seed, "report")

    def possible_cells(self, where: Callable[[str], bool] = lambda folder: True) -> Iterator[Cell]:
        """Each cell that could come to be run, whichever rates are added and chosen, of which ``where`` is true of the
        folder."""
        for group in self.groups:
            seeds: dict[int, Role] = dict.fromkeys(self.seeds.report, "report")
            if len(self.rates(group.method)) > 1:
                seeds |= dict.fromkeys(self.seeds.choose, "choose")
            for rate in self.possible_rates(group.method):
                for seed, role in seeds.items():
                    if where(cell_folder(group, rate, seed)):
                        yield self.cell(group, rate, seed, role)

    def cell(self, group: Group, rate: float, seed: int, role: Role) -> Cell:
        """One cell. RecipeError when its recipe is at fault."""
        key = cell_folder(group, rate, seed)
        if key not in self._cells:
            self._cells[key] = Cell(group, rate, seed, role, self._recipe(group, rate, seed))
        return self._cells[key]

    def _recipe(self, group: Group, rate: float, seed: int) -> Recipe:
        task, method, budget = group
        own = {key: value for key, value in (self.methods[method] or {}).items() if key != "learning_rates"}
        raw = laid_over(self.base, self.tasks[task] or {}, own)
        raw = laid_over(raw, {"method": self.method_of(method), "seed": seed, "training": {"learning_rate": rate}})
        raw["output"] = str(self.folder / cell_folder(group, rate, seed))
        if budget is not None:
            raw["budget"] = budget
        unread = set(METHOD_SECTIONS) - {methods.get(raw["method"]).section}
        raw = {key: value for key, value in raw.items() if key not in unread}
        return validate(raw, str(group))


def next_rate(rates: Sequence[float], edge: float) -> float:
    """The rate beyond the lowest or the highest of at least two, by the factor between that and its neighbour, to three
    digits."""
    rates = sorted(rates)
    beside = rates[1] if edge == rates[0] else rates[-2]
    return float(f"{edge * edge / beside:.3g}")


def laid_over(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Later parts laid over earlier ones, section by section."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = laid_over(below, value) if both else value  # type: ignore[arg-type]
    return result


def read_grid(path: Path) -> Grid:
    """The grid in a YAML file, with every recipe that can come of it validated.

    Raises:
        RecipeError: what is wrong in the file, the key by its dotted name.
    """
    if not path.is_file():
        raise RecipeError(f"no grid at {path}: give the path of a YAML file")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a grid: a grid is a YAML text file") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a grid: expected keys such as `tasks:` and `methods:` at the top")
    grid = validated(Grid, raw, str(path))
    faults = list(_faults_of_parts(grid))
    if faults:
        many = f"{path} has {len(faults)} faults:"
        raise RecipeError(f"{path}: {faults[0]}" if len(faults) == 1 else "\n  ".join([many, *faults]))
    for group in grid.groups:
        for rate in grid.rates(group.method):
            try:
                _check_cell(grid.cell(group, rate, grid.seeds.choose[0], "choose"))
            except RecipeError as error:
                raise RecipeError(f"{path}, {error}") from error
    return grid


def _check_cell(cell: Cell) -> None:
    """RecipeError unless method, task and the task's options are known."""
    recipe = completed(cell.recipe)
    validated(tasks.get(recipe.task).options, recipe.options, f"{cell.group}: task {recipe.task}", "options.")


def _faults_of_parts(grid: Grid) -> Iterator[str]:
    """What is wrong with partial recipes before they are laid over each other."""
    parts = {"base": grid.base}
    parts |= {f"tasks.{name}": part or {} for name, part in grid.tasks.items()}
    parts |= {f"methods.{name}": part or {} for name, part in grid.methods.items()}
    reads = {}
    for name in grid.methods:
        try:
            reads[f"methods.{name}"] = methods.get(grid.method_of(name)).section
        except RecipeError as error:
            yield f"methods.{name}: {error}"
    for place, part in parts.items():
        of_method = place.startswith("methods.")
        for key, advice in _SET_BY_THE_GRID.items():
            if key in part:
                yield f"{place}.{key} is not for a part of a recipe: {advice}"
        if isinstance(part.get("training"), Mapping) and "learning_rate" in part["training"]:
            yield f"{place}.training.learning_rate is chosen from `learning_rates`"
        if "method" in part and not of_method:
            yield f"{place}.method: a method is one of `methods`"
        if "learning_rates" in part and of_method:
            yield from _faults_of_rates(f"{place}.learning_rates", part["learning_rates"], grid)
        for section in (*METHOD_SECTIONS, "data", "options", "training"):
            if section in part and not isinstance(part[section], Mapping):
                yield f"{place}.{section}: should be a section with keys of its own"
        for section in METHOD_SECTIONS:
            if section in part and of_method and reads.get(place, section) != section:
                yield f"{place}.{section} has no meaning for this method"
        if not of_method:
            yield from _faults_of_sections(place, part)


def _faults_of_sections(place: str, part: Partial) -> Iterator[str]:
    """Sections of methods, of which each cell gets the one that its method reads; some may be read by none."""
    kinds: dict[str, type[BaseModel]] = {
        "adalora": AdaLoraSection,
        "lora": LoraSection,
        "bottleneck": BottleneckSection,
    }
    for section, kind in kinds.items():
        if isinstance(part.get(section), Mapping):
            try:
                validated(kind, part[section], place, f"{section}.")
            except RecipeError as error:
                yield str(error)


def _faults_of_rates(place: str, rates: object, grid: Grid) -> Iterator[str]:
    """A method's own rates must be as many as the others have, or its chance to find a good one differs."""
    wanted = len(grid.learning_rates)
    fine = isinstance(rates, list) and all(isinstance(rate, float | int) and rate > 0 for rate in rates)
    if not fine or len(set(map(float, rates))) != wanted:  # type: ignore[call-overload]
        yield f"{place} should be {wanted} different rates above 0, as many as `learning_rates` has (given: {rates!r})"
