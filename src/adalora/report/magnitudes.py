"""How weights moved, after DoRA's paper (Liu et al., ICML 2024, arXiv 2402.09353, section 3.2 and figure 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..runs import RunError
from .figure import Column, Figure, axis, layout, shades
from .markup import number

FILE = "directions.json"


def direction_figure(folder: Path) -> Figure | None:
    """Change of direction against change of magnitude, a point for each matrix and step; None where nobody measured it.

    Reads ``directions.json``: ``method``, ``steps``, ``layers`` (modules), and ``magnitude`` and ``direction``, each
    [layers][steps].

    Raises:
        RunError: the file does not say that.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps, modules = list(found["steps"]), [str(name) for name in found["layers"]]
        magnitude = _by_step(found["magnitude"], len(modules), len(steps))
        direction = _by_step(found["direction"], len(modules), len(steps))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read: remove it, and it will be written anew") from error
    x, y = [v for row in direction for v in row], [v for row in magnitude for v in row]
    related = correlation(x, y)
    said = f"Their correlation is {related:.2f}." if related is not None else "Their correlation is not defined."
    data = [
        {"type": "scatter", "mode": "markers", "name": f"step {step}", "x": across, "y": up}
        | {"marker": {"color": colour, "size": 8, "line": {"color": "var(--ink)", "width": 0.6}}}
        | {"labels": modules, "hovertemplate": "%{text}<br>ΔD %{x:.3g}, ΔM %{y:.3g}<extra>%{fullData.name}</extra>"}
        for step, colour, across, up in zip(steps, shades(len(steps)), direction, magnitude, strict=True)
    ]
    return Figure(
        key="directions",
        title="Direction and magnitude",
        summary=f"Change of direction against change of magnitude of {number(len(modules))} matrices at "
        f"{number(len(steps))} steps. {said}",
        data=data,
        layout=layout(
            400,
            axis("change of direction ΔD", rangemode="tozero"),
            axis("change of magnitude ΔM", rangemode="tozero"),
            hovermode="closest",
        ),
        columns=[
            Column("step", [step for step in steps for _ in modules]),
            Column("module", [name for _ in steps for name in modules]),
            Column("change of direction", x),
            Column("change of magnitude", y),
        ],
        note="ΔM is the mean change of the columns' lengths, ΔD the mean of one minus the cosine between a column and "
        "what it was. In DoRA's paper, full fine-tuning gives a negative correlation and LoRA a positive one.",
    )


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    count = len(x)
    if count < 2:
        return None
    mean_x, mean_y = sum(x) / count, sum(y) / count
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread > 0 else None


def _by_step(values: Sequence[Sequence[float]], layers: int, steps: int) -> list[list[float]]:
    """[layers][steps] turned; ValueError unless it is as large as it should be."""
    if len(values) != layers or any(len(row) != steps for row in values):
        raise ValueError("a value for each layer and step is expected")
    return [[float(row[step]) for row in values] for step in range(steps)]
