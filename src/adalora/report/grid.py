"""Adapted matrices as a grid: one row for each kind of module, one column for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where a module sits in a model, read off its name."""

    stack: str  # what is repeated, such as "encoder.layer"; "" when nothing is
    layer: int | None
    module: str  # within the layer, such as "attention.self.query"


class Grid(NamedTuple):
    """Values of modules, arranged; None where a layer has no such module."""

    layers: list[str]
    modules: list[str]
    values: list[list[int | None]]  # [modules][layers]


def place(name: str) -> Place:
    """Split a module's name at its first number: ``encoder.layer.3.output.dense`` is ``output.dense`` of layer 3."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and index + 1 < len(parts):
            return Place(".".join(parts[:index]), int(part), ".".join(parts[index + 1 :]))
    return Place("", None, name)


def arrange(values: Mapping[str, int]) -> Grid:
    """Arrange values by module name. Stacks, such as an encoder and a decoder, follow one another and are named
    only when there are several; modules outside any stack share one column, ``-``."""
    places = {name: place(name) for name in values}
    stacks = list(dict.fromkeys(p.stack for p in places.values() if p.layer is not None))
    short = _short_names(stacks)
    columns = sorted(
        {(p.stack, p.layer) for p in places.values()},
        key=lambda column: (len(stacks) if column[1] is None else stacks.index(column[0]), column[1] or 0),
    )
    modules = list(dict.fromkeys(p.module for p in places.values()))
    cells = {(p.module, p.stack, p.layer): values[name] for name, p in places.items()}
    return Grid(
        layers=["-" if layer is None else f"{short[stack]} {layer}".strip() for stack, layer in columns],
        modules=modules,
        values=[[cells.get((module, *column)) for column in columns] for module in modules],
    )


def _short_names(stacks: list[str]) -> dict[str, str]:
    """What tells the stacks apart: ``model.encoder.layers`` and ``model.decoder.layers`` are encoder and decoder."""
    parts = [stack.split(".") for stack in stacks]
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    shortest = min(map(len, parts))
    before = _shared(parts)
    after = min(_shared([part[::-1] for part in parts]), shortest - before)
    return {
        stack: ".".join(part[before : len(part) - after]) or stack for stack, part in zip(stacks, parts, strict=True)
    }


def _shared(sequences: Iterable[list[str]]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
