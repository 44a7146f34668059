"""What the allocator did, one JSON object a line, readable while training runs.

The first line has ``type: start`` (names, initial ranks and sizes of the matrices, budgets, schedule); each allocation
adds one with ``type: allocation``, whose lists are in the order of the names (see :class:`Allocation`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


class Allocation(NamedTuple):
    """One ranking of all triplets."""

    step: int
    budget: int
    ranks: list[int]  # live triplets of each matrix, in the allocator's order
    returned: list[int]  # of each matrix, how many of them the allocation before had pruned
    orthogonality: float  # mean over P and Q of ‖XXᵀ - I‖_F
    scores: list[list[float]] | None = None  # of the last allocation: S of each matrix's triplets, to four digits

    @staticmethod
    def rounded(scores: Sequence[Tensor]) -> list[list[float]]:
        """Scores as a trace holds them."""
        return [[float(f"{score:.4g}") for score in of_matrix.tolist()] for of_matrix in scores]


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
            told = {key: value for key, value in allocation._asdict().items() if value is not None}
            file.write(json.dumps({"type": "allocation", **told}) + "\n")

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
