"""Figures of the matrices: the scores of their triplets, and the parameters that they got."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .figure import ABOVE, Column, Figure, Json, axis, layout
from .grid import OUTSIDE, cells
from .maps import MANY_LAYERS
from .markup import number, plain, plot_text
from .run import Trace


def score_figure(trace: Trace) -> Figure | None:
    """The scores of the last ranking, sorted, and where the budget cut; None before it."""
    last = trace.allocations[-1] if trace.allocations else None
    if last is None or last.scores is None:
        return None
    found: list[tuple[float, bool, int]] = []
    for matrix, (scores, rank) in enumerate(zip(last.scores, last.ranks, strict=True)):
        best = sorted(range(len(scores)), key=lambda place: -scores[place])
        found += [(scores[place], order < rank, matrix) for order, place in enumerate(best)]
    found.sort(key=lambda triplet: (-triplet[0], not triplet[1]))
    kept = sum(live for _, live, _ in found)
    zeros = sum(score <= 0 for score, _, _ in found)
    traces = [
        _points("kept", [(place, t) for place, t in enumerate(found, 1) if t[1]], trace.names, "var(--kept)"),
        _points("pruned", [(place, t) for place, t in enumerate(found, 1) if not t[1]], trace.names, "var(--pruned)"),
    ]
    edge, text = kept + 0.5, f" cut at the budget of {number(kept)}"
    if trace.unit == "parameters":  # smaller ones beyond may still have been kept
        edge = next((place for place, (_, live, _) in enumerate(found) if not live), kept) + 0.5
        text = f" the first beyond the budget of {number(last.budget)} {trace.unit}"
    cut = {"type": "line", "x0": edge, "x1": edge, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    said = {"x": edge, "yref": "paper", "y": 1, "yanchor": "top", "xanchor": "left", "showarrow": False}
    if edge > len(found) / 2:
        said, text = said | {"xanchor": "right"}, f"{text[1:]} "
    above = [score for score, live, _ in found if live]
    gap = f"The lowest score that was kept is {number(min(above))}. " if above else ""
    own = "Each matrix kept its own best triplets." if trace.policy != "global_topk" else ""
    return Figure(
        key="scores",
        title="Final scores",
        summary=f"{number(kept)} of {number(len(found))} triplets were kept at step {last.step}. {gap}{own}".strip(),
        data=traces,
        layout=layout(
            360,
            axis("triplets, best first", zeroline=False),
            axis("score (log)", type="log", exponentformat="power", dtick=_decades([t[0] for t in found])),
            shapes=[cut | {"line": {"color": "var(--ink)", "width": 1.2, "dash": "dash"}}],
            annotations=[said | {"text": text, "font": {"color": "var(--faint)", "size": 12}}],
            hovermode="closest",
        )
        | {"legend": ABOVE | {"itemsizing": "constant"}},
        columns=[
            Column("place", range(1, len(found) + 1)),
            Column("score", [score for score, _, _ in found]),
            Column("kept", ["yes" if live else "no" for _, live, _ in found]),
            Column("module", [matrix for _, _, matrix in found], of_modules=True),
        ],
        note=f"Scores of 0 ({number(zeros)} here) have no place on a logarithmic axis." if zeros else "",
    )


def share_figures(trace: Trace) -> list[Figure]:
    """Parameters by kind of module and by depth, beside LoRA of one rank everywhere with as many parameters."""
    ranks = list(trace.final.values())
    grid = cells(trace.names)
    sizes = dict(zip(trace.names, trace.triplet_parameters, strict=True))
    spent = {name: size * rank for (name, size), rank in zip(sizes.items(), ranks, strict=True)}
    total = sum(spent.values())
    uniform = total / sum(sizes.values())

    def of(names: Sequence[str]) -> tuple[int, float]:
        return sum(spent[name] for name in names), uniform * sum(sizes[name] for name in names)

    kinds = [[name for cell in row for name in cell] for row in grid.names]
    layers = [[name for row in grid.names for name in row[index]] for index in range(len(grid.columns))]
    by_kind, by_layer = [of(names) for names in kinds], [of(names) for names in layers]
    depths = [column.name for column in grid.columns]
    beside = f"LoRA of rank {uniform:.3g} everywhere, which has as many parameters ({number(total)})"
    return [
        _shares("kinds", "Parameters by kind of module", "kind of module", grid.kinds, by_kind, beside, upright=False),
        _shares("depth", "Parameters by depth", "layer", depths, by_layer, beside, upright=True),
    ]


def _shares(
    key: str, title: str, what: str, names: list[str], values: list[tuple[int, float]], beside: str, *, upright: bool
) -> Figure:
    spent, even = [value for value, _ in values], [round(value) for _, value in values]
    places, labels = list(range(len(names))), [plot_text(name) for name in names]
    ratios = [ours / theirs if theirs else 1.0 for ours, theirs in values]
    most, least = (choose(places, key=ratios.__getitem__) for choose in (max, min))
    along = axis(what, tickmode="array", tickvals=places, ticktext=labels, zeroline=False, ticklabelstandoff=4)
    if len(names) > 24:
        along |= {"tickvals": places[:: len(names) // 12], "ticktext": labels[:: len(names) // 12]}
    counts = axis("parameters", rangemode="tozero", tickformat=".3~s")
    ends, direction = ("xy", "v") if upright else ("yx", "h")
    if not upright:
        along |= {"autorange": "reversed", "title": {"text": ""}}
    hover = f"%{{{ends[0]}}}<br>%{{{ends[1]}:,}} parameters, %{{fullData.name}}<extra></extra>"
    series = (("learned", spent, "var(--kept)"), ("uniform LoRA", even, "var(--pruned)"))
    named = [plain(name) for name in names]
    if upright:
        named = ["what lies outside of layers" if name == OUTSIDE else f"layer {name}" for name in named]
    many = upright and len(names) > MANY_LAYERS
    bars: list[Json] = [
        {"type": "bar", "name": name, "orientation": direction, ends[0]: places, ends[1]: counted}
        | {"marker": {"color": colour, "line": {"width": 0}}, "hovertemplate": hover}
        for name, counted, colour in series
    ]
    if many:  # bars side by side would be too thin
        bars[1] |= {"type": "scatter", "mode": "lines", "line": {"color": series[1][2], "width": 2, "shape": "hvh"}}
        del bars[1]["marker"], bars[1]["orientation"]
    axes = (along, counts) if upright else (counts, along)
    return Figure(
        key=key,
        title=title,
        summary=f"Beside {beside}: {named[most]} got most ({ratios[most]:.0%} of its share there), "
        f"{named[least]} least ({ratios[least]:.0%}).",
        data=bars,
        layout=layout(320 if upright else 120 + 38 * len(names), *axes, bargap=0.28, bargroupgap=0.06),
        columns=[Column(what, names), Column("parameters", spent), Column("uniform LoRA", even)],
    )


def _points(name: str, points: list[tuple[int, tuple[float, bool, int]]], modules: list[str], colour: str) -> Json:
    """Scores above 0 as points; their modules' names are put in by the page's script."""
    shown = [(place, score, matrix) for place, (score, _, matrix) in points if score > 0]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [place for place, _, _ in shown],
        "y": [score for _, score, _ in shown],
        "modules": [matrix for _, _, matrix in shown],
        "marker": {"color": colour, "size": 5 if len(points) < 1000 else 3},
        "hovertemplate": "%{text}<br>score %{y:.3g}, place %{x}<extra>%{fullData.name}</extra>",
    }


def _decades(scores: Sequence[float]) -> int | str:
    """Powers of ten between two marks of the axis, for at most eight marks; over a short axis, also 2 and 5 times."""
    positive = [score for score in scores if score > 0]
    span = math.log10(max(positive) / min(positive)) if positive else 1
    return "D2" if span < 2 else math.ceil(span / 8)
