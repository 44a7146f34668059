"""What a task is: columns become features, the model's outputs become answers, answers become metrics.

A task is a class marked ``@register("name")`` in a file of this folder. Tasks know neither PEFT nor the allocator:
``head()`` says what the model's last layer must look like, in the words of a Transformers configuration, and whoever
trains takes it from there. Training, ``adalora evaluate`` and ``adalora predict`` share ``predict`` and ``metrics``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import DataCollatorWithPadding
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError

ModelKind = Literal["sequence classification", "token classification", "question answering", "generation"]
"""What the model's output layer is for. ``generation`` is a causal or an encoder-decoder language model."""

Answer = dict[str, Any]
"""What a model says about one row, ready for JSON."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a task reads, by what they are to it."""

    text: str  # what the model reads
    text_pair: str | None  # what else it reads
    label: str  # what it should answer

    def of_text(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]


class Options(BaseModel):
    """Settings of one task that others do not have: the recipe's section ``options``. Tasks extend it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


@dataclass(frozen=True)
class Setup:
    """What a recipe says to its task."""

    columns: Columns
    label_names: list[str] | None
    max_length: int  # tokens that the model reads of a row
    options: Any  # an instance of the task's own Options


class Task(Protocol):
    """One family of tasks."""

    kind: ClassVar[ModelKind]
    columns: ClassVar[Columns]
    """Columns where the recipe names none."""
    max_length: ClassVar[int]
    """Tokens kept of a row where the recipe does not say."""
    options: ClassVar[type[Options]]
    headline: ClassVar[str]
    """The metric to name first, and to compare methods by."""
    metric_names: tuple[str, ...]
    """All that ``metrics`` computes, in the order to show it in."""
    in_percent: ClassVar[bool]
    """Whether metrics that are shares run to 100, not to 1."""
    lower_is_better: ClassVar[frozenset[str]]
    """Metrics of which less is more."""

    label_names: list[str] | None
    """The classes in the order of the model's outputs, or None."""

    def __init__(self, setup: Setup) -> None:
        """The task as a recipe describes it. RecipeError on a setting that has no meaning for it."""

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """DataError naming source, column and row unless the rows can be read, and scored when ``with_targets``."""
        ...

    def fit(self, rows: Dataset) -> Self:
        """The task with what training rows say about its labels. DataError when nothing can be learned."""
        ...

    def head(self) -> dict[str, Any]:
        """Settings of the model's configuration, such as ``num_labels``."""
        ...

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """The model's inputs for training, with ``input_ids`` and ``labels`` (or what the model's loss needs)."""
        ...

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """What makes a batch of rows of ``features``."""
        ...

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """What the model says about each row, in the order of the rows, which may lack their targets."""
        ...

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Quality of the answers to ``rows``; nan where a metric is not defined."""
        ...

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]] | None:
        """What takes no model: a constant answer, say, in words, and its metrics. None where nothing is sensible."""
        ...

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """Rows made of texts from the command line, for ``predict``. DataError when pairs are missing or too many."""
        ...


@runtime_checkable
class Signed(Protocol):
    """A task whose metrics have variants that figures can only be compared within."""

    def signatures(self, rows: Dataset) -> dict[str, str]:
        """The variant of each such metric on these rows, in its library's notation."""
        ...


@runtime_checkable
class StartsOutput(Protocol):
    """A task that knows from its training rows where a new output layer should start."""

    def start_output(self, model: nn.Module) -> None:
        """Set the new output layer of ``model``; one that was trained before is left as it is."""
        ...


@runtime_checkable
class Stratified(Protocol):
    """A task that divides rows into classes, which both sides should have when some are held out."""

    def strata(self, rows: Dataset) -> list[str]:
        """The class of each row. DataError where it has none."""
        ...


@runtime_checkable
class TellsLoss(Protocol):
    """A task whose answers say what the model's loss was, so that it need not be run again for it."""

    def loss(self, answers: Sequence[Answer], rows: Dataset) -> float:
        """Mean of the model's loss on ``rows``."""
        ...


_REGISTRY: dict[str, type[Task]] = {}
_T = TypeVar("_T")


def register(name: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: recipes may say ``task: name``."""

    def add(cls: type[_T]) -> type[_T]:
        _REGISTRY[name] = cls  # type: ignore[assignment]
        return cls

    return add


def names() -> list[str]:
    """Names of all tasks."""
    return sorted(_REGISTRY)


def get(name: str) -> type[Task]:
    """The task called ``name``; RecipeError naming the nearest when there is none."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, names(), n=1)
    advice = f"did you mean {near[0]}?" if near else f"known tasks are {', '.join(names())}"
    raise RecipeError(f"unknown task {name!r}: {advice}")


# --- checks that tasks share ------------------------------------------------------------------------


def check_columns(rows: Dataset, wanted: Sequence[str], source: str) -> None:
    """DataError unless every wanted column is there and has a value in every row."""
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}: its columns are {', '.join(rows.column_names)}"
        )
    for column in wanted:
        empty = [index for index, value in enumerate(rows[column]) if value is None]
        if empty:
            raise DataError(
                f"column {column!r} of {source} is empty in {len(empty)} of {len(rows)} rows "
                f"(the first is row {empty[0] + 1}): fill them in or leave them out"
            )


def check_text(rows: Dataset, columns: Sequence[str], source: str) -> None:
    """DataError unless the columns are there, hold text, and every row has some in one of them."""
    check_columns(rows, columns, source)
    for column in columns:
        kind = getattr(rows.features[column], "dtype", None)
        if kind not in {"string", "large_string"}:
            found = ((index, value) for index, value in enumerate(rows[column]) if not isinstance(value, str))
            row, value = next(found, (0, kind))
            raise DataError(f"column {column!r} of {source} should hold text; row {row + 1} has {value!r}")
    texts = zip(*(rows[column] for column in columns), strict=True)
    blank = next((index for index, row in enumerate(texts) if not any(text.strip() for text in row)), None)
    if blank is not None:
        names = ", ".join(map(repr, columns))
        raise DataError(f"column {names} of {source} has no text in row {blank + 1}: fill it in or leave it out")


def text_rows(columns: Columns, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
    """Rows of plain texts, or pairs of them: what most tasks answer in ``rows_of``."""
    if columns.text_pair is None and pairs:
        raise DataError("this run reads single texts: leave the second ones out")
    if columns.text_pair is not None and len(pairs or ()) != len(texts):
        raise DataError(
            f"this run reads pairs of texts ({columns.text}, {columns.text_pair}): give a second text for each "
            f"first one ({len(texts)} first, {len(pairs or ())} second)"
        )
    given = {columns.text: list(texts)}
    if columns.text_pair is not None:
        given[columns.text_pair] = list(pairs or ())
    return Dataset.from_dict(given)


# --- from rows to the model's outputs ---------------------------------------------------------------


def tokenize(rows: Dataset, columns: Sequence[str], tokenizer: Any, max_length: int) -> Dataset:
    """The model's inputs for each row, cut at ``max_length`` tokens, not padded."""

    def encode(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        texts = (batch[column] for column in columns)
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    return mapped(rows, encode)


def mapped(rows: Dataset, encode: Callable[[Mapping[str, list[Any]]], dict[str, Any]]) -> Dataset:
    """What ``encode`` makes of batches of rows, in memory, with none of the columns of ``rows``."""
    return rows.map(
        encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, load_from_cache_file=False
    )


def batches_by_length(
    inputs: Dataset, batch_size: int, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]], device: Any
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of rows of like length, the longest first, on ``device``: their row numbers and the model's inputs."""
    lengths = [len(tokens) for tokens in inputs["input_ids"]]
    order = sorted(range(len(inputs)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([inputs[index] for index in chosen])
        yield chosen, {name: values.to(device) for name, values in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """The device that the model's inputs belong on."""
    return next(model.parameters()).device


@torch.no_grad()
def logits(model: nn.Module, tokenizer: Any, inputs: Dataset, batch_size: int) -> list[np.ndarray]:
    """The model's logits for each row of tokenized ``inputs``, in float32, padding included where it is inside."""
    found: list[Any] = [None] * len(inputs)
    collate = DataCollatorWithPadding(tokenizer)
    for chosen, batch in batches_by_length(inputs, batch_size, collate, device_of(model)):
        outputs = model(**batch).logits.float().cpu().numpy()
        for row, output in zip(chosen, outputs, strict=True):
            found[row] = output
    return found
