"""The command line: ``adalora train | evaluate | predict | bench | export | convert``.

Everything heavy is imported inside the commands, so that help is quick and needs no extra. Every mistake of a user
ends in one message on stderr and exit code 2, a failure at run time in exit code 1; ADALORA_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit("Error: the command line needs the train extra: pip install 'adalora[train]'")

from . import __version__
from .core.errors import AdaLoraError
from .quiet import quieten

if TYPE_CHECKING:
    from rich.console import Console

    from .recipe import Recipe
    from .runs import Mode
    from .serving import Exported
    from .training import Prepared

_TRAIN = "accelerate datasets matplotlib pydantic rich rouge_score sacrebleu scipy seqeval sklearn yaml"
_EXTRA_OF = {**dict.fromkeys(_TRAIN.split(), "train"), "ray": "ray"}

app = typer.Typer(
    name="adalora",
    help="Fine-tune under a parameter budget with AdaLoRA; what comes out is an ordinary LoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag(key: str, *names: str, what: str) -> Any:
    return typer.Option(*names, help=f"{what} ({key})", show_default=False)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"adalora {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe, a YAML file. Without one: the demo.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe, such as adalora.tfinal=0.2."),
    ] = None,
    model: Annotated[str | None, _flag("model", "--model", what="Folder or hub name of the model.")] = None,
    task: Annotated[str | None, _flag("task", "--task", what="What is learned: classification, glue/mrpc, ...")] = None,
    method: Annotated[str | None, _flag("method", "--method", what="How: adalora, lora, full, ...")] = None,
    budget: Annotated[
        str | None, _flag("budget", "--budget", what="Adapter parameters to end with, or as `rank 8`.")
    ] = None,
    train_data: Annotated[
        str | None, _flag("data.train", "--train", what="Training rows: file, folder or hub name.")
    ] = None,
    eval_data: Annotated[str | None, _flag("data.eval", "--eval", what="Held-out rows, as --train.")] = None,
    text: Annotated[str | None, _flag("data.text", "--text", what="Column with the text.")] = None,
    text_pair: Annotated[
        str | None, _flag("data.text_pair", "--text-pair", what="Column with the second text.")
    ] = None,
    label: Annotated[str | None, _flag("data.label", "--label", what="Column with the class or number.")] = None,
    max_length: Annotated[int | None, _flag("data.max_length", "--max-length", what="Tokens kept of a row.")] = None,
    target_r: Annotated[int | None, _flag("adalora.target_r", "--target-r", what="Average rank at the end.")] = None,
    init_r: Annotated[int | None, _flag("adalora.init_r", "--init-r", what="Rank at the start.")] = None,
    epochs: Annotated[
        float | None, _flag("training.num_train_epochs", "--epochs", what="Passes over the training rows.")
    ] = None,
    lr: Annotated[float | None, _flag("training.learning_rate", "--lr", what="Highest learning rate.")] = None,
    batch_size: Annotated[
        int | None, _flag("training.per_device_train_batch_size", "--batch-size", what="Rows in a batch.")
    ] = None,
    output: Annotated[str | None, _flag("output", "--output", "-o", what="Folder of the run.")] = None,
    seed: Annotated[int | None, _flag("seed", "--seed", what="Seed of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")
    ] = False,
) -> None:
    """Fine-tune a model: by a RECIPE, by flags, or, with neither, the demo (MiniLM on film reviews).

    Flags and --set take the place of what the recipe says.
    """
    flags = {
        "model": model,
        "task": task,
        "method": method,
        "budget": int(budget) if budget and budget.isdecimal() else budget,
        "data.train": train_data,
        "data.eval": eval_data,
        "data.text": text,
        "data.text_pair": text_pair,
        "data.label": label,
        "data.max_length": max_length,
        "adalora.target_r": target_r,
        "adalora.init_r": init_r,
        "training.num_train_epochs": epochs,
        "training.learning_rate": lr,
        "training.per_device_train_batch_size": batch_size,
        "output": output,
        "seed": seed,
    }
    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other: replace the run, or continue it")
    given = {key: value for key, value in flags.items() if value is not None}
    mode: Mode = "overwrite" if overwrite else "resume" if resume else "new"
    _train(_recipe(recipe, given, assignments or [], resume), mode)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="Other rows: file, folder or hub name.", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="Another split.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a finished run on its held-out rows, or on others with the same columns."""
    quieten()
    from .files import to_json
    from .inference import evaluate_run
    from .report.terminal import console, metric_table

    found = evaluate_run(run, data, split, batch_size)
    if as_json:
        typer.echo(to_json(found._asdict()))
        return
    out = console()
    out.print(f"{found.rows:,} rows of {found.source}")
    out.print(metric_table(found.metrics, found.baseline, found.baseline_answer, found.method))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be given several times.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option("--text-pair", help="The second text to each --text, where there are pairs.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Texts: the lines of a .txt, or the run's columns of a data file.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Ask a finished run about texts."""
    if bool(text) == (file is not None):
        raise typer.BadParameter("give texts with --text, or a file of them with --file")
    quieten()
    from .files import to_json
    from .inference import predict_run, rows_of_file, rows_of_texts, shown
    from .report.terminal import answer_table, console

    rows = rows_of_texts(run, text or [], text_pair) if file is None else rows_of_file(run, file)
    answers = predict_run(run, rows, batch_size)
    given = shown(run, rows)
    if as_json:
        for row, answer in zip(given, answers, strict=True):
            typer.echo(to_json({**row, **answer}))
        return
    console().print(answer_table(given, answers))


@app.command()
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
) -> None:
    """Compare methods on tasks at equal parameters, by a GRID, and write tables and pictures.

    One cell is one process and one folder. Finished cells are never run again, so the same command goes on after an
    interruption, and draws the tables anew.
    """
    quieten()
    from .bench.grid import read_grid
    from .bench.pages import write_results
    from .bench.runner import collect, run_bench
    from .report.terminal import console

    out = console()
    try:
        found = run_bench(grid, workers, ray, retry, out)
    except KeyboardInterrupt:
        found = collect(read_grid(grid))
        typer.echo(f"Interrupted. The same command goes on; so far: {write_results(*found[:2])}", err=True)
        raise typer.Exit(130) from None
    out.print(f"Tables and pictures: {write_results(found.grid, found.records)}", soft_wrap=True)
    failed = sum(record.state == "failed" for record in found.records)
    if failed:
        typer.echo(f"{failed} cells broke (failure.json in their folders says why): --retry runs them again", err=True)
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run, a checkpoint, or any LoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="lora, merged, gguf-ready or diffusers.")
    ] = "lora",
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, float16 or bfloat16.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="K", help="Keep the best triplets, K a matrix on average.", show_default=False)
    ] = None,
    pad: Annotated[bool, typer.Option("--max-rank-pad", help="Bring every module to the largest rank.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the base model is.", show_default=False)
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Part of a Diffusers pipeline: unet, transformer, ...", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
) -> None:
    """Write an adapter in the form that an engine reads.

    lora: PEFT, vLLM and others. merged: one model for from_pretrained. gguf-ready: for llama.cpp's
    convert_lora_to_gguf.py. diffusers: for load_lora_weights of a pipeline.
    """
    quieten()
    from . import serving

    found = serving.export(
        source, out, form, rank=rank, pad=pad, dtype=dtype, base=base, component=component, overwrite=overwrite
    )
    _show_exported(found)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of PEFT's AdaLoRA.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
) -> None:
    """Make plain LoRA of a checkpoint of PEFT's AdaLoRA (peft_type ADALORA), of any version."""
    quieten()
    from . import serving

    _show_exported(serving.convert(source, out, overwrite=overwrite))


def main() -> None:
    """Run the command line; every deliberate error becomes one line."""
    try:
        app()
    except AdaLoraError as error:
        _fail(str(error), 1 if isinstance(error, RuntimeError) else 2)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        advice = f"pip install 'adalora[{extra}]'" if extra else f"pip install {error.name}"
        _fail(f"this needs the package {error.name}: {advice}", 2)
    except Exception as error:  # whatever it is, a user reads one line; a developer asks for more
        _fail(f"{type(error).__name__}: {error} (ADALORA_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("ADALORA_DEBUG", "") not in {"", "0"}:
        traceback.print_exc()
    typer.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _show_exported(found: Exported) -> None:
    ranks = found.ranks.values()
    spread = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    padding = "" if sum(ranks) == found.triplets else ", padded with zeros"
    typer.echo(f"{len(ranks)} modules, {spread}, {found.triplets} triplets{padding}")
    for name, size in found.files.items():
        typer.echo(f"{found.folder / name}  {size:,} bytes")


def _recipe(file: Path | None, flags: dict[str, Any], assignments: list[str], resume: bool) -> Recipe:
    """The recipe that the command line asks for: a file's, the interrupted run's own, or the demo's, changed by flags
    and --set."""
    from . import recipe as recipes
    from .runs import RunFolder

    values = {**flags, **recipes.assigned(assignments)}
    if file is not None:
        base, source = recipes.read_raw(file), str(file)
    elif resume:
        values.setdefault("output", recipes.demo_raw()["output"])
        folder = RunFolder(Path(str(values["output"])).expanduser())
        folder.check_target("resume")
        base, source = recipes.read_raw(folder.recipe), str(folder.recipe)
    elif "data.train" in values:
        base, source = {"model": recipes.DEMO_MODEL}, "command line"
    else:
        base, source = recipes.demo_raw(), "command line"
    return recipes.validate(recipes.with_values(base, values), source)


def _train(recipe: Recipe, mode: Mode) -> None:
    quieten()
    from .progress import ShowProgress
    from .report import terminal
    from .training import prepare, train

    out = terminal.console()
    out.print("reading data and model ...", style="dim")
    prepared = prepare(recipe, mode)
    if prepared.finished is not None:
        out.print(f"The run in {prepared.folder.path} is finished already, and nothing was to be done.")
        terminal.print_summary(out, prepared.folder.path, prepared.finished)
        return
    _announce(out, prepared)
    progress = ShowProgress(out, prepared.task.metric_names)
    try:
        metrics = train(prepared, [progress])
    except KeyboardInterrupt:
        progress.stop()
        typer.echo(f"Interrupted. Continue with: adalora train --resume --output {prepared.folder.path}", err=True)
        raise typer.Exit(130) from None
    finally:
        progress.stop()
    terminal.print_summary(out, prepared.folder.path, metrics)


def _announce(out: Console, prepared: Prepared) -> None:
    """What will happen, in words."""
    from .report import terminal

    recipe, data, training = prepared.recipe, prepared.recipe.data, prepared.recipe.training
    held_out = f"{data.eval or data.train}" if data.eval else f"{data.eval_split} of {data.train}"
    rows = f"{len(prepared.train):,} training rows from {data.train}\n"
    rows += f"{len(prepared.evaluation):,} held-out rows from {held_out}"
    if prepared.baseline is not None:
        answer, baseline = prepared.baseline
        headline = next((name for name, value in baseline.items() if math.isfinite(value)), "")
        rows += f"\nTo beat: {answer}, {headline} {terminal.number(baseline.get(headline))}"
    lines = {
        "Task": f"{recipe.task}" + (f" into {', '.join(data.label_names)}" if data.label_names else ""),
        "Data": rows,
        "Model": f"{recipe.model}, {prepared.frozen_parameters:,} frozen parameters",
        "Method": _method(prepared),
        "Schedule": prepared.schedule,
        "Training": f"{prepared.total_steps:,} steps of {prepared.rows_per_step} rows, learning rate "
        f"{training.learning_rate:g}, seed {recipe.seed}",
        "Output": str(prepared.folder.path),
    }
    lines = {name: text for name, text in lines.items() if text}
    if prepared.mode == "resume":
        lines["Resuming"] = (
            f"after step {prepared.resumed_step}"
            if prepared.checkpoint
            else "from the beginning: the interrupted run has no complete checkpoint"
        )
    terminal.print_lines(out, lines)


def _method(prepared: Prepared) -> str:
    """What is trained, and how many parameters that are."""
    trainable, frozen = prepared.trainable_parameters, prepared.frozen_parameters
    size = f"{trainable:,} trainable parameters ({trainable / (trainable + frozen):.2%})"
    ranks = prepared.initial_ranks
    if not ranks:
        return f"{prepared.recipe.method}; {size}"
    first, last = min(ranks.values()), max(ranks.values())
    spread = f"rank {first} each" if first == last else f"ranks {first} to {last}"
    if not prepared.schedule:
        return f"{prepared.recipe.method}: {len(ranks)} matrices, {spread}; {size}"
    end = prepared.recipe.adalora.target_r
    return (
        f"{prepared.recipe.method}: {len(ranks)} matrices, {spread} to begin with, {end} on average at the end; {size}"
    )
