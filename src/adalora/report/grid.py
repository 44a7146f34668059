"""Adapted matrices as a grid: one row for each kind of module, one column for each layer.

Where a matrix sits is read off its name. Models that are not one stack of equal layers fit, too: several stacks
(encoder and decoder, vision and language) stand side by side; blocks within blocks (ResNets, UNets, Swin) are columns
such as ``2.1``; experts of a mixture are one kind, whose cell holds them all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

OUTSIDE = "-"
"""The column of modules that are in no stack, such as an output layer."""

_EXPERT = re.compile(r"(.*_)?experts?", re.IGNORECASE)
_NUMBERED_EXPERT = re.compile(r"experts?_?\d+", re.IGNORECASE)
_PARTS = {"resnets", "attentions", "motion_modules", "downsamplers", "upsamplers"}
"""Lists within a block, in Diffusers' UNets: which list it is says what kind of module it holds."""


class Place(NamedTuple):
    """Where a module sits in a model, read off its name."""

    stack: str  # what is repeated, such as "encoder.layer"; "" when nothing is
    layer: int | None
    module: str  # within the layer, such as "attention.self.query"


class Column(NamedTuple):
    """One layer."""

    stack: str  # what tells the stacks apart, such as "encoder"; "" when there is one stack
    layer: str  # such as "3", or "2.1" for a block within a block; OUTSIDE for modules in no stack

    @property
    def name(self) -> str:
        return f"{self.stack} {self.layer}".strip()


class Cells(NamedTuple):
    """Names of modules, arranged: an empty list where a layer has no such module, several for experts."""

    columns: list[Column]
    kinds: list[str]
    names: list[list[list[str]]]  # [kinds][columns]


class Grid(NamedTuple):
    """Values of modules, arranged; None where a layer has no such module. Several in one cell are their mean."""

    layers: list[str]
    modules: list[str]
    values: list[list[float | None]]  # [modules][layers]


class _Spot(NamedTuple):
    """A module's name, taken apart."""

    stack: tuple[str, ...]
    layers: tuple[tuple[tuple[str, ...], int], ...]
    """Outermost first: the words before, with * for numbers, and the number."""
    kind: str


def _is_number(part: str) -> bool:
    """Whether a part of a name counts layers: a stranger's may have more digits than any number."""
    return part.isdecimal() and len(part) < 10


def place(name: str) -> Place:
    """Split a module's name at its first number: ``encoder.layer.3.output.dense`` is ``output.dense`` of layer 3."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if _is_number(part) and index + 1 < len(parts):
            return Place(".".join(parts[:index]), int(part), ".".join(parts[index + 1 :]))
    return Place("", None, name)


def arrange(values: Mapping[str, int]) -> Grid:
    """Arrange values by module name. Stacks, such as an encoder and a decoder, follow one another and are named
    only when there are several; modules outside any stack share one column, ``-``."""
    columns, kinds, names = cells(values)
    means = [[_mean([values[name] for name in cell]) for cell in row] for row in names]
    return Grid([column.name for column in columns], kinds, means)


def cells(names: Iterable[str]) -> Cells:
    """Arrange modules by their names; kinds and stacks are in the order in which they come first."""
    spots = {name: _spot(name) for name in names}
    stacks = list(dict.fromkeys(spot.stack for spot in spots.values() if spot.layers))
    short = _short_names(stacks)
    seen: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for spot in spots.values():
        for level, number in spot.layers:
            seen[level].add(number)

    def depth(spot: _Spot) -> tuple[int, ...]:
        """Its layer's number, then those of blocks within it as far as they tell anything apart."""
        inner = tuple(number for level, number in spot.layers[1:] if len(seen[level]) > 1)
        return tuple(number for _, number in spot.layers[:1]) + inner

    def order(column: tuple[tuple[str, ...], tuple[int, ...]]) -> tuple[int, tuple[int, ...]]:
        stack, numbers = column
        return (stacks.index(stack) if numbers else len(stacks)), numbers

    where = {name: (spot.stack if spot.layers else (), depth(spot)) for name, spot in spots.items()}
    columns = {column: index for index, column in enumerate(sorted(set(where.values()), key=order))}
    kinds = {kind: index for index, kind in enumerate(dict.fromkeys(spot.kind for spot in spots.values()))}
    found: list[list[list[str]]] = [[[] for _ in columns] for _ in kinds]
    for name, spot in spots.items():
        found[kinds[spot.kind]][columns[where[name]]].append(name)
    labels = [
        Column(short[stack], ".".join(map(str, numbers))) if numbers else Column("", OUTSIDE)
        for stack, numbers in columns
    ]
    return Cells(labels, list(kinds), found)


def _spot(name: str) -> _Spot:
    """Take a name apart at its numbers. The first one that something follows, and others that count blocks, are layers;
    an expert's is left out; the rest, such as a place within a Sequential, belong to the kind."""
    parts = name.split(".")
    stack: tuple[str, ...] = ()
    layers: list[tuple[tuple[str, ...], int]] = []
    kind: list[str] = []
    for index, part in enumerate(parts):
        before, last = parts[index - 1] if index else "", index + 1 == len(parts)
        if _NUMBERED_EXPERT.fullmatch(part) or (_is_number(part) and _EXPERT.fullmatch(before)):
            continue
        if not _is_number(part) or last or not _counts_layers(before, bool(layers)):
            kind.append(part)
            continue
        if not layers:
            held = before in _PARTS
            stack, kind = tuple(kind[:-1] if held else kind), [before] if held else []
        elif kind and kind[-1] == before and before not in _PARTS:
            kind.pop()
        level = tuple("*" if _is_number(word) else word for word in parts[:index])
        layers.append((level, int(part)))
    return _Spot(stack, tuple(layers), ".".join(kind))


def _counts_layers(before: str, nested: bool) -> bool:
    """Whether the number after this word says which layer: within a layer, that takes a plural (``resnets.1``) or
    another number (``blocks.0.1``)."""
    return not nested or _is_number(before) or (before.endswith("s") and not before.endswith("ss"))


def _mean(values: Sequence[int]) -> float | None:
    """To one digit behind the point, and a whole number where it is one."""
    if not values:
        return None
    mean = sum(values) / len(values)
    return int(mean) if mean == int(mean) else round(mean, 1)


def _short_names(stacks: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What tells the stacks apart, in as few words as do: ``model.encoder.layers`` and ``model.decoder.layers`` are
    encoder and decoder."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    shared = _shared(stacks)
    short = {}
    for stack in stacks:
        ends = range(shared + 1, len(stack) + 1)
        telling = (end for end in ends if sum(other[:end] == stack[:end] for other in stacks) == 1)
        short[stack] = ".".join(stack[shared : next(telling, len(stack))] or stack)
    return short


def _shared(sequences: Iterable[Sequence[str]]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
