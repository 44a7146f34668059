"""A short text that says what a long one says: XSum, CNN/DailyMail, or a user's own columns.

The defaults are XSum's columns. CNN/DailyMail has ``text: article`` and ``label: highlights``, and wants
``max_target_length: 160``. What papers call R-L is ``rougeLsum``: highlights of several sentences need it, and a single
sentence, as XSum's summaries are, has the same ``rougeL``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

from datasets import Dataset
from pydantic import Field

from .base import Columns, Options, register
from .generation import GenerationOptions
from .text_metrics import rouge, sentences
from .text_task import Example, TextGeneration, references_of, text_of

_LONGEST_LEAD = 3


class SummarizationOptions(GenerationOptions):
    """Generation's options, with what asks a causal model for a summary."""

    separator: str = Field("\nTL;DR:\n", description="Put between document and summary, for causal models.")


@register("summarization")
class Summarization(TextGeneration):
    """ROUGE of one summary for each document."""

    columns: ClassVar[Columns] = Columns("document", None, "summary")
    max_length: ClassVar[int] = 512
    options: ClassVar[type[Options]] = SummarizationOptions
    headline: ClassVar[str] = "rougeLsum"
    metric_names: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    @staticmethod
    def read(value: Any, label: Any) -> Example:
        """A document, and one summary or several."""
        return Example(text_of(value), references_of(label))

    def scores(self, texts: Sequence[str], rows: Dataset) -> dict[str, float]:
        """Mean over rows."""
        return rouge(texts, [example.references for example in self.examples(rows)], self.metric_names)

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """The document's first sentences: as many as summaries have on average, three at most."""
        examples = self.examples(rows)
        usual = fmean(len(sentences(reference)) for example in examples for reference in example.references)
        count = min(max(round(usual), 1), _LONGEST_LEAD)
        leads = ["\n".join(sentences(example.text)[:count]) for example in examples]
        return f"the first {count} sentences" if count > 1 else "the first sentence", self.scores(leads, rows)
