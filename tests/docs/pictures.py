"""Draws docs/pictures/ from a finished run: ``python -m tests.docs.pictures runs/rotten_tomatoes``.

The run is the demo's (``adalora train``). Only its trace is read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from adalora.files import replacing
from adalora.report.grid import arrange
from adalora.report.run import Trace, read_run

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
INK, QUIET, PAPER, ABSENT = "#1b2733", "#66717c", "#ffffff", "#e4e4e4"
BLUE, ORANGE, GREY = "#00417a", "#c87800", "#b8bfc6"
PHASES = ("#eef2f6", "#fdf3e1", "#e9f1ea")


def budget(trace: Trace) -> Figure:
    """b(t) and the live triplets, and how many came back at each ranking."""
    schedule = trace.schedule or {}
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [0, *(found.step for found in trace.allocations)]
    starts = (0, schedule["t_init"], schedule["total_step"] - schedule["t_final"], schedule["total_step"])
    for axes in (above, below):
        for first, last, colour in zip(starts, starts[1:], PHASES, strict=False):
            axes.axvspan(first, last, color=colour, lw=0)
        plain(axes)
    for first, last, name in zip(starts, starts[1:], ("warm-up", "pruning", "final phase"), strict=False):
        above.text((first + last) / 2, 1.03, name, transform=above.get_xaxis_transform(), ha="center", color=QUIET)
    budgets = [found.budget for found in trace.allocations]
    course = [trace.initial_budget, trace.initial_budget, *budgets, budgets[-1]]
    above.plot([0, starts[1], *steps[1:], starts[3]], course, color=ORANGE, lw=5, alpha=0.45, label="budget b(t)")
    live = [trace.initial_budget, *(sum(found.ranks) for found in trace.allocations)]
    above.step([*steps, starts[3]], [*live, live[-1]], where="post", color=BLUE, lw=1.4, label="live triplets")
    above.set_ylabel("triplets")
    above.legend(frameon=False, loc="upper right")
    returned = [sum(found.returned) for found in trace.allocations]
    below.bar(steps[1:], returned, width=1.5, color=BLUE)
    below.set_yticks(range(max(returned, default=0) + 1))
    below.set_ylabel("came back")
    below.set_xlabel("optimizer step")
    below.set_xlim(0, starts[3])
    return figure


def scores(trace: Trace) -> Figure:
    """Every triplet's score at the last ranking, best first, and where the budget cuts."""
    last = trace.allocations[-1]
    assert last.scores is not None
    found = sorted((score for of_matrix in last.scores for score in of_matrix), reverse=True)
    kept = last.budget
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    places = range(1, len(found) + 1)
    axes.bar(places[:kept], found[:kept], width=0.8, color=BLUE)
    axes.bar(places[kept:], found[kept:], width=0.8, color=GREY)
    axes.axvline(kept + 0.5, color=ORANGE, lw=2)
    axes.text(kept - 2, max(found), f"kept: {kept}", color=BLUE, va="top", ha="right")
    axes.text(kept + 3, max(found), f"pruned: {len(found) - kept}", color=QUIET, va="top")
    axes.set_yscale("log")
    axes.set_ylim(min(score for score in found if score > 0) * 0.7, max(found) * 1.4)
    axes.set_xlim(0, len(found) + 1)
    axes.set_xlabel("triplets of all matrices, by score")
    axes.set_ylabel("score S")
    return figure


def ranks_by_step(trace: Trace, count: int = 4) -> Figure:
    """The rank of each matrix at steps of equal distance, from the first ranking to the last."""
    every = trace.allocations
    shown = [every[round(index * (len(every) - 1) / (count - 1))] for index in range(count)]
    figure = Figure(figsize=(8.8, 2.3), layout="constrained")
    colours = Normalize(0, max(trace.initial_ranks))
    for number, (axes, found) in enumerate(zip(figure.subplots(1, count), shown, strict=True)):
        grid = arrange(dict(zip(trace.names, found.ranks, strict=True)))
        axes.set_facecolor(ABSENT)
        values = [[float("nan") if value is None else value for value in row] for row in grid.values]
        image = axes.imshow(values, cmap="cividis", norm=colours, aspect="equal")
        for row, numbers in enumerate(grid.values):
            for column, rank in enumerate(numbers):
                if rank is not None:
                    ink = INK if colours(rank) > 0.55 else PAPER
                    axes.text(column, row, f"{rank:g}", ha="center", va="center", color=ink, fontsize=7.5)
        axes.set_xticks(range(len(grid.layers)), grid.layers)
        axes.set_yticks(range(len(grid.modules)), grid.modules if number == 0 else [""] * len(grid.modules))
        axes.tick_params(length=0, labelsize=8, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_title(f"step {found.step}: {sum(found.ranks)} triplets", fontsize=9, color=INK)
        axes.set_xlabel("layer", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="rank", shrink=0.85, ticks=range(max(trace.initial_ranks) + 1))
    return figure


def orthogonality(trace: Trace) -> Figure:
    """Mean of the norms of PᵀP - I and QQᵀ - I, at each ranking."""
    figure = Figure(figsize=(8.0, 2.4), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    axes.plot([a.step for a in trace.allocations], [a.orthogonality for a in trace.allocations], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean ‖XXᵀ − I‖")
    return figure


def triplets(_: Trace) -> Figure:
    """W0 + P Λ Q, with two of six triplets pruned."""
    figure = Figure(figsize=(8.0, 2.7), layout="constrained")
    axes = figure.subplots()
    rank, tall, wide, side = 6, 3.4, 4.6, 0.3
    pruned = {2, 5}
    colours = [GREY if index in pruned else BLUE for index in range(rank)]
    alphas = [0.35 if index in pruned else 1 - 0.11 * index for index in range(rank)]

    def box(x: float, y: float, width: float, height: float, colour: str, alpha: float = 1.0) -> None:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=alpha, edgecolor=PAPER, lw=1))

    def word(x: float, y: float, text: str, size: float = 13) -> None:
        axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=size)

    box(0, 0, wide, tall, "#dfe5ea")
    word(wide / 2, tall / 2, "W₀", 18)
    word(wide / 2, -0.42, "frozen, d₁ × d₂", 10)
    word(wide + 0.65, tall / 2, "+ s ρ", 15)
    left = wide + 1.3
    for index in range(rank):
        box(left + side * index, 0, side, tall, colours[index], alphas[index])
    word(left + side * rank / 2, -0.42, "P, d₁ × r", 10)
    middle, top = left + side * rank + 0.35, tall - side
    axes.add_patch(
        Rectangle((middle, tall - side * rank), side * rank, side * rank, fill=False, edgecolor=GREY, lw=0.8)
    )
    for index in range(rank):
        box(middle + side * index, top - side * index, side, side, colours[index], alphas[index])
    for index in pruned:
        word(middle + side * (index + 0.5), top - side * (index - 0.5), "0", 10)
    word(middle + side * rank / 2, tall - side * rank - 0.4, "Λ, r × r", 10)
    right = middle + side * rank + 0.35
    for index in range(rank):
        box(right, top - side * index, wide, side, colours[index], alphas[index])
    word(right + wide / 2, tall - side * rank - 0.4, "Q, r × d₂", 10)
    word(right + wide / 2, 0.45, "grey: pruned, λ = 0", 10)
    axes.set_xlim(-0.1, right + wide + 0.1)
    axes.set_ylim(-0.8, tall + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def plain(axes: Axes) -> None:
    """Axes without a frame, in quiet ink."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GREY)
    axes.tick_params(colors=QUIET)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


DRAWN = {
    "budget": budget,
    "scores": scores,
    "ranks-by-step": ranks_by_step,
    "orthogonality": orthogonality,
    "triplets": triplets,
}
"""Name of each picture -> who draws it."""


def draw(trace: Trace, folder: Path) -> list[Path]:
    """Every picture as PNG in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure_of in DRAWN.items():
        path = folder / f"{name}.png"
        plainly: dict[str, Any] = {"format": "png", "dpi": 150, "facecolor": PAPER, "metadata": {"Software": None}}
        with replacing(path) as beside:
            figure_of(trace).savefig(beside, **plainly)
        drawn.append(path)
    return drawn


if __name__ == "__main__":
    found = read_run(Path(sys.argv[1])).trace
    assert found is not None, "this run moved no budget"
    for picture in draw(found, PICTURES):
        print(picture, picture.stat().st_size)
