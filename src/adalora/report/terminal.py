"""A run in the terminal: ranks by layer and module, metrics beside the baseline."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..quiet import visible
from .grid import Grid, arrange

_DETAILS = {"scores", "n_best"}  # of an answer: for --json
_CELL = 4  # width of a column of ranks, borders included


def _loading(folder: Path, loading: Mapping[str, Any]) -> list[str]:
    """How anyone loads what was learned, without us. Empty where it takes the method's own code."""
    name, base = loading["auto_class"], Path(loading["base"])
    labels = loading["head"].get("num_labels")
    if not loading["peft"]:
        whole = (folder / "config.json").is_file()
        load = f"model = {name}.from_pretrained({str(folder)!r})"
        return [f"from transformers import {name}", load] if whole else []
    place = f"{str(base.parent)!r}, gguf_file={base.name!r}" if base.suffix == ".gguf" else repr(str(base))
    head = f", num_labels={labels}" if labels else ""
    return [
        "from peft import PeftModel",
        f"from transformers import {name}",
        f"base = {name}.from_pretrained({place}{head})",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
    ]


def number(value: float | None) -> str:
    """A metric for people: three digits behind the point, or that it is not defined."""
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.3f}"


class _Console(Console):
    """A console that shows control characters, which names in strangers' files may hold, instead of sending them."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console(stderr: bool = False) -> Console:
    """Where words go: to stdout, or to stderr where that is for machines. Elsewhere than on a terminal, lines are as
    long as they are. Brackets are brackets, as in a folder's name."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 110
    return _Console(highlight=False, markup=False, soft_wrap=False, stderr=stderr, width=width)


def duration(seconds: float) -> str:
    """A time in words: ``45 s``, ``2 min 31 s``, ``3 h 20 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (hours, "h"), (minutes, "min"), (0 if hours else rest, "s")
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def clock(seconds: float) -> str:
    """A time as a clock shows it, of nearly the same width from second to second: 0:07, 12:30, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_lines(out: Console, lines: Mapping[str, str]) -> None:
    """Named facts, one below the other; each continues below its own beginning where it is too long for a line."""
    indent = max(map(len, lines), default=0) + 2
    for name, text in lines.items():
        rows = Text(text).wrap(out, max(out.width - indent, 20))
        for row, label in zip(rows, [name, *[""] * len(rows)], strict=False):
            row.rstrip()
            out.print(Text.assemble((f"{label:{indent}}", "bold"), row), soft_wrap=True)
    out.print()


def print_summary(out: Console, folder: Path, metrics: Mapping[str, Any]) -> None:
    """What ``metrics.json`` says, and what to do next."""
    ranks: dict[str, int] = metrics["ranks"]
    out.print()
    if ranks:
        live = metrics["live_triplets"]
        average = f"{live / len(ranks):.3g} on average in {len(ranks)} matrices"
        began = metrics["initial_triplets"]
        out.print(
            f"Learned ranks: {live} of {began} triplets kept, {average}" if began != live else f"Ranks: {average}"
        )
        out.print(rank_table(ranks, out.width))
    baseline = metrics["baseline"] or {"metrics": {}, "answer": ""}
    out.print(metric_table(metrics["metrics"], baseline["metrics"], baseline["answer"], metrics["method"]))
    out.print(f"Trained in {duration(metrics['seconds'])}. In {folder}:")
    loading = _loading(folder, metrics["loading"])
    form = "plain LoRA" if metrics["loading"]["peft"] else "what was trained"
    files = {name: f"{form}, {size / 1e3:,.0f} kB" for name, size in metrics["saved_bytes"].items()}
    if (folder / "report.html").is_file():
        files = {"report.html": "where the budget went, and all else: open it in a browser"} | files
    if (folder / "trace.jsonl").is_file():
        files["ranks.png"] = "a picture of the learned ranks"
        files["metrics.json, trace.jsonl"] = "the figures above, and each allocation on the way"
    else:
        files["metrics.json"] = "the figures above"
    files["recipe.yaml"] = "what was run, with every setting"
    print_lines(out, {f"  {name}": text for name, text in files.items()})
    place = shlex.quote(str(folder))
    out.print("Next:")
    out.print(f"  {_program()} evaluate {place}", soft_wrap=True)
    example = [part for option, text in metrics["example"].items() for part in (f"--{option}", text)]
    out.print(f"  {_program()} predict {place} {shlex.join(example or ['--file', 'FILE'])}", soft_wrap=True)
    if loading:
        out.print(f"or anywhere, with {'PEFT' if metrics['loading']['peft'] else 'Transformers'} alone:")
        for line in loading:
            out.print(f"  {line}", soft_wrap=True)


def _program() -> str:
    """The command as it can be typed here: an environment that is not active is not on the path."""
    if shutil.which("adalora"):
        return "adalora"
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "adalora" else f"{shlex.quote(sys.executable)} -m adalora"


def answer_table(texts: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> Table:
    """Each text with what the model says about it."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    columns = list(dict.fromkeys(name for answer in answers for name in answer if name not in _DETAILS))
    for name in columns:
        table.add_column(name, justify="left" if name == "label" else "right")
    for name in texts[0] if texts else ():
        table.add_column(name)
    for text, answer in zip(texts, answers, strict=True):
        cells = [*(answer.get(name) for name in columns), *text.values()]
        table.add_row(*(Text(_shown(cell)) for cell in cells))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "–"
    if isinstance(value, dict):
        return " ".join(map(_shown, value.values()))
    return "–" if value is None else str(value)


def rank_table(ranks: Mapping[str, int], width: int) -> Table:
    """Ranks of all matrices. Modules go down and layers across, or the other way where that is too wide."""
    grid = arrange(ranks)
    needed = max(map(len, grid.modules)) + sum(max(_CELL, len(layer) + 1) for layer in (*grid.layers, "mean"))
    return _table(grid, "module") if needed <= width else _table(_turned(grid), "layer")


def metric_table(
    metrics: Mapping[str, float | None], baseline: Mapping[str, float | None], answer: str, method: str
) -> Table:
    """Each metric, beside the one that an answer without a model reaches, where there is one."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("held-out")
    table.add_column("AdaLoRA" if method == "adalora" else method, justify="right", style="bold")
    if baseline:
        table.add_column(Text(f"baseline ({answer})"), justify="right")
    for name, value in metrics.items():
        table.add_row(name, number(value), *([number(baseline.get(name))] if baseline else []))
    return table


def _table(grid: Grid, corner: str) -> Table:
    """Columns are ``grid.layers``, rows ``grid.modules``, with the mean of each."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(corner)
    for layer in grid.layers:
        table.add_column(layer, justify="right")
    table.add_column("mean", justify="right", style="bold")
    for module, row in zip(grid.modules, grid.values, strict=True):
        table.add_row(module, *("" if rank is None else _rank(rank) for rank in row), _mean(row))
    columns = list(zip(*grid.values, strict=True))
    everything = [rank for row in grid.values for rank in row]
    table.add_section()
    table.add_row("mean", *(_mean(column) for column in columns), _mean(everything), style="bold")
    return table


def _turned(grid: Grid) -> Grid:
    return Grid(grid.modules, grid.layers, [list(column) for column in zip(*grid.values, strict=True)])


def _rank(rank: float) -> str:
    """Whole, unless it is the mean of several matrices that share a cell."""
    return f"{rank:.1f}".removesuffix(".0")


def _mean(ranks: Sequence[float | None]) -> str:
    present = [rank for rank in ranks if rank is not None]
    return f"{sum(present) / len(present):.1f}" if present else ""
