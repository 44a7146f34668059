"""``adalora report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quiet import quieten


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of runs, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: report.html, in DIR if there is one.", show_default=False),
    ] = None,
    directions: Annotated[
        bool, typer.Option(help="Analyse magnitude and direction of the weights, where checkpoints allow it.")
    ] = True,
) -> None:
    """Draw runs as one page that needs no network.

    Every run of `train` writes the page of its own folder; this draws it anew, adds what takes the
    model's weights, and puts several runs into one page.
    """
    quieten()
    from ..directions import write_directions
    from ..report.page import write_report
    from ..report.run import read_run

    found = [read_run(folder) for folder in runs]
    if directions:
        for run in found:
            outcome = write_directions(run)
            if outcome.path is None:
                typer.echo(f"{run.folder.path}: no magnitudes and directions: {outcome.reason}", err=True)
    page = output or (found[0].folder.report if len(found) == 1 else Path("report.html"))
    typer.echo(write_report(page, found))
