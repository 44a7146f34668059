"""The report: one page that holds all it needs, of one run or of several."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..core.errors import AdaLoraError
from ..files import write_text
from .figure import Figure
from .markup import isolated, plain, script_json, text
from .run import Run, names_of
from .sections import Section, facts, headline, method_name, sections


class ReportError(AdaLoraError):
    """A report that cannot be made."""


def write_report(path: Path, runs: Sequence[Run]) -> Path:
    """Write the page of one run or of several at ``path``, whole or not at all.

    Raises:
        ReportError: plotly is not installed.
    """
    write_text(path, report_html(runs))
    return path


def report_html(runs: Sequence[Run]) -> str:
    """The page of one run, or of several with a switch between them.

    Raises:
        ReportError: no run, or plotly is not installed.
    """
    if not runs:
        raise ReportError("a report needs the folder of at least one run")
    if len(runs) == 1:
        name = runs[0].folder.path.resolve().name or "run"
        body, data = _run_html(runs[0], name, 0, 2)
        return page(f"{name}: report of a run", _masthead(runs[0], name) + body, {"runs": [data]})
    tabs, panels, found = [], [], []
    for index, (run, name) in enumerate(zip(runs, names_of([run.folder.path for run in runs]), strict=True)):
        body, data = _run_html(run, name, index, 3)
        chosen = index == 0
        tabs.append(
            f'<button type="button" role="tab" id="tab-{index}" aria-controls="panel-{index}" '
            f'aria-selected="{str(chosen).lower()}" tabindex="{0 if chosen else -1}">{isolated(name)}</button>'
        )
        panels.append(
            f'<div role="tabpanel" id="panel-{index}" aria-labelledby="tab-{index}"{"" if chosen else " hidden"}>'
            f"<h2>{headline(run)}</h2>{_about(run, name)}{body}</div>"
        )
        found.append(data)
    head = f'<header class="masthead"><h1>{len(runs)} runs</h1></header>'
    switch = f'<div role="tablist" aria-label="Runs" class="tabs">{"".join(tabs)}</div>'
    return page(f"Report of {len(runs)} runs", head + switch + "\n".join(panels), {"runs": found})


def page(title: str, body: str, data: Any) -> str:
    """A self-contained page: plotly's script, our style sheet and script, and nothing from elsewhere, which its
    content security policy makes sure of.

    Args:
        title: of the window; plain text.
        body: HTML of the main part.
        data: what the script draws: ``runs``, each with ``slug``, ``names`` and ``figures``.

    Raises:
        ReportError: plotly is not installed.
    """
    scripts = [_plotly(), _resource("files.js") + _resource("page.js")]
    policy = " ".join(
        [
            f"default-src 'none'; script-src {' '.join(map(_digest, scripts))};",
            "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'",
        ]
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(plain(title))}</title>",
            f"<style>{_resource('page.css')}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">To the content</a>',
            '<div class="bar"><span class="brand">adalora</span>'
            '<button type="button" id="theme" aria-pressed="false">Dark</button></div>',
            "<noscript><p>The pictures of this page are drawn by its script, which is switched off.</p></noscript>",
            f'<main id="main">{body}</main>',
            f'<script type="application/json" id="data">{script_json(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def figure_html(figure: Figure, run: int) -> str:
    """A place for a figure of a run, its words, and what can be done with it."""
    least = f' style="min-width:{figure.least_width}px"' if figure.least_width else ""
    height = figure.layout["height"]
    return (
        f'<figure id="run-{run}-{text(figure.key)}" data-run="{run}" data-figure="{text(figure.key)}">'
        f'<div class="name">{text(figure.title)}</div>{figure.controls}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(figure.title)}">'
        f'<div class="least"{least}><div class="plot" role="img" aria-label="{text(figure.summary)}" '
        f'style="height:{height}px"></div></div></div>'
        f"<figcaption>{text(figure.summary)}"
        + (f' <span class="note">{text(figure.note)}</span>' if figure.note else "")
        + "</figcaption>"
        '<div class="foot"><div class="actions"><button type="button" class="csv">CSV'
        f'<span class="unseen"> of {text(figure.title)}</span></button>'
        f'<button type="button" class="svg">SVG<span class="unseen"> of {text(figure.title)}</span></button></div>'
        f'<details><summary>Data<span class="unseen"> of {text(figure.title)}</span></summary></details></div></figure>'
    )


def _run_html(run: Run, name: str, index: int, level: int) -> tuple[str, dict[str, Any]]:
    """Everything below the name of a run, and what the script needs to draw it."""
    found = list(sections(run))
    slug = name.replace("/", "-")
    parts = [_facts(run), _contents(found, index), *(section_html(section, index, level) for section in found)]
    data = {
        "slug": slug,
        "names": run.trace.names if run.trace else [],
        "figures": {figure.key: figure.as_json for section in found for figure in section.figures},
        "log": run.log,
    }
    return f'<div data-slug="{text(slug)}">' + "\n".join(parts) + "</div>", data


def section_html(section: Section, index: int, level: int) -> str:
    place = f"run-{index}-section-{section.key}"
    lead = f'<p class="lead">{section.lead}</p>' if section.lead else ""
    inside = "\n".join([*(figure_html(figure, index) for figure in section.figures), *section.tables])
    kind = "sheets" if section.tables else "pair" if section.side_by_side else "whole"
    return (
        f'<section id="{place}" aria-labelledby="{place}-name"><h{level} id="{place}-name">{text(section.title)}'
        f'</h{level}>{lead}<div class="{kind}">{inside}</div></section>'
    )


def _contents(found: Iterable[Section], index: int) -> str:
    links = (f'<a href="#run-{index}-section-{section.key}">{text(section.title)}</a>' for section in found)
    return f'<nav aria-label="Contents">{" ".join(links)}</nav>'


def _facts(run: Run) -> str:
    shown = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts(run))
    state = "" if run.metrics else _UNFINISHED
    return f'{state}<dl class="facts">{shown}</dl>' if shown else state


_UNFINISHED = (
    '<p class="state" role="status"><strong>This run is not finished.</strong> '
    "The page shows it as far as it was when the page was made.</p>"
)


def _masthead(run: Run, name: str) -> str:
    return f'<header class="masthead"><h1>{headline(run)}</h1>{_about(run, name)}</header>'


def _about(run: Run, name: str) -> str:
    return f'<p class="about">{text(method_name(run))}, {text(run.recipe.task)}, folder {isolated(name)}</p>'


def _digest(script: str) -> str:
    """How a content security policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ReportError(
            "the report is drawn by plotly, which is not installed: pip install adalora[train]"
        ) from error
    script: str = get_plotlyjs()
    return script
