"""Records in one file, which a grid goes on from on another machine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adalora.bench.errors import BenchError
from adalora.bench.speed import speeds, steps_of_cells
from adalora.bench.store import read_store, write_store

from .grids import failed, grid, record
from .test_grid import changed
from .test_runner import run, times

Write = Callable[[Mapping[str, Any]], Path]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """In an order of its own, whichever ended first; to the same bytes; without paths."""
    whole = record("mrpc", "lora", "rank 2", 1, 0.8, loss=0.5, steps=10, curve=[[5, 0.7], [10, 0.8]], recipe="abc")
    records = [
        replace(whole, ranks={"b": 1, "a": 2}, versions={"torch": "2.13"}),
        record("mrpc", "full", None, 2, None, collapsed=True, ranks={"a": 1, "b": 1}),
        failed("cola", "adalora", "rank 8", 0, "OSError: /home/someone/x.py: no space in C:\\tmp\\y left"),
        record("cola", "lora", 5000, 1, 0.8),
    ]
    path = tmp_path / "records.json"
    write_store(grid(), path, records, {})
    first = path.read_bytes()
    write_store(grid(), path, records[::-1], {})
    assert path.read_bytes() == first
    found = read_store(path)
    for one in records:
        kept = one.failure and "OSError: …: no space in … left"
        got = found[one.folder]
        assert replace(got, metrics={}) == replace(one, metrics={}, failure=kept)
        assert got.score == one.score or math.isnan(one.score)
    cells = json.loads(first)["cells"]
    wanted = {"task", "budget", "method", "seed", "score", "loss", "saved_parameters", "learning_rate", "collapsed"}
    assert all(set(cell) > {*wanted, "steps", "steps_to_lora"} for cell in cells)
    assert "folder" not in cells[0] and cells[-1]["saved_parameters"] == 2000


def test_cells_that_the_grid_leaves_out_stay(tmp_path: Path) -> None:
    """A machine that runs some of the methods keeps what others found; its own earlier records give way."""
    path = tmp_path / "records.json"
    elsewhere, stale = record("mrpc", "dora", "rank 2", 1, 0.7), record("mrpc", "lora", "rank 2", 1, 0.1)
    before = {one.folder: one for one in (elsewhere, stale)}
    ours = record("mrpc", "lora", "rank 2", 2, 0.8)
    write_store(grid(), path, [ours], before)
    assert set(read_store(path)) == {elsewhere.folder, ours.folder}


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"task": "x"}]}', '{"cells": [{"task": "x", "who": 1}]}'])
def test_what_is_no_file_of_records_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="does not hold the records of a grid"):
        read_store(path)


def test_a_grid_goes_on_from_a_file(tiny_grid: dict[str, Any], write: Write, tmp_path: Path) -> None:
    """On a machine without its folders nothing is run again, until a recipe changes."""
    records = tmp_path / "records.json"
    asked = changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], records=str(records))
    asked = changed(asked, base__training__eval_strategy="steps", base__training__eval_steps=0.5)
    asked = changed(asked, base__training__eval_rows=16, reference="head")
    first, _ = run(write(asked))
    assert [(r.steps, [step for step, _ in r.curve]) for r in first.records] == [(4, [2, 4])]
    assert first.records[0].loss is not None and 0 < first.records[0].loss < 2
    text = records.read_text()
    assert str(tmp_path) not in text.replace(json.dumps(str(records)), "") and len(text) < 2000
    shutil.rmtree(first.grid.folder)

    again, said = run(write(asked))
    assert (again.records, said, times(again.grid.folder)) == (first.records, "", {})
    assert records.read_text() == text

    other, said = run(write(changed(asked, base__training__weight_decay=0.5)))
    assert "1 records in " in said and "are of other recipes than the grid asks for now" in said
    assert len(times(other.grid.folder)) == 1
    assert [r.recipe for r in read_store(records).values()] == [r.recipe for r in other.records]
    assert other.records[0].recipe != first.records[0].recipe


def test_how_soon_a_method_is_there() -> None:
    """By hand: the reference ends at 0.8 on average; ours is above it at the second of four steps, plus its start."""
    lora = [record("mrpc", "lora", "rank 2", s, 0.8, curve=[[1, 0.1], [2, 0.2], [3, 0.3], [4, e]])
            for s, e in ((1, 0.7), (2, 0.9))]  # fmt: skip
    ours = [record("mrpc", "adalora", "rank 2", s, 0.8, curve=[[1, 0.5], [2, e], [3, 0.7], [4, 0.9]], start_steps=0.4)
            for s, e in ((1, 0.75), (2, 0.9))]  # fmt: skip
    slow = [record("mrpc", "slow", "rank 2", 1, 0.8, curve=[[1, 0.5], [4, None]])]
    records = [*lora, *ours, *slow]
    found = {one.method: one for one in speeds(records, "lora")}
    assert found["lora"].median == 1 and found["adalora"].tasks == {"mrpc": pytest.approx(0.6)}
    assert math.isinf(found["slow"].median)
    cells = steps_of_cells(records, "lora")
    assert [cells.get(one.folder) for one in records] == [None, 4, 4.4, 2.4, None]
    assert speeds(records, None) == []
