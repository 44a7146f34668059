"""One number for each text, or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr, spearmanr
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Columns, register


@register("regression")
@dataclass(frozen=True)
class Regression:
    """Pearson and Spearman correlation, and mean squared error."""

    headline: ClassVar[str] = "pearson"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")
    label_names: list[str] | None
    column: str

    @classmethod
    def fit(cls, rows: Dataset, columns: Columns, label_names: Sequence[str] | None) -> Self:
        """Check that there are numbers to learn."""
        if label_names is not None:
            raise RecipeError("data.label_names has no meaning in task regression: leave it out, or use classification")
        task = cls(None, columns.label)
        values = task.targets(rows)
        if len(set(values)) < 2:
            raise DataError(f"column {columns.label!r} holds one value only, {values[0]}: there is nothing to learn")
        return task

    def head(self) -> dict[str, Any]:
        """One output, trained with the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def targets(self, rows: Dataset) -> list[float]:
        """The number in each row; DataError on anything else."""
        if isinstance(rows.features[self.column], ClassLabel):
            raise DataError(f"column {self.column!r} holds classes, not numbers: use task classification")
        values = rows[self.column]
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"column {self.column!r} should hold numbers; row {index + 1} has {value!r}")
        return [float(value) for value in values]

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Metrics of the one output. A correlation with a constant is not defined."""
        return _metrics(outputs.reshape(len(targets)).astype(np.float64), targets.astype(np.float64))

    def baseline(self, targets: np.ndarray) -> tuple[str, dict[str, float]]:
        """Always answering the mean of ``targets``."""
        mean = float(np.mean(targets, dtype=np.float64))
        return f"always {mean:.3g}", _metrics(np.full(len(targets), mean), targets.astype(np.float64))

    def answers(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """The number for each row."""
        return [{"value": float(value)} for value in outputs.reshape(len(outputs))]


def _metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    defined = len(targets) > 1 and np.ptp(predicted) > 0 and np.ptp(targets) > 0
    return {
        "pearson": float(pearsonr(predicted, targets).statistic) if defined else math.nan,
        "spearman": float(spearmanr(predicted, targets).statistic) if defined else math.nan,
        "mse": float(np.mean((predicted - targets) ** 2)),
    }
