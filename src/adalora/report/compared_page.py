"""Several runs side by side as one page that needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .compare import Comparison, Curve, Row
from .compared import setting
from .figure import COLOURS, Column, Figure, Json, axis, layout, line
from .markup import isolated, number, plain, plot_text, table, text
from .page import page, section_html
from .sections import Section

_DASHES = ["solid", "dash", "dot", "dashdot"]
_HEIGHT = 340
_STYLE = """<style>
.compared .sheets { columns: 1; }
.compared td, .compared thead th { overflow-wrap: break-word; min-width: 6.5rem; }
.compared tbody th { position: sticky; left: 0; background: var(--paper); overflow-wrap: break-word; }
</style>"""  # tables as wide as runs are many: they scroll, and the names of their rows stay


def write_comparison(found: Comparison, path: Path) -> None:
    """Write the page at ``path``, whole or not at all.

    Raises:
        ReportError: plotly is not installed.
    """
    write_text(path, comparison_html(found))


def comparison_html(found: Comparison) -> str:
    """The page: tables, curves and ranks of all runs."""
    parts = _sections(found)
    links = " ".join(f'<a href="#run-0-section-{part.key}">{text(part.title)}</a>' for part in parts)
    names = ", ".join(map(isolated, found.names))
    body = (
        f'<header class="masthead"><h1>{len(found.runs)} runs compared</h1><p class="about">{names}</p></header>'
        f'{_STYLE}<div class="compared" data-slug="comparison"><nav aria-label="Contents">{links}</nav>'
        + "\n".join(section_html(part, 0, 2) for part in parts)
        + "</div>"
    )
    figures = {figure.key: figure.as_json for part in parts for figure in part.figures}
    data = {"slug": "comparison", "names": [], "figures": figures, "log": []}
    return page(f"Comparison of {', '.join(map(plain, found.names))}", body, {"runs": [data]})


def _sections(found: Comparison) -> list[Section]:
    """What there is to show, in the order of the page."""
    notes = " ".join(map(text, found.notes))
    parts = [Section("runs", "Runs", notes, tables=[_rows_table("Runs", found, found.facts, "runs")])]
    curves = [
        _curves("loss", "Training loss", "training loss", found, found.logged("loss")),
        _curves("scores", "Held-out score", found.headlines[0] if found.headlines else "", found, found.scores),
        _curves("budget", "Live triplets", "triplets", found, found.budgets, line={"shape": "hv"}),
    ]
    drawn = [curve for curve in curves if curve]
    parts.append(Section("training", "Training", "" if drawn else "Nothing was logged yet.", drawn, side_by_side=True))
    if any(found.ranks):
        lead = "Mean rank over the matrices of a kind, and over those of a layer."
        bars = [_bars(found, "kinds", "Ranks by kind of module", found.kinds, upright=False)]
        bars.append(_bars(found, "layers", "Ranks by depth", found.layers, upright=True))
        parts.append(Section("ranks", "Where the ranks are", lead, bars, side_by_side=True))
        lead = (
            "Spearman's correlation of the ranks of the matrices that both runs adapt, and the share of the budget "
            "that would have to move to make one division the other."
        )
        parts.append(Section("likeness", "How alike the ranks are", lead, tables=[_likeness(found)]))
    if found.settings:
        written = [Row(row.name, [setting(value) for value in row.values]) for row in found.settings]
        differ = _rows_table("Settings that differ", found, written, "settings")
        parts.append(Section("recipes", "What the recipes differ in", "", tables=[differ]))
    else:
        parts.append(Section("recipes", "What the recipes differ in", "Nothing: they are the same."))
    return parts


def _rows_table(caption: str, found: Comparison, rows: Sequence[Row], key: str) -> str:
    return table(caption, ["", *found.names], [[row.name, *row.values] for row in rows], key=key)


def _likeness(found: Comparison) -> str:
    columns = ["run", "and", "matrices in both", "Spearman's ρ of ranks", "budget that lies elsewhere", ""]
    rows = [
        [pair.one, pair.other, pair.matrices, _finite(pair.spearman), _finite(pair.moved), pair.reason]
        for pair in found.likenesses
    ]
    return table("Pairs of runs", columns, rows, key="likeness")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _curves(
    key: str, title: str, what: str, found: Comparison, curves: Sequence[Curve], **settings: Any
) -> Figure | None:
    """One line for each run that has values; None where none has."""
    there = [(index, curve) for index, curve in enumerate(curves) if curve]
    if not there:
        return None
    own = settings.pop("line", {})
    lines = [
        line(
            plot_text(found.names[index]),
            [step for step, _ in curve],
            [value for _, value in curve],
            COLOURS[index % len(COLOURS)],
            mode="lines+markers" if len(curve) < 20 else "lines",
            line={"dash": _DASHES[index // len(COLOURS) % len(_DASHES)], **own},
        )
        for index, curve in there
    ]
    ends = ", ".join(f"{plain(found.names[index])} {number(curve[-1][1])}" for index, curve in there)
    columns = [
        Column("run", [found.names[index] for index, curve in there for _ in curve]),
        Column("step", [step for _, curve in there for step, _ in curve]),
        Column(what, [value for _, curve in there for _, value in curve]),
    ]
    y = axis(plot_text(what), **({"rangemode": "tozero"} if key == "budget" else {}))
    drawn = layout(_HEIGHT, axis("step"), y, hovermode="x unified", showlegend=True)
    return Figure(key, title, f"{title} of {len(there)} runs. At the end: {ends}.", lines, drawn, columns)


def _bars(found: Comparison, key: str, title: str, rows: Sequence[Row], *, upright: bool) -> Figure:
    """Mean ranks side by side."""
    places, labels = list(range(len(rows))), [plot_text(row.name) for row in rows]
    ends, direction = ("xy", "v") if upright else ("yx", "h")
    ranked = [index for index, ranks in enumerate(found.ranks) if ranks]
    hover = f"%{{customdata}}: %{{{ends[1]}:.2f}}, %{{fullData.name}}<extra></extra>"
    bars: list[Json] = [
        {"type": "bar", "name": plot_text(found.names[index]), "orientation": direction, ends[0]: places}
        | {ends[1]: [row.values[index] for row in rows], "marker": {"color": COLOURS[index % len(COLOURS)]}}
        | {"customdata": labels, "hovertemplate": hover}
        for index in ranked
    ]
    every = max(1, len(rows) // 24)
    along = axis("layer" if upright else "", tickmode="array", tickvals=places[::every], ticktext=labels[::every])
    ranks = axis("mean rank", rangemode="tozero")
    height = _HEIGHT if upright else max(_HEIGHT, 90 + 16 * len(rows) * len(ranked))
    x, y = (along, ranks) if upright else (ranks, along | {"autorange": "reversed"})
    said = "; ".join(f"{plain(found.names[index])} {_most(rows, index)}" for index in ranked)
    columns = [Column("layer" if upright else "kind of module", [row.name for row in rows])]
    columns += [Column(found.names[index], [row.values[index] for row in rows]) for index in ranked]
    drawn = layout(height, x, y, barmode="group", showlegend=True)
    return Figure(key, title, f"{title}: {said}.", bars, drawn, columns)


def _most(rows: Sequence[Row], run: int) -> str:
    """Where a run has its highest mean rank, in words."""
    values = {row.name: row.values[run] for row in rows if row.values[run] is not None}
    if len(set(values.values())) == 1:
        return f"{number(next(iter(values.values())))} everywhere"
    most = max(values, key=values.__getitem__)
    return f"at most {number(values[most])}, in {plain(most)}"
