"""A planted teacher: where the true ranks are known, allocation finds them, and pays."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program() -> Iterator[Any]:
    """The benchmark's module, imported as when it is run."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("planted_ranks")
    patch.undo()
    del sys.modules["planted_ranks"]


def test_allocation_finds_planted_ranks_and_beats_uniform_ones(program: Any) -> None:
    """docs/benchmarks.md has ten seeds; the bounds here leave room for other machines' rounding."""
    allocated = [program.train("adalora", seed, 3e-2, steps=300) for seed in range(2)]
    uniform = [program.train("uniform", seed, 3e-2, steps=300) for seed in range(2)]
    for outcome, even in zip(allocated, uniform, strict=True):
        assert sum(outcome.learned) == sum(outcome.planted) == sum(even.learned) == 16, "the same size"
        assert outcome.correlation > 0.9 and outcome.matched > 0.85
        assert outcome.error < even.error / 2
    assert statistics.median(outcome.error for outcome in allocated) < 0.03


def test_the_table_is_printed(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--seeds", "1", "--choose", "1", "--steps", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(program.METHODS) and all(line.startswith("| ") for line in lines[2:])
