"""Any number of labels for each text, or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from pydantic import Field
from scipy.special import expit
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Columns, Options, Setup, register
from .classification import in_order, listed
from .whole_text import WholeText


class MultiLabelOptions(Options):
    """Settings of the task ``multi_label``."""

    label_columns: list[str] | None = Field(
        None, min_length=1, description="One column of 0 and 1 for each label, instead of a column of lists."
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="A label is answered when its probability is at least this.")


@register("multi_label")
class MultiLabel(WholeText):
    """One yes or no for each label, trained with the binary cross-entropy. Micro- and macro-averaged F1, and the share
    of rows whose labels are all right."""

    columns: ClassVar[Columns] = Columns("text", None, "labels")
    options: ClassVar[type[Options]] = MultiLabelOptions
    headline: ClassVar[str] = "micro_f1"
    metric_names: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "subset_accuracy")

    label_names: list[str] | None
    """``data.label_names``, or ``options.label_columns``, or what ``fit`` found."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        columns: list[str] | None = setup.options.label_columns
        names = setup.label_names or columns or []
        if columns is not None and names != columns:
            raise RecipeError("data.label_names: with options.label_columns the labels are those columns; leave it out")
        if len(set(names)) != len(names):
            raise RecipeError(f"the labels name one of them twice: {', '.join(names)}")
        self.label_names = names or None

    @property
    def target_columns(self) -> list[str]:
        """One, or one for each label."""
        return self.setup.options.label_columns or [self.setup.columns.label]

    def fit(self, rows: Dataset) -> Self:
        """The labels are those that the recipe names, else those that the column declares, else those that occur."""
        column = self.setup.columns.label
        present = in_order({name for labels in self._labels(rows) for name in labels})
        if not present:
            raise DataError("no row has any label: there is nothing to learn")
        names = self.label_names
        if names is None:
            item = getattr(rows.features[column], "feature", None)
            names = list(item.names) if isinstance(item, ClassLabel) else present
        task = type(self)(replace(self.setup, label_names=names))
        task.targets(rows)  # every label is among them
        return task

    def head(self) -> dict[str, Any]:
        """One output for each label."""
        return {
            "num_labels": len(self._names),
            "id2label": dict(enumerate(self._names)),
            "label2id": {name: index for index, name in enumerate(self._names)},
            "problem_type": "multi_label_classification",
        }

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Tokens, and 1.0 or 0.0 for each label."""
        return self.inputs(rows, tokenizer).add_column("labels", self.targets(rows).astype(np.float32).tolist())

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The labels at or above the threshold, and the probability of each label."""
        return [self._answer(expit(row)) for row in self.outputs(model, tokenizer, rows, batch_size)]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the answered labels."""
        return _metrics(self._matrix([answer["labels"] for answer in answers]), self.targets(rows))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Always answering the same labels: as many of the most frequent ones as give the best micro-averaged F1."""
        targets = self.targets(rows)
        frequencies = targets.sum(axis=0)
        order = np.argsort(-frequencies, kind="stable")
        sizes = np.arange(1, len(order) + 1)
        f1 = 2 * frequencies[order].cumsum() / (sizes * len(targets) + frequencies.sum())
        chosen = np.sort(order[: int(f1.argmax()) + 1])
        predicted = np.zeros_like(targets)
        predicted[:, chosen] = 1
        return f"always {listed([self._names[index] for index in chosen])}", _metrics(predicted, targets)

    def targets(self, rows: Dataset) -> np.ndarray:
        """0 or 1, [rows, labels]; DataError on a label that the task does not have."""
        labels = self._labels(rows)
        unknown = in_order({name for row in labels for name in row} - set(self._names))
        if unknown:
            raise DataError(
                f"column {self.setup.columns.label!r} holds {listed(unknown)}, "
                f"not among the labels trained on: {listed(self._names)}"
            )
        return self._matrix(labels)

    @property
    def _names(self) -> list[str]:
        return self.label_names or []

    def _matrix(self, labels: Sequence[Sequence[str]]) -> np.ndarray:
        index = {name: position for position, name in enumerate(self._names)}
        matrix = np.zeros((len(labels), len(index)), dtype=np.int64)
        for row, names in enumerate(labels):
            matrix[row, [index[name] for name in names]] = 1
        return matrix

    def _answer(self, probabilities: np.ndarray) -> Answer:
        scores = dict(zip(self._names, probabilities.tolist(), strict=True))
        return {"labels": [name for name, score in scores.items() if score >= self._threshold], "scores": scores}

    @property
    def _threshold(self) -> float:
        return float(self.setup.options.threshold)

    def _labels(self, rows: Dataset) -> list[list[str]]:
        """The labels of each row as text."""
        columns = self.setup.options.label_columns
        return _of_columns(rows, columns) if columns else _of_lists(rows, self.setup.columns.label)


def _of_columns(rows: Dataset, columns: Sequence[str]) -> list[list[str]]:
    """The names of the columns that hold 1."""
    labels: list[list[str]] = [[] for _ in range(len(rows))]
    for column in columns:
        for index, value in enumerate(rows[column]):
            if value not in (0, 1):
                raise DataError(f"column {column!r} should hold 0 or 1; row {index + 1} has {value!r}")
            if value:
                labels[index].append(column)
    return labels


def _of_lists(rows: Dataset, column: str) -> list[list[str]]:
    item = getattr(rows.features[column], "feature", None)
    labels: list[list[str]] = []
    for index, values in enumerate(rows[column]):
        if not isinstance(values, list) or any(isinstance(value, list | dict | float | None) for value in values):
            raise DataError(
                f"column {column!r} should hold a list of labels; row {index + 1} has {values!r}. "
                "For a column of 0 and 1 for each label set options.label_columns"
            )
        if isinstance(item, ClassLabel):
            if any(value < 0 for value in values):
                raise DataError(f"column {column!r} hides its labels (-1), as test splits do: choose another split")
            values = [item.names[value] for value in values]
        labels.append([str(value) for value in values])
    return labels


def _metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    def f1(average: str) -> float:
        average = "binary" if targets.shape[1] == 1 else average  # scikit-learn sees two classes in a single column
        return float(f1_score(targets, predicted, average=average, zero_division=0))

    return {
        "micro_f1": f1("micro"),
        "macro_f1": f1("macro"),
        "subset_accuracy": float(accuracy_score(targets, predicted)),
    }
