"""One number for each text, or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr, spearmanr
from torch import nn
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Setup, register
from .whole_text import WholeText


@register("regression")
class Regression(WholeText):
    """Pearson and Spearman correlation, and mean squared error."""

    headline: ClassVar[str] = "pearson"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"mse"})

    label_names: list[str] | None = None

    def __init__(self, setup: Setup) -> None:
        if setup.label_names is not None:
            raise RecipeError("data.label_names has no meaning for numbers: leave it out, or use task classification")
        super().__init__(setup)

    def fit(self, rows: Dataset) -> Self:
        """Check that there are numbers to learn."""
        values = self.targets(rows)
        if len(set(values)) < 2:
            column = self.setup.columns.label
            raise DataError(f"column {column!r} holds one value only, {values[0]}: there is nothing to learn")
        self._mean = sum(values) / len(values)
        return self

    def start_output(self, model: nn.Module) -> None:
        """Let the new output layer begin with the mean of the training rows. From 0, the first steps of every weight
        go into finding it, all in one direction, which a short training does not recover from (decision 012). An
        output layer without a bias is left as it is."""
        body: nn.Module = getattr(model, "base_model", model)
        pretrained = set(body.modules())
        for module in model.modules():
            if module in pretrained or not isinstance(module, nn.Linear) or module.out_features != 1:
                continue
            if module.bias is not None and not module.bias.any():  # a bias of exactly 0 was never trained
                nn.init.constant_(module.bias, self._mean)

    def head(self) -> dict[str, Any]:
        """One output, trained with the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Tokens, and the number."""
        return self.inputs(rows, tokenizer).add_column("labels", self.targets(rows))

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The number for each row."""
        return [{"value": float(row.item())} for row in self.outputs(model, tokenizer, rows, batch_size)]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the one output. A correlation with a constant is not defined."""
        return _metrics(np.array([answer["value"] for answer in answers]), np.array(self.targets(rows)))

    def loss(self, answers: Sequence[Answer], rows: Dataset) -> float:
        """The squared error."""
        return float(np.mean((np.array([answer["value"] for answer in answers]) - self.targets(rows)) ** 2))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Always answering the mean."""
        targets = np.array(self.targets(rows))
        mean = float(np.mean(targets))
        return f"always {mean:.3g}", _metrics(np.full(len(targets), mean), targets)

    def targets(self, rows: Dataset) -> list[float]:
        """The number in each row; DataError on anything else."""
        column = self.setup.columns.label
        if isinstance(rows.features[column], ClassLabel):
            raise DataError(f"column {column!r} holds classes, not numbers: use task classification")
        values = rows[column]
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"column {column!r} should hold numbers; row {index + 1} has {value!r}")
        return [float(value) for value in values]


def _metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    defined = len(targets) > 1 and np.ptp(predicted) > 0 and np.ptp(targets) > 0
    return {
        "pearson": float(pearsonr(predicted, targets).statistic) if defined else math.nan,
        "spearman": float(spearmanr(predicted, targets).statistic) if defined else math.nan,
        "mse": float(np.mean((predicted - targets) ** 2)),
    }
