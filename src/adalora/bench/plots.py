"""Pictures of a bench: scores against budgets and learning rates, and where each method puts its ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..files import replacing
from ..report.grid import arrange
from .grid import budget_name
from .records import Budget, Record
from .tables import AVERAGE, Results, Row, Table

_MARKERS = "osD^vPX*<>"


def draw_plots(found: Results, records: Sequence[Record], folder: Path) -> dict[str, list[Path]]:
    """Draw what there is to draw, each picture as PNG and as SVG. Returns the paths by task, ``AVERAGE`` among them.

    ``TASK/budget`` and ``average`` have mean scores over budgets with one sample standard deviation each way, or, with
    one budget, ``TASK/methods`` method by method; ``TASK/rate`` has the runs that chose the learning rates,
    ``TASK/ranks`` the ranks of methods that divide a budget.
    """
    methods = list(dict.fromkeys(row.group.method for table in found.tables for row in table.rows))
    style = {method: (f"C{index % 10}", _MARKERS[index % len(_MARKERS)]) for index, method in enumerate(methods)}
    drawn: dict[str, list[Path]] = {}
    for table in found.tables:
        own = [record for record in records if record.task == table.task and record.state == "done"]
        figures = {
            "budget": _against_budget([table], style),
            "methods": _by_method(table, style),
            "rate": _against_rate(table, [record for record in own if record.role == "choose"], style),
            "ranks": _rank_maps(table.task, [record for record in own if record.role == "report"]),
        }
        drawn[table.task] = [
            path for name, figure in figures.items() if figure for path in _saved(figure, folder / table.task / name)
        ]
    average = _against_budget(found.averages, style)
    drawn[AVERAGE] = _saved(average, folder / AVERAGE) if average else []
    return drawn


def _saved(figure: Figure, path: Path) -> list[Path]:
    """The same figure gives the same bytes every time."""
    targets = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for target in targets:
        kind = target.suffix[1:]
        with replacing(target) as beside, rc_context({"svg.hashsalt": path.name}):
            figure.savefig(beside, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return targets


_Style = dict[str, tuple[str, str]]  # colour and marker of each method


def _against_budget(tables: Sequence[Table], style: _Style) -> Figure | None:
    """One line for each method; a method whose size cannot be chosen is a line across. None without two budgets."""
    rows = [(table, row) for table in tables for row in table.rows if row.summary.n]
    budgets: list[Budget] = list(dict.fromkeys(row.group.budget for _, row in rows if row.group.budget is not None))
    if len(budgets) < 2:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(row.group.method for _, row in rows))
    for index, method in enumerate(methods):
        own = [(table, row) for table, row in rows if row.group.method == method]
        colour, marker = style[method]
        fixed = [_shown(table, row) for table, row in own if row.group.budget is None]
        for mean, _ in fixed:
            axes.axhline(mean, color=colour, linestyle="--", label=method)
        if fixed:
            continue
        aside = 0.06 * (index - (len(methods) - 1) / 2)  # so that error bars do not hide each other
        places = [budgets.index(row.group.budget) + aside for _, row in own]
        means, deviations = zip(*(_shown(table, row) for table, row in own), strict=True)
        axes.errorbar(places, means, deviations, color=colour, marker=marker, capsize=3, label=method)
    axes.set_xticks(range(len(budgets)), [_words(budget) for budget in budgets])
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    axes.set_xlabel("budget")
    title = "Average over tasks" if tables[0].task == AVERAGE else tables[0].title
    return _finished(figure, axes, tables[0].headline, f"{title}: mean ± standard deviation over seeds")


def _by_method(table: Table, style: _Style) -> Figure | None:
    """One line of the picture for each method, with its seeds in grey. None with two budgets or without scores."""
    rows = [row for row in reversed(table.rows) if row.summary.n]
    if not rows or len({row.group.budget for row in rows} - {None}) > 1:
        return None
    figure = Figure(figsize=(6.4, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    points = table.points.get(table.headline, 1.0)
    for place, row in enumerate(rows):
        mean, deviation = _shown(table, row)
        colour, marker = style[row.group.method]
        seeds = [score * points for score in row.scores.values()]
        axes.plot(seeds, [place - 0.22] * len(seeds), "|", color="#888888", markersize=5)
        axes.errorbar(mean, place, xerr=deviation, color=colour, marker=marker, capsize=3)
    axes.set_yticks(range(len(rows)), [row.group.method for row in rows])
    axes.set_xlabel(table.headline)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    budget = next((f" at {_words(row.group.budget)}" for row in rows if row.group.budget is not None), "")
    figure.suptitle(f"{table.title}{budget}: mean ± standard deviation, seeds below", fontsize=11)
    return figure


def _shown(table: Table, row: Row) -> tuple[float, float]:
    """Mean and deviation in the table's unit; a single seed has no bar."""
    points = table.points.get(table.headline, 1.0)
    deviation = row.summary.deviation
    return row.summary.mean * points, 0.0 if math.isnan(deviation) else deviation * points


def _against_rate(table: Table, chosen_from: Sequence[Record], style: _Style) -> Figure | None:
    """One panel for each budget, one line for each method, the chosen rate ringed. None where nothing was chosen."""
    scored = [record for record in chosen_from if math.isfinite(record.score)]
    budgets = list(dict.fromkeys(record.budget for record in scored))
    if not scored:
        return None
    points = table.points.get(table.headline, 1.0)
    figure = Figure(figsize=(max(4.6 * len(budgets), 6.4), 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0])
    for axes, budget in zip(panels, budgets, strict=True):
        for row in table.rows:
            if row.group.budget != budget:
                continue
            line = sorted((r.learning_rate, r.score * points) for r in scored if r.group == row.group)
            if not line:
                continue
            rates, scores = zip(*line, strict=True)
            colour, marker = style[row.group.method]
            axes.plot(rates, scores, color=colour, marker=marker, label=row.group.method)
            for rate, score in line:
                if rate in row.learning_rates:
                    axes.plot(rate, score, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
        axes.set_xscale("log")
        ticks = sorted({record.learning_rate for record in scored if record.budget == budget})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.15)
        axes.set_xticklabels([f"{rate:g}" for rate in ticks], rotation=30)
        axes.set_xlabel("learning rate")
        axes.set_title(_words(budget), fontsize=10)
    return _finished(figure, panels[0], table.headline, f"{table.title}: the run that chose the learning rate")


def _rank_maps(task: str, reported: Sequence[Record]) -> Figure | None:
    """Mean rank of each matrix over seeds, a panel for each method and budget that does not spread ranks evenly."""
    groups: dict[tuple[str, Budget], list[dict[str, int]]] = defaultdict(list)
    for record in reported:
        if len(set(record.ranks.values())) > 1:
            groups[record.method, record.budget].append(record.ranks)
    if not groups:
        return None
    grids = {key: arrange(_totals(runs)) for key, runs in groups.items()}
    wide, high = (max(len(getattr(grid, side)) for grid in grids.values()) for side in ("layers", "modules"))
    label = 0.085 * max(len(module) for grid in grids.values() for module in grid.modules)
    columns = min(3, math.ceil(len(grids) / 3))
    lines = math.ceil(len(grids) / columns)
    size = (max(columns * (0.5 * wide + label + 1.6), 6.4), (0.42 * high + 1.2) * lines + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(grids) :]:
        axes.remove()
    for axes, ((method, budget), grid) in zip(panels, grids.items(), strict=False):
        n = len(groups[method, budget])
        values = [[math.nan if total is None else total / n for total in row] for row in grid.values]
        highest = max(value for row in values for value in row if not math.isnan(value))
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=max(highest, 1))
        _write_in(axes, values, dark_above=0.55 * highest)
        axes.set_xticks(range(len(grid.layers)), grid.layers, rotation=60 if max(map(len, grid.layers)) > 3 else 0)
        axes.set_yticks(range(len(grid.modules)), grid.modules)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{method}, {_words(budget)}, {n} seed{'s' if n > 1 else ''}", fontsize=10)
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"Learned ranks on {task}, means over seeds", fontsize=11)
    return figure


def _write_in(axes: Axes, values: list[list[float]], dark_above: float) -> None:
    """Each cell's value in it, in an ink that can be read there."""
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                ink = "#111111" if value > dark_above else "#ffffff"
                text = f"{value:.1f}" if value < 10 else f"{value:.3g}"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=8)


def _totals(runs: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum of the ranks of each matrix."""
    totals: dict[str, int] = defaultdict(int)
    for ranks in runs:
        for name, rank in ranks.items():
            totals[name] += rank
    return totals


def _finished(figure: Figure, axes: Axes, headline: str, title: str) -> Figure:
    axes.set_ylabel(headline)
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    entries = {label: handle for p in figure.axes for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _words(budget: Budget) -> str:
    return "own size" if budget is None else budget_name(budget)
