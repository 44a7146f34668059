"""``adalora evaluate | predict``: what a finished run is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quiet import quieten
from .options import AsJson


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="Other rows: file, folder or hub name.", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="Another split.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure a finished run on its held-out rows, or on others.

    Other rows have the same columns.
    """
    quieten()
    from ..files import to_json
    from ..inference import evaluate_run
    from ..report.terminal import console, metric_table

    found = evaluate_run(run, data, split, batch_size)
    if as_json:
        typer.echo(to_json(found._asdict()))
        return
    out = console()
    out.print(f"{found.rows:,} rows of {found.source}")
    out.print(metric_table(found.metrics, found.baseline, found.baseline_answer, found.method))


def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be given several times.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option("--text-pair", help="The second text to each --text, where there are pairs.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Texts: the lines of a .txt or of standard input (-), or the run's columns of a data file.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Ask a finished run about texts."""
    if bool(text) == (file is not None):
        raise typer.BadParameter("give texts with --text, or a file of them with --file")
    quieten()
    from ..files import to_json
    from ..inference import predict_run, rows_of_file, rows_of_texts, shown
    from ..report.terminal import answer_table, console

    rows = rows_of_texts(run, text or [], text_pair) if file is None else rows_of_file(run, file)
    answers = predict_run(run, rows, batch_size)
    given = shown(run, rows)
    if as_json:
        for row, answer in zip(given, answers, strict=True):
            typer.echo(to_json({**row, **answer}))
        return
    console().print(answer_table(given, answers))
