"""From records to the rows of tables: what each method scored, and how far that is from the reference.

All of it comes from the records alone, so that it can be drawn again at any time, from an unfinished grid as well.
Scores are held as the tasks give them; ``Table.points`` says by what they are multiplied to be shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from .. import tasks
from .choose import lost_groups
from .grid import Grid, Group, budget_name
from .published import Figure, figures
from .records import Budget, Record
from .speed import Speed, speeds
from .statistics import Agreement, Difference, Overall, Summary, overall, paired_difference, rank_agreement, summary

AVERAGE = "average"
"""Stands for a task in the groups of the average over tasks."""


class Cost(NamedTuple):
    """What the reported runs of a row took; nan where none of them says."""

    adapter_start: float = math.nan  # parameters, means over the runs
    adapter_saved: float = math.nan
    minutes: float = math.nan  # mean of the runs that were not interrupted
    peak_bytes: float = math.nan  # of the largest run


@dataclass(frozen=True)
class Row:
    """One method at one budget."""

    group: Group
    scores: dict[int, float]  # the headline metric by seed
    summary: Summary
    difference: Difference | None  # to the reference at the same budget; None of the reference itself, or without one
    learning_rates: list[float] = field(default_factory=list)  # chosen
    tried: list[float] = field(default_factory=list)
    metrics: dict[str, Summary] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    wanted: int = 0  # seeds that the grid asks for
    undefined: list[int] = field(default_factory=list)  # seeds at which it is not defined, so that it counts as 0
    collapsed: list[int] = field(default_factory=list)  # seeds at which nothing was learned
    worst: float = math.nan  # score of the worst seed
    loss: Summary = field(default_factory=lambda: summary(()))  # on the held-out rows
    failures: list[Record] = field(default_factory=list)  # reported cells that broke, and those that were to choose
    lost: bool = False  # no learning rate gave a result, so there is nothing to report

    @property
    def missing(self) -> int:
        """Seeds that are still to be run."""
        if self.lost:
            return 0
        broken = sum(record.role == "report" for record in self.failures)
        return max(0, self.wanted - len({*self.scores, *self.undefined}) - broken)


@dataclass(frozen=True)
class Table:
    """One task, or the average over several."""

    task: str
    title: str
    headline: str
    rows: list[Row]
    points: dict[str, float]  # by what each metric is multiplied to be shown: 100 of a share, else 1
    words: str  # what the table is of
    lower_is_better: frozenset[str] = frozenset()  # metrics of which less is more
    model: str = ""
    published: list[Figure] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """All metrics that some row has, the headline first."""
        names = dict.fromkeys(name for row in self.rows for name in row.metrics)
        return sorted(names, key=lambda name: name != self.headline)


@dataclass(frozen=True)
class Results:
    """All that a bench has to say."""

    name: str
    reference: str | None
    tables: list[Table]
    averages: list[Table]  # one for each budget
    agreement: list[Agreement]
    overall: list[Overall]  # one method less each other, over all tasks
    speeds: list[Speed]
    versions: dict[str, list[str]]  # of each package, all that some run was run with


def results(grid: Grid, records: Sequence[Record]) -> Results:
    """The tables of a grid, as far as its records go."""
    lost = set(lost_groups(grid, {record.folder: record for record in records}))
    tables = [_of_task(grid, task, [record for record in records if record.task == task], lost) for task in grid.tasks]
    budgets = sorted(dict.fromkeys(group.budget for group in grid.groups), key=lambda budget: budget is None)
    averages = [average(tables, budget, grid.reference) for budget in budgets] if len(tables) > 1 else []
    done = [record for record in records if record.role == "report" and record.state == "done"]
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, set()).add(version)
    return Results(
        grid.name,
        grid.reference,
        tables,
        [table for table in averages if table],
        rank_agreement(done),
        _overall(tables, grid.ours),
        speeds(records, grid.reference),
        {package: sorted(found) for package, found in versions.items()},
    )


def _overall(tables: Sequence[Table], ours: str | None) -> list[Overall]:
    """``ours`` less each other method, where they share two tasks or more. Tasks of which less is better have other
    units, and are left out."""
    scores: dict[str, dict[tuple[str, Budget], dict[int, float]]] = {}
    collapsed: dict[str, int] = {}
    for table in tables:
        if table.headline in table.lower_is_better:
            continue
        for row in table.rows:
            points = table.points.get(table.headline, 1.0)
            found = {seed: score * points for seed, score in row.scores.items()}
            scores.setdefault(row.group.method, {})[table.task, row.group.budget] = found
            collapsed[row.group.method] = collapsed.get(row.group.method, 0) + len(row.collapsed)
    rows = []
    if ours is None or ours not in scores:
        return []
    for rival in scores:
        compared = None if rival == ours else overall(scores[ours], scores[rival])
        if compared is None or len(compared[3]) < 2:
            continue
        mean, low, high, by_task, budgets = compared
        behind = [task for task, of_task in by_task.items() if of_task.high < 0]
        means = {task: of_task.mean for task, of_task in by_task.items()}
        rows.append(Overall(ours, rival, mean, low, high, means, budgets, behind, collapsed[ours], collapsed[rival]))
    return rows


def average(tables: Sequence[Table], budget: Budget, reference: str | None) -> Table | None:
    """Mean over tasks of the headline metrics at one budget, in points, for each seed: over the tasks and seeds at
    which every method has a score, so that all means are of the same. None where fewer than two tasks are left.

    Metrics of which less is more are left out, and so are tasks on which a method has no score at all.
    """
    found = {table.task: [row for row in table.rows if row.group.budget == budget] for table in tables}
    methods = dict.fromkeys(row.group.method for rows in found.values() for row in rows)
    used, left = [], []
    for table in tables:
        without = [row.group.method for row in found[table.task] if not row.scores]
        if table.headline in table.lower_is_better:
            left.append(f"{table.task} (less {table.headline} is better)")
        elif without:
            left.append(f"{table.task} (no result of {', '.join(without)})")
        else:
            used.append(table)
    seeds = set.intersection(*(set(row.scores) for table in used for row in found[table.task])) if used else set()
    if len(used) < 2 or not seeds:
        return None
    rows = []
    for method in methods:
        own = [
            {seed: score * table.points[table.headline] for seed, score in row.scores.items()}
            for table in used
            for row in found[table.task]
            if row.group.method == method
        ]
        scores = {seed: fmean(of_task[seed] for of_task in own) for seed in sorted(seeds)}
        rows.append(Row(Group(AVERAGE, method, budget), scores, summary(scores.values()), None))
    words = f"mean of {', '.join(f'{table.task} ({table.headline})' for table in used)}"
    words += f"; left out: {', '.join(left)}" if left else ""
    title = "Average" if budget is None else f"Average at {budget_name(budget)}"
    return Table(AVERAGE, title, "points", _with_differences(rows, reference), {"points": 1.0}, words)


def _of_task(grid: Grid, task: str, records: Sequence[Record], lost: set[Group]) -> Table:
    groups = sorted((group for group in grid.groups if group.task == task), key=lambda group: group.budget is None)
    recipe = grid.cell(groups[0], grid.rates(groups[0].method)[0], grid.seeds.choose[0], "choose").recipe
    kind = tasks.get(recipe.task)
    rows = [_row(group, records, len(grid.seeds.report), group in lost) for group in groups]
    measured = [record.metrics for record in records]
    names = {kind.headline, *(name for metrics in measured for name in metrics)}
    lower = frozenset(name for name in names if name.split(", ")[0] in kind.lower_is_better)  # "mse, another split"
    return Table(
        task,
        f"{kind.headline} of {task}",
        kind.headline,
        _with_differences(rows, grid.reference),
        _points(kind.in_percent, lower, measured),
        words=f"{recipe.model} on {recipe.data.train}" + (f" ({recipe.data.config})" if recipe.data.config else ""),
        lower_is_better=lower,
        model=recipe.model,
        published=figures(recipe.task, recipe.data.train, recipe.data.config),
    )


def _row(group: Group, records: Sequence[Record], wanted: int, lost: bool) -> Row:
    own = [record for record in records if record.group == group]
    done = [record for record in own if record.role == "report" and record.state == "done"]
    undefined = sorted(record.seed for record in done if not math.isfinite(record.score))
    scores = {record.seed: record.score for record in done if record.seed not in undefined}
    if not any(record.lower_is_better for record in done):  # the correlation of a constant answer: no better than none
        scores = {record.seed: scores.get(record.seed, 0.0) for record in done}
    names = dict.fromkeys(name for record in done for name in record.metrics)
    return Row(
        group,
        scores,
        summary(scores.values()),
        difference=None,
        learning_rates=sorted({record.learning_rate for record in done}),
        tried=sorted({record.learning_rate for record in own if record.role == "choose"}),
        metrics={name: summary(_finite(record.metrics.get(name) for record in done)) for name in names}
        | {record.headline: summary(scores.values()) for record in done},
        cost=_cost(done),
        wanted=wanted,
        undefined=undefined,
        collapsed=sorted(record.seed for record in done if record.collapsed),
        worst=(max if any(record.lower_is_better for record in done) else min)(scores.values(), default=math.nan),
        loss=summary(_finite(record.loss for record in done)),
        failures=[record for record in own if record.state == "failed"],
        lost=lost,
    )


def _with_differences(rows: Sequence[Row], reference: str | None) -> list[Row]:
    """The rows with what tells each from the reference at the same budget."""
    theirs = {row.group.budget: row.scores for row in rows if row.group.method == reference}
    return [
        replace(row, difference=paired_difference(row.scores, theirs[row.group.budget]))
        if row.group.budget in theirs and row.group.method != reference
        else row
        for row in rows
    ]


def _cost(done: Sequence[Record]) -> Cost:
    """Means over the runs; the memory is the GPU's where there was one, else the process's."""

    def mean(values: Iterable[float | None]) -> float:
        known = _finite(values)
        return fmean(known) if known else math.nan

    peaks = [record.gpu_peak_bytes or record.peak_bytes for record in done]
    return Cost(
        mean(record.parameters.get("adapter_start") for record in done),
        mean(record.parameters.get("adapter_saved") for record in done),
        mean(record.seconds for record in done if not record.resumed) / 60,
        max(_finite(peaks), default=math.nan),
    )


def _points(
    in_percent: bool, lower: Collection[str], measured: Sequence[Mapping[str, float | None]]
) -> dict[str, float]:
    """100 for each metric that is a share or a correlation, 1 for one that is in per cent already or has no bounds."""
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    return {
        name: 100.0
        if not in_percent
        and name not in lower
        and all(abs(value) <= 1 for value in _finite(metrics.get(name) for metrics in measured))
        else 1.0
        for name in names
    }


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
