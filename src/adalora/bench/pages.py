"""Results as pages: JSON for programs, Markdown to read, LaTeX (booktabs) to print, and the plots beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .grid import Grid
from .plots import draw_plots
from .records import Record
from .sheets import Sheet, how_to_read, remarks, sheets_of_all, sheets_of_task
from .statistics import CONFIDENCE
from .tables import AVERAGE, Results, Row, Table, results


def write_results(grid: Grid, records: Sequence[Record]) -> Path:
    """Write ``results.json``, ``results.tex``, ``plots/`` and ``results.md`` into the grid's output folder, from the
    records alone, of however many cells there are. Returns the path of the last."""
    output = grid.folder
    found = results(grid, records)
    drawn = draw_plots(found, records, output / "plots")
    pictures = {task: [path.relative_to(output).as_posix() for path in paths] for task, paths in drawn.items()}
    write_json(output / "results.json", as_json(found))
    write_text(output / "results.tex", as_latex(found))
    write_text(output / "results.md", as_markdown(found, pictures))
    return output / "results.md"


# --- JSON -------------------------------------------------------------------------------------------


def as_json(found: Results) -> dict[str, Any]:
    """Everything, unrounded, in the tasks' own units (averages in points)."""
    return {
        "name": found.name,
        "reference": found.reference,
        "confidence": CONFIDENCE,
        "tasks": {table.task: _table_as_json(table) for table in found.tables},
        "averages": [_table_as_json(table) for table in found.averages],
        "overall": [one._asdict() for one in found.overall],
        "steps_to_reference": [one._asdict() for one in found.speeds],
        "versions": found.versions,
        "rank_agreement": [agreement._asdict() for agreement in found.agreement],
    }


def _table_as_json(table: Table) -> dict[str, Any]:
    return {
        "what": table.words,
        "model": table.model,
        "headline": table.headline,
        "rows": [_row_as_json(row) for row in table.rows],
        "published": [figure._asdict() for figure in table.published],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "method": row.group.method,
        "budget": row.group.budget,
        "learning_rates": row.learning_rates,
        "learning_rates_tried": row.tried,
        "scores": row.scores,
        **row.summary._asdict(),
        "seeds_wanted": row.wanted,
        "seeds_missing": row.missing,
        "lost": row.lost,
        "seeds_undefined": row.undefined,
        "seeds_collapsed": row.collapsed,
        "worst": row.worst,
        "loss": row.loss._asdict(),
        "failures": [
            {"role": cell.role, "learning_rate": cell.learning_rate, "seed": cell.seed, "why": cell.failure}
            for cell in row.failures
        ],
        "difference": None if row.difference is None else row.difference._asdict(),
        "metrics": {name: of_metric._asdict() for name, of_metric in row.metrics.items()},
        "cost": row.cost._asdict(),
    }


# --- Markdown and LaTeX -----------------------------------------------------------------------------


def as_markdown(found: Results, pictures: Mapping[str, Sequence[str]]) -> str:
    """The page; ``pictures`` are paths relative to it, by task."""
    parts = [f"# {found.name}", *how_to_read(found)]
    for table in found.tables:
        parts += [f"## {table.task}", f"{table.words}."]
        parts += [part for sheet in sheets_of_task(table, found.reference) for part in _markdown_sheet(sheet)]
        said = [f"- {line}" for line in remarks(table)]
        parts += ["To know:", "\n".join(said)] if said else []
        parts += _images(pictures.get(table.task, ()))
    overall = [part for sheet in sheets_of_all(found) for part in _markdown_sheet(sheet)]
    parts += ["## Overall", *overall, *_images(pictures.get(AVERAGE, ()))] if overall else []
    return "\n\n".join(parts) + "\n"


def as_latex(found: Results) -> str:
    """The tables as a document of its own; each can be copied into a paper that loads booktabs."""
    sheets = [sheet for table in found.tables for sheet in sheets_of_task(table, found.reference)]
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[a4paper, landscape, margin=1.5cm]{geometry}",
            r"\usepackage{booktabs}",
            r"\begin{document}",
            *(line for sheet in [*sheets, *sheets_of_all(found)] for line in _latex_sheet(sheet)),
            r"\end{document}",
            "",
        ]
    )


def _markdown_sheet(sheet: Sheet) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    ruler = ["---" if index < sheet.words else "---:" for index in range(len(sheet.columns))]
    yield f"### {sheet.title}"
    yield "\n".join([line(sheet.columns), line(ruler), *map(line, sheet.rows)])
    if sheet.note:
        yield sheet.note


def _latex_sheet(sheet: Sheet) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex, cells)) + r" \\"

    numbers = len(sheet.columns) - sheet.words
    yield r"\begin{table}[ht]"
    yield r"\centering\footnotesize\setlength{\tabcolsep}{4pt}"
    yield rf"\caption{{{latex(' '.join(filter(None, [sheet.title + '.', sheet.note])))}}}"
    yield rf"\begin{{tabular}}{{{'l' * sheet.words}{'r' * numbers}}}"
    yield from (r"\toprule", line(sheet.columns), r"\midrule", *map(line, sheet.rows), r"\bottomrule")
    yield r"\end{tabular}"
    yield r"\end{table}"


_LATEX = {
    **{char: "\\" + char for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "→": r"$\to$",
    "↓": r"$\downarrow$",
    "×": r"$\times$",
    "`": "",
}


def latex(text: str) -> str:
    """``text`` with what LaTeX would take for commands written out."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found.group()], text)


def _images(paths: Sequence[str]) -> list[str]:
    shown = [path for path in paths if path.endswith(".png")]
    return ["\n".join(f"![{Path(path).stem}]({path})" for path in shown)] if shown else []
