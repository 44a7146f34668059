"""Means, paired differences and rank agreement, against numbers computed by hand and by scipy in other ways."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from adalora.bench.records import Record
from adalora.bench.statistics import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Agreement,
    coverage,
    hierarchical_interval,
    overall,
    paired_difference,
    rank_agreement,
    summary,
)

NAN = math.nan


def same(found: tuple[float, ...], wanted: tuple[float, ...]) -> bool:
    return bool(np.allclose(found, wanted, rtol=1e-12, equal_nan=True))


# ------------------------------------------------------------------------------------------------ means


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([2.0, 4.0, 9.0], (5.0, math.sqrt((9 + 1 + 16) / 2), 3)),
        ([2.0, NAN, 4.0, math.inf], (3.0, math.sqrt(2), 2)),
        ([0.7], (0.7, NAN, 1)),  # one seed has no spread
        ([], (NAN, NAN, 0)),
        ([0.5, 0.5], (0.5, 0.0, 2)),
    ],
)
def test_the_deviation_is_the_samples(scores: list[float], wanted: tuple[float, float, int]) -> None:
    assert same(summary(scores), wanted)


# ------------------------------------------------------------------------------------------------ differences

OURS = {1: 0.81, 2: 0.84, 3: 0.80, 4: 0.86, 5: 0.83}
THEIRS = {1: 0.80, 2: 0.80, 3: 0.81, 4: 0.82, 5: 0.81}


def test_the_p_value_is_the_paired_t_tests() -> None:
    """By hand: differences 1, 4, -1, 4, 2 in hundredths, mean 2, variance 18 / 4, t = 2 / sqrt(4.5 / 5), 4 degrees."""
    found = paired_difference(OURS, THEIRS)
    t = 2 / math.sqrt(4.5 / 5)
    assert found.n == 5 and math.isclose(found.mean, 0.02)
    assert math.isclose(found.p_value, 2 * stats.t.sf(t, 4), rel_tol=1e-9)
    assert math.isclose(found.p_value, stats.ttest_rel(list(OURS.values()), list(THEIRS.values())).pvalue)


def test_the_interval_is_the_paired_percentile_bootstraps() -> None:
    """The same as scipy's on both samples at once, and near the exact distribution over all 5 ** 5 resamples."""
    found = paired_difference(OURS, THEIRS)
    samples = [np.array(list(scores.values())) for scores in (OURS, THEIRS)]
    wanted = stats.bootstrap(
        samples,
        lambda a, b, axis: (a - b).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    assert same((found.low, found.high), tuple(wanted))
    every = np.stack(np.meshgrid(*[samples[0] - samples[1]] * 5)).reshape(5, -1).mean(axis=0)
    # neighbouring values of the exact distribution are 0.002 apart
    assert np.allclose((found.low, found.high), np.quantile(every, [0.025, 0.975]), atol=0.0021)
    assert paired_difference(OURS, THEIRS) == found, "the same every time"


def test_only_common_seeds_count() -> None:
    more = OURS | {6: 0.1, 7: NAN}
    assert paired_difference(more, THEIRS | {7: 0.5, 8: 0.9}) == paired_difference(OURS, THEIRS)
    assert paired_difference(OURS, dict(reversed(THEIRS.items()))) == paired_difference(OURS, THEIRS)
    assert paired_difference({1: 0.5}, {2: 0.5}).n == 0


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        ({1: 0.9}, (0.2, NAN, NAN, NAN, 1)),
        ({1: 0.9, 2: 0.8, 3: 0.7}, (0.2, 0.2, 0.2, NAN, 3)),  # everywhere the same, but for rounding
        ({1: 0.7, 2: 0.6, 3: 0.5}, (0.0, 0.0, 0.0, NAN, 3)),
        ({}, (NAN, NAN, NAN, NAN, 0)),
    ],
)
def test_differences_without_spread_have_no_p_value(ours: dict[int, float], wanted: tuple[float, ...]) -> None:
    assert same(paired_difference(ours, {1: 0.7, 2: 0.6, 3: 0.5}), wanted)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
def test_the_coverage_that_the_page_states_is_the_intervals(n: int) -> None:
    """By simulation with normal differences: 1,500 samples leave a standard error of about 0.01."""
    samples = np.random.default_rng(1).normal(size=(1500, n))
    chosen = np.random.default_rng(2).integers(n, size=(1500, 500, n))
    means = np.take_along_axis(samples[:, None, :], chosen, axis=2).mean(axis=2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    held = float(((low <= 0) & (high >= 0)).mean())
    assert coverage(n) == pytest.approx(held, abs=0.03)
    assert coverage(n) < CONFIDENCE


# ------------------------------------------------------------------------------------------------ ranks


def run(task: str = "mrpc", budget: Any = "rank 2", seed: int = 1, method: str = "adalora", **ranks: int) -> Record:
    return Record(task, method, budget, 1e-3, seed, "report", "done", "", "accuracy", {"accuracy": 0.5}, ranks=ranks)


def test_agreement_is_spearmans_over_pairs_that_differ_in_one_thing() -> None:
    """By hand: of ranks 1, 2, 3 the correlation with themselves is 1, with 3, 2, 1 it is -1, with 2, 1, 3 it is 0.5."""
    records = [
        run(seed=1, a=1, b=2, c=3),
        run(seed=2, a=10, b=20, c=30),
        run(seed=3, a=3, b=2, c=1),
        run(seed=1, budget="rank 8", a=2, b=1, c=3),
        run(seed=1, task="rte", a=3, b=2, c=1),
    ]
    assert rank_agreement(records) == [
        Agreement("seeds", "adalora, mrpc, rank 2", pytest.approx(-1 / 3), -1.0, 1.0, 3),  # type: ignore[arg-type]
        Agreement("budgets", "adalora, mrpc", 0.5, 0.5, 0.5, 1),
        Agreement("tasks", "adalora, rank 2", -1.0, -1.0, -1.0, 1),
    ]


def test_agreement_gives_ties_their_average_rank() -> None:
    """By hand: 1, 1, 2, 3 have the ranks 1.5, 1.5, 3, 4 and 2, 2, 2, 9 have 2, 2, 2, 4, whose deviations from 2.5 are
    -1, -1, 0.5, 1.5 and -0.5, -0.5, -0.5, 1.5: Pearson's correlation is 3 / sqrt(4.5 x 3)."""
    found = rank_agreement([run(seed=1, a=1, b=1, c=2, d=3), run(seed=2, a=2, b=2, c=2, d=9)])
    assert math.isclose(found[0].mean, 3 / math.sqrt(4.5 * 3))


def test_agreement_leaves_out_what_says_nothing() -> None:
    flat = [run(seed=seed, method="lora", a=2, b=2, c=2) for seed in (1, 2)]
    none = [run(seed=seed, method="full") for seed in (1, 2)]
    elsewhere = [run(seed=1, a=1, b=2), run(seed=2, x=1, y=2)]  # another model: no matrix in common
    methods = [run(method="adalora", a=1, b=2), run(method="peft_adalora", a=1, b=2)]
    for records in (flat, none, elsewhere, methods, []):
        assert rank_agreement(records) == []


def test_the_interval_over_tasks_and_seeds_is_of_both() -> None:
    """Against the variance by hand: of K task means, and of the seeds within."""
    draw = np.random.default_rng(1)
    differences = [draw.normal(centre, 0.5, size=5) for centre in draw.normal(1, 1, size=12)]
    low, high = hierarchical_interval(differences)
    means = np.array([values.mean() for values in differences])
    within = np.mean([values.var() / values.size for values in differences])
    wide = 2 * 1.96 * math.sqrt((means.var() + within) / len(means))
    assert low < means.mean() < high and high - low == pytest.approx(wide, rel=0.1)
    assert hierarchical_interval(differences) == (low, high), "the same every time"
    assert hierarchical_interval([np.array([2.0, 2.0])]) == (2, 2) and math.isnan(hierarchical_interval([])[0])


def test_one_method_less_another_over_all_tasks() -> None:
    """By hand; a rival without budgets stands at each of ours, and only seeds at all budgets of a task count."""
    ours = {("a", 1): {1: 3.0, 2: 5.0}, ("a", 2): {1: 4.0, 2: 6.0, 3: 99.0}, ("b", 1): {1: 1.0, 2: 1.0}}
    found = overall(ours, {("a", None): {1: 1.0, 2: 2.0, 3: 0.0}, ("b", 1): {1: 2.0, 2: 3.0}})
    assert found is not None
    mean, low, high, tasks, budgets = found
    assert (mean, budgets) == (0.75, 2) and {task: one.mean for task, one in tasks.items()} == {"a": 3.0, "b": -1.5}
    assert low <= -1.5 and high >= 3 and tasks["b"].high < 0
    assert overall(ours, {("c", 1): {1: 1.0}}) is None
