"""What a run will do, in words or as JSON, before it does it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from .core.schedule import Schedule
from .preparation import MOST_TRIALS, Prepared
from .progress import Budget
from .report.terminal import number, print_lines

_NAME = 210  # bytes that the name and place of a tensor take in an adapter's file


class Phase(NamedTuple):
    """Steps ``first`` to ``last`` of a schedule, both included."""

    name: str  # warm-up, pruning or final; fixed where nothing is pruned
    first: int
    last: int
    before: int  # of the budget that may live when it begins
    after: int  # and when it ends


def phases(schedule: Schedule, after_step: int = 0) -> list[Phase]:
    """The phases of a schedule, without the steps up to ``after_step``."""
    if schedule.prunes:
        ends = {"warm-up": schedule.t_init, "pruning": schedule.final_step, "final": schedule.total_step}
    else:
        ends = {"fixed": schedule.total_step}
    found, done = [], after_step
    for name, last in ends.items():
        if last > done:
            found.append(Phase(name, done + 1, last, schedule.budget(done), schedule.budget(last)))
            done = last
    return found


def budget_of(prepared: Prepared) -> Budget | None:
    """What one who watches the training may ask about its budget; None of a method that has none."""
    schedule = prepared.budget
    if schedule is None:
        return None
    course = phases(schedule) if schedule.prunes else []
    return Budget(
        at=schedule.budget,
        phase=lambda step: next((phase.name for phase in course if step <= phase.last), ""),
        live=lambda: _spent(prepared, prepared.adapted.ranks().values()),
    )


def as_json(prepared: Prepared) -> dict[str, Any]:
    """What will happen, for machines. Sizes at the end are what the budget leaves if it is spread evenly, and the least
    and the most that it can leave."""
    recipe, data, schedule, ranks = prepared.recipe, prepared.recipe.data, prepared.budget, prepared.initial_ranks
    start = prepared.trainable_parameters - prepared.head_parameters
    least, most = _end(prepared)
    evenly = start - _pruned_parameters(prepared)
    entries = next(p.element_size() for p in prepared.model.parameters() if p.requires_grad)

    def size(end: int) -> int:
        return (end + prepared.head_parameters) * entries + 2 * len(ranks) * _NAME

    return {
        "model": recipe.model,
        "task": recipe.task,
        "classes": data.label_names,
        "method": recipe.method,
        "train_rows": {"source": data.train, "count": len(prepared.train)},
        "eval_rows": {
            "source": data.eval or data.train,
            "split": None if data.eval or data.holdout else data.eval_split,
            "holdout": data.holdout,
            "together": _together(prepared) if data.holdout else None,
            "count": len(prepared.evaluation),
        },
        "baseline": {"answer": prepared.baseline[0], "metrics": prepared.baseline[1]} if prepared.baseline else None,
        "matrices": len(ranks),
        "initial_ranks": ranks,
        "budget": None
        if schedule is None
        else {"initial": schedule.initial_budget, "target": schedule.target_budget, "unit": schedule.unit},
        "parameters": {
            "adapter_start": start,
            "adapter_end": min(max(evenly, least), most),
            "adapter_end_least": least,
            "adapter_end_most": most,
            "head": prepared.head_parameters,
            "frozen": prepared.frozen_parameters,
        },
        "start": prepared.start,
        "steps": prepared.total_steps,
        "resumed_from_step": prepared.resumed_step,
        "phases": [] if schedule is None else [phase._asdict() for phase in phases(schedule, _done(prepared))],
        "steps_between_allocations": schedule.delta_t if schedule is not None and schedule.prunes else None,
        "warning": (schedule.shortness() if schedule is not None else "") or None,
        "rows_per_step": prepared.rows_per_step,
        "learning_rate": recipe.training.learning_rate,
        "search": prepared.search and prepared.search._asdict(),
        "seed": recipe.seed,
        "output": str(prepared.folder.path),
        "result": _result(prepared),
        **{f"result_bytes{name}": size(end) for name, end in (("", evenly), ("_least", least), ("_most", most))},
    }


def announce(out: Console, prepared: Prepared) -> None:
    """What will happen, in words."""
    facts, recipe = as_json(prepared), prepared.recipe
    classes = recipe.data.label_names
    lines = {
        "Task": f"{recipe.task} into {', '.join(classes)}" if classes else recipe.task,
        "Data": _rows(facts),
        "Model": f"{recipe.model}, {prepared.frozen_parameters:,} parameters, frozen"
        if prepared.frozen_parameters
        else f"{recipe.model}, of which every parameter is trained",
        "Method": _method(prepared),
        "Start": _start(facts["start"]),
        "Trained": _sizes(facts),
        "Steps": f"{prepared.total_steps:,} of {prepared.rows_per_step} rows each, "
        f"learning rate {recipe.training.learning_rate}, seed {recipe.seed}",
        "Search": _search(prepared),
        "Phases": _course(prepared),
        "Beware": facts["warning"] or "",
        "Resuming": _resuming(prepared),
        "Result": f"{facts['result']} in {prepared.folder.path}, {_spread(facts, 'result_bytes', _size)}",
    }
    print_lines(out, {name: text for name, text in lines.items() if text})


def _rows(facts: Mapping[str, Any]) -> str:
    train, held_out = facts["train_rows"], facts["eval_rows"]
    source = f"split {held_out['split']}" if held_out["split"] else held_out["source"]
    held = f"{held_out['count']:,} held-out rows of {source}"
    if held_out["holdout"]:
        same = " or ".join(held_out["together"])
        held += f", the same for every seed, none with the {same} of a training row"
    rows = f"{train['count']:,} training rows of {train['source']}\n{held}"
    if facts["baseline"] is not None:
        metrics = facts["baseline"]["metrics"]
        headline = next((name for name, value in metrics.items() if math.isfinite(value)), "")
        rows += f"\nTo beat: {facts['baseline']['answer']}, {headline} {number(metrics.get(headline))}"
    return rows


def _together(prepared: Prepared) -> list[str]:
    """What is never the same of a held-out row and a training row."""
    data, columns = prepared.recipe.data, prepared.evaluation.column_names
    read = [column for column in (data.text, data.text_pair) if column and column in columns]
    return data.holdout_by or [" and ".join(read or columns)]


def _method(prepared: Prepared) -> str:
    """What becomes of which matrices."""
    method, ranks, schedule = prepared.recipe.method, prepared.initial_ranks, prepared.budget
    if not ranks:
        return method
    first, last = min(ranks.values()), max(ranks.values())
    spread = f"rank {first}" if first == last else f"ranks {first} to {last}"
    if schedule is None or not schedule.prunes:
        return f"{method} on {len(ranks)} matrices, {spread} each"
    end = f"{schedule.target_budget / sum(_costs(prepared)):.3g}"
    end = f"{end} on average" if schedule.unit == "triplets" else f"the parameters of rank {end}"
    return f"{method} on {len(ranks)} matrices, {spread} each at first, {end} at the end"


def _start(start: Mapping[str, Any] | None) -> str:
    """What is looked at before the first step."""
    if start is None:
        return ""
    verb = "start" if " " in start["what"] else "starts"
    return (
        f"{start['what']} {verb} from the loss's gradient on {start['rows']:,} training rows,"
        f" {start['sweeps']} times over: as long as {start['start_steps']:g} steps"
    )


def _sizes(facts: Mapping[str, Any]) -> str:
    """How many parameters that are."""
    sizes = facts["parameters"]
    start, end, head, frozen = sizes["adapter_start"], sizes["adapter_end"], sizes["head"], sizes["frozen"]
    spread = _spread(sizes, "adapter_end", lambda count: f"{count:,}")
    course = f"{start:,} parameters" if start == end else f"{start:,} parameters at first, {spread} at the end"
    share = f" ({end / frozen:.2%} of the model)" if frozen and start else ""
    if not start:
        return f"{head:,} parameters, the output layer"
    return f"{course}{share}" + (f"; {head:,} in the output layer" if head else "")


def _spread(facts: Mapping[str, Any], key: str, said: Callable[[int], str]) -> str:
    """The least and the most in words: a budget does not say which matrices it is spent on."""
    least, most = said(facts[f"{key}_least"]), said(facts[f"{key}_most"])
    return f"about {most}" if least == most else f"{least} to {most}"


def _search(prepared: Prepared) -> str:
    """How a learning rate is found."""
    course = prepared.search
    if course is None:
        return ""
    return (
        f"first for a learning rate: from {course.first:g} in half decades, at most {MOST_TRIALS} trials of "
        f"{course.steps} steps each, judged by the loss on {course.rows:,} training rows left out of them"
    )


def _course(prepared: Prepared) -> str:
    """The budget from step to step."""
    schedule = prepared.budget
    if schedule is None:
        return ""
    unit = "doublets" if "doublets" in prepared.schedule else schedule.unit
    every = "every step" if schedule.delta_t == 1 else f"every {schedule.delta_t} steps"
    words = {
        "fixed": "{before:,} {unit}, nothing is pruned",
        "warm-up": "warm-up, all {before:,} {unit}",
        "pruning": "pruning to {after:,} {unit}, {every}",
        "final": "final, {after:,} {unit}, ranks fixed",
    }
    course = phases(schedule, _done(prepared))
    spans = [
        f"steps {phase.first}-{phase.last}" if phase.first < phase.last else f"step {phase.first}" for phase in course
    ]
    width = max(map(len, spans), default=0)
    return "\n".join(
        f"{span:{width}}  {words[phase.name].format(**phase._asdict(), unit=unit, every=every)}"
        for span, phase in zip(spans, course, strict=True)
    )


def _end(prepared: Prepared) -> tuple[int, int]:
    """The least and the most parameters of the adapter that the budget can leave."""
    start = prepared.trainable_parameters - prepared.head_parameters
    header, schedule = prepared.adapted.header, prepared.budget
    if header is None or schedule is None or schedule.target_budget >= schedule.initial_budget:
        return start, start
    begins = header()
    sizes = sorted(zip(begins["triplet_parameters"], begins["initial_ranks"], strict=True))
    beside = start - sum(map(operator.mul, *zip(*sizes, strict=True)))
    beside -= 0 if "doublets" in prepared.schedule else sum(begins["initial_ranks"])  # λ, which is folded into Q
    budget = schedule.target_budget
    if begins.get("budget_unit") == "parameters":  # filled up to less than a triplet of the largest kind
        return beside + budget - sizes[-1][0] + 1, beside + budget
    return beside + _taken_from(sizes, budget), beside + _taken_from(sizes[::-1], budget)


def _taken_from(sizes: Sequence[tuple[int, int]], count: int) -> int:
    """Parameters of so many triplets, taken from matrices (parameters of a triplet, triplets) in this order."""
    total = 0
    for each, there in sizes:
        taken = min(there, count)
        total, count = total + each * taken, count - taken
    return total


def _costs(prepared: Prepared) -> list[int]:
    """What one triplet of each matrix takes of the budget."""
    header, schedule = prepared.adapted.header, prepared.budget
    assert header is not None and schedule is not None
    each: list[int] = header()["triplet_parameters"]
    return each if schedule.unit == "parameters" else [1] * len(each)


def _spent(prepared: Prepared, ranks: Iterable[int]) -> int:
    """What these ranks take of the budget."""
    return sum(map(operator.mul, ranks, _costs(prepared)))


def _pruned_parameters(prepared: Prepared) -> int:
    """How many parameters the budget takes from the adapter: at least, where it counts them; otherwise if it takes the
    same share of each matrix."""
    header, schedule = prepared.adapted.header, prepared.budget
    if header is None or schedule is None:
        return 0
    if schedule.unit == "parameters":
        return schedule.initial_budget - schedule.target_budget
    begins = header()
    initial: int = sum(map(operator.mul, begins["triplet_parameters"], begins["initial_ranks"]))
    return round(initial * (1 - schedule.target_budget / schedule.initial_budget))


def _resuming(prepared: Prepared) -> str:
    if prepared.mode != "resume":
        return ""
    if prepared.resumed_step is None:
        return "from the beginning: the interrupted run has no complete checkpoint"
    left = prepared.total_steps - prepared.resumed_step
    return f"after step {prepared.resumed_step:,}; {left:,} steps are left"


def _done(prepared: Prepared) -> int:
    return prepared.resumed_step or 0


def _result(prepared: Prepared) -> str:
    if prepared.initial_ranks:
        return "a plain LoRA adapter"
    return "what was trained" if prepared.frozen_parameters else "the whole model"


def _size(count: int) -> str:
    """Bytes for people, to two digits: they are an estimate."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):g} {unit}"
    return f"{float(f'{count / 1e3:.2g}'):g} kB"
