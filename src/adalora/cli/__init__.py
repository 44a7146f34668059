"""The command line, ``adalora``.

Everything heavy is imported inside the commands, so that help is quick and needs no extra. Exit codes: 0 done; 1 a
failure at run time; 2 a mistake of the user; 130 interrupted. An error is one message on stderr; ADALORA_DEBUG=1 shows
where it came from.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("Error: the command line needs the train extra: pip install 'adalora[train]'")

from .. import __version__, processes
from ..core.errors import AdaLoraError
from ..quiet import visible
from . import adapters, bench, look, report, train, use

_TRAIN = "accelerate datasets matplotlib optuna plotly pydantic rich rouge_score sacrebleu scipy seqeval sklearn yaml"
_EXTRA_OF = {**dict.fromkeys(_TRAIN.split(), "train"), "ray": "ray"}

_LONGEST = 2000  # characters of an error

_COMMANDS: list[tuple[Callable[..., Any], list[str]]] = [
    (
        train.train,
        [
            "adalora train",
            "adalora train recipes/stsb.yaml --set seed=1 -o runs/stsb-1",
            "adalora train --model roberta-base --train train.csv --eval dev.csv --text review --label stars",
        ],
    ),
    (
        train.tune,
        ["adalora tune recipes/stsb.yaml", "adalora tune --train train.csv --holdout 0.1 --method lora -o runs/mine"],
    ),
    (train.plan, ["adalora plan recipes/stsb.yaml --set adalora.target_r=2"]),
    (train.scan, ["adalora scan recipes/stsb.yaml --run runs/stsb", "adalora scan --head-steps 50 --png before.png"]),
    (use.evaluate, ["adalora evaluate runs/stsb", "adalora evaluate runs/stsb --data other.csv --json"]),
    (
        use.predict,
        [
            'adalora predict runs/rotten_tomatoes --text "A quiet triumph."',
            "adalora predict runs/stsb --file pairs.csv --json > answers.jsonl",
        ],
    ),
    (
        report.report,
        ["adalora report runs/stsb", "adalora report runs/adalora runs/lora -o both.html"],
    ),
    (look.inspect, ["adalora inspect runs/rotten_tomatoes --rank 2", "adalora inspect some_lora --png updates.png"]),
    (
        look.compare,
        ["adalora compare runs/seed-0 runs/seed-1", "adalora compare runs/adalora runs/lora --png compared.png"],
    ),
    (bench.bench, ["adalora bench recipes/bench/smoke.yaml --workers 2"]),
    (
        adapters.export,
        ["adalora export runs/stsb served --format merged", "adalora export runs/stsb smaller --rank 2"],
    ),
    (adapters.convert, ["adalora convert old_adalora plain"]),
]
"""In the order of the help, each with examples of its use."""

app = typer.Typer(
    name="adalora",
    help="Fine-tune under a parameter budget with AdaLoRA; what comes out is an ordinary LoRA adapter.",
    epilog="Exit codes: 0 done, 1 a failure at run time, 2 a mistake in what was asked, 130 interrupted. "
    "ADALORA_DEBUG=1 shows where an error came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, examples in _COMMANDS:
    app.command(epilog="\b\n" + "\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]))(command)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"adalora {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every deliberate error becomes one line."""
    try:
        app(prog_name="adalora")  # however it was started, so that completion and help always name it
    except AdaLoraError as error:
        _fail(str(error), 1 if isinstance(error, RuntimeError) else 2)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        advice = f"pip install 'adalora[{extra}]'" if extra else f"pip install {error.name}"
        _fail(f"this needs the package {error.name}: {advice}", 2)
    except OSError as error:
        from ..files import unwritable

        reason = unwritable(error)
        if reason is None or error.filename is None:
            _fail_unexpectedly(error)
        _fail(f"{error.filename}: {reason}", 2)
    except Exception as error:  # whatever it is, a user reads one line; a developer asks for more
        _fail_unexpectedly(error)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    said = " ".join(str(error).split())
    _fail(f"{type(error).__name__}: {said} (ADALORA_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("ADALORA_DEBUG", "") not in {"", "0"}:
        traceback.print_exc()
    process = f" in process {processes.rank()}" if processes.rank() else ""
    said = visible(re.sub(r"\s*[\r\n]+(?!  )", " ", message))  # but for a list of faults, which is indented
    said = said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    typer.echo(f"Error{process}: {said}", err=True)
    sys.exit(code)
