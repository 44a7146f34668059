"""One class for each text, or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Setup, register
from .whole_text import WholeText


@register("classification")
class Classification(WholeText):
    """Accuracy, macro-averaged F1 and Matthews correlation over named classes."""

    headline: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")

    label_names: list[str] | None
    """``data.label_names``, or what ``fit`` found."""
    trained: frozenset[str] | None = None
    """The classes that training rows had; None, of a task that is only evaluated: all of ``label_names``."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.label_names = setup.label_names
        if len(set(setup.label_names or ())) != len(setup.label_names or ()):
            raise RecipeError(f"data.label_names names a class twice: {', '.join(setup.label_names or ())}")

    def fit(self, rows: Dataset) -> Self:
        """The classes are ``label_names``, else those that the column declares, else those that occur."""
        column = self.setup.columns.label
        present = in_order(set(_as_names(rows, column)))
        if len(present) < 2:
            raise DataError(f"column {column!r} holds only the class {present[0]!r}: training needs two or more")
        feature = rows.features[column]
        declared = feature.names if isinstance(feature, ClassLabel) else present
        task = type(self)(replace(self.setup, label_names=list(self.label_names or declared)))
        task.trained = frozenset(present)
        outside = in_order(set(present) - set(task._names))
        if outside:
            names = listed(task._names)
            raise DataError(f"column {column!r} holds {listed(outside)}, not among data.label_names: {names}")
        return task

    def strata(self, rows: Dataset) -> list[str]:
        """The class of each row, of any source."""
        return _as_names(rows, self.setup.columns.label)

    def head(self) -> dict[str, Any]:
        """One output for each class."""
        return {
            "num_labels": len(self._names),
            "id2label": dict(enumerate(self._names)),
            "label2id": {name: index for index, name in enumerate(self._names)},
            "problem_type": "single_label_classification",
        }

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Tokens, and the index of the class."""
        return self.inputs(rows, tokenizer).add_column("labels", self.targets(rows))

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The most probable class, its probability, and the probability of each class."""
        return [self._answer(softmax(row)) for row in self.outputs(model, tokenizer, rows, batch_size)]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the most probable class."""
        index = self._index
        return self.scores(np.array([index[answer["label"]] for answer in answers]), np.array(self.targets(rows)))

    def loss(self, answers: Sequence[Answer], rows: Dataset) -> float:
        """Cross-entropy: of the probability that each row's class was given."""
        names = (self._names[target] for target in self.targets(rows))
        given = np.array([answer["scores"][name] for answer, name in zip(answers, names, strict=True)])
        return float(-np.log(np.maximum(given, np.finfo(np.float32).tiny)).mean())

    def scores(self, predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Metrics of predicted classes, [rows], by index."""
        return {
            "accuracy": float(accuracy_score(targets, predicted)),
            "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(targets, predicted)),
        }

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Always answering the most frequent class."""
        targets = np.array(self.targets(rows))
        majority = np.bincount(targets).argmax()
        return f"always {self._names[majority]!r}", self.scores(np.full_like(targets, majority), targets)

    def targets(self, rows: Dataset) -> list[int]:
        """Index of each row's class; DataError on a class that was not there in training."""
        values = _as_names(rows, self.setup.columns.label)
        known = [name for name in self._names if self.trained is None or name in self.trained]
        unknown = in_order(set(values) - set(known))
        if unknown:
            raise DataError(
                f"column {self.setup.columns.label!r} holds {listed(unknown)}, "
                f"not among the classes trained on: {listed(known)}"
            )
        index = self._index
        return [index[value] for value in values]

    @property
    def _names(self) -> list[str]:
        return self.label_names or []

    @property
    def _index(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self._names)}

    def _answer(self, probabilities: np.ndarray) -> Answer:
        best = int(probabilities.argmax())
        scores = dict(zip(self._names, probabilities.tolist(), strict=True))
        return {"label": self._names[best], "score": float(probabilities[best]), "scores": scores}


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
    broken = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if broken:
        raise DataError(f"column {column!r} holds numbers such as {broken[0]}, not classes: use task regression")
    return [str(int(value)) if isinstance(value, float) else str(value) for value in values]


def in_order(classes: set[str]) -> list[str]:
    """Numbers by value, all else by the alphabet."""
    if all(name.lstrip("-").isdecimal() for name in classes):
        return sorted(classes, key=int)
    return sorted(classes)


def listed(classes: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(repr, classes[:most]))
    return shown if len(classes) <= most else f"{shown} and {len(classes) - most} more"
