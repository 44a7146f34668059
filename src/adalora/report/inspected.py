"""An adapter's updates as tables in the terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import replacing
from ..quiet import visible
from .grid import Cells, cells, place
from .terminal import print_lines, rank_table
from .updates import Adapter, Update, kept

_WIDE = 100  # columns of a terminal from which on there is room for parameters
_INK, _PAPER, _ABSENT = "#111111", "#ffffff", "#e4e4e4"
_LONGEST = 200  # characters of a name
_DARK = 0.55  # of the colour scale, up to which text on it is white
_MOST = 60  # rows of a picture, beyond which numbers in cells cannot be read


# ------------------------------------------------------------------------------------------------------------- tables


def print_adapter(out: Console, adapter: Adapter, rank: int | None = None) -> None:
    """What there is to say, from the whole to the single matrix; with ``rank``, what that average rank would keep."""
    live = sum(adapter.ranks.values())
    shown = {
        "Adapter": f"{adapter.folder}: {adapter.method}",
        "Base model": _cut(adapter.base_model or "not named"),
        "Settings": ", ".join(f"{key} {_short(value)}" for key, value in adapter.settings.items()),
        "Matrices": f"{len(adapter.updates)}, {live} triplets, {live / len(adapter.updates):.3g} on average",
        "Parameters": f"{adapter.parameters:,} in A and B, {adapter.other_parameters:,} beside them",
    }
    print_lines(out, {name: text for name, text in shown.items() if text})
    if len(set(adapter.ranks.values())) > 1:
        out.print(rank_table(adapter.ranks, out.width))
    out.print(update_table(adapter.updates, out.width, rank))
    out.print("Energy, Σσ², that lower ranks keep:")
    out.print(cut_table(adapter, rank))
    for note in adapter.notes:
        out.print(note)


def update_table(updates: Sequence[Update], width: int, rank: int | None = None) -> Table:
    """A row for each matrix: its size, what it changes, and the energy that its first singular value holds; with
    ``rank``, the rank and the energy that it keeps when the whole adapter is cut to that average."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer")
    table.add_column("module", overflow="fold")
    roomy = width >= _WIDE or rank is None
    more = ("parameters", "energy\nof σ₁") if roomy else ("", "")
    for header in filter(None, ("rank", more[0], "‖ΔW‖F", "‖ΔW‖₂", "eff.\nrank", more[1])):
        table.add_column(header, justify="right")
    for header in () if rank is None else (f"rank\nat {rank}", "energy\nleft"):
        table.add_column(header, justify="right", style="bold")
    left = dict(zip((update.name for update in updates), kept(updates, rank or 0), strict=True))
    for layer, module, update in _in_order(updates):
        cells = [str(update.rank), *([f"{update.parameters:,}"] if roomy else [])]
        cells += [_norm(update.frobenius), _norm(update.spectral), f"{update.effective_rank:.1f}"]
        if roomy:
            cells += [_share(update.energy(1)) if update.spectral else "–"]
        if rank is not None:
            cells += [str(left[update.name]), _share(update.energy(left[update.name]))]
        table.add_row(layer, Text(module), *cells)
    return table


def cut_table(adapter: Adapter, rank: int | None = None) -> Table:
    """What is left at lower ranks: triplets ranked over the whole model, or every matrix cut alike."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("average rank", justify="right")
    table.add_column("ranked over all matrices", justify="right")
    table.add_column("every matrix alike", justify="right")
    cuts = {cut.rank: cut for cut in adapter.cuts()}
    if rank is not None:
        cuts[rank] = adapter.cut(rank)
    for number in sorted(cuts):
        cut = cuts[number]
        table.add_row(str(number), _share(cut.whole), _share(cut.each), style="bold" if number == rank else "")
    return table


def _in_order(updates: Sequence[Update]) -> list[tuple[str, str, Update]]:
    """(layer, module, update) from the first layer to the last."""
    found = {update.name: update for update in updates}
    grid = cells(found)
    return [
        (layer.name, kind if len(names) == 1 else place(name).module, found[name])
        for layer, column in zip(grid.columns, zip(*grid.names, strict=True), strict=True)
        for kind, names in zip(grid.kinds, column, strict=True)
        for name in names
    ]


def _norm(value: float) -> str:
    """Three digits, without a power of ten where that is readable."""
    return f"{value:#.3g}".rstrip(".") if 0.01 <= value < 999.5 else f"{value:.1e}" if value else "0"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def _short(value: object) -> str:
    if isinstance(value, dict):
        return f"of {len(value)} modules"
    return f"{value:g}" if isinstance(value, float) else "yes" if value is True else _cut(str(value))


# ------------------------------------------------------------------------------------------------------------ picture


def draw_adapter(adapter: Adapter, path: Path) -> None:
    """Save the picture as PNG at ``path``: norms and ranks by place, the spectra, and the energy at lower ranks."""
    grid = cells(adapter.ranks)
    rows, columns = len(grid.kinds), len(grid.columns)
    label = 0.085 * max(map(len, grid.kinds))
    cell = 0.46 if max(rows, columns) <= _MOST else 0.16
    high = max(cell * rows + 1.4, 2.6)
    figure = Figure(figsize=(max(cell * columns + label + 1.6, 9.0), high + 4.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[high, 4.0], squeeze=False)[:, 0]
    _draw_norms(upper.add_subplot(), adapter, grid, numbers=cell > 0.2)
    spectra, energy = lower.subplots(1, 2)
    _draw_spectra(spectra, adapter, grid)
    _draw_energy(energy, adapter)
    title = f"{adapter.method} in {adapter.folder}"
    figure.suptitle(visible(title if len(title) < 90 else f"... {title[-86:]}"), fontsize=11, parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=130, facecolor=_PAPER)


def _draw_norms(axes: Axes, adapter: Adapter, grid: Cells, numbers: bool) -> None:
    """Norms as colours, ranks as numbers; the mean of experts that share a cell."""
    found = {update.name: update for update in adapter.updates}
    values = [
        [fmean(found[name].frobenius for name in names) if names else math.nan for names in row] for row in grid.names
    ]
    colours = Normalize(vmin=0, vmax=max((update.frobenius for update in adapter.updates), default=0) or 1)
    axes.set_facecolor(_ABSENT)
    image = axes.imshow(values, cmap="cividis", norm=colours, aspect="equal")
    for row, column in product(range(len(grid.kinds)) if numbers else (), range(len(grid.columns))):
        if names := grid.names[row][column]:
            ink = _INK if colours(values[row][column]) > _DARK else _PAPER
            rank = f"{fmean(found[name].rank for name in names):.3g}"
            axes.text(column, row, rank, ha="center", va="center", color=ink, fontsize=9)
    every = max(1, len(grid.columns) // _MOST)
    layers = [column.name for column in grid.columns]
    wide = any(len(layer) > 3 for layer in layers)
    axes.set_xticks(range(0, len(layers), every), layers[::every], rotation=60 if wide else 0, parse_math=False)
    axes.set_yticks(range(len(grid.kinds)), [visible(kind) for kind in grid.kinds], parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    axes.set_title("Size of each update" + (" (number: its rank)" if numbers else ""), fontsize=10)
    axes.figure.colorbar(image, ax=axes, label="‖ΔW‖$_F$", shrink=0.8)


def _draw_spectra(axes: Axes, adapter: Adapter, grid: Cells) -> None:
    """One line for each matrix, one colour for each kind of module."""
    found, count = {update.name: update for update in adapter.updates}, len(grid.kinds)
    for row, (kind, cell) in enumerate(zip(grid.kinds, grid.names, strict=True)):
        colour = f"C{row}" if count <= 10 else colormaps["turbo"](row / (count - 1))
        label: str | None = visible(kind)
        for name in chain.from_iterable(cell):
            values = [value for value in found[name].singular_values if value > 0]
            if values:
                places = range(1, len(values) + 1)
                axes.plot(places, values, marker=".", linewidth=0.9, alpha=0.7, color=colour, label=label)
                label = None
    if axes.lines:
        axes.set_yscale("log")
        if count <= 12:
            for text in axes.legend(fontsize=7).get_texts():
                text.set_parse_math(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("i")
    axes.set_ylabel("σ$_i$ of ΔW")
    axes.set_title("Singular values of each update", fontsize=10)
    axes.grid(alpha=0.3)


def _draw_energy(axes: Axes, adapter: Adapter) -> None:
    cuts = [adapter.cut(rank) for rank in range(1, max([1, *adapter.ranks.values()]) + 1)]
    ranks = [cut.rank for cut in cuts]
    axes.plot(ranks, [100 * cut.whole for cut in cuts], "o-", markersize=4, label="ranked over all matrices")
    axes.plot(ranks, [100 * cut.each for cut in cuts], "s--", markersize=4, label="every matrix alike")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 103)
    axes.set_xlabel("average rank")
    axes.set_ylabel("energy kept, %")
    axes.set_title("Energy at lower ranks", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
