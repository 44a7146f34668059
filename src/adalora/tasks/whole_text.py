"""What tasks share whose model reads a text, or a pair of texts, and answers with one vector of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding

from .base import Columns, ModelKind, Options, Setup, check_columns, check_text, logits, text_rows, tokenize


class WholeText:
    """The part of a task that does not depend on what the numbers mean."""

    kind: ClassVar[ModelKind] = "sequence classification"
    columns: ClassVar[Columns] = Columns("text", None, "label")
    max_length: ClassVar[int] = 128
    options: ClassVar[type[Options]] = Options
    in_percent: ClassVar[bool] = False
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @property
    def target_columns(self) -> list[str]:
        """Columns that hold what is to be answered."""
        return [self.setup.columns.label]

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """The text columns hold text, the target columns something in every row."""
        check_text(rows, self.setup.columns.of_text(), source)
        if with_targets:
            check_columns(rows, self.target_columns, source)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad to the longest row of the batch."""
        return DataCollatorWithPadding(tokenizer)

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """The texts in the columns that the task reads."""
        return text_rows(self.setup.columns, texts, pairs)

    def inputs(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Tokens of each row."""
        return tokenize(rows, self.setup.columns.of_text(), tokenizer, self.setup.max_length)

    def outputs(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[np.ndarray]:
        """What the model answers to each row, [labels], in float64."""
        found = logits(model, tokenizer, self.inputs(rows, tokenizer), batch_size)
        return [row.astype(np.float64) for row in found]
