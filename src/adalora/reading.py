"""What a recipe says to train on: its task, and the rows on both sides, read and checked. Nothing is written."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from datasets import Dataset

from . import methods, tasks
from .data import DataError, Split, digest, has_splits, hold_out, read_rows, sample
from .facts import Facts
from .pretrained import load_tokenizer, longest
from .recipe import METHOD_SECTIONS, DataSection, Recipe, RecipeError, validated
from .tasks import Stratified, Task
from .tasks.base import check_columns

_PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets")


class Material(NamedTuple):
    """All that a recipe reads but its model."""

    recipe: Recipe  # completed, with what was found out
    task: Task  # fitted
    tokenizer: Any
    train: Dataset  # rows
    evaluation: Dataset  # rows
    more_evaluations: dict[str, Dataset]  # rows, by split
    baseline: tuple[str, dict[str, float]] | None


def read(recipe: Recipe) -> Material:
    """The rows of a recipe, and what the task learns from them.

    Raises an AdaLoraError that says what to change.
    """
    recipe = completed(recipe)
    data = recipe.data
    tokenizer = load_tokenizer(recipe.model, data.max_length)
    if data.max_length is None:
        data.max_length = min(tasks.get(recipe.task).max_length, longest(recipe.model, tokenizer))
    task = task_of(recipe)
    divided = _divided(recipe, task) if data.holdout is not None else None  # once: it looks at every row
    train_rows = sample(divided.train if divided else _training_rows(recipe, task), data.max_train_rows)
    task = task.fit(train_rows)
    eval_rows = sample(divided.held_out, data.max_eval_rows) if divided else read_evaluation_rows(recipe, task)
    baseline = task.baseline(eval_rows)
    more_rows = {split: read_evaluation_rows(recipe, task, split=split) for split in data.more_eval_splits}
    data.label_names = task.label_names
    recipe.facts = Facts(
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        train_digest=digest(train_rows, train_rows.column_names),
        versions={name: importlib.import_module(name).__version__ for name in _PACKAGES},
        learning_rate=None,
    )
    return Material(recipe, task, tokenizer, train_rows, eval_rows, more_rows, baseline)


def completed(recipe: Recipe) -> Recipe:
    """A copy whose columns and method are spelled out where the recipe leaves them to its task and method.

    Raises:
        RecipeError: an unknown task or method, or a section that the method does not read.
    """
    columns, section = tasks.get(recipe.task).columns, methods.get(recipe.method).section
    for unused in METHOD_SECTIONS:
        if unused in recipe.model_fields_set and unused != section:
            reads = f"reads the section `{section}`" if section else "has no settings"
            raise RecipeError(f"the section `{unused}` has no meaning for method {recipe.method}, which {reads}")
    recipe = recipe.model_copy(deep=True, update={section: getattr(recipe, section)} if section else {})
    data = recipe.data
    data.text = data.text or columns.text
    data.text_pair = data.text_pair or columns.text_pair
    data.label = data.label or columns.label
    return recipe


def task_of(recipe: Recipe) -> Task:
    """The task of a completed recipe."""
    kind, data = tasks.get(recipe.task), recipe.data
    options = validated(kind.options, recipe.options, f"task {recipe.task}", "options.")
    assert data.text is not None and data.label is not None and data.max_length is not None  # completed
    columns = tasks.Columns(data.text, data.text_pair, data.label)
    return kind(tasks.Setup(columns, data.label_names, data.max_length, options))


def read_evaluation_rows(recipe: Recipe, task: Task, source: str | None = None, split: str | None = None) -> Dataset:
    """The rows to evaluate on, those of the recipe unless a source or a split is given, with the columns checked.

    Of another source all rows are taken. Raises DataError when a split is asked for of a source that holds none.
    """
    data = recipe.data
    place = source or data.eval or data.train
    if data.holdout is not None and source is None and split is None:
        return sample(_divided(recipe, task).held_out, data.max_eval_rows)
    if split is not None:
        _check_holds(place, split)
    elif source is None:
        _check_split(place, data, "eval_split")
    rows = read_rows(place, split or data.eval_split, data.config)
    task.check(rows, place)
    return sample(rows, data.max_eval_rows) if source is None else rows


def _training_rows(recipe: Recipe, task: Task) -> Dataset:
    """All rows of a source of their own to train on, checked, so that a fault is in the row that it names."""
    data = recipe.data
    if data.eval is None and not has_splits(data.train):
        raise DataError(
            f"{data.train} holds no splits: hold some of its rows out, data.holdout (--holdout 0.1), or give the "
            "held-out rows in another, data.eval (--eval)"
        )
    return _checked(recipe, task)


def _checked(recipe: Recipe, task: Task) -> Dataset:
    data = recipe.data
    _check_split(data.train, data, "train_split")
    rows = read_rows(data.train, data.train_split, data.config)
    task.check(rows, data.train)
    return rows


def _divided(recipe: Recipe, task: Task) -> Split:
    """The rows of the training source, all of them checked, in those to train on and those held out."""
    assert recipe.data.holdout is not None
    return divide(_checked(recipe, task), recipe.data.holdout, recipe.data, task)


def divide(rows: Dataset, size: float, data: DataSection, task: Task) -> Split:
    """``rows`` with ``size`` of them held out, by what ``data`` says that stays together."""
    check_columns(rows, data.holdout_by or [], f"data.holdout_by: {data.train}")
    read = [column for column in (data.text, data.text_pair) if column and column in rows.column_names]
    together = [[column] for column in data.holdout_by or ()] or [read or rows.column_names]
    return hold_out(rows, size, together, task.strata(rows) if isinstance(task, Stratified) else None)


def _check_split(source: str, data: DataSection, key: str) -> None:
    """A split that the recipe names must be one; the default stands for all rows of a source without splits."""
    if getattr(data, key) != DataSection.model_fields[key].default:
        _check_holds(source, getattr(data, key))


def _check_holds(source: str, split: str) -> None:
    if not has_splits(source):
        raise DataError(
            f"{source} holds no splits, so no {split!r}: leave the split out, or give a folder with a file for each "
            f"split ({split}.csv, ...)"
        )
