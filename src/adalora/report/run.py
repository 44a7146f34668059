"""What a run's folder says: its recipe, its metrics, and the trace of its budget."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..recipe import Recipe
from ..runs import RunError, RunFolder

_WRITTEN = {"headline", "log", "metrics", "parameters", "ranks", "seconds", "steps", "versions"}
"""Keys of ``metrics.json`` without which nothing can be said of a finished run."""


class Allocation(NamedTuple):
    """One ranking of all triplets; lists are in the order of ``Trace.names``."""

    step: int
    budget: int
    ranks: list[int]
    returned: list[int]  # triplets that live again after the ranking before had pruned them
    orthogonality: float  # mean over P and Q of ‖XXᵀ - I‖_F
    scores: list[list[float]] | None = None  # of the last ranking: S of each matrix's triplets


@dataclass(frozen=True)
class Trace:
    """What ``trace.jsonl`` says: how a budget was divided among matrices, ranking by ranking."""

    names: list[str]
    initial_ranks: list[int]
    triplet_parameters: list[int]
    """Parameters of one triplet of each matrix, as saved."""
    initial_budget: int
    target_budget: int
    schedule: dict[str, Any] | None
    """``total_step``, ``t_init``, ``t_final``, ``delta_t``, ``curve``; None where it was not known yet."""
    importance: str
    policy: str
    unit: str
    """What the budget counts: ``triplets`` or ``parameters``."""
    rank_by: str
    """``score``, or ``score_per_parameter``: then the scores are so, too."""
    allocations: list[Allocation]
    start: dict[str, Any] | None = None
    """What P and Q were found from: ``rows``, ``batches``, ``sweeps``, ``share`` of ‖G‖² held, singular ``values``."""

    @property
    def initial(self) -> dict[str, int]:
        """Rank of each matrix at the start."""
        return dict(zip(self.names, self.initial_ranks, strict=True))

    @property
    def final(self) -> dict[str, int]:
        """Rank of each matrix after the last ranking so far."""
        ranks = self.allocations[-1].ranks if self.allocations else self.initial_ranks
        return dict(zip(self.names, ranks, strict=True))

    @property
    def costs(self) -> list[int]:
        """What one triplet of each matrix takes of the budget."""
        return self.triplet_parameters if self.unit == "parameters" else [1] * len(self.names)

    def spent(self, ranks: Sequence[int]) -> int:
        """What these ranks take of the budget."""
        return sum(map(operator.mul, ranks, self.costs))

    @property
    def average(self) -> str:
        """What the target is for each matrix, in words."""
        rank = f"{self.target_budget / sum(self.costs):.3g}"
        return f"{rank} triplets each on average" if self.unit == "triplets" else f"what LoRA of rank {rank} has"

    @property
    def target(self) -> str:
        """The outcome in words."""
        live, start, matrices = sum(self.final.values()), sum(self.initial.values()), len(self.final)
        return f"{live} of {start} triplets kept, {live / matrices:.3g} on average in {matrices} matrices"


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    folder: RunFolder
    recipe: Recipe
    metrics: dict[str, Any] | None
    """What ``metrics.json`` says; None while the run is not finished."""
    trace: Trace | None
    """None of a method that moves no budget."""

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """What the Trainer logged: ``step``, ``loss``, ``learning_rate``, ``eval_...``. Of a run that is not finished,
        up to its last checkpoint."""
        if self.metrics is not None:
            return list(self.metrics["log"])
        checkpoint = self.folder.last_checkpoint()
        if checkpoint is None:
            return []
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return list(state["log_history"])

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted matrix by its name, as far as is known; empty without ranks."""
        if self.metrics is not None:
            return dict(self.metrics["ranks"])
        return self.trace.final if self.trace else {}


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell runs apart."""
    places = [folder.resolve() for folder in folders]
    for length in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def read_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
        RunError: no run wrote there, or what it wrote cannot be read.
    """
    folder = RunFolder(path)
    recipe = folder.read_recipe()
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8")) if folder.metrics.is_file() else None
    if metrics is not None and not metrics.keys() >= _WRITTEN:
        raise RunError(f"{folder.metrics} is not of this version of adalora: train the run again")
    return Run(folder, recipe, metrics, read_trace(folder.trace) if folder.trace.is_file() else None)


def read_trace(path: Path) -> Trace:
    """A ``trace.jsonl``, also while it grows. A line that a kill cut short is left out.

    Raises:
        RunError: it is not a trace.
    """
    lines = _lines(path)
    try:
        start = next(lines)
        return Trace(
            names=start["names"],
            initial_ranks=start["initial_ranks"],
            triplet_parameters=start["triplet_parameters"],
            initial_budget=start["budget"]["initial"],
            target_budget=start["budget"]["target"],
            schedule=start["schedule"],
            importance=start["importance"],
            policy=start["policy"],
            unit=start.get("budget_unit", "triplets"),
            rank_by=start.get("rank_by", "score"),
            allocations=[Allocation(**{key: line[key] for key in line if key != "type"}) for line in lines],
            start=start.get("start"),
        )
    except (StopIteration, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a trace of this version of adalora: train the run again") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
