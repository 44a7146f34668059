"""``adalora inspect | compare``: what adapters changed, and what runs differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quiet import quieten
from .options import AsJson, Page, Picture


def inspect(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run, a checkpoint of one, any LoRA by PEFT, or PEFT's AdaLoRA.")
    ],
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="What an average rank of K would keep.", show_default=False),
    ] = None,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter changes, matrix by matrix.

    Ranks, parameters, norms, singular values, energy at lower ranks. The base model is not needed.
    """
    quieten()
    from ..files import to_json
    from ..inspection import inspect as read
    from ..report.inspected import draw_adapter, print_adapter
    from ..report.terminal import console

    adapter = read(source)
    if picture is not None:
        draw_adapter(adapter, picture)
        typer.echo(f"Picture: {picture}", err=True)
    if as_json:
        cut = {} if rank is None else {"at_rank": adapter.at(rank)}
        typer.echo(to_json(adapter.as_json() | cut, indent=2))
    else:
        print_adapter(console(), adapter, rank)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of two runs or more.")],
    picture: Picture = None,
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side.

    What came of them, what their recipes differ in, where each put its ranks. Runs may be of
    any method; what cannot be compared says why.
    """
    quieten()
    from ..files import to_json
    from ..report.compare import compare as read
    from ..report.compared import draw_comparison, print_comparison
    from ..report.terminal import console

    found = read(folders)
    if picture is not None:
        draw_comparison(found, picture)
        typer.echo(f"Picture: {picture}", err=True)
    if page is not None:
        from ..report.compared_page import write_comparison

        write_comparison(found, page)
        typer.echo(f"Page: {page}", err=True)
    if as_json:
        typer.echo(to_json(found.as_json(), indent=2))
    else:
        print_comparison(console(), found)
