"""A rank map from before training: in the terminal, as a picture, as a page; beside the learned one of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import write_text
from .maps import map_figure
from .markup import isolated, number, plain, table, text
from .page import page, section_html
from .ranks import draw_map
from .run import Run
from .sections import Section
from .similarity import moved, spearman
from .terminal import rank_table

WORTH = (
    "The gradient before the first step says where a first step would gain most, not where training will want ranks in"
    " the end: across matrices its sizes follow depth and a new output layer more than need. Take it as a hint; what"
    " was measured is in decision 016."
)


@dataclass(frozen=True)
class Scan:
    """What a look at the gradient says about ranks."""

    model: str
    train: str
    rows: int
    head_steps: int  # in which the new output layer was trained alone before
    share: float  # of the square of all gradients, what the triplets hold
    values: dict[str, list[float]]  # singular values of each matrix's gradient, init_r of them at most, falling
    ranks: dict[str, int]  # if the budget went to the largest of them all

    @property
    def sums(self) -> dict[str, float]:
        """Σσ of each matrix: what a first small step on its λ gains, up to the same factor for all."""
        return {name: sum(values) for name, values in self.values.items()}


def as_json(scan: Scan, run: Run | None) -> dict[str, Any]:
    """What was found, for machines."""
    found = {
        "model": scan.model,
        "train": scan.train,
        "rows": scan.rows,
        "head_steps": scan.head_steps,
        "share": scan.share,
        "singular_values": scan.values,
        "ranks": scan.ranks,
    }
    return found if run is None else found | {"learned": run.ranks, "likeness": likeness(scan, run)}


def likeness(scan: Scan, run: Run) -> dict[str, float | None]:
    """How well the scan tells the learned ranks: Spearman's correlation with Σσ of a matrix, and with its rank in the
    scan's map; the share of the budget that lies elsewhere. None where one is the same everywhere."""
    found = {
        "spearman_of_sums": spearman(scan.sums, run.ranks),
        "spearman_of_ranks": spearman(scan.ranks, run.ranks),
        "moved": moved(scan.ranks, run.ranks),
    }
    return {key: None if math.isnan(value) else round(value, 3) for key, value in found.items()}


def print_scan(out: Console, scan: Scan, run: Run | None) -> None:
    out.print(_lead(scan))
    out.print(rank_table(scan.ranks, out.width))
    if run is not None:
        out.print(f"Learned ranks of {run.folder.path}:")
        out.print(rank_table(run.ranks, out.width))
        out.print(_alike(scan, run))
    out.print(WORTH)


def draw_scan(scan: Scan, path: Path) -> None:
    """Save the map as PNG, whole or not at all."""
    when = f"after {scan.head_steps} steps of the output layer" if scan.head_steps else "before training"
    title = f"Ranks by the gradient {when}: {scan.model} on {scan.train}"
    draw_map(scan.ranks, max(map(len, scan.values.values())), path, f"{title}\nthe largest singular values of all")


def write_scan(scan: Scan, run: Run | None, path: Path) -> None:
    """Save the page, whole or not at all.

    Raises:
        ReportError: plotly is not installed.
    """
    figures = [map_figure(scan.ranks, "scan", "Ranks by the gradient")]
    tables = [
        table(
            "Singular values of the gradient",
            ["module", "sum", *(f"{i + 1}" for i in range(max(map(len, scan.values.values()))))],
            [[name, number(scan.sums[name]), *map(number, values)] for name, values in scan.values.items()],
            key="singular-values",
        )
    ]
    leads = [text(_lead(scan)), text(WORTH)]
    if run is not None:
        figures.append(map_figure(run.ranks, "learned", "Learned ranks"))
        leads.insert(1, f"{text(_alike(scan, run))} The run is {isolated(str(run.folder.path))}.")
    parts = [
        Section("scan", "Where parameters would help first", " ".join(leads), figures),
        Section("values", "Singular values", "Of each matrix's gradient, falling.", tables=tables),
    ]
    names = f"{plain(scan.model)} on {plain(scan.train)}"
    body = f'<header class="masthead"><h1>Scan of {text(names)}</h1></header>' + "\n".join(
        section_html(part, 0, 2) for part in parts
    )
    data: Mapping[str, Any] = {
        "slug": "scan", "names": [], "figures": {figure.key: figure.as_json for figure in figures}, "log": [],
    }  # fmt: skip
    write_text(path, page(f"Scan of {names}", body, {"runs": [data]}))


def _lead(scan: Scan) -> str:
    triplets, matrices = sum(scan.ranks.values()), len(scan.ranks)
    after = f", after {scan.head_steps} steps of the output layer alone" if scan.head_steps else ""
    return (
        f"Where the {triplets} largest singular values of the loss's gradient lie, {triplets / matrices:.3g} on average"
        f" in {matrices} matrices; {scan.rows} rows{after}. The values kept of each matrix hold {scan.share:.0%} of"
        " the gradient's square."
    )


def _alike(scan: Scan, run: Run) -> str:
    found = likeness(scan, run)
    sums, ranks = (found[key] for key in ("spearman_of_sums", "spearman_of_ranks"))
    if sums is None:
        return "The learned ranks are the same everywhere, so there is no correlation with them."
    said = f"Spearman's correlation with the learned ranks: {sums:.2f} of the sums of singular values"
    return f"{said}." if ranks is None else f"{said}, {ranks:.2f} of these ranks."
