"""``adalora train | tune | plan | scan``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import processes
from ..quiet import quieten
from .asked import Asked, takes_recipe
from .options import AsJson, Page, Picture

if TYPE_CHECKING:
    from rich.console import Console

    from ..preparation import Prepared
    from ..recipe import Recipe
    from ..runs import Mode

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")]


@takes_recipe
def train(
    asked: Asked,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model by a RECIPE or flags; with neither, the demo.

    The demo is MiniLM on film reviews. Flags and --set take the place of what the recipe says.
    """
    mode = _mode(overwrite, resume)
    _train(asked.recipe(resume), mode, as_json)


@takes_recipe
def tune(
    asked: Asked,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Search again where the output folder holds a search.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search for a learning rate, and write the recipe that has it.

    Short trials on a part of the training rows, judged by rows left out of them; held-out rows are never looked at.
    The same command goes on after an interruption. `train --lr auto` searches and trains.
    """
    quieten()
    from ..files import to_json
    from ..preparation import prepare
    from ..report import terminal
    from ..tuning import chosen_in_words, search, write_tuned

    out = terminal.console(stderr=as_json)
    out.print("reading data and model ...", style="dim")
    asked.values["training.learning_rate"] = "auto"
    prepared = prepare(asked.recipe(), "new")
    try:
        with prepared.folder.alone():
            if overwrite:
                prepared.folder.clear_search()
            recipe = search(prepared, lambda line: out.print(f"  {line}", soft_wrap=True)).recipe
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on.", err=True)
        raise typer.Exit(130) from None
    written = write_tuned(prepared.folder, recipe)
    out.print(chosen_in_words(recipe), soft_wrap=True)
    out.print(f"Train with it: adalora train {written}", soft_wrap=True)
    if as_json:
        assert recipe.facts is not None and recipe.facts.learning_rate is not None
        found = {"learning_rate": recipe.training.learning_rate, "recipe": str(written)}
        typer.echo(to_json(found | recipe.facts.learning_rate.model_dump()))


@takes_recipe
def plan(asked: Asked, overwrite: Overwrite = False, resume: Resume = False, as_json: AsJson = False) -> None:
    """Say what train would do, and check it; nothing is written.

    All that can be checked before training is checked: output folder, recipe, data, model, budget, schedule.
    """
    mode = _mode(overwrite, resume)
    quieten()
    from .. import announcement
    from ..files import to_json
    from ..preparation import prepare
    from ..report.terminal import console

    prepared = prepare(asked.recipe(resume), mode)
    if as_json:
        typer.echo(to_json(announcement.as_json(prepared)))
        return
    announcement.announce(console(), prepared)


def _mode(overwrite: bool, resume: bool) -> Mode:
    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other: replace the run, or continue it")
    return "overwrite" if overwrite else "resume" if resume else "new"


@takes_recipe
def scan(
    asked: Asked,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="A run whose learned ranks to compare with.", show_default=False),
    ] = None,
    head_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="First train a new output layer alone, N steps.")
    ] = 0,
    picture: Picture = None,
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Say where parameters would help, before training: a rank map by the gradient.

    It looks at the loss's gradient on a few training batches, finds the largest singular values of every matrix,
    and spends the budget on the largest of all. No more than a hint: what it predicts is in decision 016.
    """
    quieten()
    from ..files import to_json
    from ..preparation import prepare
    from ..report import scanned
    from ..report.run import read_run
    from ..report.terminal import console
    from ..scanning import scan as look

    learned = None if run is None else read_run(run)
    values = {**asked.values, "adalora.initialization": "gradient", "method": "adalora"}
    found = look(prepare(asked._replace(values=values).recipe(), "overwrite"), head_steps)
    if picture is not None:
        scanned.draw_scan(found, picture)
        typer.echo(f"Picture: {picture}", err=True)
    if page is not None:
        scanned.write_scan(found, learned, page)
        typer.echo(f"Page: {page}", err=True)
    if as_json:
        typer.echo(to_json(scanned.as_json(found, learned), indent=2))
    else:
        scanned.print_scan(console(), found, learned)


def _train(recipe: Recipe, mode: Mode, as_json: bool) -> None:
    quieten()
    from ..announcement import announce, budget_of
    from ..preparation import prepare
    from ..progress import ShowProgress
    from ..report import terminal
    from ..report.page import write_report
    from ..report.run import read_run
    from ..training import train

    out = terminal.console(stderr=as_json)
    out.quiet = not processes.is_first()
    out.print("reading data and model ...", style="dim")
    prepared = prepare(recipe, mode)
    if prepared.finished is not None:
        out.print(f"The run in {prepared.folder.path} is finished already, and nothing was to be done.")
        if processes.is_first() and not prepared.folder.report.is_file():  # it was killed right before
            write_report(prepared.folder.report, [read_run(prepared.folder.path)])
        _show(out, prepared.folder.path, prepared.finished, as_json)
        return
    announce(out, prepared)
    if prepared.search is not None:
        prepared = _searched(prepared, out)
    progress = ShowProgress(out, prepared.task.metric_names, prepared.task.headline, budget_of(prepared))
    try:
        with redirect_stdout(sys.stderr if as_json else sys.stdout):  # Trackio, for one, prints
            metrics = train(prepared, [progress], report=True)
    except KeyboardInterrupt:
        progress.stop()
        raise _interrupted(prepared) from None
    finally:
        progress.stop()
    if processes.is_first():
        _show(out, prepared.folder.path, metrics, as_json)


def _searched(prepared: Prepared, out: Console) -> Prepared:
    """The same run with a learning rate that a search has found."""
    from ..tuning import chosen_in_words, search_for_run

    try:
        found = search_for_run(prepared, lambda line: out.print(f"  {line}", soft_wrap=True))
    except KeyboardInterrupt:
        raise _interrupted(prepared) from None
    out.print(chosen_in_words(found.recipe), soft_wrap=True)
    return found


def _interrupted(prepared: Prepared) -> typer.Exit:
    if processes.is_first():
        typer.echo(f"Interrupted. Continue with: adalora train --resume --output {prepared.folder.path}", err=True)
    return typer.Exit(130)


def _show(out: Console, folder: Path, metrics: dict[str, Any], as_json: bool) -> None:
    from ..files import to_json
    from ..report.terminal import print_summary

    print_summary(out, folder, metrics)
    if as_json:
        typer.echo(to_json(metrics))
