"""``adalora report``: one page of one run or of several, finished or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .conftest import Finished

Run = Callable[..., Finished]


def test_a_run_writes_its_page_and_it_can_be_drawn_anew(adalora: Run, finished: Path) -> None:
    """With the analysis of its checkpoints this time, which the training's own page goes without."""
    shutil.copytree(finished, "run")
    page = Path("run/report.html")
    assert "Direction and magnitude" not in page.read_text(encoding="utf-8")
    page.unlink()
    done = adalora("report", "run")
    assert (done.code, done.out, done.err) == (0, f"{page}\n", "")
    assert "Direction and magnitude" in page.read_text(encoding="utf-8")
    found = json.loads(Path("run/directions.json").read_text())
    assert len(found["steps"]) >= 2 and len(found["layers"]) == 12


def test_several_runs_share_a_page(adalora: Run, finished: Path) -> None:
    shutil.copytree(finished, "one")
    shutil.copytree(finished, "two")
    done = adalora("report", "one", "two", "--no-directions", "-o", "both.html")
    assert done.out == "both.html\n", done.err
    page = Path("both.html").read_text(encoding="utf-8")
    assert page.count('role="tab" id=') == 2 and not Path("one/directions.json").exists()


def test_a_run_that_is_not_finished_has_a_page(adalora: Run, finished: Path) -> None:
    """It says so, and what could not be analysed is said beside it."""
    shutil.copytree(finished, "run")
    for name in ("metrics.json", "report.html"):
        Path("run", name).unlink()
    shutil.rmtree("run/checkpoints")
    done = adalora("report", "run")
    assert done.code == 0 and done.err.startswith("run: no magnitudes and directions: ")
    assert "not finished" in Path("run/report.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_refused(adalora: Run) -> None:
    Path("empty").mkdir()
    done = adalora("report", "empty")
    assert done.code == 2 and "empty is not the folder of a run" in done.err
    assert not list(Path("empty").iterdir())


def test_a_page_goes_with_the_run_that_is_replaced(adalora: Run, finished: Path, tiny_run: list[object]) -> None:
    shutil.copytree(finished, "run")
    assert adalora("report", "run").code == 0
    done = adalora("train", *tiny_run, "-o", "run", "--overwrite", "--seed", "1")
    assert done.code == 0, done.err
    assert not Path("run/directions.json").exists()
    assert "Direction and magnitude" not in Path("run/report.html").read_text(encoding="utf-8")
