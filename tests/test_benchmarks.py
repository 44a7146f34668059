"""The benchmark program runs, and what it counts is exact. What it times is not looked at: tests never time."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("speed", "speed_methods", "speed_report", "live_bytes", "operations")
COUNTED = (
    "operations",
    "allocator_operations",
    "peak_bytes",
    "state_bytes",
    "trained_parameters",
    "other_bytes_at_rest",
)


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """The programs' modules, imported as when one of them is run."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    found = {name: importlib.import_module(name) for name in MODULES}
    tiny = found["speed_methods"].Shape("bert", 1, 32, 64, 2, rows=2, length=8, share=1, turn=2)
    patch.setitem(found["speed_methods"].SHAPES, "tiny", tiny)
    yield found
    patch.undo()
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def runs(programs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """speed.json of a run with all methods, and of another one with some."""
    found = []
    for rounds, methods in ((2, []), (1, ["--methods", "adalora", "adalora singular", "peft adalora", "frozen"])):
        folder = tmp_path_factory.mktemp("speed")
        programs["speed"].main(["--shapes", "tiny", "--rounds", str(rounds), "--output", str(folder), *methods])
        found.append(json.loads((folder / "speed.json").read_text()))
        assert "| peft adalora |" in (folder / "speed.md").read_text()
    return found


def test_every_method_is_measured(programs: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    (cell,) = runs[0]["cells"]
    assert set(cell["methods"]) == set(programs["speed_methods"].METHODS)
    for name, found in cell["methods"].items():
        kind = programs["speed_methods"].METHODS[name]
        assert "error" not in found, name
        assert len(found.get("step_ms", [])) == (2 if kind.timed else 0), name
        assert all(milliseconds > 0 for milliseconds in found.get("step_ms", []))
        others = {"peft lora", "peft adalora", "lora, our kernels", "frozen"} if kind.timed else set()
        assert set(found["ratios"]) == others
        assert all(0 < low <= median <= high for median, low, high in found["ratios"].values())
        assert ("forward_ms" in found) == (kind.timed and kind.inference)
        assert ("merged_ms" in found) == (kind.timed and kind.inference and name != "frozen")
        assert ("save_s" in found) == (kind.timed and name not in ("full", "frozen"))
        assert ("export_s" in found) == (kind.timed and name.startswith("adalora"))
    assert {"versions", "machine", "load", "command", "options", "bounds"} <= set(runs[0])


def test_counts_are_the_same_in_two_runs(runs: list[dict[str, Any]]) -> None:
    first, second = (run["cells"][0]["methods"] for run in runs)
    for name, found in second.items():
        counts = {key: found.get(key) for key in COUNTED}
        assert counts == {key: first[name].get(key) for key in COUNTED}, name
        assert all(isinstance(count, int) for count in counts.values() if count is not None)


def test_what_is_counted(runs: list[dict[str, Any]]) -> None:
    """One layer of hidden size 32 with six matrices, of which the exact sizes are known."""
    found = runs[0]["cells"][0]["methods"]
    entries = 12 * (4 * (32 + 32) + 2 * (32 + 64))  # rank, d_in + d_out of each matrix
    triplets = 12 * 6
    assert found["peft lora"]["trained_parameters"] == found["lora, our kernels"]["trained_parameters"] == entries
    assert found["adalora"]["trained_parameters"] == found["peft adalora"]["trained_parameters"] == entries + triplets
    assert found["frozen"]["trained_parameters"] == 0
    assert found["adalora"]["state_bytes"] == 8 * (entries + triplets)
    assert found["adalora singular"]["state_bytes"] == 8 * triplets
    assert found["peft adalora"]["state_bytes"] == 12 * (entries + triplets)
    # PEFT: two matrices, two norms, ... for the regulariser of each matrix, which its outer wrapper would leave out
    assert found["peft adalora"]["operations"] > 4 * found["peft lora"]["operations"]
    assert 26 < found["frozen"]["operations"] < found["adalora"]["operations"]
    assert 0 < found["adalora"]["allocator_operations"] < found["adalora"]["operations"]
    # parameters, gradients and two moments, and what the floor has, too
    assert found["peft lora"]["peak_bytes"] > 16 * entries + found["frozen"]["peak_bytes"] / 2


def test_bounds_are_judged(programs: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    rows = {(row["figure"], row["where"]): row for row in runs[0]["bounds"]}
    state = rows["state, bytes per adapter parameter", "tiny"]
    assert (state["measured"], state["at_most"], state["met"]) == (8, 8, True)
    assert rows["operations a step", "matrices-216"]["met"] is None  # not part of this run
    changed = json.loads(json.dumps(runs[0]))
    changed["cells"][0]["methods"]["adalora"]["state_bytes_per_parameter"] = 12
    judged = {(row["figure"], row["where"]): row for row in programs["speed_report"].bounds(changed)}
    assert judged["state, bytes per adapter parameter", "tiny"]["met"] is False


def test_ratios_are_taken_within_a_round(programs: dict[str, Any]) -> None:
    methods = {"a": {"step_ms": [1.0, 20.0, 3.0]}, "b": {"step_ms": [2.0, 10.0, 3.0]}}
    ratio = programs["speed_report"].ratio({"methods": methods}, "a", "b")
    assert ratio == (1.0, 0.75, 1.5)
    assert programs["speed_report"].ratio({"methods": methods}, "a", "c") is None


def test_what_fails_is_recorded_and_the_rest_goes_on(
    programs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: torch.nn.Module, situation: Any) -> torch.nn.Module:
        raise RuntimeError("out of luck\nand more")

    methods = programs["speed_methods"]
    monkeypatch.setitem(methods.METHODS, "full", methods.Method(broken))
    arguments = ["--shapes", "tiny", "--rounds", "1", "--methods", "full", "frozen", "--output", str(tmp_path)]
    programs["speed"].main(arguments)
    found = json.loads((tmp_path / "speed.json").read_text())["cells"][0]["methods"]
    assert found["full"]["error"] == "RuntimeError: out of luck" and len(found["frozen"]["step_ms"]) == 1
    assert "out of luck" in (tmp_path / "speed.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_form_says_so(programs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        programs["speed"].main(["--preset", "gpu"])
    assert "there is no GPU that PyTorch can use" in capsys.readouterr().err


def test_live_bytes_counts_what_autograd_holds(programs: dict[str, Any]) -> None:
    """Each tensor from its making to its end; what was there before does not count, nor do views."""
    weight, x = torch.ones(10, 30, requires_grad=True), torch.ones(5, 30)
    with programs["live_bytes"].LiveBytes() as alive:
        y = (x @ weight.t()).exp()  # the product is gone; the result is held for backward
        assert (alive.live, alive.peak) == (4 * 50, 2 * 4 * 50)
        z = y.sum()
        del y
        assert alive.live == 4 * 50 + 4
        z.backward()
        assert weight.grad is not None and alive.live == 4 * 300 + 4
        del z
        weight.grad = None
        assert alive.live == 0
        alive.restart()
        assert alive.peak == 0
    del weight, x
    assert math.isclose(alive.live, 0)


def test_tables_go_between_the_marks_of_a_page(programs: dict[str, Any], tmp_path: Path) -> None:
    begin, end = programs["speed_report"].MARKS
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    programs["speed_report"].put_into_page(page, "new\n")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        programs["speed_report"].put_into_page(page, "new\n")
    text = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert text.index(begin) < text.index(end)
