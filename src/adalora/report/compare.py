"""Several runs side by side: what came of them, what their recipes differ in, and how alike they divide a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

from ..recipe import METHOD_SECTIONS, Recipe, flat
from ..runs import RunError
from .grid import Cells, cells
from .run import Run, names_of, read_run
from .similarity import moved, spearman

_APART = "no matrix in common"
_BESIDE_THE_POINT = {"output"}  # keys of recipes that are never the same


Curve = list[tuple[int, float]]
"""(step, value)."""


class Row(NamedTuple):
    """One quantity of all runs, in their order; None where a run does not have it."""

    name: str
    values: list[Any]


class Likeness(NamedTuple):
    """How alike two runs divide their budgets, over the matrices that both adapt."""

    one: str
    other: str
    matrices: int  # that both adapt
    spearman: float  # of ranks; nan where a run has the same rank everywhere
    moved: float  # share of the budget that lies elsewhere
    reason: str  # why there is nothing to compare, or no correlation; empty otherwise


@dataclass(frozen=True)
class Comparison:
    """What tables, pictures and pages of several runs say."""

    names: list[str]
    runs: list[Run]

    @cached_property
    def ranks(self) -> list[dict[str, int]]:
        """Ranks of each run, as far as they are known."""
        return [run.ranks for run in self.runs]

    @property
    def facts(self) -> list[Row]:
        """What each run is and what came of it, metrics included, the headline's first."""
        rows: dict[str, list[Any]] = {
            "model": [run.recipe.model for run in self.runs],
            "task": [run.recipe.task for run in self.runs],
            "data": [run.recipe.data.train for run in self.runs],
            "method": [run.recipe.method for run in self.runs],
            "seed": [run.recipe.seed for run in self.runs],
            "steps": [self._said(run, "steps") for run in self.runs],
            "matrices": [len(ranks) or None for ranks in self.ranks],
            "triplets": [sum(ranks.values()) if ranks else None for ranks in self.ranks],
            "average rank": [_mean(ranks, ranks) for ranks in self.ranks],
            "saved parameters": [self._said(run, "parameters", "adapter_saved") for run in self.runs],
            "trainable parameters": [self._said(run, "parameters", "trainable") for run in self.runs],
            **{metric: [self._said(run, "metrics", metric) for run in self.runs] for metric in self._metrics()},
            "minutes": [_over(self._said(run, "seconds"), 60) for run in self.runs],
            "memory, GB": [_over(self._said(run, "memory", "peak_bytes"), 1e9) for run in self.runs],
            "GPU memory, GB": [_over(self._said(run, "memory", "gpu_peak_bytes"), 1e9) for run in self.runs],
        }
        return [Row(name, values) for name, values in rows.items() if any(value is not None for value in values)]

    @property
    def settings(self) -> list[Row]:
        """The keys of the recipes, as resolved, whose values differ. Sections that a method does not read are left
        out of its recipe, and so is the folder of the run."""
        recipes = []
        for run in self.runs:
            absent = {name for name in METHOD_SECTIONS if name not in run.recipe.model_fields_set}
            recipes.append(dict(flat(run.recipe.model_dump(exclude=absent | _BESIDE_THE_POINT))))
        keys = dict.fromkeys(key for recipe in recipes for key in recipe)
        rows = [Row(key, [recipe.get(key) for recipe in recipes]) for key in keys]
        return [row for row in rows if any(value != row.values[0] for value in row.values)]

    @property
    def notable_settings(self) -> list[Row]:
        """The same without keys that only some of the methods read, and that have their defaults there."""
        return [row for row in self.settings if not _is_usual(row)]

    @property
    def likenesses(self) -> list[Likeness]:
        """Every pair of runs."""
        return [self._likeness(one, other) for one, other in combinations(range(len(self.runs)), 2)]

    @property
    def headlines(self) -> list[str]:
        """Names of the metrics that the tasks are judged by."""
        return list(dict.fromkeys(run.metrics["headline"] for run in self.runs if run.metrics))

    @property
    def scores(self) -> list[Curve]:
        """The first headline on the way, of each run; empty where a task has another one."""
        return self.logged(f"eval_{self.headlines[0]}") if self.headlines else [[] for _ in self.runs]

    def logged(self, key: str) -> list[Curve]:
        """What a Trainer logged under a key, of each run."""
        return [[(entry["step"], entry[key]) for entry in run.log if entry.get(key) is not None] for run in self.runs]

    @property
    def budgets(self) -> list[Curve]:
        """Live triplets from the first step to the last, of each run; empty without ranks."""
        curves = []
        for run, ranks in zip(self.runs, self.ranks, strict=True):
            live: Curve = [(0, sum(ranks.values()))] if ranks else []
            if run.trace is not None:
                live = [(0, sum(run.trace.initial_ranks))]
                live += [(allocation.step, sum(allocation.ranks)) for allocation in run.trace.allocations]
            last = max((entry["step"] for entry in run.log), default=0)
            curves.append([*live, (last, live[-1][1])] if live and last > live[-1][0] else live)
        return curves

    @cached_property
    def _cells(self) -> Cells:
        return cells(dict.fromkeys(name for ranks in self.ranks for name in ranks))

    @property
    def kinds(self) -> list[Row]:
        """Mean rank of each kind of module, of each run."""
        return [
            Row(kind, [_mean(ranks, chain.from_iterable(row)) for ranks in self.ranks])
            for kind, row in zip(self._cells.kinds, self._cells.names, strict=True)
        ]

    @property
    def layers(self) -> list[Row]:
        """Mean rank of each layer, of each run."""
        return [
            Row(column.name, [_mean(ranks, chain.from_iterable(names)) for ranks in self.ranks])
            for column, names in zip(self._cells.columns, zip(*self._cells.names, strict=True), strict=True)
        ]

    @property
    def notes(self) -> list[str]:
        """What cannot be compared, and why."""
        notes = [f"{name} is not finished." for name, run in zip(self.names, self.runs, strict=True) if not run.metrics]
        for row in self.facts:
            if row.name in {"task", "data"} and len(set(row.values)) > 1:
                notes.append(f"The runs differ in {row.name}: their metrics are not to be set against each other.")
        for name, run, ranks in zip(self.names, self.runs, self.ranks, strict=True):
            if run.metrics and not ranks:
                notes.append(f"{name} has no ranks: method {run.recipe.method} does not work by them.")
            if len(set(ranks.values())) == 1 and len(ranks) > 1:
                notes.append(f"{name} has one rank everywhere, so there is no correlation with its ranks.")
        for pair in self.likenesses:
            if pair.reason == _APART:
                notes.append(f"{pair.one} and {pair.other} have no matrix in common: their ranks cannot be compared.")
        return notes

    def as_json(self) -> dict[str, Any]:
        """Everything, by the names of the runs."""

        def by_run(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
            return {row.name: dict(zip(self.names, row.values, strict=True)) for row in rows}

        return {
            "runs": {name: str(run.folder.path) for name, run in zip(self.names, self.runs, strict=True)},
            "facts": by_run(self.facts),
            "recipe_differences": by_run(self.settings),
            "rank_similarity": [likeness._asdict() for likeness in self.likenesses],
            "mean_rank_by_module": by_run(self.kinds),
            "mean_rank_by_layer": by_run(self.layers),
            "ranks": dict(zip(self.names, self.ranks, strict=True)),
            "notes": self.notes,
        }

    def _metrics(self) -> list[str]:
        """Names of metrics, headlines first."""
        finished = [run.metrics for run in self.runs if run.metrics]
        return list(dict.fromkeys([*self.headlines, *(name for metrics in finished for name in metrics["metrics"])]))

    def _said(self, run: Run, *keys: str) -> Any:
        """A value of ``metrics.json``; None where it is not there."""
        value: Any = run.metrics
        for key in keys:
            value = (value or {}).get(key)
        return value

    def _likeness(self, one: int, other: int) -> Likeness:
        first, second = self.ranks[one], self.ranks[other]
        common = first.keys() & second.keys()
        correlation, reason = spearman(first, second), ""
        if not first or not second:
            reason = f"{self.names[other if first else one]} has no ranks"
        elif not common:
            reason = _APART
        elif math.isnan(correlation):
            even = [i for i in (one, other) if len({self.ranks[i][name] for name in common}) == 1]
            reason = f"one rank everywhere in {' and '.join(self.names[i] for i in even)}"
        return Likeness(self.names[one], self.names[other], len(common), correlation, moved(first, second), reason)


def compare(folders: Sequence[Path]) -> Comparison:
    """The runs in these folders, side by side.

    Raises:
        RunError: fewer than two, the same one twice, or a folder that no run wrote.
    """
    if len(folders) < 2:
        raise RunError("give the folders of two runs or more: adalora inspect and adalora report show a single one")
    places = [folder.expanduser().resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise RunError(f"{folders[index]} is given twice: give runs that differ")
    return Comparison(names_of(places), [read_run(folder.expanduser()) for folder in folders])


def _mean(ranks: Mapping[str, int], names: Iterable[str]) -> float | None:
    """Over those of the matrices that there are."""
    found = [ranks[name] for name in names if name in ranks]
    return sum(found) / len(found) if found else None


def _is_usual(row: Row) -> bool:
    section, _, key = row.name.partition(".")
    if section not in METHOD_SECTIONS:
        return False
    usual = getattr(Recipe.model_fields[section].default, key)
    return None in row.values and all(value in (None, usual) for value in row.values)


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
