"""One class for each text, or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from typing_extensions import Self

from ..data import DataError
from .base import Columns, register


@register("classification")
@dataclass(frozen=True)
class Classification:
    """Accuracy, macro-averaged F1 and Matthews correlation over named classes."""

    headline: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    label_names: list[str]
    column: str
    trained: frozenset[str] | None = None
    """The classes that training rows had; None, of a task that is only evaluated: all of ``label_names``."""

    @classmethod
    def fit(cls, rows: Dataset, columns: Columns, label_names: Sequence[str] | None) -> Self:
        """The classes are ``label_names``, else those that the column declares, else those that occur."""
        values = _as_names(rows, columns.label)
        present = _in_order(set(values))
        if len(present) < 2:
            raise DataError(f"column {columns.label!r} holds only the class {present[0]!r}: training needs two or more")
        feature = rows.features[columns.label]
        declared = feature.names if isinstance(feature, ClassLabel) else present
        task = cls(list(label_names or declared), columns.label, frozenset(present))
        if len(set(task.label_names)) != len(task.label_names):
            raise DataError(f"label_names names a class twice: {', '.join(task.label_names)}")
        outside = _in_order(set(present) - set(task.label_names))
        if outside:
            names = _listed(task.label_names)
            raise DataError(f"column {columns.label!r} holds {_listed(outside)}, not among data.label_names: {names}")
        return task

    def head(self) -> dict[str, Any]:
        """One output for each class."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
            "problem_type": "single_label_classification",
        }

    def targets(self, rows: Dataset) -> list[int]:
        """Index of each row's class; DataError on a class that was not there in training."""
        index = {name: position for position, name in enumerate(self.label_names)}
        values = _as_names(rows, self.column)
        known = [name for name in self.label_names if self.trained is None or name in self.trained]
        unknown = _in_order(set(values) - set(known))
        if unknown:
            raise DataError(
                f"column {self.column!r} holds {_listed(unknown)}, not among the classes trained on: {_listed(known)}"
            )
        return [index[value] for value in values]

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Metrics of the most probable class."""
        return _metrics(outputs.argmax(axis=-1), targets)

    def baseline(self, targets: np.ndarray) -> tuple[str, dict[str, float]]:
        """Always answering the most frequent class of ``targets``."""
        majority = np.bincount(targets).argmax()
        return f"always {self.label_names[majority]!r}", _metrics(np.full_like(targets, majority), targets)

    def answers(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """The most probable class, its probability, and the probability of each class."""
        return [self._answer(row) for row in softmax(outputs.astype(np.float64), axis=-1)]

    def _answer(self, probabilities: np.ndarray) -> dict[str, Any]:
        best = int(probabilities.argmax())
        scores = dict(zip(self.label_names, probabilities.tolist(), strict=True))
        return {"label": self.label_names[best], "score": float(probabilities[best]), "scores": scores}


def _metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(targets, predicted)),
    }


def _as_names(rows: Dataset, column: str) -> list[str]:
    """The class of each row as text."""
    feature = rows.features[column]
    values = rows[column]
    if isinstance(feature, ClassLabel):
        if any(value < 0 for value in values):
            raise DataError(f"column {column!r} hides its labels (-1), as test splits do: choose another split")
        return [feature.names[value] for value in values]
    if any(isinstance(value, list | dict) for value in values):
        raise DataError(f"column {column!r} should hold one class for each row, it holds {feature}")
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise DataError(f"column {column!r} holds numbers such as {values[0]}, not classes: use task regression")
    return [str(int(value)) if isinstance(value, float) else str(value) for value in values]


def _in_order(classes: set[str]) -> list[str]:
    """Numbers by value, all else by the alphabet."""
    if all(name.lstrip("-").isdecimal() for name in classes):
        return sorted(classes, key=int)
    return sorted(classes)


def _listed(classes: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(repr, classes[:most]))
    return shown if len(classes) <= most else f"{shown} and {len(classes) - most} more"
