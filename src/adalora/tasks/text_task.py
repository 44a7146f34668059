"""What tasks share whose answer is a text: all but what a row means and how answers are scored.

How causal and encoder-decoder models read inputs and learn targets is the business of ``generation``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from torch import nn
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Columns, ModelKind, Options, Setup, check_columns, mapped, text_rows
from .generation import Encoder, GenerationOptions, Pad, write


class Example(NamedTuple):
    """What a row says: a text to read, and the texts any of which would be a good answer."""

    text: str
    references: list[str]


class TextGeneration(ABC):
    """All of a task's contract but what a row means, which is ``read``, and how answers are scored."""

    kind: ClassVar[ModelKind] = "generation"
    columns: ClassVar[Columns]
    max_length: ClassVar[int]
    options: ClassVar[type[Options]] = GenerationOptions
    headline: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]
    in_percent: ClassVar[bool] = True
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    label_names: list[str] | None = None

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        if setup.label_names is not None:
            raise RecipeError("data.label_names has no meaning where the answer is a text: leave it out")
        if setup.columns.text_pair is not None:
            raise RecipeError("data.text_pair has no meaning where the answer is a text: the model reads one column")

    @staticmethod
    @abstractmethod
    def read(value: Any, label: Any, /) -> Example:
        """What the columns ``text`` and ``label`` of a row say; a label of None has no references.

        Raises DataError that says what was found and what was expected."""

    @abstractmethod
    def scores(self, texts: Sequence[str], rows: Dataset) -> dict[str, float]:
        """Metrics of a text for each row."""

    @abstractmethod
    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]] | None:
        """As in Task."""

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """Every row has a text and, where targets matter, a reference."""
        columns = self.setup.columns
        check_columns(rows, [columns.text, columns.label] if with_targets else [columns.text], source)
        examples = self.examples(rows, source, with_targets)
        for index, example in enumerate(examples):
            if not example.text:
                raise DataError(f"column {columns.text!r} of {source} has no text in row {index + 1}")
        for index in self.scored(rows, source) if with_targets else ():
            if not examples[index].references:
                raise DataError(f"column {columns.label!r} of {source} has no text in row {index + 1}")

    def scored(self, rows: Dataset, source: str = "the input") -> Sequence[int]:
        """Numbers, from 0, of the rows that count in evaluation: all."""
        return range(len(rows))

    def fit(self, rows: Dataset) -> Self:
        """Nothing is to be known of the rows beforehand."""
        return self

    def head(self) -> dict[str, Any]:
        """A language model keeps the output layer that it has."""
        return {}

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """``input_ids`` and ``labels`` for every reference of every row: a row with three is learned from thrice."""
        encode = Encoder.of(self.setup, tokenizer, model)
        columns = self.setup.columns

        def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            pairs = zip(batch[columns.text], batch[columns.label], strict=True)
            examples = [self.read(value, label) for value, label in pairs]
            sources = [example.text for example in examples for _ in example.references]
            return encode.pairs(sources, [reference for example in examples for reference in example.references])

        return mapped(rows, encode_batch)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad on the right; the loss passes over what was padded."""
        return Pad(tokenizer.pad_token_id, "right")

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """``{"output": ...}`` for each row; the work is done once for each distinct input."""
        texts = [example.text for example in self.examples(rows, with_references=False)]
        distinct = list(dict.fromkeys(texts))
        prompts = Encoder.of(self.setup, tokenizer, model).sources(distinct)
        answers = write(model, tokenizer, prompts, batch_size, **self.setup.options.search())
        answer = dict(zip(distinct, answers, strict=True))
        return [{"output": answer[text]} for text in texts]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the answers' texts."""
        return self.scores([answer["output"] for answer in answers], rows)

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """The texts in the column that the task reads."""
        return text_rows(self.setup.columns, texts, pairs)

    def examples(self, rows: Dataset, source: str = "the input", with_references: bool = True) -> list[Example]:
        """What each row says; DataError naming the row that cannot be read."""
        columns = self.setup.columns
        values = list(rows[columns.text])
        known = with_references and columns.label in rows.column_names
        labels = list(rows[columns.label]) if known else [None] * len(values)
        names = f"columns {columns.text!r} and {columns.label!r}" if known else f"column {columns.text!r}"
        found = []
        for index, (value, label) in enumerate(zip(values, labels, strict=True)):
            try:
                found.append(self.read(value, label))
            except DataError as error:
                raise DataError(f"row {index + 1} of {source}, {names}: {error}") from error
        return found


def text_of(value: Any) -> str:
    """A text that a column holds."""
    if isinstance(value, str):
        return value.strip()
    raise DataError(f"expected a text, found {shortened(value)}")


def references_of(label: Any) -> list[str]:
    """The references that a column holds: a text, a list of texts, or such a list under the key ``text``, beside what
    else is known of it. None and blank texts are no references."""
    if isinstance(label, Mapping) and "text" in label:
        return references_of(label["text"])
    options = label if isinstance(label, list | tuple) else [label]
    if not all(option is None or isinstance(option, str) for option in options):
        raise DataError(f"expected a text or a list of texts as references, found {shortened(label)}")
    return [option.strip() for option in options if option and option.strip()]


def shortened(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
