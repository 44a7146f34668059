"""What the allocator did, one JSON object a line, readable while training runs.

The first line has ``type: start`` (names and initial ranks of the matrices, budgets, schedule); each allocation adds
one with ``type: allocation`` (step, budget, the rank of every matrix in the order of the names, orthogonality error).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple


class Allocation(NamedTuple):
    """One ranking of all triplets."""

    step: int
    budget: int
    ranks: list[int]  # live triplets of each matrix, in the allocator's order
    orthogonality: float  # mean over P and Q of ‖XXᵀ - I‖_F


class TraceFile:
    """Appends to ``path``; every line is flushed, so a killed run leaves whole lines."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def start(self, header: dict[str, Any], after_step: int = 0) -> None:
        """Begin the file, or keep what an interrupted run wrote up to and including ``after_step``."""
        kept = [line for line in self._lines() if line.get("type") == "allocation" and line["step"] <= after_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text("".join(json.dumps(line) + "\n" for line in [{"type": "start", **header}, *kept]))
        beside.replace(self.path)

    def append(self, allocation: Allocation) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"type": "allocation", **allocation._asdict()}) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the line that a kill cut short
                break
        return lines
