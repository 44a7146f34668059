"""One number for each text, or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr, spearmanr
from torch import nn
from transformers import DataCollatorWithPadding
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import (
    Answer,
    Columns,
    ModelKind,
    Options,
    Setup,
    check_columns,
    check_text,
    logits,
    register,
    text_rows,
    tokenize,
)


@register("regression")
class Regression:
    """Pearson and Spearman correlation, and mean squared error."""

    kind: ClassVar[ModelKind] = "sequence classification"
    columns: ClassVar[Columns] = Columns("text", None, "label")
    max_length: ClassVar[int] = 128
    options: ClassVar[type[Options]] = Options
    headline: ClassVar[str] = "pearson"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")

    label_names: list[str] | None = None

    def __init__(self, setup: Setup) -> None:
        if setup.label_names is not None:
            raise RecipeError("data.label_names has no meaning for numbers: leave it out, or use task classification")
        self.setup = setup

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """The text columns hold text, the label column something in every row."""
        check_text(rows, self.setup.columns.of_text(), source)
        if with_targets:
            check_columns(rows, [self.setup.columns.label], source)

    def fit(self, rows: Dataset) -> Self:
        """Check that there are numbers to learn."""
        values = self.targets(rows)
        if len(set(values)) < 2:
            column = self.setup.columns.label
            raise DataError(f"column {column!r} holds one value only, {values[0]}: there is nothing to learn")
        return self

    def head(self) -> dict[str, Any]:
        """One output, trained with the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Tokens, and the number."""
        return self._inputs(rows, tokenizer).add_column("labels", self.targets(rows))

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad to the longest row of the batch."""
        return DataCollatorWithPadding(tokenizer)

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The number for each row."""
        outputs = logits(model, tokenizer, self._inputs(rows, tokenizer), batch_size)
        return [{"value": float(row.item())} for row in outputs]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the one output. A correlation with a constant is not defined."""
        return _metrics(np.array([answer["value"] for answer in answers]), np.array(self.targets(rows)))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Always answering the mean."""
        targets = np.array(self.targets(rows))
        mean = float(np.mean(targets))
        return f"always {mean:.3g}", _metrics(np.full(len(targets), mean), targets)

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """The texts in the columns that the task reads."""
        return text_rows(self.setup.columns, texts, pairs)

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

    def _inputs(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(rows, self.setup.columns.of_text(), tokenizer, self.setup.max_length)


def _metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    defined = len(targets) > 1 and np.ptp(predicted) > 0 and np.ptp(targets) > 0
    return {
        "pearson": float(pearsonr(predicted, targets).statistic) if defined else math.nan,
        "spearman": float(spearmanr(predicted, targets).statistic) if defined else math.nan,
        "mse": float(np.mean((predicted - targets) ** 2)),
    }
