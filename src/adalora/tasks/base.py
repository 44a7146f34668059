"""What a task is: columns become targets and features, the model's outputs become metrics and answers.

A task is one file in this folder with a class marked ``@register("name")``. Tasks know neither PEFT nor the
allocator: ``head()`` says what the model's last layer must look like, in the words of a Transformers
configuration, and whoever trains takes it from there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from datasets import Dataset
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a task reads."""

    text: str
    text_pair: str | None
    label: str

    def of_text(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]


class Task(Protocol):
    """One family of tasks, fitted to the training rows."""

    headline: ClassVar[str]
    """The metric to name first."""

    metric_names: ClassVar[tuple[str, ...]]
    """All that ``metrics`` computes, in the order to show it in."""

    label_names: list[str] | None
    """The classes in the order of the model's outputs, or None."""

    def __init__(self, label_names: list[str] | None, column: str) -> None:
        """A task as an earlier run found it, for evaluation and prediction."""

    @classmethod
    def fit(cls, rows: Dataset, columns: Columns, label_names: Sequence[str] | None) -> Self:
        """Learn what the labels are. DataError when nothing can be learned from them."""
        ...

    def head(self) -> dict[str, Any]:
        """Settings of the model's configuration, such as ``num_labels``."""
        ...

    def targets(self, rows: Dataset) -> list[int] | list[float]:
        """What the model should answer for each row. DataError on a label that has no place in the task."""
        ...

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Quality of the outputs, [rows, labels]; nan where a metric is not defined."""
        ...

    def baseline(self, targets: np.ndarray) -> tuple[str, dict[str, float]]:
        """The best that one constant answer reaches: that answer in words, and its metrics."""
        ...

    def answers(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """What the outputs, [rows, labels], say about each row."""
        ...


_REGISTRY: dict[str, type[Task]] = {}
_T = TypeVar("_T")


def register(name: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: make a task known under ``name``."""

    def add(cls: type[_T]) -> type[_T]:
        _REGISTRY[name] = cls  # type: ignore[assignment]
        return cls

    return add


def names() -> list[str]:
    """Names of all tasks."""
    return sorted(_REGISTRY)


def get(name: str) -> type[Task]:
    """The task called ``name``; RecipeError naming the nearest when there is none."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, names(), n=1)
    advice = f"did you mean {near[0]}?" if near else f"known tasks are {', '.join(names())}"
    raise RecipeError(f"unknown task {name!r}: {advice}")


def check_columns(rows: Dataset, wanted: Sequence[str], source: str) -> None:
    """DataError unless every wanted column is there and has a value in every row."""
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}: its columns are {', '.join(rows.column_names)}"
        )
    for column in wanted:
        empty = [index for index, value in enumerate(rows[column]) if value is None]
        if empty:
            raise DataError(
                f"column {column!r} of {source} is empty in {len(empty)} of {len(rows)} rows "
                f"(the first is row {empty[0] + 1}): fill them in or leave them out"
            )


def check_text(rows: Dataset, columns: Columns, source: str) -> None:
    """DataError unless the text columns are there, hold text, and hold it in every row."""
    check_columns(rows, columns.of_text(), source)
    for column in columns.of_text():
        kind = getattr(rows.features[column], "dtype", "a list")
        if kind not in {"string", "large_string"}:
            raise DataError(f"column {column!r} of {source} should hold text, it holds {kind}")


def tokenize(rows: Dataset, columns: Columns, tokenizer: Any, max_length: int) -> Dataset:
    """The model's inputs for each row, cut at ``max_length`` tokens, not padded."""

    def encode(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        texts = (batch[column] for column in columns.of_text())
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    return rows.map(
        encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, load_from_cache_file=False
    )
