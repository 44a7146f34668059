"""The learned ranks of a run, drawn as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..files import replacing
from .grid import Grid, arrange

if TYPE_CHECKING:
    from .run import Trace

_INK, _PAPER, _ABSENT = "#111111", "#ffffff", "#e4e4e4"


def draw_ranks(trace: Trace, path: Path, title: str) -> None:
    """Save the heat map of the final ranks, modules by layers, as PNG at ``path``, whole or not at all."""
    draw_map(trace.final, max(trace.initial.values()), path, f"{title}\n{trace.target}")


def draw_map(ranks: Mapping[str, int], highest: int, path: Path, title: str) -> None:
    """The same of any ranks; ``highest`` is the end of the scale."""
    figure = rank_figure(arrange(ranks), highest, title)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=150, facecolor=_PAPER)


def rank_figure(grid: Grid, highest: int, title: str) -> Figure:
    """One cell for each matrix, its rank in it; sized so that the numbers stay readable."""
    wide = any(len(layer) > 3 for layer in grid.layers)
    label_width = 0.085 * max(map(len, grid.modules))
    cells = (0.46 * len(grid.layers), 0.46 * len(grid.modules))
    size = (max(cells[0] + label_width + 1.6, 6.4), max(cells[1] + (2.1 if wide else 1.6), 3.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(_ABSENT)
    colours = Normalize(vmin=0, vmax=max(highest, 1))
    values = [[float("nan") if value is None else value for value in row] for row in grid.values]
    image = axes.imshow(values, cmap="cividis", norm=colours, aspect="equal")
    for row, numbers in enumerate(grid.values):
        for column, rank in enumerate(numbers):
            if rank is not None:
                ink = _INK if colours(rank) > 0.55 else _PAPER
                number = f"{rank:.1f}".removesuffix(".0")  # a mean, where a cell has several matrices
                axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=10)
    axes.set_xticks(range(len(grid.layers)), grid.layers, rotation=60 if wide else 0)
    axes.set_yticks(range(len(grid.modules)), grid.modules)
    axes.set_xticks([x - 0.5 for x in range(1, len(grid.layers))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(grid.modules))], minor=True)
    axes.grid(which="minor", color=_PAPER, linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="rank", shrink=0.8, ticks=_ticks(max(highest, 1)))
    figure.suptitle(title, fontsize=11)
    return figure


def _ticks(highest: int) -> list[int]:
    """Whole numbers from 0 to the highest, at most about eight."""
    return list(range(0, highest + 1, max(1, round(highest / 8))))
