"""How soon a method reaches what the reference has at its end.

A run's curve is its headline metric at a fixed grid of steps, on the same held-out rows each time. A method's is the
mean over its reported seeds. It has reached the reference at the first step of its curve at which it is as good as the
reference's mean is at the last of its own; what was spent before the first step counts as ``start_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import NamedTuple

from .records import Budget, Record


class Speed(NamedTuple):
    """One method at one budget, over tasks."""

    method: str
    budget: Budget
    median: float  # over tasks, of the share of the reference's steps that it takes; inf: half of them or more never
    tasks: dict[str, float]  # the share of each; inf where it does not get there


def speeds(records: Sequence[Record], reference: str | None) -> list[Speed]:
    """Of every method that has curves on the tasks and budgets of the reference's."""
    goals = _goals(records, reference)
    found: dict[tuple[str, Budget], dict[str, float]] = {}
    for (task, method, budget), runs in _groups(records).items():
        if (task, budget) in goals:
            goal, steps = goals[task, budget]
            reached = _first(_mean_curve(runs), goal, runs[0].lower_is_better)
            start = fmean(run.start_steps for run in runs)
            found.setdefault((method, budget), {})[task] = (reached + start) / steps
    return [Speed(method, budget, median(shares.values()), shares) for (method, budget), shares in found.items()]


def steps_of_cells(records: Sequence[Record], reference: str | None) -> dict[str, float]:
    """For each reported run, by its folder, the steps until it reaches the reference; none where it does not."""
    goals = _goals(records, reference)
    found = {}
    for record in _with_curves(records):
        if (record.task, record.budget) in goals:
            goal, _ = goals[record.task, record.budget]
            reached = _first(_mean_curve([record]), goal, record.lower_is_better) + record.start_steps
            if math.isfinite(reached):
                found[record.folder] = reached
    return found


def _goals(records: Sequence[Record], reference: str | None) -> dict[tuple[str, Budget], tuple[float, int]]:
    """For each task and budget, the reference's mean at the end of its curve, and its steps."""
    return {
        (task, budget): (_mean_curve(runs)[-1][1], _mean_curve(runs)[-1][0])
        for (task, method, budget), runs in _groups(records).items()
        if method == reference and _mean_curve(runs)
    }


def _with_curves(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r.role == "report" and r.state == "done" and len(r.curve) > 1]


def _groups(records: Iterable[Record]) -> dict[tuple[str, str, Budget], list[Record]]:
    groups: dict[tuple[str, str, Budget], list[Record]] = {}
    for record in _with_curves(records):
        groups.setdefault(record.group, []).append(record)
    return groups


def _mean_curve(runs: Sequence[Record]) -> list[tuple[int, float]]:
    """Mean at the steps that all runs have; a metric that is not defined counts as 0 where more is better, else not."""
    curves = [
        {int(step or 0): _counted(value, run.lower_is_better) for step, value in run.curve if step is not None}
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, fmean(curve[step] for curve in curves)) for step in steps]


def _counted(value: float | None, lower_is_better: bool) -> float:
    if value is not None and math.isfinite(value):
        return value
    return math.inf if lower_is_better else 0.0


def _first(curve: Sequence[tuple[int, float]], goal: float, lower_is_better: bool) -> float:
    there = (step for step, value in curve if (value <= goal if lower_is_better else value >= goal))
    return float(next(there, math.inf))
