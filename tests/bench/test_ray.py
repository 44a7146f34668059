"""Cells on a Ray cluster: one is started here, and its workers train."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adalora.bench.errors import BenchError

from .test_grid import changed
from .test_runner import once, pid_of, run, times

ray = pytest.importorskip("ray")

Write = Callable[[Mapping[str, Any]], Path]


def test_a_grid_on_a_local_cluster(tiny_grid: dict[str, Any], write: Write) -> None:
    """A worker that is killed is recorded as any broken cell; the others finish, each in a process of its own; what
    Ray has finished, the local runner takes over."""
    methods = {"killed": {"method": "head", "training": {"max_steps": 100_000}}, "head": None}
    grid = changed(tiny_grid, methods=methods, budgets=[], learning_rates=[1e-3])
    path = write(grid)
    victim = path.parent / "out/cells/reviews/killed/no-budget/lr-0.001/seed-1"
    with once(lambda: pid_of(victim), lambda pid: os.kill(pid, signal.SIGKILL)):
        bench, _ = run(path, ray="local")
    killed, head = bench.records
    assert not ray.is_initialized()
    assert killed.state == "failed" and str(killed.failure).startswith("its Ray worker was lost: ")
    assert head.state == "done" and head.peak_bytes
    assert pid_of(path.parent / "out" / head.folder) not in {pid_of(victim), os.getpid()}
    assert "step 4 of 4" in (path.parent / "out" / head.folder / "log.txt").read_text()

    before = times(path.parent / "out")
    again, _ = run(path)
    assert again.records == bench.records and times(path.parent / "out") == before


def test_no_such_cluster(tiny_grid: dict[str, Any], write: Write) -> None:
    with pytest.raises(BenchError, match="no Ray cluster at localhost:1"):
        run(write(tiny_grid), ray="localhost:1")


def test_a_cluster_without_what_a_cell_wants(tiny_grid: dict[str, Any], write: Write) -> None:
    with pytest.raises(BenchError, match="no node of the Ray cluster at local has what a cell wants"):
        run(write(changed(tiny_grid, resources={"cpus": 10_000})), ray="local")
