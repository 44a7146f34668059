"""``adalora bench``: every cell of a grid is run once, whatever happens to the others, and each result is written down
as soon as it is there."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..files import HeldError, holding
from ..report.terminal import duration
from .cells import CellFolder, Job, check_asked, clear, digest_of, failed_otherwise, job_of, record_of, settle
from .choose import cells_known, lost_groups
from .display import Display
from .errors import BenchError
from .grid import Cell, Grid, Group, read_grid
from .pools import LocalPool, Pool
from .records import Record, write_records
from .store import read_store, write_store

_POLL = 5.0  # seconds between two looks at what runs


class Bench(NamedTuple):
    """What a bench has come to."""

    grid: Grid
    records: list[Record]
    lost: list[Group]
    """Groups of which no learning rate gave a result."""


def run_bench(
    path: Path, workers: int | None = None, ray: str | None = None, retry: bool = False, console: Console | None = None
) -> Bench:
    """Run the cells of a grid that are not finished; with all of them finished, only read them.

    Args:
        workers: how many cells at a time: on this machine (default: 1), or at most on the cluster (default: all that
            fit).
        ray: address of a Ray cluster (``auto``, ``host:port``, ``ray://host:port``), or ``local`` to start one here.
        retry: run broken cells again, from the beginning.

    Raises:
        RecipeError: a fault of the grid; nothing has been run then.
        BenchError: another bench writes to its folder, or a cell there was run by another recipe.
        KeyboardInterrupt: interrupted, or told to end; every process has been stopped then.
    """
    grid = read_grid(path)
    with _alone_in(grid.folder):
        _check_folders(grid)
        stored = _stored(grid)
        records: dict[str, Record] = {}
        _take_in(grid, records, stored, retry)
        if _waiting(grid, records):
            pool = _pool(grid, workers, ray)
            with _ended_by_signals(), Display(grid, console or Console(), records) as display:
                display.outdated(grid.records, _outdated(grid, stored))
                try:
                    _run_all(grid, pool, records, stored, retry, display)
                finally:
                    pool.stop()
        return _written(grid, records, stored)


def collect(grid: Grid) -> Bench:
    """What the grid's folder holds, finished or not; writes nothing."""
    records: dict[str, Record] = {}
    _take_in(grid, records, _stored(grid), retry=False)
    return Bench(grid, _in_order(grid, records), lost_groups(grid, records))


def _pool(grid: Grid, workers: int | None, ray: str | None) -> Pool:
    if ray is None:
        return LocalPool(workers or 1, grid.resources)
    from .cluster import RayPool  # needs a package of its own

    return RayPool(ray, workers, grid.resources)


def _run_all(
    grid: Grid, pool: Pool, records: dict[str, Record], stored: Mapping[str, Record], retry: bool, display: Display
) -> None:
    """Start cells while there is room, take in those that have ended; ``records`` gets an entry for each."""
    running: dict[str, Cell] = {}
    started: dict[str, float] = {}
    while True:
        waiting = [cell for cell in _waiting(grid, records) if cell.folder not in running]
        for cell in waiting[: max(0, pool.capacity() - len(running))]:
            pool.start(cell.folder, _job(grid, cell, pool.threads))
            running[cell.folder], started[cell.folder] = cell, time.monotonic()
        if not running and not waiting:
            return
        display.started(running.values(), pool.capacity())
        if not running:  # a cluster that has lost its nodes, and may get others
            time.sleep(_POLL)
        for key, ending in (pool.ended(_POLL) if running else {}).items():
            cell = running.pop(key)
            settle(cell, grid.folder, _too_long(grid, time.monotonic() - started[key]) or ending)
            record = record_of(cell, grid.folder)
            assert record is not None  # settled
            records[key] = record
            _take_in(grid, records, stored, retry, running)
            _written(grid, records, stored)
            display.finished(cell, record)


def _waiting(grid: Grid, records: dict[str, Record]) -> list[Cell]:
    return [cell for cell in cells_known(grid, records) if cell.folder not in records]


def _job(grid: Grid, cell: Cell, threads: int) -> Job:
    """Continues an interrupted run, and begins any other."""
    folder = CellFolder(grid.folder / cell.folder)
    resume = folder.condition == "interrupted"
    if not resume:
        clear(folder)
    return job_of(cell, resume, threads, grid.resources.minutes)


def _too_long(grid: Grid, seconds: float) -> str | None:
    minutes = grid.resources.minutes
    if minutes is None or seconds < 60 * minutes:
        return None
    return f"it was stopped after {duration(60 * minutes)}, the limit of resources.minutes"


def _check_folders(grid: Grid) -> None:
    """BenchError when some folder holds the run of another recipe, be it one that is not looked at before hours."""

    def was_run(folder: str) -> bool:
        return CellFolder(grid.folder / folder).condition in {"done", "interrupted"}

    for cell in grid.possible_cells(was_run):
        check_asked(cell, CellFolder(grid.folder / cell.folder))


def _stored(grid: Grid) -> dict[str, Record]:
    """The records of the grid's file, finished here or elsewhere."""
    return {} if grid.records is None else read_store(Path(grid.records).expanduser())


def _outdated(grid: Grid, stored: Mapping[str, Record]) -> int:
    """How many of the file's records are of cells that the grid could ask for, but by another recipe."""
    cells = grid.possible_cells(lambda folder: folder in stored)
    return sum(stored[cell.folder].recipe != digest_of(cell) for cell in cells)


def _take_in(
    grid: Grid,
    records: dict[str, Record],
    stored: Mapping[str, Record],
    retry: bool,
    running: Collection[str] = (),
) -> None:
    """Add the records of cells that need not be run, unless they are ``running``: what a folder here says, or else
    ``stored`` of the same recipe. Which cells there are depends on
    records: once a rate is chosen, its cells may have been run before."""
    looked_at = {*records, *running}
    while cells := [cell for cell in cells_known(grid, records) if cell.folder not in looked_at]:
        for cell in cells:
            looked_at.add(cell.folder)
            record = record_of(cell, grid.folder)
            if record is None:
                found = stored.get(cell.folder)
                if found and found.recipe == digest_of(cell) and (found.state == "done" or not retry):
                    records[cell.folder] = replace(found, role=cell.role)
                continue
            if record.state == "done" or not (retry or failed_otherwise(cell, grid.folder)):
                records[cell.folder] = record


def _in_order(grid: Grid, records: dict[str, Record]) -> list[Record]:
    """The records that the grid asks for. A cell at a rate that is no longer the chosen one is not among them."""
    return [records[cell.folder] for cell in cells_known(grid, records) if cell.folder in records]


def _written(grid: Grid, records: dict[str, Record], stored: Mapping[str, Record]) -> Bench:
    bench = Bench(grid, _in_order(grid, records), lost_groups(grid, records))
    write_records(grid.folder, bench.records)
    if grid.records is not None:
        write_store(grid, Path(grid.records).expanduser(), bench.records, stored)
    return bench


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold the folder's lock; BenchError when another process does."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with holding(output / ".lock"):
            yield
    except HeldError as error:
        raise BenchError(
            f"another bench writes to {output} ({error}): wait for it, or give the grid another `output`"
        ) from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the bench as an interrupt from the keyboard does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
