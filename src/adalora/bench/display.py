"""A bench as a person follows it: a line for each finished cell, and on a terminal a bar below them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from ..report.terminal import duration, number
from .choose import cells_known, lost_groups
from .grid import Cell, Grid, Group
from .records import Record


class Display:
    """Prints to ``console`` what happens to the cells of ``grid``.

    Args:
        records: by folder, and filled by the bench as it goes on; at first those that were finished before.
    """

    def __init__(self, grid: Grid, console: Console, records: Mapping[str, Record]) -> None:
        self._grid = grid
        self._console = console
        self._records = records
        self._running: Collection[Cell] = ()
        self._workers = 1
        self._bar = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, completed=len(records), status="")

    def __enter__(self) -> Display:
        before = f", of which {len(self._records)} are finished" if self._records else ""
        self._say(f"{self._grid.name}: {self._total} cells{before}. Results in {self._grid.output}")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def outdated(self, file: str | None, count: int) -> None:
        """Say how many records of the grid's file are of no use today."""
        if count:
            self._say(f"{count} records in {file} are of other recipes than the grid asks for now: they are run again")

    def started(self, running: Collection[Cell], workers: int) -> None:
        """Show which cells run now, of so many that could."""
        self._running, self._workers = running, workers
        self._update()

    def finished(self, cell: Cell, record: Record) -> None:
        """Say how a cell ended."""
        if record.state == "done":
            outcome = f"{record.headline} {number(record.score)} in {duration(record.seconds or 0)}"
        else:
            outcome = f"failed: {record.failure}"
        line = f"[{len(self._records)} of {self._total}] {cell}: {outcome}"
        if not self._console.is_terminal:
            line += f"; {self._counts()}"
        self._say(line, style="red" if record.state == "failed" else None)
        self._update()

    def _update(self) -> None:
        running = "; ".join(str(cell) for cell in self._running)
        self._bar.update(
            self._task, total=self._total, completed=len(self._records), status=f"{self._counts()}. Running: {running}"
        )

    @property
    def _total(self) -> int:
        """More than at first once rates are added."""
        return len(self._records) + len(_left(self._grid, self._records))

    def _counts(self) -> str:
        failed = sum(record.state == "failed" for record in self._records.values())
        left = _left(self._grid, self._records)
        seconds = time_left(left, list(self._records.values()), self._workers)
        parts = [f"{len(self._records) - failed} done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{len(left)} left"] if left else []
        parts += [f"about {duration(max(60 * round(seconds / 60), 60))}"] if seconds else []  # no seconds in a guess
        return ", ".join(parts)

    def _say(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def time_left(left: Collection[Group], records: Collection[Record], workers: int) -> float | None:
    """Seconds that a cell for each of ``left`` will take, from what others of the same task and method took, else of
    the same task, else any. None where none has finished yet."""
    took: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        if record.seconds is not None:
            for key in ((record.task, record.method), (record.task,), ()):
                took.setdefault(key, []).append(record.seconds)
    if not took:
        return None
    total = 0.0
    for task, method, _ in left:
        times = took.get((task, method)) or took.get((task,)) or took[()]
        total += sum(times) / len(times)
    return total / max(1, workers)


def _left(grid: Grid, records: Mapping[str, Record]) -> list[Group]:
    """The group of each cell that has not ended, those at a rate that is still to be chosen included."""
    known = cells_known(grid, records)
    left = [cell.group for cell in known if cell.folder not in records]
    settled = {cell.group for cell in known if cell.role == "report"} | set(lost_groups(grid, records))
    return left + [group for group in grid.groups if group not in settled for _ in grid.seeds.report]
