"""GLUE: nine tasks with the columns, classes and metrics of the benchmark (Wang et al., ICLR 2019, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Columns, Setup, register
from .classification import Classification
from .regression import Regression


@dataclass(frozen=True)
class Spec:
    """One task of GLUE; its classes in the hub's order, so that the second one of a pair is the positive one."""

    texts: tuple[str, ...]  # columns
    classes: tuple[str, ...]  # empty: the label is a number
    metrics: tuple[str, ...]  # the benchmark's, in its order, but for STS-B's last; the first or `headline` leads
    max_length: int  # tokens, as the paper trains it
    headline: str | None = None


_TWO_SENTENCES = ("sentence1", "sentence2")

GLUE = {
    "cola": Spec(("sentence",), ("unacceptable", "acceptable"), ("mcc",), 64),
    "sst2": Spec(("sentence",), ("negative", "positive"), ("accuracy",), 128),
    "mrpc": Spec(_TWO_SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1"), 320),
    "qqp": Spec(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), 320),
    "stsb": Spec(_TWO_SENTENCES, (), ("pearson", "spearman", "correlation"), 128, headline="correlation"),
    "mnli": Spec(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), 256),
    "qnli": Spec(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",), 512),
    "rte": Spec(_TWO_SENTENCES, ("entailment", "not_entailment"), ("accuracy",), 320),
    "wnli": Spec(_TWO_SENTENCES, ("not_entailment", "entailment"), ("accuracy",), 128),  # not in the paper
}
"""Every task by its name on the hub. The headline is what the paper's table 1 reports: for MRPC and QQP the accuracy,
for STS-B the mean of the two correlations."""


class GlueClassification(Classification):
    """A task of GLUE with classes: integers and ``ClassLabel`` columns mean the benchmark's own."""

    classes: ClassVar[tuple[str, ...]]

    def __init__(self, setup: Setup) -> None:
        classes = list(self.classes)
        if setup.label_names not in (None, classes):
            raise RecipeError(f"data.label_names: this task of GLUE has its own classes, {', '.join(classes)}")
        super().__init__(replace(setup, label_names=classes))

    def fit(self, rows: Dataset) -> Self:
        """The classes are the benchmark's; two of them at least must occur."""
        return super().fit(self._with_classes(rows))

    def targets(self, rows: Dataset) -> list[int]:
        """Index of each row's class; DataError on a class that was not there in training."""
        return super().targets(self._with_classes(rows))

    def scores(self, predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The benchmark's metrics of predicted classes, [rows], by index."""
        return {name: _METRICS[name](targets, predicted) for name in self.metric_names}

    def _with_classes(self, rows: Dataset) -> Dataset:
        """The label column alone, its integers declared to be the benchmark's classes."""
        column = self.setup.columns.label
        feature, values = rows.features[column], rows[column][:]
        if not (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))):
            return rows.select_columns([column])
        if max(values) >= len(self.classes):
            numbered = ", ".join(f"{index} ({name})" for index, name in enumerate(self.classes))
            row = values.index(max(values)) + 1
            raise DataError(f"column {column!r} should hold {numbered} or those names; row {row} has {max(values)}")
        return Dataset.from_dict({column: values}, Features({column: ClassLabel(names=list(self.classes))}))


class GlueRegression(Regression):
    """A task of GLUE with numbers: both correlations, and their mean."""

    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    def targets(self, rows: Dataset) -> list[float]:
        """The number in each row; DataError on anything else."""
        values = super().targets(rows)
        if all(value == -1 for value in values):
            column = self.setup.columns.label
            raise DataError(f"column {column!r} hides its labels (-1), as test splits do: choose another split")
        return values

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the one output. A correlation with a constant is not defined."""
        return _correlations(super().metrics(answers, rows))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Always answering the mean."""
        answer, found = super().baseline(rows)
        return answer, _correlations(found)


def _correlations(found: dict[str, float]) -> dict[str, float]:
    pearson, spearman = found["pearson"], found["spearman"]
    return {"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2}


_METRICS = {
    "accuracy": lambda targets, predicted: float(accuracy_score(targets, predicted)),
    "f1": lambda targets, predicted: float(f1_score(targets, predicted, pos_label=1, zero_division=0)),
    "mcc": lambda targets, predicted: float(matthews_corrcoef(targets, predicted)),
}

for _name, _spec in GLUE.items():
    register(f"glue/{_name}")(
        type(
            f"Glue{_name.upper()}",
            (GlueClassification if _spec.classes else GlueRegression,),
            {
                "__doc__": f"{_name} of GLUE.",
                "columns": Columns(_spec.texts[0], _spec.texts[1] if len(_spec.texts) > 1 else None, "label"),
                "classes": _spec.classes,
                "metric_names": _spec.metrics,
                "headline": _spec.headline or _spec.metrics[0],
                "max_length": _spec.max_length,
            },
        )
    )
