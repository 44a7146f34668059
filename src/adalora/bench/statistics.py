"""What a handful of seeds can say: means, paired differences, and how far learned ranks agree.

Two methods are compared over the seeds that both have. Every seed gives one difference, and all that is said of the
two methods is said of these differences, so that what a seed does to both (its order of rows, its first weights of
the output layer) cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..report.similarity import spearman
from .records import Budget, Record

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0


class Summary(NamedTuple):
    """Scores of one row of a table."""

    mean: float  # nan of no score
    deviation: float  # of the sample, over n - 1; nan of fewer than two scores
    n: int


class Difference(NamedTuple):
    """One method less another, over the seeds that both have."""

    mean: float  # nan without a common seed
    low: float  # the bootstrap interval; nan of fewer than two seeds
    high: float
    p_value: float  # of the paired t-test; nan where all differences are the same
    n: int


class Agreement(NamedTuple):
    """How alike two sets of runs divide the budget: Spearman's correlation over matrices, averaged over pairs."""

    between: str  # what the two runs of a pair differ in: seed, budget or task
    what: str  # what they share
    mean: float
    low: float  # lowest and highest of the pairs
    high: float
    pairs: int


def summary(scores: Iterable[float]) -> Summary:
    """Mean and sample standard deviation of the finite scores."""
    values = np.array([score for score in scores if math.isfinite(score)], dtype=np.float64)
    mean = float(values.mean()) if values.size else math.nan
    return Summary(mean, float(values.std(ddof=1)) if values.size > 1 else math.nan, values.size)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """``ours`` less ``theirs``, scores by seed, over the seeds at which both are finite.

    The interval is the percentile bootstrap's over seeds (Efron 1979; ``scipy.stats.bootstrap``), the p-value that of
    the two-sided paired t-test (Student's on the differences). An exact sign-flip test of five differences has no
    p-value below 2/32, so it could never tell two methods apart; the t-test can, at the price of taking the
    differences for normal.
    """
    seeds = [s for s in sorted(ours.keys() & theirs.keys()) if math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    a, b = (np.array([scores[seed] for seed in seeds], dtype=np.float64) for scores in (ours, theirs))
    return difference_of(a - b)


def difference_of(differences: np.ndarray) -> Difference:
    """What ``paired_difference`` says, of differences that are at hand."""
    n = differences.size
    if n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(differences.mean())
    if n == 1:
        return Difference(mean, math.nan, math.nan, math.nan, 1)
    if np.ptp(differences) <= 1e-12 * max(1.0, abs(mean)):  # equal up to rounding: a t-test would divide by it
        return Difference(mean, mean, mean, math.nan, n)
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean, float(interval.low), float(interval.high), p_value, n)


class Overall(NamedTuple):
    """One method less another over all tasks, in points."""

    method: str
    rival: str
    mean: float  # of tasks, each of which is the mean of its budgets and seeds
    low: float  # the interval, resampled over tasks and, in each, over seeds
    high: float
    tasks: dict[str, float]  # the mean on each
    budgets: int
    behind: list[str]  # tasks on which the whole interval over seeds is below 0
    collapsed: int  # reported runs, of the method and of the rival
    rival_collapsed: int


def hierarchical_interval(differences: Sequence[np.ndarray]) -> tuple[float, float]:
    """The percentile interval of the mean of task means, each task drawn with replacement, and of each drawn task its
    seeds (Davison and Hinkley 1997, section 3.8). nan of no tasks.

    Args:
        differences: for each task a difference for each seed, [seeds].
    """
    if not differences:
        return math.nan, math.nan
    draw = np.random.default_rng(SEED)
    chosen = draw.integers(len(differences), size=(RESAMPLES, len(differences)))
    means = np.empty(chosen.shape)
    for task, values in enumerate(differences):
        places = np.nonzero(chosen == task)
        means[places] = draw.choice(values, size=(len(places[0]), values.size)).mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means.mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def overall(
    ours: Mapping[tuple[str, Budget], Mapping[int, float]],
    theirs: Mapping[tuple[str, Budget], Mapping[int, float]],
) -> tuple[float, float, float, dict[str, Difference], int] | None:
    """Mean, interval and tasks of ``ours`` less ``theirs``: scores in points by task and budget, then by seed. A rival
    without budgets is compared with at each of ours. Seeds that both have at every budget of a task count; None where
    there is no such task."""
    by_task: dict[str, list[dict[int, float]]] = {}
    budgets = set()
    for (task, budget), scores in ours.items():
        against = theirs.get((task, budget), theirs.get((task, None), {}))
        common = {seed: scores[seed] - against[seed] for seed in scores.keys() & against.keys()}
        if common:
            by_task.setdefault(task, []).append(common)
            budgets.add(budget)
    found = {}
    for task, of_budgets in by_task.items():
        seeds = sorted(set.intersection(*map(set, of_budgets)))
        if seeds:
            found[task] = np.array([np.mean([of[seed] for of in of_budgets]) for seed in seeds])
    if not found:
        return None
    low, high = hierarchical_interval(list(found.values()))
    mean = float(np.mean([values.mean() for values in found.values()]))
    return mean, low, high, {task: difference_of(values) for task, values in found.items()}, len(budgets)


def coverage(n: int) -> float:
    """How often the interval of ``paired_difference`` holds the true mean of ``n`` normal differences.

    A resampled mean has the variance s² (n - 1) / n², so the interval is mean ± 1.96 s sqrt(n - 1) / n where the
    right one is mean ± t s / sqrt(n) with Student's t of n - 1 degrees of freedom: of few seeds it is too narrow. Of
    two or three it goes from the least to the greatest, which fails when all lie on one side: in 2 of 2**n cases.
    """
    if n <= 3:
        return 1 - 2.0 ** (1 - n)
    reach = stats.norm.ppf(0.5 + CONFIDENCE / 2) * math.sqrt((n - 1) / n)
    return float(1 - 2 * stats.t.sf(reach, n - 1))


# --- ranks ------------------------------------------------------------------------------------------


def rank_agreement(records: Iterable[Record]) -> list[Agreement]:
    """Do learned ranks agree between seeds, between budgets and between tasks?

    Two runs are compared when they differ in one of the three and share the others and the method, by Spearman's
    correlation of the ranks of the matrices that both have (average ranks for ties). Runs whose matrices all have one
    rank say nothing, and are left out.
    """
    runs = [record for record in records if len(set(record.ranks.values())) > 1]
    found: dict[tuple[str, str], list[float]] = {}
    for one, other in combinations(runs, 2):
        if one.method != other.method:
            continue
        differ = [name for name in ("task", "budget", "seed") if getattr(one, name) != getattr(other, name)]
        correlation = spearman(one.ranks, other.ranks) if len(differ) == 1 else math.nan
        if math.isfinite(correlation):
            shared = [one.method, *(_named(one, name) for name in ("task", "budget") if name != differ[0])]
            found.setdefault((f"{differ[0]}s", ", ".join(filter(None, shared))), []).append(correlation)
    order = ["seeds", "budgets", "tasks"]
    return [
        Agreement(between, what, float(np.mean(values)), min(values), max(values), len(values))
        for (between, what), values in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]


def _named(record: Record, name: str) -> str:
    value = getattr(record, name)
    return "" if value is None else f"{value:,} parameters" if isinstance(value, int) else str(value)
