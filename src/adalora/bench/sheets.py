"""The tables as text, before it is decided whether for Markdown or LaTeX: columns, cells, and what has to be said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .grid import budget_name
from .published import SOURCE
from .records import Budget
from .statistics import CONFIDENCE, Summary, coverage
from .tables import Results, Row, Table

_NONE = "–"


class Sheet(NamedTuple):
    """A table as text. The first columns are words, the others numbers."""

    title: str
    note: str
    words: int  # columns of words
    columns: list[str]
    rows: list[list[str]]


def how_to_read(found: Results) -> Iterator[str]:
    """What is compared, and how much a few seeds can claim."""
    yield (
        "Means ± sample standard deviation over the reported seeds. Shares and correlations are in points (× 100). "
        "Where learning rates stand in brackets, one of them was chosen on seeds that are not reported."
    )
    if found.versions:
        mixed = any(len(versions) > 1 for versions in found.versions.values())
        yield (
            "Run with "
            + ", ".join(f"{package} {' and '.join(versions)}" for package, versions in found.versions.items())
            + (". Runs of several versions stand side by side here." if mixed else ".")
        )
    if found.reference is None:
        yield "The grid names no reference, so there are no differences."
        return
    differences = [row.difference for table in [*found.tables, *found.averages] for row in table.rows]
    sizes = sorted({difference.n for difference in differences if difference is not None and difference.n > 1})
    held = ", ".join(f"{coverage(n):.0%} of the time with {n} seeds" for n in sizes)
    yield (
        f"Differences are to `{found.reference}` at the same budget, seed by seed. The interval is the percentile "
        f"bootstrap's over seeds, {CONFIDENCE:.0%} by name"
        + (f"; of normal differences it would hold the true mean {held}: it is narrower than its name" if held else "")
        + ". p is of the two-sided paired t-test and is not corrected for the number of rows: where nothing differs, "
        "one row in twenty is below 0.05 all the same. Whatever stands here is of these seeds, this data and this "
        "model."
    )


def sheets_of_task(table: Table, reference: str | None) -> Iterator[Sheet]:
    """All tables of one task."""
    yield _comparison(table, reference)
    yield from _by_seed(table)
    if len(table.metrics) > 1:
        yield Sheet(
            f"All metrics of {table.task}",
            "",
            2,
            ["method", "budget", *(_metric(table, name) for name in table.metrics)],
            [
                [
                    row.group.method,
                    _budget(row.group.budget),
                    *(_summary(table, name, row.metrics.get(name)) for name in table.metrics),
                ]
                for row in table.rows
            ],
        )
    if table.published:
        models = {figure.model for figure in table.published}
        other = "" if models == {table.model} else f", another model than {table.model} above"
        yield Sheet(
            f"What the paper prints on {table.task}",
            f"{SOURCE}: {', '.join(sorted(models))}{other}, all of the data, means of five seeds, in points.",
            3,
            ["method", "budget", "metric", "score"],
            [[f.method, f.budget, f.metric, f"{f.value:.2f}".removesuffix("0")] for f in table.published],
        )


def _comparison(table: Table, reference: str | None) -> Sheet:
    """The headline metric of each row, and how far it is from the reference's."""
    costs = any(row.learning_rates for row in table.rows)
    losses = any(row.loss.n for row in table.rows)
    columns = ["method", "budget", "seeds", _metric(table, table.headline)]
    if reference is not None:
        columns += [f"minus {reference}", f"{CONFIDENCE:.0%} interval", "p"]
    columns += ["worst", "collapsed"] if costs else []
    columns += ["loss ↓"] if losses else []
    if costs:
        columns += ["learning rate", "parameters", "minutes", "memory"]
    rows = []
    for row in table.rows:
        cells = [row.group.method, _budget(row.group.budget), _seeds(row), _summary(table, table.headline, row.summary)]
        cells += _difference(table, row) if reference is not None else []
        cells += [_score(table, row.worst), str(len(row.collapsed)) if row.scores else _NONE] if costs else []
        cells += [f"{_number(row.loss.mean, 4)} ± {_number(row.loss.deviation, 4)}"] if losses else []
        cells += [_rates(row), *_cost(row)] if costs else []
        rows.append(cells)
    note = (
        "Parameters are the adapter's, at the start → as saved; memory is that of the largest run, on the GPU where "
        "there was one, else of its process with all libraries. Worst is the score of the worst seed; a collapsed run "
        "is no better than a constant answer."
        + (" Loss is the mean on the held-out rows, without any regulariser." if losses else "")
    )
    return Sheet(table.title, note if costs else f"{table.words}.", 2, columns, rows)


def _by_seed(table: Table) -> Iterator[Sheet]:
    """Each score for itself: a mean does not say that one run in five collapsed."""
    seeds = sorted({seed for row in table.rows for seed in row.scores})
    if len(seeds) > 1:
        yield Sheet(
            f"{table.title}, seed by seed",
            "",
            2,
            ["method", "budget", *(f"seed {seed}" for seed in seeds)],
            [
                [row.group.method, _budget(row.group.budget), *(_score(table, row.scores.get(seed)) for seed in seeds)]
                for row in table.rows
            ],
        )


def sheets_of_all(found: Results) -> Iterator[Sheet]:
    """The tables over all tasks."""
    if found.averages:
        rows = [row for average in found.averages for row in average.rows]
        words = ". ".join(f"{average.title}: {average.words}" for average in found.averages)
        yield _comparison(
            replace(found.averages[0], title="Average over tasks", rows=rows, words=words), found.reference
        )
    if found.overall:
        yield Sheet(
            f"{found.overall[0].method} over all tasks",
            "Points, the mean over tasks of the mean over budgets and seeds. The interval is resampled over tasks and, "
            "in each, over seeds. Behind are tasks on which the whole interval over seeds is below 0. Collapsed are "
            "its reported runs and the rival's.",
            1,
            ["less", "difference", f"{CONFIDENCE:.0%} interval", "tasks", "budgets", "behind", "collapsed"],
            [
                [
                    one.rival,
                    _number(one.mean, sign="+"),
                    f"{_number(one.low, sign='+')} to {_number(one.high, sign='+')}",
                    str(len(one.tasks)),
                    str(one.budgets),
                    f"{len(one.behind)}" + (f" ({', '.join(one.behind)})" if one.behind else ""),
                    f"{one.collapsed}, {one.rival_collapsed}",
                ]
                for one in found.overall
            ],
        )
    if found.speeds:
        tasks = list(dict.fromkeys(task for one in found.speeds for task in one.tasks))
        yield Sheet(
            f"Steps until it reaches what {found.reference} has at the end",
            f"As a share of {found.reference}'s steps, what was spent before the first step counted; from the mean "
            "over seeds, to the next step at which runs were evaluated. Never: not within the training.",
            2,
            ["method", "budget", "median", *tasks],
            [
                [
                    one.method,
                    _budget(one.budget),
                    _share(one.median),
                    *(_share(one.tasks[task]) if task in one.tasks else _NONE for task in tasks),
                ]
                for one in found.speeds
            ],
        )
    if found.agreement:
        yield Sheet(
            "Do learned ranks agree?",
            "Spearman's correlation of the ranks of all matrices, over pairs of runs that differ in one thing alone: "
            "1 is the same order, 0 none in common.",
            2,
            ["between", "of", "mean", "lowest", "highest", "pairs"],
            [
                [pair.between, pair.what, *map(_number, (pair.mean, pair.low, pair.high)), str(pair.pairs)]
                for pair in found.agreement
            ],
        )


def remarks(table: Table) -> Iterator[str]:
    """What the grid asks for and the table does not have, and why; and rates that may not be the best there are."""
    for row in table.rows:
        if row.lost:
            yield f"{_name(row)}: no learning rate gave a result, so there is none to report"
        if row.missing:
            yield f"{_name(row)}: {row.missing} of {row.wanted} seeds are still to be run"
        if row.undefined:
            seeds = ", ".join(map(str, row.undefined))
            counted = "" if row.undefined[0] not in row.scores else ": a constant answer, which counts as 0"
            yield f"{_name(row)}: {table.headline} is not defined at seed {seeds}{counted}"
        for cell in row.failures:
            where = f"seed {cell.seed}, learning rate {cell.learning_rate:g} (to {cell.role})"
            yield f"{_name(row)}: failed at {where}: {cell.failure}"
        if len(row.tried) > 1:
            for edge, word in ((row.tried[0], "lowest"), (row.tried[-1], "highest")):
                if row.learning_rates == [edge]:
                    yield f"{_name(row)}: the learning rate chosen, {edge:g}, is the {word} of those tried"


# --- cells ------------------------------------------------------------------------------------------


def _name(row: Row) -> str:
    budget = row.group.budget
    return row.group.method if budget is None else f"{row.group.method} at {budget_name(budget)}"


def _budget(budget: Budget) -> str:
    return _NONE if budget is None else f"{budget:,}" if isinstance(budget, int) else budget


def _metric(table: Table, name: str) -> str:
    return f"{name} ↓" if name in table.lower_is_better else name


def _digits(table: Table, name: str) -> int:
    """Two behind the point; four of an error below 1, which is not shown in points."""
    small = all(abs(row.metrics[name].mean) < 1 for row in table.rows if name in row.metrics)
    return 4 if name in table.lower_is_better and small else 2


def _number(value: float, digits: int = 2, sign: str = "") -> str:
    rounded = round(value, digits) + 0.0 if math.isfinite(value) else value  # without a minus before zero
    return f"{rounded:{sign}.{digits}f}".replace("-", "−") if math.isfinite(rounded) else _NONE


def _summary(table: Table, name: str, found: Summary | None) -> str:
    """``85.12 ± 0.34``; one seed has no deviation."""
    if found is None or found.n == 0:
        return _NONE
    points, digits = table.points.get(name, 1.0), _digits(table, name)
    return f"{_number(found.mean * points, digits)} ± {_number(found.deviation * points, digits)}"


def _share(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"


def _score(table: Table, score: float | None) -> str:
    """That of one run."""
    if score is None:
        return _NONE
    return _number(score * table.points.get(table.headline, 1.0), _digits(table, table.headline))


def _seeds(row: Row) -> str:
    """``5``, or ``3 of 5``, with what failed."""
    wanted = f" of {row.wanted}" if row.wanted > row.summary.n else ""
    broken = sum(cell.role == "report" for cell in row.failures)
    return f"{row.summary.n}{wanted}" + (f" ({broken} failed)" if broken else "")


def _difference(table: Table, row: Row) -> list[str]:
    """Difference, interval, p-value."""
    found = row.difference
    if found is None or found.n == 0:
        return [_NONE] * 3
    points, digits = table.points.get(table.headline, 1.0), _digits(table, table.headline)
    low, high = (_number(edge * points, digits, "+") for edge in (found.low, found.high))
    p = _NONE if math.isnan(found.p_value) else "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    fewer = f" (n = {found.n})" if found.n < row.summary.n else ""
    interval = _NONE if math.isnan(found.low) else f"{low} to {high}"
    return [_number(found.mean * points, digits, "+") + fewer, interval, p]


def _rates(row: Row) -> str:
    chosen = ", ".join(f"{rate:g}" for rate in row.learning_rates) or _NONE
    return f"{chosen} ({', '.join(f'{rate:g}' for rate in row.tried)})" if row.tried else chosen


def _cost(row: Row) -> list[str]:
    """Parameters, minutes, memory."""
    start, saved = (_NONE if math.isnan(n) else f"{n:,.0f}" for n in (row.cost.adapter_start, row.cost.adapter_saved))
    memory = _NONE if math.isnan(row.cost.peak_bytes) else f"{row.cost.peak_bytes / 2**20:,.0f} MiB"
    return [saved if start == saved else f"{start} → {saved}", _number(row.cost.minutes, 1), memory]
