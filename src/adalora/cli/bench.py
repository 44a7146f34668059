"""``adalora bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quiet import quieten
from .options import AsJson


def bench(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Tasks, methods, budgets, learning rates, seeds.")],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Cells at a time. Default: one here, all that fit on a cluster.", show_default=False),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on this Ray cluster; local: start one here.", show_default=False),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run broken cells again, from the beginning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods on tasks at equal parameters.

    Writes tables and pictures. One cell is one process and one folder. Finished cells are never run again, so the same
    command goes on after an interruption, and draws the tables anew.
    """
    quieten()
    from ..bench.grid import read_grid
    from ..bench.pages import write_results
    from ..bench.runner import collect, run_bench
    from ..report.terminal import console

    out = console(stderr=as_json)
    try:
        found = run_bench(grid, workers, ray, retry, out)
    except KeyboardInterrupt:
        found = collect(read_grid(grid))
        typer.echo(f"Interrupted. The same command goes on; so far: {write_results(*found[:2])}", err=True)
        raise typer.Exit(130) from None
    page = write_results(found.grid, found.records)
    out.print(f"Tables and pictures: {page}", soft_wrap=True)
    if as_json:
        typer.echo(page.with_suffix(".json").read_text(encoding="utf-8"))
    failed = sum(record.state == "failed" for record in found.records)
    if failed:
        typer.echo(f"{failed} cells broke (failure.json in their folders says why): --retry runs them again", err=True)
        raise typer.Exit(1)
