"""Heat maps of the matrices, layers across and kinds of module down: their ranks, and what came back to them."""

from __future__ import annotations

from collections.abc import Sequence

from .figure import CIVIDIS, Column, Figure, Json, axis, layout, scale
from .grid import Cells, cells
from .grid import Column as Layer
from .markup import number, plain, plot_text, times
from .run import Run, Trace

_CELL, _NARROW_CELL = 28, 11  # pixels
MANY_LAYERS = 48
"""From which on cells are narrow and hold no numbers."""


def rank_figure(run: Run) -> Figure:
    """The heat map of ranks; with a trace, the page's script moves it along the rankings."""
    trace = run.trace
    ranks = trace.final if trace else run.ranks
    grid = cells(ranks)
    highest = max([*ranks.values(), *(trace.initial_ranks if trace else ()), 1])
    columns = [Column("module", list(ranks)), Column("rank", list(ranks.values()))]
    extra: Json = {"map": {"cells": _places(grid, list(ranks)), "ranks": [list(ranks.values())]}}
    if trace:
        order = {name: place for place, name in enumerate(trace.names)}
        columns = [Column("module", [order[name] for name in ranks], of_modules=True), columns[1]]
        extra["map"] = {
            "cells": _places(grid, trace.names),
            "steps": [0, *(a.step for a in trace.allocations)],
            "budgets": [trace.initial_budget, *(a.budget for a in trace.allocations)],
            "ranks": [trace.initial_ranks, *(a.ranks for a in trace.allocations)],
            "live": [trace.spent(ranks) for ranks in (trace.initial_ranks, *(a.ranks for a in trace.allocations))],
            "unit": trace.unit,
        }
    extra["map"] |= {"kinds": grid.kinds, "layers": [column.name for column in grid.columns]}
    return Figure(
        key="ranks",
        title="Learned ranks",
        summary=_ranks_in_words(grid, ranks),
        data=[_heat(grid, highest, "rank")],
        layout=_map_layout(grid),
        columns=columns,
        least_width=_least_width(grid),
        note=_experts_in_words(grid),
        controls=_player(len(trace.allocations)) if trace and trace.allocations else "",
        extra=extra,
    )


def map_figure(ranks: dict[str, int], key: str, title: str) -> Figure:
    """The heat map of ranks that stand still."""
    grid = cells(ranks)
    places: Json = {"cells": _places(grid, list(ranks)), "ranks": [list(ranks.values())]}
    return Figure(
        key=key,
        title=title,
        summary=_ranks_in_words(grid, ranks),
        data=[_heat(grid, max(*ranks.values(), 1), "rank")],
        layout=_map_layout(grid),
        columns=[Column("module", list(ranks)), Column("rank", list(ranks.values()))],
        least_width=_least_width(grid),
        note=_experts_in_words(grid),
        extra={"map": places | {"kinds": grid.kinds, "layers": [column.name for column in grid.columns]}},
    )


def returns_figure(trace: Trace) -> Figure | None:
    """Of each matrix, how many times one of its triplets came back; None when none ever did."""
    counts = [sum(of_matrix) for of_matrix in zip(*(a.returned for a in trace.allocations), strict=True)]
    if not any(counts):
        return None
    of = dict(zip(trace.names, counts, strict=True))
    grid = cells(of)
    sums = [[sum(of[name] for name in cell) if cell else None for cell in row] for row in grid.names]
    best = max(of, key=of.__getitem__)
    heat = _heat(grid, max(max(filter(None, row), default=0) for row in sums), "times")
    touched = sum(1 for count in counts if count)
    return Figure(
        key="returns",
        title="Where they came back",
        summary=f"Triplets came back in {touched} of {len(counts)} matrices, most often in {plain(best)} "
        f"({times(of[best])}).",
        data=[heat | {"z": sums, "hovertemplate": "layer %{x}, %{y}<br>came back %{z} times<extra></extra>"}],
        layout=_map_layout(grid),
        columns=[Column("module", range(len(counts)), of_modules=True), Column("came back", counts)],
        least_width=_least_width(grid),
    )


def _heat(grid: Cells, highest: int, what: str) -> Json:
    bar = {"title": {"text": what, "side": "top"}, "thickness": 10, "outlinewidth": 0, "len": 1, "ypad": 0}
    bar |= {"tickmode": "array", "tickvals": _marks(max(highest, 1))}
    return {
        "type": "heatmap",
        "x": list(range(len(grid.columns))),
        "y": list(range(len(grid.kinds))),
        "zmin": 0,
        "zmax": max(highest, 1),
        "colorscale": scale(CIVIDIS),
        "xgap": 1.5,
        "ygap": 1.5,
        "colorbar": bar,
        "hoverongaps": False,
        "numbered": len(grid.columns) <= MANY_LAYERS,  # the page's script writes them
    }


def _map_layout(grid: Cells) -> Json:
    """Layers across, kinds down; stacks are named below the axis and set apart by a line."""
    layers, kinds = grid.columns, grid.kinds
    every = max(1, len(layers) // 24) if len(layers) > MANY_LAYERS else 1
    longest = max((len(column.layer) for column in layers), default=1)
    x = axis(
        "layer",
        tickmode="array",
        tickvals=list(range(0, len(layers), every)),
        ticktext=[column.layer for column in layers[::every]],
        tickangle=0 if longest < 4 else -90,
        showgrid=False,
        zeroline=False,
        ticks="",
        side="top",
        range=[-0.5, len(layers) - 0.5],
    )
    y = axis("", tickmode="array", tickvals=list(range(len(kinds))), ticktext=[plot_text(kind) for kind in kinds])
    y |= {"range": [len(kinds) - 0.5, -0.5], "showgrid": False, "zeroline": False, "ticks": "", "ticklabelstandoff": 6}
    spans = _stack_spans(layers)
    many = len(spans) > 1
    shapes: list[Json] = [
        {"type": "line", "x0": begin - 0.5, "x1": begin - 0.5, "yref": "paper", "y0": -0.02, "y1": 1.02}
        | {"line": {"color": "var(--ink)", "width": 1.5}}
        for _, begin, _ in spans[1:]
    ]
    names: list[Json] = [
        {"text": plot_text(name), "x": (begin + end) / 2, "yref": "paper", "y": 0, "yshift": -4, "yanchor": "top"}
        | {"showarrow": False, "font": {"size": 12}}
        for name, begin, end in spans
        if many and name
    ]
    height = 28 * len(kinds) + 76 + (24 if many else 0) + (8 * longest if longest > 3 else 0)
    margin = {"l": 40, "r": 8, "t": 52, "b": 32 if many else 10}
    return layout(max(height, 190), x, y, margin=margin, shapes=shapes, annotations=names)


def _stack_spans(layers: Sequence[Layer]) -> list[tuple[str, int, int]]:
    """Name, first and last column of each stack."""
    spans: list[tuple[str, int, int]] = []
    for place, column in enumerate(layers):
        if spans and spans[-1][0] == column.stack:
            spans[-1] = (column.stack, spans[-1][1], place)
        else:
            spans.append((column.stack, place, place))
    return spans


def _least_width(grid: Cells) -> int:
    many = len(grid.columns) > MANY_LAYERS
    cell, bar = (_NARROW_CELL, 70) if many else (_CELL, 16)  # cells with numbers go without the scale on a phone
    return cell * len(grid.columns) + 7 * max(map(len, grid.kinds), default=0) + bar


def _places(grid: Cells, names: Sequence[str]) -> list[list[list[int]]]:
    """The modules of each cell, by their places in the list of names."""
    order = {name: place for place, name in enumerate(names)}
    return [[[order[name] for name in cell] for cell in row] for row in grid.names]


def _marks(highest: int) -> list[int]:
    return list(range(0, highest + 1, max(1, -(-highest // 6))))


def _ranks_in_words(grid: Cells, ranks: dict[str, int]) -> str:
    def mean(names: Sequence[str]) -> float:
        return sum(ranks[name] for name in names) / len(names)

    kinds = {kind: mean([n for cell in row for n in cell]) for kind, row in zip(grid.kinds, grid.names, strict=True)}
    most, least = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
    values = list(ranks.values())
    if min(values) == max(values):
        return f"{len(values)} matrices have rank {values[0]} each."
    average = number(mean(list(ranks)))
    said = f"{len(values)} matrices have rank {average} on average, from {min(values)} to {max(values)}."
    if len(kinds) == 1 or kinds[most] == kinds[least]:
        return said
    return f"{said} {plain(most)} has most ({kinds[most]:.1f} on average), {plain(least)} least ({kinds[least]:.1f})."


def _player(rankings: int) -> str:
    """A slider over the rankings, the start before them, and a button that moves it."""
    return (
        '<div class="player"><button type="button">Play</button>'
        f'<label>Training step <input type="range" min="0" max="{rankings}" step="1" value="{rankings}"></label>'
        '<output aria-live="polite"></output></div>'
    )


def _experts_in_words(grid: Cells) -> str:
    several = [len(cell) for row in grid.names for cell in row if len(cell) > 1]
    return f"A cell with several experts ({max(several)} at most) shows their mean." if several else ""
