"""Several runs side by side, as tables in the terminal and as one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import replacing
from .compare import Comparison, Curve, Likeness, Row
from .terminal import number

_LEAST = 12  # columns of the terminal that a run takes
_MARKERS, _LINES = "osD^vPX*", ["-", "--", "-.", ":"]


# ------------------------------------------------------------------------------------------------------------- tables


def print_comparison(out: Console, found: Comparison) -> None:
    """Runs, what their recipes differ in, and how alike they divide the budget."""
    parts = [
        ("", "run", found.facts, shown),
        ("Recipes differ in:", "key", found.notable_settings, setting),
        (
            "Mean rank of each kind of module:",
            "module",
            found.kinds,
            lambda rank: "–" if rank is None else f"{rank:.2f}",
        ),
    ]
    for title, corner, rows, words in parts:
        if rows and title:
            out.print(title)
        for table in run_tables(corner, found.names, rows, out.width, words):
            out.print(table)
        if corner == "key" and not rows:
            out.print(
                "The recipes are the same.\n" if not found.settings else "The recipes differ in defaults alone.\n"
            )
    if any(found.ranks):
        out.print("How alike the ranks are:")
        out.print(likeness_table(found.likenesses))
    for note in found.notes:
        out.print(Text(note))


def run_tables(
    corner: str, names: Sequence[str], rows: Sequence[Row], width: int, words: Callable[[Any], str]
) -> Iterator[Table]:
    """A row for each quantity and a column for each run; as many tables as the width asks for."""
    if not rows:
        return
    first = min(max(map(len, [corner, *(row.name for row in rows)])), max(width // 3, 12))
    at_once = min(len(names), max(1, (width - first - 4) // (_LEAST + 2)))
    each = max(_LEAST, (width - first - 4) // at_once - 2)
    for start in range(0, len(names), at_once):
        chosen = slice(start, start + at_once)
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(corner, overflow="fold", max_width=first)
        for name in names[chosen]:
            table.add_column(Text(name), justify="right", overflow="fold", max_width=each)
        for row in rows:
            table.add_row(Text(row.name), *(Text(words(value)) for value in row.values[chosen]))
        yield table


def likeness_table(pairs: Sequence[Likeness]) -> Table:
    """A row for each pair of runs."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("run", "and"):
        table.add_column(header, overflow="fold")
    for header in ("matrices\nin both", "Spearman's ρ\nof ranks", "budget that\nlies elsewhere"):
        table.add_column(header, justify="right")
    for pair in pairs:
        cells = ["–" if math.isnan(pair.spearman) else f"{pair.spearman:.2f}"]
        cells += ["–" if math.isnan(pair.moved) else f"{100 * pair.moved:.1f} %"]
        table.add_row(Text(pair.one), Text(pair.other), str(pair.matrices), *cells)
    return table


def shown(value: Any) -> str:
    """A quantity for people."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _rank(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def setting(value: Any) -> str:
    """A value of a recipe, as one would write it there."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "[]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------------ picture


def draw_comparison(found: Comparison, path: Path) -> None:
    """Save the picture as PNG at ``path``: budgets, losses, held-out scores, ranks by depth and by kind. Panels without
    anything to draw are left out."""
    panels = [
        draw
        for draw, there in (
            (_draw_budget, any(found.ranks)),
            (_draw_loss, any(found.logged("loss"))),
            (_draw_scores, any(found.scores)),
            (_draw_depth, len(found.layers) > 1),
            (_draw_kinds, bool(found.kinds)),
        )
        if there
    ]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 3.6 * rows + 0.5), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    for index, draw in enumerate(panels):
        alone = index % 2 == 0 and index == len(panels) - 1
        axes = figure.add_subplot(grid[index // 2, :] if alone else grid[index // 2, index % 2])
        draw(axes, found)
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], **_style(index), label=name) for index, name in enumerate(found.names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=130, facecolor="white")


def _style(index: int) -> dict[str, Any]:
    """Told apart by colour, line and marker."""
    return {
        "color": f"C{index % 10}",
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
    }


def _draw_curves(axes: Axes, curves: Sequence[Curve], drawstyle: str = "default") -> None:
    for index, curve in enumerate(curves):
        if curve:
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, values, **_style(index), drawstyle=drawstyle, markevery=max(1, len(curve) // 10))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_budget(axes: Axes, found: Comparison) -> None:
    _draw_curves(axes, found.budgets, "steps-post")
    axes.set_ylim(0, 1.08 * max(live for curve in found.budgets for _, live in curve))
    axes.set_ylabel("live triplets")
    axes.set_title("Budget", fontsize=10)


def _draw_loss(axes: Axes, found: Comparison) -> None:
    _draw_curves(axes, found.logged("loss"))
    axes.set_ylabel("training loss")
    axes.set_title("Training loss", fontsize=10)


def _draw_scores(axes: Axes, found: Comparison) -> None:
    """One headline; runs of a task with another one have no line."""
    _draw_curves(axes, found.scores)
    axes.set_ylabel(found.headlines[0])
    axes.set_title("Held-out score", fontsize=10)


def _draw_depth(axes: Axes, found: Comparison) -> None:
    rows = found.layers
    for index in range(len(found.runs)):
        values = [math.nan if row.values[index] is None else row.values[index] for row in rows]
        axes.plot(range(len(rows)), values, **_style(index))
    every = max(1, len(rows) // 16)
    names = [row.name for row in rows]
    axes.set_xticks(range(0, len(rows), every), names[::every], rotation=60 if max(map(len, names)) > 3 else 0)
    axes.set_ylim(0, 1.08 * max(value for row in rows for value in row.values if value is not None))
    axes.set_xlabel("layer")
    axes.set_ylabel("mean rank")
    axes.set_title("Ranks by depth", fontsize=10)


def _draw_kinds(axes: Axes, found: Comparison) -> None:
    rows, ranked = found.kinds, [index for index, ranks in enumerate(found.ranks) if ranks]
    height = 0.8 / len(ranked)
    for place, index in enumerate(ranked):
        values = [row.values[index] or 0.0 for row in rows]
        axes.barh([line + place * height for line in range(len(rows))], values, height, color=f"C{index % 10}")
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(rows))], [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean rank")
    axes.set_title("Ranks by kind of module", fontsize=10)
