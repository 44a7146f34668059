"""What the page says of one run, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ..recipe import dump, flat
from .figure import Figure
from .magnitudes import direction_figure
from .maps import rank_figure, returns_figure
from .markup import isolated, number, table, text
from .over_matrices import score_figure, share_figures
from .over_steps import budget_figure, loss_figure, metric_figure, orthogonality_figure, returned_figure
from .run import Run
from .terminal import duration

_METHODS = {"adalora": "AdaLoRA", "lora": "LoRA", "dora": "DoRA", "full": "Full fine-tuning"}


_BY = {"score": "", "score_per_parameter": ", over its number of parameters,"}
_CUT = {
    "triplets": "What lies right of the cut was pruned for good.",
    "parameters": "The budget was spent from the left on, each triplet being kept that still fitted in.",
}


class Section(NamedTuple):
    """A heading, and what stands below it: sentences (HTML), figures, tables (HTML)."""

    key: str
    title: str
    lead: str
    figures: Sequence[Figure] = ()
    tables: Sequence[str] = ()
    side_by_side: bool = False


def sections(run: Run) -> Iterator[Section]:
    """All that can be shown of a run; what its method does not have is absent, with a sentence."""
    trace = run.trace
    yield _ranks(run)
    if trace:
        lead = f"How many {trace.unit} may live at each step, and how many do."
        yield Section("budget", "Budget", lead, [budget_figure(trace)])
    curves = [figure for figure in (loss_figure(run), metric_figure(run)) if figure]
    yield Section("training", "Training", "" if curves else "No loss was logged yet.", curves, side_by_side=True)
    scores = score_figure(trace) if trace else None
    if trace and scores:
        lead = f"Importance of every triplet{_BY[trace.rank_by]} at the last ranking. {_CUT[trace.unit]}"
        yield Section("scores", "Final scores", lead, [scores])
    if trace:
        lead = "Parameters of the learned ranks beside those of LoRA with one rank everywhere and the same total."
        yield Section("shares", "Where parameters went", lead, share_figures(trace), side_by_side=True)
    if trace and trace.allocations:
        lead = "A pruned triplet keeps its vectors and may return as long as pruning goes on."
        returned = [figure for figure in (returned_figure(trace), returns_figure(trace)) if figure]
        yield Section("returned", "Pruned, and back again", lead, returned)
        yield Section("orthogonality", "Orthogonality", "", [orthogonality_figure(trace)])
    moved = direction_figure(run.folder.path)
    if moved:
        lead = "How the weights moved, taken apart as DoRA does: the lengths of their columns, and where these point."
        yield Section("directions", "Direction and magnitude", lead, [moved])
    if run.metrics:
        yield Section("numbers", "In numbers", "", tables=list(_tables(run, run.metrics)))
    yield Section("recipe", "Recipe", "Every setting that the run depends on.", tables=list(_recipe(run)))


def headline(run: Run) -> str:
    """What the run was, in one line of HTML."""
    return f"{isolated(_last(run.recipe.model))} on {isolated(_last(run.recipe.data.train))}"


def _last(name: str) -> str:
    """The end of a path."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def method_name(run: Run) -> str:
    """The method as papers write it."""
    return _METHODS.get(run.recipe.method, run.recipe.method)


def facts(run: Run) -> list[tuple[str, str]]:
    """The few numbers to know first: what it is, the number."""
    found, trace, metrics = [], run.trace, run.metrics
    if trace:
        found.append(("triplets kept", f"{number(sum(trace.final.values()))} of {number(sum(trace.initial_ranks))}"))
    if run.ranks:
        ranks = list(run.ranks.values())
        found.append(("ranks", f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{min(ranks)}"))
    if metrics:
        name = metrics["headline"]
        found.append((f"held-out {name}", number(metrics["metrics"].get(name))))
        if metrics["parameters"]["adapter_saved"]:
            found.append(("parameters saved", number(metrics["parameters"]["adapter_saved"])))
        found.append(("training time", duration(metrics["seconds"])))
    return found


def _ranks(run: Run) -> Section:
    method = method_name(run)
    if not run.ranks:
        why = f"{method} has no ranks." if run.metrics else "Ranks are known when the run is finished."
        return Section("ranks", "Ranks", text(why))
    if run.trace is None:
        lead = f"{method} moves no budget while it trains: these are its ranks from beginning to end."
        return Section("ranks", "Ranks", text(lead), [rank_figure(run)])
    lead = f"One budget for {len(run.trace.names)} matrices, {run.trace.average}; training decided who needs more."
    start = run.trace.start
    if start:
        lead += (
            f" P and Q started from the loss's gradient on {number(start['rows'])} rows, of whose square the triplets"
            f" hold {start['share']:.0%}."
        )
    return Section("ranks", "Where the budget went", lead, [rank_figure(run)])


def _tables(run: Run, metrics: Mapping[str, Any]) -> Iterator[str]:
    yield _held_out(metrics, method_name(run))
    parameters, memory = metrics["parameters"], metrics.get("memory") or {}
    yield table(
        "Size and cost",
        ["", "value"],
        [
            ("adapter parameters at the start", parameters["adapter_start"]),
            ("adapter parameters as saved", parameters["adapter_saved"]),
            ("output layer's parameters", parameters["head"]),
            ("trainable parameters", parameters["trainable"]),
            ("frozen parameters", parameters["frozen"]),
            *((f"{name}, bytes", size) for name, size in metrics["saved_bytes"].items()),
            ("optimizer steps", metrics["steps"]),
            ("training time, seconds", metrics["seconds"]),
            *(
                (f"{name}, MiB", round(memory[key] / 2**20))
                for key, name in (("peak_bytes", "peak memory"), ("gpu_peak_bytes", "peak memory on the GPU"))
                if memory.get(key)
            ),
            ("seed", run.recipe.seed),
        ],
        key="cost",
    )
    yield table("Versions", ["package", "version"], list(metrics["versions"].items()), key="versions")


def _held_out(metrics: Mapping[str, Any], method: str) -> str:
    baseline = metrics["baseline"]
    more: Mapping[str, Mapping[str, Any]] = metrics.get("more_metrics", {})
    columns = ["metric", method, *(f"{method}, {split}" for split in more)]
    columns += [f"baseline ({baseline['answer']})"] if baseline else []
    rows = [
        [name, value, *(split.get(name) for split in more.values())]
        + ([baseline["metrics"].get(name)] if baseline else [])
        for name, value in metrics["metrics"].items()
    ]
    return table("Held-out metrics", columns, rows, key="metrics")


def _recipe(run: Run) -> Iterator[str]:
    """A table for each of its sections, and one for what stands outside them."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for key, value in flat(yaml.safe_load(dump(run.recipe))):
        group, _, name = key.rpartition(".")
        if group != "facts.versions":  # a table of their own
            grouped.setdefault(group, []).append((name, _setting(value)))
    for group, rows in grouped.items():
        yield table(group or "run", ["setting", "value"], rows, key=f"recipe-{group or 'run'}")


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
