"""What a bench found: one record for each cell, in ``results.jsonl`` of the grid's output folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..files import to_json, write_text

RESULTS = "results.jsonl"

Role = Literal["choose", "report"]
State = Literal["done", "failed"]
Budget = int | str | None
"""Parameters, ``"rank 8"``, or None: the size that the method's own settings give."""


@dataclass(frozen=True)
class Record:
    """One cell that has been run."""

    task: str
    """Its name in the grid."""
    method: str
    """Its name in the grid: a label, under which several settings of one method may appear."""
    budget: Budget
    learning_rate: float
    seed: int
    role: Role
    """``choose``: run to choose the learning rate, and used for nothing else. ``report``: at the chosen rate."""
    state: State
    folder: str
    """The run's folder, relative to the grid's output folder."""
    headline: str
    """The metric to compare methods by."""
    lower_is_better: bool
    """Whether of two scores the lower one is better."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """All metrics on the held-out rows; None where not defined. Empty of a cell that failed."""
    loss: float | None = None
    """Mean loss on the held-out rows, without any regulariser; None where the run did not measure it."""
    collapsed: bool = False
    """Nothing was learned: see :mod:`.collapse`."""
    steps: int | None = None
    """Optimizer steps of the training."""
    start_steps: float = 0.0
    """What was done before the first step, in steps' worth of passes forward and backward."""
    curve: list[list[float | None]] = field(default_factory=list)
    """Pairs of a step and the headline metric there, on the same rows each time."""
    recipe: str = ""
    """Digest of what was asked for, by which a record on another machine is known to be of the same run."""
    parameters: dict[str, int] = field(default_factory=dict)
    """``adapter_start``, ``adapter_saved``, ``head``, ``trainable``."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of each adapted matrix at the end, by the name of its module. Empty without ranks."""
    seconds: float | None = None
    """The cell's process from start to end, on the wall."""
    cpu_seconds: float | None = None
    resumed: bool = False
    """Interrupted and continued: its times are those of the last part alone."""
    peak_bytes: int | None = None
    """Largest resident memory of the process, its libraries included."""
    gpu_peak_bytes: int | None = None
    """Largest memory allocated on the GPU; None without one."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that it was run with, this one included."""
    failure: str | None = None
    """Why it failed, in a line."""

    @property
    def score(self) -> float:
        """The headline metric; nan of a cell that failed, or where the metric is not defined."""
        value = self.metrics.get(self.headline)
        return math.nan if value is None else value

    @property
    def group(self) -> tuple[str, str, Budget]:
        """Cells that differ in nothing but learning rate and seed."""
        return self.task, self.method, self.budget


def write_records(output: Path, records: Iterable[Record]) -> None:
    """Write ``results.jsonl`` of a grid's output folder, whole or not at all."""
    write_text(output / RESULTS, "".join(to_json(asdict(record)) + "\n" for record in records))
