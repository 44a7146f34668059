"""The runner: real processes that train, break, are killed and go on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from adalora.bench.cells import record_of
from adalora.bench.display import time_left
from adalora.bench.errors import BenchError
from adalora.bench.grid import Group, read_grid
from adalora.bench.pools import PRELOADED, LocalPool, places
from adalora.bench.records import Record
from adalora.bench.runner import Bench, collect, run_bench
from adalora.files import holding
from adalora.runs import RunFolder

from .grids import grid as grid_of
from .test_grid import changed

Write = Callable[[Mapping[str, Any]], Path]


def run(path: Path, **settings: Any) -> tuple[Bench, str]:
    """A bench to its end, and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    bench = run_bench(path, console=console, **settings)
    return bench, console.file.getvalue()  # type: ignore[attr-defined]


def times(output: Path) -> dict[Path, int]:
    """When each result was written."""
    return {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}


@contextmanager
def once(condition: Callable[[], Any], action: Callable[[Any], None]) -> Iterator[None]:
    """Meanwhile, do something as soon as ``condition`` gives something to do it with."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            found = condition()
            if found:
                action(found)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def pid_of(cell: Path) -> int | None:
    """The process of a cell that has started to train."""
    note = cell / "cell.json"
    return int(json.loads(note.read_text())["pid"]) if note.is_file() else None


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``condition`` gives, as soon as it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_a_grid_from_beginning_to_end(tiny_grid: dict[str, Any], write: Write) -> None:
    """Every cell is an ordinary run; the best rate is reported; nothing is run twice; a new seed is run alone; a cell
    with another recipe is not mixed with the old ones."""
    path = write(tiny_grid)
    bench, said = run(path, workers=2)
    output = Path(bench.grid.output)
    assert len(bench.records) == bench.grid.total == 6 and not bench.lost
    assert [record.role for record in bench.records] == ["choose"] * 4 + ["report"] * 2
    lines = (output / "results.jsonl").read_text().splitlines()
    assert [Record(**json.loads(line)) for line in lines] == bench.records == collect(read_grid(path)).records
    for record in bench.records:
        recipe = RunFolder(output / record.folder).check_trained()
        assert (recipe.method, recipe.seed) == (record.method, record.seed)
        assert recipe.training.learning_rate == record.learning_rate
        assert record.state == "done" and 0 <= record.score <= 1 and record.headline == "accuracy"
        assert not record.lower_is_better
        assert record.seconds and record.cpu_seconds and record.peak_bytes and not record.resumed
        assert record.peak_bytes > 2**27  # torch alone takes more
        assert "step 4 of 4" in (output / record.folder / "log.txt").read_text()
        assert not list((output / record.folder).glob("checkpoints/*"))
    lora = next(record for record in bench.records if record.method == "lora")
    assert lora.parameters["adapter_saved"] == 2 * 2 * 64 == sum(lora.ranks.values()) * 64
    for method in ("lora", "head"):
        scores = {r.learning_rate: r.score for r in bench.records if (r.method, r.role) == (method, "choose")}
        best = min(rate for rate in scores if scores[rate] == max(scores.values()))
        assert [r.learning_rate for r in bench.records if (r.method, r.role) == (method, "report")] == [best]
    lines = said.splitlines()
    assert lines[0].startswith("tiny: 6 cells. Results in ") and len(lines) == 7
    assert lines[1].startswith("[1 of 6] reviews, ") and "; 1 done, 5 left, about " in lines[1]
    assert lines[-1].startswith("[6 of 6] reviews, ") and lines[-1].endswith("; 6 done")

    before = times(output)
    again, said = run(path)
    assert again.records == bench.records and times(output) == before and said == ""

    more, said = run(write(changed(tiny_grid, methods={"head": None}, seeds__report=[1, 2])))
    assert "tiny: 4 cells, of which 3 are finished" in said
    assert [record.seed for record in more.records] == [0, 0, 1, 2]
    assert times(output).items() >= before.items()

    before = times(output)
    rates, said = run(write(changed(tiny_grid, methods={"head": None}, learning_rates=[5e-2, 1e-3, 1e30])))
    assert "tiny: 4 cells, of which 2 are finished" in said
    assert [record.state for record in rates.records] == ["done"] * 4
    assert len(times(output)) == len(before) + 1 and times(output).items() >= before.items()

    with pytest.raises(BenchError, match=r"training\.weight_decay was 0\.0, is 0\.5\. Change it back, or .*`output`"):
        run(write(changed(tiny_grid, base__training__weight_decay=0.5)))


def test_broken_cells_do_not_stop_the_others(tiny_grid: dict[str, Any], write: Write) -> None:
    """An error, a diverging loss, a killed process: each is recorded with its reason, and run again only when asked
    for, from the beginning, with the recipe as it is then."""
    methods: dict[str, Any] = {
        "nowhere": {"method": "lora", "lora": {"target_modules": ["nothing"]}},
        "killed": {"method": "head", "training": {"max_steps": 400}},
        "head": None,
    }
    grid = changed(tiny_grid, methods=methods, budgets=[], learning_rates=[1e-3])
    path = write(grid)
    output = path.parent / "out"
    victim = output / "cells/reviews/killed/no-budget/lr-0.001/seed-1"
    with once(lambda: pid_of(victim), lambda pid: os.kill(pid, signal.SIGKILL)):
        bench, said = run(path)
    nowhere, killed, head = bench.records
    assert (nowhere.state, killed.state, head.state) == ("failed", "failed", "done")
    assert nowhere.failure and nowhere.failure.startswith("RecipeError: ") and "nothing" in nowhere.failure
    assert killed.failure == "its process was ended by SIGKILL, as a system does that is out of memory"
    assert "nowhere, learning rate 0.001, seed 1: failed: RecipeError" in said and "2 failed" in said
    failure = json.loads((output / nowhere.folder / "failure.json").read_text())
    assert any("RecipeError" in line for line in failure["tail"])
    assert "Traceback" in (output / nowhere.folder / "log.txt").read_text()

    before = times(output)
    again, _ = run(path)
    assert again.records == bench.records and times(output) == before

    methods["nowhere"]["lora"]["target_modules"] = ["query"]
    mended, said = run(write(changed(grid, methods=methods)))  # another recipe, so it has not been run yet
    assert [record.state for record in mended.records] == ["done", "failed", "done"] and "2 are finished" in said
    methods["killed"]["training"]["max_steps"] = 4
    fixed, _ = run(write(changed(grid, methods=methods)), retry=True)
    assert [record.state for record in fixed.records] == ["done"] * 3
    assert not fixed.records[1].resumed and times(output).items() >= before.items()


def test_a_broken_cell_run_again_leaves_finished_ones_alone(tiny_grid: dict[str, Any], write: Write) -> None:
    """Though it takes part in choosing the rate that they were run at."""
    path = write(changed(tiny_grid, methods={"head": None}))
    bench, _ = run(path)
    output = Path(bench.grid.output)
    lost = output / next(r.folder for r in bench.records if r.role == "choose" and r.learning_rate != 1e-3)
    asked = json.loads((lost / "cell.json").read_text())["asked"]
    shutil.rmtree(lost)
    lost.mkdir()
    (lost / "failure.json").write_text(json.dumps({"message": "the disk was full", "tail": [], "asked": asked}))
    reported = {path: time for path, time in times(output).items() if "seed-1" in str(path)}
    again, _ = run(path, retry=True)
    assert [record.score for record in again.records] == [record.score for record in bench.records]
    assert reported and times(output).items() >= reported.items()


def test_the_home_folder_may_hold_a_grid(
    tiny_grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    grid = changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], output="~/[v2]")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    bench, _ = run(tmp_path / "grid.yaml")
    assert [record.state for record in bench.records] == ["done"] and not (tmp_path / "~").exists()
    assert (tmp_path / "[v2]" / bench.records[0].folder / "cell.json").is_file()


def test_a_cluster_that_loses_its_nodes_is_waited_for(
    tiny_grid: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for a while: the bench neither ends early nor counts on workers that are not there."""
    room = iter([0, 0, 1])
    monkeypatch.setattr(LocalPool, "capacity", lambda _: next(room, 1))
    monkeypatch.setattr("adalora.bench.runner._POLL", 0.1)
    bench, _ = run(write(changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], seeds__report=[1, 2])))
    assert [record.state for record in bench.records] == ["done"] * 2
    assert time_left([Group("a", "b", None)], bench.records, 0) is not None


def test_a_group_without_any_result_is_not_reported(tiny_grid: dict[str, Any], write: Write) -> None:
    """Both rates diverge, so there is none to report; the other method is not held up."""
    lora = {"learning_rates": [1e30, 1e31], "training": {"logging_steps": 1}}
    bench, _ = run(write(changed(tiny_grid, methods__lora=lora)), workers=2)
    assert bench.lost == [Group("reviews", "lora", "rank 1")]
    assert [(r.method, r.role, r.state) for r in bench.records if r.method == "lora"] == [
        ("lora", "choose", "failed")
    ] * 2
    assert [r.state for r in bench.records if r.method == "head"] == ["done"] * 3
    assert "lower training.learning_rate" in str(bench.records[0].failure)


def test_a_cell_that_takes_too_long_is_stopped(tiny_grid: dict[str, Any], write: Write) -> None:
    grid = changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], resources={"minutes": 0.1})
    bench, _ = run(write(changed(grid, base__training__max_steps=1_000_000)))
    (record,) = bench.records
    assert record.failure == "it was stopped after 6 s, the limit of resources.minutes"
    tail = json.loads((Path(bench.grid.output) / record.folder / "failure.json").read_text())["tail"]
    assert any(" in run_cell" in line for line in tail)  # where it was: the dump of its stack


def test_an_interrupted_bench_stops_its_cells_and_goes_on_later(tiny_grid: dict[str, Any], write: Write) -> None:
    grid = changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], base__training__max_steps=80)
    path = write(changed(grid, base__training__save_steps=10))
    cell = path.parent / "out/cells/reviews/head/no-budget/lr-0.001/seed-1"
    with (
        once(lambda: list(cell.glob("checkpoints/*/manifest.json")), lambda _: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(KeyboardInterrupt),
    ):
        run(path)
    pid = pid_of(cell)
    assert pid is not None and not is_alive(pid)
    assert not (cell / "failure.json").exists() and not (cell / "metrics.json").exists()
    bench, _ = run(path)
    assert [(record.state, record.resumed) for record in bench.records] == [("done", True)]
    assert json.loads((cell / "metrics.json").read_text())["resumed_from_step"] >= 10


def test_killed_in_the_middle_and_started_again(tiny_grid: dict[str, Any], write: Write) -> None:
    """A bench that is killed takes its cells with it; the next one finishes without repeating a finished cell."""
    grid = changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3], seeds__report=[1, 2, 3])
    path = write(changed(grid, base__training__max_steps=30, base__training__save_steps=10))
    folder = path.parent / "out/cells/reviews/head/no-budget/lr-0.001"
    program = f"if __name__ == '__main__':\n from adalora.bench.runner import *\n run_bench(Path({str(path)!r}))"
    (path.parent / "bench.py").write_text(program)
    bench = subprocess.Popen([sys.executable, path.parent / "bench.py"], start_new_session=True)
    try:
        until(lambda: list((folder / "seed-2").glob("checkpoints/*/manifest.json")))
    finally:
        os.killpg(bench.pid, signal.SIGKILL)
        bench.wait()
    running = pid_of(folder / "seed-2")
    until(lambda: running is not None and not is_alive(running))
    before = times(path.parent / "out")
    assert list(before) == [folder / "seed-1" / "metrics.json"]

    finished, said = run(path)
    assert "tiny: 3 cells, of which 1 are finished" in said
    assert [(r.seed, r.state, r.resumed) for r in finished.records] == [
        (1, "done", False),
        (2, "done", True),
        (3, "done", False),
    ]
    assert times(path.parent / "out").items() > before.items()


def test_one_bench_in_one_folder(tiny_grid: dict[str, Any], write: Write) -> None:
    path = write(tiny_grid)
    (path.parent / "out").mkdir()
    with holding(path.parent / "out" / ".lock"), pytest.raises(BenchError, match=rf"process {os.getpid()} on "):
        run(path)


def test_runs_of_others_are_not_touched(tiny_grid: dict[str, Any], write: Write) -> None:
    path = write(changed(tiny_grid, methods={"head": None}, learning_rates=[1e-3]))
    cell = path.parent / "out/cells/reviews/head/no-budget/lr-0.001/seed-1"
    cell.mkdir(parents=True)
    (cell / "metrics.json").write_text("{}")
    with pytest.raises(BenchError, match="holds a run that no bench started"):
        run(path)


def test_what_is_left_is_estimated_from_its_like() -> None:
    def record(task: str, method: str, seconds: float | None) -> Record:
        return Record(task, method, None, 1e-3, 1, "report", "done", "", "accuracy", False, seconds=seconds)

    records = [record("a", "lora", 10), record("a", "lora", 20), record("a", "full", 100), record("b", "full", None)]
    left = [Group("a", "lora", None), Group("a", "dora", None), Group("b", "lora", None)]
    mean = 130 / 3
    assert time_left(left, records, 2) == pytest.approx((15 + mean + mean) / 2)
    assert time_left(left, records[3:], 2) is None


def test_what_the_server_of_cells_preloads_exists() -> None:
    """The server says nothing of a name that it does not find."""
    assert [name for name in PRELOADED if find_spec(name) is None] == []


@pytest.mark.parametrize(
    ("task", "headline", "lower"), [("instruction", "perplexity", True), ("regression", "pearson", False)]
)
def test_a_record_says_whether_less_of_its_headline_is_better(
    task: str, headline: str, lower: bool, tmp_path: Path
) -> None:
    """As the cell's task does. Metrics of a further split have its name."""
    of = grid_of(tasks={"it": {"task": task, "data": {"train": "rows"}}})
    cell = next(of.report_cells(Group("it", "lora", "rank 2"), 1e-3))
    folder = tmp_path / cell.folder
    folder.mkdir(parents=True)
    measured = {"metrics": {headline: 9.0}, "more_metrics": {"other": {headline: 8.0}}, "seconds": 1.0}
    (folder / "metrics.json").write_text(
        json.dumps({**measured, "parameters": {}, "ranks": {}, "versions": {"torch": "2.6"}})
    )
    (folder / "cell.json").write_text('{"resumed": false}')
    record = record_of(cell, tmp_path)
    assert record is not None and (record.headline, record.score) == (headline, 9.0)
    assert record.lower_is_better is lower and record.metrics[f"{headline}, other"] == 8.0


def test_cells_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert places(2, 0) == ["", ""]
    assert places(8, 1) == ["0", "1", "2", "3"]
    assert places(3, 2) == ["0,1", "2,3"]
    assert places(5, 0.5) == ["0", "1", "2", "3", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,GPU-8f")  # what a scheduler gave us
    assert places(8, 1) == ["2", "3", "5", "GPU-8f"] and places(3, 2) == ["2,3", "5,GPU-8f"]
    with pytest.raises(BenchError, match="a cell wants 5 GPUs, and this machine has 4"):
        places(1, 5)
