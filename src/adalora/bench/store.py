"""The records of a grid in one file that can be committed, from which it goes on on another machine.

    {"name": "final", "modules": [[...], ...], "versions": [{...}, ...], "cells": [
    {"task": ..., "budget": ..., "method": ..., "seed": ..., "score": ..., ...},
    ...
    ]}

A line for each cell, in an order that does not depend on when cells ended; without paths. Names of matrices and
versions of packages, which are those of hundreds of cells, stand on top once, and a cell has their place in the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..files import to_json, write_text
from .errors import BenchError
from .grid import Grid, Group, budget_name, cell_folder
from .records import Record
from .speed import steps_of_cells

_DERIVED = ("score", "saved_parameters", "steps_to_lora")  # for readers; a record says them otherwise
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:,;'\"]*")


def read_store(path: Path) -> dict[str, Record]:
    """The records in a file, by the folder of their cells; none where there is no file.

    Raises:
        BenchError: the file is not one of records.
    """
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        records = [_record(cell, raw) for cell in raw["cells"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BenchError(
            f"{path} does not hold the records of a grid ({type(error).__name__}: {error}): restore it, or give the"
            " grid another file in `records`"
        ) from error
    return {record.folder: record for record in records}


def write_store(grid: Grid, path: Path, records: Sequence[Record], before: Mapping[str, Record]) -> None:
    """Write the grid's records, whole or not at all. Of those that were there, cells that the grid does not have (a
    method, a task, a budget, a seed that is left out today) stay; others give way to what the grid has found."""
    seeds = {*grid.seeds.choose, *grid.seeds.report}
    groups = {tuple(group) for group in grid.groups}
    others = [record for record in before.values() if record.group not in groups or record.seed not in seeds]
    kept = sorted([*records, *others], key=_order)
    reached = steps_of_cells(kept, grid.reference)
    names: list[list[str]] = []
    versions: list[dict[str, str]] = []
    lines = [_cell(record, reached.get(record.folder), names, versions) for record in kept]
    head = to_json({"name": grid.name, "modules": names, "versions": versions})[:-1]
    text = head + ', "cells": [\n' + ",\n".join(map(to_json, lines)) + "\n]}\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _order(record: Record) -> tuple[Any, ...]:
    budget = "" if record.budget is None else budget_name(record.budget)
    return record.task, budget, record.method, record.role, record.learning_rate, record.seed


def _cell(
    record: Record, reached: float | None, names: list[list[str]], versions: list[dict[str, str]]
) -> dict[str, Any]:
    """A record as a line, without what is empty."""
    told = {
        "task": record.task,
        "budget": record.budget,
        "method": record.method,
        "seed": record.seed,
        "role": record.role,
        "score": record.score,
        "loss": record.loss,
        "saved_parameters": record.parameters.get("adapter_saved"),
        "learning_rate": record.learning_rate,
        "collapsed": record.collapsed,
        "steps": record.steps,
        "steps_to_lora": reached,
    }
    rest = {key: value for key, value in asdict(record).items() if key not in (*told, "folder") and value}
    if record.ranks:
        ordered = sorted(record.ranks)
        rest["ranks"] = [_place(names, ordered), [record.ranks[name] for name in ordered]]
    if record.versions:
        rest["versions"] = _place(versions, record.versions)
    if record.failure:
        rest["failure"] = _PATH.sub("…", record.failure)
    return told | rest


def _record(cell: Mapping[str, Any], top: Mapping[str, Any]) -> Record:
    told = {key: value for key, value in cell.items() if key not in _DERIVED}
    unknown = set(told) - {field.name for field in fields(Record)}
    if unknown:
        raise KeyError(f"a cell has the unknown key {min(unknown)!r}")
    if "ranks" in told:
        place, ranks = told["ranks"]
        told["ranks"] = dict(zip(top["modules"][place], ranks, strict=True))
    if "versions" in told:
        told["versions"] = top["versions"][told["versions"]]
    told = {"lower_is_better": False} | told
    group = Group(told["task"], told["method"], told["budget"])
    return Record(**told, folder=cell_folder(group, told["learning_rate"], told["seed"]))


def _place(known: list[Any], value: Any) -> int:
    """Where ``value`` is in the list, to which it is added if it is new."""
    if value not in known:
        known.append(value)
    return known.index(value)
