"""A figure of the page: what plotly draws, a sentence that says what it shows, and the data behind it.

Figures are plain dictionaries, as plotly's script reads them. Colours are names of the page's style sheet, such as
``var(--kept)``, so that they fit light and dark paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]

CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"]
"""Even to the eye, also to one that does not tell red from green (Nuñez, Anderton and Renslow, 2018)."""

ABOVE = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
"""Where a legend is."""

COLOURS = [f"var(--colour-{index})" for index in range(1, 7)]
"""For lines and points that are told apart."""


class Column(NamedTuple):
    """One column of the data behind a figure."""

    title: str
    values: Sequence[Any]
    of_modules: bool = False
    """Values are places in the run's list of modules."""


@dataclass(frozen=True)
class Figure:
    """One picture."""

    key: str  # unique in its run; names its files
    title: str
    summary: str  # in words, for whoever does not see it
    data: list[Json]
    layout: Json
    columns: list[Column]
    least_width: int = 0  # in pixels; where there is less, the picture scrolls
    note: str = ""  # how to read it
    controls: str = ""  # HTML that stands above it
    extra: Json = field(default_factory=dict)  # for the page's script

    @property
    def as_json(self) -> Json:
        """What the page's script needs."""
        columns = [
            {"title": column.title, "values": list(column.values), "ofModules": column.of_modules}
            for column in self.columns
        ]
        return {"data": self.data, "layout": self.layout, "columns": columns, **self.extra}


def axis(title: str, **settings: Any) -> Json:
    """An axis with its title."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, **settings}


def layout(height: int, x: Json, y: Json, **settings: Any) -> Json:
    """A layout of one pair of axes; a legend, where there is one, lies above them."""
    margin = {"l": 48, "r": 12, "t": 36, "b": 44}
    return {"height": height, "margin": margin, "xaxis": x, "yaxis": y, "legend": ABOVE, **settings}


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, **settings: Any) -> Json:
    """A line with a name that is safe to show."""
    shown = {"color": colour, "width": 2, **settings.pop("line", {})}
    return {"type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": list(y), "line": shown, **settings}


def scale(colours: Sequence[str] = CIVIDIS) -> list[list[Any]]:
    """A plotly colour scale from 0 to 1."""
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def shades(count: int) -> list[str]:
    """So many colours of cividis, in order and evenly spread."""
    last = len(CIVIDIS) - 1
    return [_between(last * index / max(count - 1, 1)) for index in range(count)]


def _between(place: float) -> str:
    lower = min(int(place), len(CIVIDIS) - 2)
    pair = ((int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in CIVIDIS[lower : lower + 2])
    mixed = (round(a + (b - a) * (place - lower)) for a, b in zip(*pair, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
