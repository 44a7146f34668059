"""HTML in which any string may stand: each is escaped for the place where it goes."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..files import to_json

_DIRECTION_MARKS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = {"R", "AL", "AN"}


def text(value: object) -> str:
    """``value`` as the text of an element or, quoted, of an attribute."""
    return html.escape(str(value), quote=True)


def isolated(value: object) -> str:
    """A string from outside as an element of its own, whose direction of writing leaves its surroundings alone."""
    return f"<bdi>{text(value)}</bdi>"


def plain(value: object) -> str:
    """A string from outside within a sentence: what is written from right to left is isolated by Unicode's marks."""
    cleaned = _DIRECTION_MARKS.sub("\ufffd", str(value))
    turns = any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in cleaned)
    return f"\u2068{cleaned}\u2069" if turns else cleaned


def plot_text(value: object) -> str:
    """A string from outside for a plotly figure, which reads tags and entities in every label."""
    return plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def script_json(value: Any) -> str:
    """``value`` as JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
    compact = json.dumps(json.loads(to_json(value)), separators=(",", ":"), ensure_ascii=False)
    return compact.translate(escapes)


def number(value: object) -> str:
    """A number for people: four significant digits, or thousands apart; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count:,} times"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, key: str) -> str:
    """A table with a name for each column and row, and a button that downloads it.

    Args:
        rows: the first cell of each is its name.
        key: what the downloaded file is called.
    """
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_NUMBER if is_numeric else ""}>{isolated(column)}</th>'
        for column, is_numeric in zip(columns, numeric, strict=True)
    )
    body = "\n".join(_row(row) for row in rows)
    return (
        f'<div class="sheet"><div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">\n'
        f'<table data-csv="{text(key)}">\n<caption>{text(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n"
        f'<div class="actions"><button type="button" class="csv">CSV<span class="unseen"> of {text(caption)}</span>'
        "</button></div></div>"
    )


_NUMBER = ' class="number"'


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _row(row: Sequence[object]) -> str:
    name, *values = row
    return f'<tr><th scope="row">{isolated(name)}</th>{"".join(map(_cell, values))}</tr>'


def _cell(value: object) -> str:
    if _is_number(value):
        return f'<td{_NUMBER} data-value="{text("" if value is None else value)}">{text(number(value))}</td>'
    return f"<td>{isolated(number(value))}</td>"
