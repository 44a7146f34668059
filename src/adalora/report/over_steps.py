"""Figures whose axis is the training step: the budget, the curves, the orthogonality, what came back."""

from __future__ import annotations

import math
from typing import Any

from .figure import COLOURS, Column, Figure, Json, axis, layout, line
from .markup import number, plain, plot_text, times
from .run import Run, Trace

_PHASES = ("warm-up", "pruning", "final phase")
_NARROW = 0.16  # share of the axis below which a phase has no room for its name
_HEIGHT = 320
_FEW = 40  # points that are marked one by one


def budget_figure(trace: Trace) -> Figure:
    """The budget and the triplets that live, after each ranking."""
    first, last = _ends(trace)
    steps = [first, *(a.step for a in trace.allocations)]
    budgets = [trace.initial_budget, *(a.budget for a in trace.allocations)]
    live = [trace.spent(trace.initial_ranks), *(trace.spent(a.ranks) for a in trace.allocations)]
    end = max(last, steps[-1])
    wide = {"width": 7, "shape": "hv"}
    agree = "At every ranking as many triplets live as the budget allows." if budgets == live else ""
    unit = trace.unit
    return Figure(
        key="budget",
        title=f"Budget and live {unit}",
        summary=f"The budget falls from {number(budgets[0])} to {number(budgets[-1])} {unit} by step {steps[-1]}; "
        f"{number(live[-1])} {unit} live at the end. {agree}".strip(),
        data=[
            line("budget", [*steps, end], [*budgets, budgets[-1]], "var(--budget)", line=wide),
            line(f"live {unit}", [*steps, end], [*live, live[-1]], "var(--ink)", line={"width": 1.6, "shape": "hv"}),
        ],
        layout=_over_steps(trace.schedule, end, axis(unit, rangemode="tozero"), hovermode="x unified"),
        columns=[Column("step", steps), Column("budget", budgets), Column(f"live {unit}", live)],
        note=_phases_in_words(trace.schedule),
    )


def loss_figure(run: Run) -> Figure | None:
    """Training loss, and held-out loss where the task measures it."""
    train = [(entry["step"], entry["loss"]) for entry in run.log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in run.log if "eval_loss" in entry]
    if not train:
        return None
    mode = "lines+markers" if len(train) < _FEW else "lines"
    data = [line("training loss", *_series(train), COLOURS[0], mode=mode)]
    if held_out:
        data.append(line("held-out loss", *_series(held_out), COLOURS[1], mode="lines+markers"))
    schedule = run.trace.schedule if run.trace else None
    low = min(train, key=lambda point: point[1] if _finite(point[1]) else math.inf)
    keys = ["step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate"]
    entries = [entry for entry in run.log if "loss" in entry or "eval_loss" in entry]
    present = [key for key in keys if any(key in entry for entry in entries)]
    return Figure(
        key="loss",
        title="Loss",
        summary=f"The training loss is {number(train[0][1])} at step {train[0][0]}."
        if len(train) == 1
        else f"The training loss goes from {number(train[0][1])} at step {train[0][0]} to {number(train[-1][1])} at "
        f"step {train[-1][0]}; the lowest is {number(low[1])} at step {low[0]}.",
        data=data,
        layout=_over_steps(schedule, _last_step(run), axis("loss"), hovermode="x unified"),
        columns=[Column(key, [entry.get(key) for entry in entries]) for key in present],
    )


def metric_figure(run: Run) -> Figure | None:
    """Held-out metrics on the way; those that share the headline's scale."""
    points = evaluations(run)
    if not points:
        return None
    names = list(dict.fromkeys(name for _, metrics in points for name in metrics))
    headline = run.metrics["headline"] if run.metrics else names[0]
    headline = headline if headline in names else names[0]
    shown = [headline, *(name for name in names if name != headline and _alike(points, headline, name))][: len(COLOURS)]
    steps = [step for step, _ in points]
    values = {name: [metrics.get(name) for _, metrics in points] for name in names}
    data = [
        line(plot_text(name), steps, values[name], colour, mode="lines+markers", line={"width": 3 - 1.4 * (index > 0)})
        for index, (name, colour) in enumerate(zip(shown, COLOURS, strict=False))
    ]
    schedule = run.trace.schedule if run.trace else None
    figure = _over_steps(schedule, _last_step(run), axis("held-out metric"), hovermode="x unified")
    baseline = ((run.metrics or {}).get("baseline") or {"metrics": {}})["metrics"].get(headline)
    if _finite(baseline):
        figure["shapes"].append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": baseline, "y1": baseline, "layer": "below"}
            | {"line": {"color": "var(--faint)", "width": 1.5, "dash": "dot"}}
        )
        said = {"text": f"baseline, {plot_text(headline)}", "font": {"color": "var(--faint)"}, "showarrow": False}
        place = {"xref": "paper", "x": 0.01, "xanchor": "left", "y": baseline, "yanchor": "bottom"}
        figure["annotations"].append(said | place)
    first, last = values[headline][0], values[headline][-1]
    beside = f", beside {number(baseline)} of the baseline" if _finite(baseline) else ""
    return Figure(
        key="metrics",
        title="Held-out metrics",
        summary=f"Held-out {plain(headline)} goes from {number(first)} at step {steps[0]} to {number(last)} at step "
        f"{steps[-1]}{beside}.",
        data=data,
        layout=figure,
        columns=[Column("step", steps), *(Column(name, values[name]) for name in names)],
        note="" if len(shown) == len(names) else "Metrics on another scale are in the table alone.",
    )


def orthogonality_figure(trace: Trace) -> Figure:
    """How far P and Q are from orthonormal."""
    steps = [a.step for a in trace.allocations]
    errors = [a.orthogonality for a in trace.allocations]
    return Figure(
        key="orthogonality",
        title="Orthogonality error",
        summary=f"The mean of ‖XXᵀ − I‖ over all P and Q is {number(errors[-1])} at step {steps[-1]}; the largest is "
        f"{number(max(errors))}, at step {steps[errors.index(max(errors))]}.",
        data=[line("error", steps, errors, COLOURS[0], mode="lines+markers" if len(steps) < _FEW else "lines")],
        layout=_over_steps(trace.schedule, _ends(trace)[1], axis("mean ‖XXᵀ − I‖", rangemode="tozero")),
        columns=[Column("step", steps), Column("orthogonality error", errors)],
        note="Zero where the columns of P and the rows of Q are orthonormal, so that Λ holds singular values.",
    )


def returned_figure(trace: Trace) -> Figure:
    """Triplets that live again, ranking by ranking."""
    steps = [a.step for a in trace.allocations]
    counts = [sum(a.returned) for a in trace.allocations]
    total = sum(counts)
    most = max(range(len(counts)), key=counts.__getitem__)
    said = f"Pruned triplets came back {times(total)}." if total else "No pruned triplet came back."
    if counts[most] > 1:
        said += f" Most of them at step {steps[most]}, {counts[most]}."
    whole = {"dtick": 1} if counts[most] < 5 else {}
    bars = {"type": "bar", "x": steps, "y": counts, "marker": {"color": COLOURS[2], "line": {"width": 0}}}
    return Figure(
        key="returned",
        title="Triplets that came back",
        summary=said,
        data=[{**bars, "name": "came back", "hovertemplate": "step %{x}: %{y} came back<extra></extra>"}],
        layout=_over_steps(trace.schedule, _ends(trace)[1], axis("triplets", rangemode="tozero", **whole), bargap=0.1),
        columns=[Column("step", steps), Column("came back", counts)],
    )


def evaluations(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Step and held-out metrics of each evaluation."""
    if run.metrics is not None:
        return [(entry["step"], entry["metrics"]) for entry in run.metrics["evaluations"]]
    prefix, beside = "eval_", {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    found = (
        (entry["step"], {key.removeprefix(prefix): entry[key] for key in entry if key.startswith(prefix)})
        for entry in ({key: value for key, value in entry.items() if key not in beside} for entry in run.log)
    )
    return [(step, metrics) for step, metrics in found if metrics]


def _series(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Points as steps and values."""
    return [step for step, _ in points], [value for _, value in points]


def _ends(trace: Trace) -> tuple[int, int]:
    """The first and the last step of training, as far as is known."""
    last = trace.allocations[-1].step if trace.allocations else 0
    return 0, trace.schedule["total_step"] if trace.schedule else last


def _last_step(run: Run) -> int:
    logged = max((entry["step"] for entry in run.log), default=0)
    return max(logged, _ends(run.trace)[1]) if run.trace else logged


def _over_steps(schedule: Json | None, end: int, y: Json, **settings: Any) -> Json:
    """A layout whose horizontal axis is the step, with the phases shaded."""
    shapes, annotations = _phases(schedule)
    x = axis("optimizer step", range=[0, max(end, 1)], zeroline=False)
    return layout(_HEIGHT, x, y, shapes=shapes, annotations=annotations, **settings)


def _bounds(schedule: Json | None) -> list[tuple[str, int, int]]:
    """Name, begin and end of each phase; empty where the schedule is not known or nothing is pruned."""
    if not schedule or schedule["initial_budget"] == schedule["target_budget"]:
        return []
    total, warm, final = schedule["total_step"], schedule["t_init"], schedule["total_step"] - schedule["t_final"]
    spans = zip(_PHASES, (0, warm, final), (warm, final, total), strict=True)
    return [(name, begin, end) for name, begin, end in spans if end > begin]


def _phases(schedule: Json | None) -> tuple[list[Json], list[Json]]:
    shapes: list[Json] = []
    annotations: list[Json] = []
    for name, begin, end in _bounds(schedule):
        colour = f"var(--phase-{_PHASES.index(name) + 1})"
        area = {"type": "rect", "x0": begin, "x1": end, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
        shapes.append({**area, "fillcolor": colour, "line": {"width": 0}})
        if schedule and (end - begin) / schedule["total_step"] > _NARROW:
            place = {"x": (begin + end) / 2, "yref": "paper", "y": 0.995, "yanchor": "top", "showarrow": False}
            annotations.append({**place, "text": name, "font": {"color": "var(--faint)", "size": 11}})
    return shapes, annotations


def _phases_in_words(schedule: Json | None) -> str:
    parts = [f"{name}, steps {begin + 1} to {end}" for name, begin, end in _bounds(schedule)]
    return f"Shaded: {'; '.join(parts)}." if parts else ""


def _alike(points: list[tuple[int, dict[str, Any]]], headline: str, name: str) -> bool:
    """Whether two metrics can share an axis: both within ±1, or neither and less than tenfold apart."""
    sizes = [max((abs(m[k]) for _, m in points if _finite(m.get(k))), default=math.nan) for k in (headline, name)]
    if any(map(math.isnan, sizes)):
        return False
    return max(sizes) <= 1 or (min(sizes) > 1 and max(sizes) < 10 * min(sizes))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
