"""What a finished run is good for: evaluate it, and let it answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn

from . import methods
from .data import DataError, read_lines, read_rows
from .pretrained import load_model, load_tokenizer
from .reading import completed, read_evaluation_rows, task_of
from .recipe import Recipe
from .runs import RunFolder
from .tasks import Answer, Task


class Evaluation(NamedTuple):
    """Metrics of a run on some rows, beside those of an answer that takes no model, where the task has one."""

    method: str
    source: str
    rows: int
    metrics: dict[str, float]
    baseline_answer: str
    baseline: dict[str, float]


def evaluate_run(folder: Path, source: str | None = None, split: str | None = None, batch_size: int = 64) -> Evaluation:
    """Metrics of the run in ``folder`` on its own held-out rows, or on all of ``source``.

    Raises RunError when there is no finished run, DataError when the rows do not fit its task or the source has no such
    split.
    """
    run = _Run.of(folder)
    rows = read_evaluation_rows(run.recipe, run.task, source, split)
    metrics = run.task.metrics(run.answers(rows, batch_size), rows)
    answer, baseline = run.task.baseline(rows) or ("", {})
    name = source or run.recipe.data.eval or run.recipe.data.train
    return Evaluation(run.recipe.method, name, len(rows), metrics, answer, baseline)


def predict_run(folder: Path, rows: Dataset, batch_size: int = 64) -> list[Answer]:
    """What the run in ``folder`` says about each of the rows that ``rows_of_texts`` or ``rows_of_file`` made.

    Raises RunError when there is no finished run.
    """
    return _Run.of(folder).answers(rows, batch_size) if len(rows) else []


def rows_of_texts(folder: Path, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Dataset:
    """Rows that the run in ``folder`` can answer.

    Raises RunError when there is no finished run, DataError when second texts are missing or too many.
    """
    return _Run.of(folder).task.rows_of(texts, pairs)


def rows_of_file(folder: Path, file: Path) -> Dataset:
    """Rows that the run in ``folder`` can answer: lines of a .txt, or the columns of a data file that it was trained
    on, without what it should answer."""
    run = _Run.of(folder)
    task, target = run.task, run.recipe.data.label
    if not file.is_file() and str(file) != "-":
        raise DataError(f"no file {file}: expected lines of text in a .txt, or on standard input (-), or a data file")
    if file.suffix.lower() == ".txt" or str(file) == "-":
        return task.rows_of(read_lines(file), None)
    rows = read_rows(str(file), "train")
    rows = rows.remove_columns([target]) if target in rows.column_names else rows
    task.check(rows, str(file), with_targets=False)
    return rows


def shown(folder: Path, rows: Dataset) -> list[dict[str, Any]]:
    """What the model reads of each row, under the names of the command line's options."""
    columns = _Run.of(folder).task_columns
    return [{name: row[column] for name, column in columns.items() if column in row} for row in rows]


class _Run(NamedTuple):
    """A finished run."""

    folder: Path
    recipe: Recipe
    task: Task

    @classmethod
    def of(cls, folder: Path) -> _Run:
        recipe = completed(RunFolder(folder).check_trained())
        return cls(folder, recipe, task_of(recipe))

    @property
    def task_columns(self) -> dict[str, str]:
        data = self.recipe.data
        pair = {"text_pair": data.text_pair} if data.text_pair else {}
        return {"text": str(data.text), **pair}

    def answers(self, rows: Dataset, batch_size: int) -> list[Answer]:
        model, tokenizer = self.load()
        return self.task.predict(model, tokenizer, rows, batch_size)

    def load(self) -> tuple[nn.Module, Any]:
        """The model with what the run learned, ready to answer, and its tokenizer."""
        recipe = self.recipe
        tokenizer = load_tokenizer(recipe.model, recipe.data.max_length)
        method = methods.get(recipe.method)
        base = load_model(recipe.model, self.task, tokenizer, method.base_precision)
        model = method.load(base, recipe, self.folder)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
