"""One cell: a run in a process of its own, and what its folder says about it afterwards.

A cell's folder is that of an ordinary run, with three files more: ``log.txt``, what the process printed; ``cell.json``,
the recipe as the grid asked for it, where it ran and what that took; ``failure.json``, the recipe and why there is no
result.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import tasks
from ..files import write_json
from ..recipe import METHOD_SECTIONS, RecipeError, differences, dump, flat, validate
from ..recipe_text import parse_yaml
from ..runs import RunFolder
from .collapse import is_collapsed
from .errors import BenchError
from .grid import Cell
from .records import Record

Condition = Literal["done", "failed", "interrupted", "new"]

_FREE_TO_CHANGE = {"output", "training.logging_steps", "training.save_total_limit", "training.report_to"}
"""Keys of a recipe that may differ from those of a cell that was run: they do not reach the weights."""

_TAIL = 25  # lines of a log or a traceback that failure.json repeats


class CellFolder(NamedTuple):
    """The files of one cell."""

    path: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def early_log(self) -> Path:
        """Beside the folder, which does not exist until the run has been checked."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def note(self) -> Path:
        return self.path / "cell.json"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def condition(self) -> Condition:
        """What became of the cell."""
        if self.run.metrics.is_file():
            return "done"
        if self.failure.is_file():
            return "failed"
        return "interrupted" if self.run.recipe.is_file() and self.note.is_file() else "new"


@dataclass(frozen=True)
class Job:
    """What a cell's process is told; plain values, so that it can go to another machine."""

    recipe: dict[str, Any]
    resume: bool
    directory: str  # where relative paths of the recipe start
    threads: int
    seconds: float | None  # after which the process ends itself


def job_of(cell: Cell, resume: bool, threads: int, minutes: float | None) -> Job:
    """The job that runs ``cell``."""
    return Job(_as_asked(cell), resume, str(Path.cwd()), threads, None if minutes is None else 60 * minutes)


def _as_asked(cell: Cell) -> dict[str, Any]:
    recipe: dict[str, Any] = parse_yaml(dump(cell.recipe), str(cell))
    return recipe


# --- in the cell's process ---------------------------------------------------------------------------


def run_cell(job: Job) -> None:
    """Train, evaluate, and say in the folder how it went. All that is printed goes to its log."""
    began = time.monotonic()
    os.chdir(job.directory)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = validate(job.recipe, "cell")
    folder = CellFolder(Path(recipe.output))
    _print_to(folder.log if job.resume else folder.early_log)
    if job.seconds is not None:
        faulthandler.dump_traceback_later(job.seconds, exit=True)
    try:
        _train(job, folder, began)
    except Exception as error:
        traceback.print_exc()
        tail = traceback.format_exc().splitlines()[-_TAIL:]
        _note_failure(folder, job.recipe, f"{type(error).__name__}: {error}", tail)
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()


def _train(job: Job, folder: CellFolder, began: float) -> None:
    import datasets
    import torch
    import transformers

    from ..announcement import budget_of
    from ..preparation import prepare
    from ..progress import ShowProgress
    from ..report.terminal import console
    from ..training import train

    torch.set_num_threads(job.threads)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    prepared = prepare(validate(job.recipe, "cell"), "resume" if job.resume else "new")
    folder.path.mkdir(parents=True, exist_ok=True)
    if not job.resume:
        folder.early_log.rename(folder.log)
    note = {"asked": job.recipe, "resumed": job.resume, "host": socket.gethostname(), "pid": os.getpid()}
    write_json(folder.note, note)
    train(prepared, [ShowProgress(console(), prepared.task.metric_names, prepared.task.headline, budget_of(prepared))])
    folder.run.drop_checkpoints(after=-1)
    write_json(folder.note, note | _usage(began))


def _usage(began: float) -> dict[str, Any]:
    """What the process has taken so far."""
    from ..training import peak_memory

    return {
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(time.process_time(), 2),
        **peak_memory(),
    }


def _print_to(log: Path) -> None:
    """Send what this process and its libraries print to the end of ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115


# --- in the bench's process --------------------------------------------------------------------------


def check_asked(cell: Cell, folder: CellFolder) -> None:
    """BenchError when the folder holds a run of another recipe than the grid asks for now."""
    try:
        asked = _read(folder.note)["asked"]
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"{folder.path} holds a run that no bench started: give the grid another `output`") from error
    try:
        changed = _changed(asked, cell)
    except RecipeError as error:
        raise BenchError(f"{error}. Another version of adalora wrote it: give the grid another `output`") from error
    if changed:
        raise BenchError(
            f"the grid asks for another run than the one in {folder.path}: {'; '.join(changed)}. "
            "Change it back, or give the grid another `output`"
        )


def digest_of(cell: Cell) -> str:
    """Of all that the grid asks of the cell: keys that do not reach the weights, and keys without a value, aside. The
    same on every machine, as long as the grid names its data and models by the same words."""
    recipe = cell.recipe
    absent = {section for section in METHOD_SECTIONS if section not in recipe.model_fields_set}
    asked = dict(flat(recipe.model_dump(exclude_none=True, exclude=absent, mode="json")))
    told = {key: value for key, value in asked.items() if key not in _FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def failed_otherwise(cell: Cell, output: Path) -> bool:
    """Whether the cell's folder says why another recipe failed than the grid asks for now: that is no result of it."""
    try:
        return bool(_changed(_read(CellFolder(output / cell.folder).failure)["asked"], cell))
    except (KeyError, RecipeError):
        return True


def _changed(asked: Mapping[str, Any], cell: Cell) -> list[str]:
    return differences(validate(asked, str(cell)), cell.recipe, ignore=_FREE_TO_CHANGE)


def clear(folder: CellFolder) -> None:
    """Remove what is left of a cell that has to start at the beginning."""
    folder.early_log.unlink(missing_ok=True)
    if folder.path.is_dir():
        shutil.rmtree(folder.path)


def settle(cell: Cell, output: Path, ending: str | None) -> None:
    """After the process: see to it that the folder holds a result, or says why not. ``ending``: how the process ended,
    where it could not say so itself."""
    folder = CellFolder(output / cell.folder)
    if folder.condition in {"interrupted", "new"}:
        folder.path.mkdir(parents=True, exist_ok=True)
        why = ending or "its process ended without a result"
        _note_failure(folder, _as_asked(cell), why, _tail_of_log(folder))
    if folder.early_log.is_file():
        folder.early_log.replace(folder.log)


def record_of(cell: Cell, output: Path) -> Record | None:
    """What the cell's folder says; None while there is neither a result nor a failure."""
    folder = CellFolder(output / cell.folder)
    if folder.condition not in {"done", "failed"}:
        return None
    task, method, budget = cell.group
    kind = tasks.get(cell.recipe.task)
    found = Record(
        task=task,
        method=method,
        budget=budget,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        role=cell.role,
        state="done" if folder.condition == "done" else "failed",
        folder=cell.folder,
        headline=kind.headline,
        lower_is_better=kind.headline in kind.lower_is_better,
        recipe=digest_of(cell),
    )
    if found.state == "failed":
        return Record(**asdict(found) | {"failure": _read(folder.failure)["message"]})
    metrics, note = _read(folder.run.metrics), _read(folder.note)
    usage = {key: note.get(key) for key in ("cpu_seconds", "peak_bytes", "gpu_peak_bytes")}
    seconds = note.get("seconds", metrics["seconds"])  # without its own when it was killed right after training
    parts = {key: metrics[key] for key in ("metrics", "parameters", "ranks", "versions")}
    baseline = (metrics.get("baseline") or {}).get("metrics")
    parts |= {
        "loss": metrics.get("loss"),
        "collapsed": is_collapsed(kind, metrics["metrics"], baseline),
        "steps": metrics.get("steps"),
        "start_steps": metrics.get("start_steps", 0.0),
        "curve": [[point["step"], point["metrics"].get(kind.headline)] for point in metrics.get("curve", ())],
    }
    for split, values in metrics["more_metrics"].items():  # such as the mismatched half of MNLI
        parts["metrics"] |= {f"{name}, {split}": value for name, value in values.items()}
    return Record(**asdict(found) | usage | parts | {"seconds": seconds, "resumed": note["resumed"]})


def _note_failure(folder: CellFolder, asked: Mapping[str, Any], message: str, tail: list[str]) -> None:
    write_json(folder.failure, {"message": " ".join(message.split()), "tail": tail, "asked": asked})


def _tail_of_log(folder: CellFolder) -> list[str]:
    for log in (folder.early_log, folder.log):
        if log.is_file():
            return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    return []


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
