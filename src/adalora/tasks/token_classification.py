"""One tag for each word of a sentence, and the entities that the tags spell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import seqeval.scheme
from datasets import ClassLabel, Dataset
from pydantic import Field
from scipy.special import softmax
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from torch import nn
from transformers import DataCollatorForTokenClassification
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Columns, ModelKind, Options, Setup, check_columns, logits, mapped, register
from .classification import listed

OUTSIDE = "O"
"""The tag of a word that belongs to no entity."""

Scheme = Literal["default", "IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU"]

_PREFIXES = {"IOB1": "BI", "IOB2": "BI", "IOE1": "IE", "IOE2": "IE", "BILOU": "BILU"}
_NOT_TRAINED = -100
"""The label that the cross-entropy leaves out."""


class TokenOptions(Options):
    """Settings of the task ``token_classification``."""

    scheme: Scheme = Field(
        "default",
        description="How tags spell entities. default: as conlleval and seqeval read IOB1, IOB2 and IOBES alike; "
        "or the one scheme to hold all tags to, strictly.",
    )


@register("token_classification")
class TokenClassification:
    """Precision, recall and F1 of entities, and the share of words with the right tag, as seqeval counts them.

    A word's tag is learned and answered at its first sub-word. A sentence longer than the model is read in windows
    that overlap by a quarter; each word counts once, in the window where it stands farthest from an edge.
    """

    kind: ClassVar[ModelKind] = "token classification"
    columns: ClassVar[Columns] = Columns("tokens", None, "ner_tags")
    max_length: ClassVar[int] = 256
    options: ClassVar[type[Options]] = TokenOptions
    headline: ClassVar[str] = "f1"
    metric_names: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1", "accuracy")
    in_percent: ClassVar[bool] = False
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    label_names: list[str] | None
    """``data.label_names``, or what ``fit`` found."""

    def __init__(self, setup: Setup) -> None:
        if setup.columns.text_pair is not None:
            raise RecipeError("data.text_pair has no meaning in task token_classification: leave it out")
        self.setup = setup
        self.label_names = setup.label_names
        self.scheme: Scheme = setup.options.scheme

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """Every row has a list of words, and a tag for each."""
        words, tags = self.setup.columns.text, self.setup.columns.label
        check_columns(rows, [words, tags] if with_targets else [words], source)
        item = getattr(rows.features[words], "feature", None)
        if getattr(item, "dtype", None) not in {"string", "large_string"}:
            raise DataError(f"column {words!r} of {source} should hold lists of words, it holds {rows.features[words]}")
        for number, row in enumerate(rows[words], 1):
            if not row or None in row:
                raise DataError(f"column {words!r} of {source} has no word in row {number}, or an empty place in it")
        if with_targets:
            for number, (row, found) in enumerate(zip(rows[words], rows[tags], strict=True), 1):
                if not isinstance(found, list) or len(found) != len(row):
                    there = len(found) if isinstance(found, list) else repr(found)
                    raise DataError(
                        f"row {number} of {source} has {len(row)} words in column {words!r}, but in column {tags!r} "
                        f"{there}: expected a list with a tag for each word"
                    )

    def fit(self, rows: Dataset) -> Self:
        """The tags are ``label_names``, else those that the column declares, else those that occur, O first."""
        present = {tag for row in self._tags(rows) for tag in row}
        if not present - {OUTSIDE}:
            raise DataError(f"column {self.setup.columns.label!r} holds only {OUTSIDE}: there is nothing to learn")
        names = self.label_names
        if names is None:
            item = getattr(rows.features[self.setup.columns.label], "feature", None)
            occurring = sorted(present, key=lambda tag: (tag != OUTSIDE, tag))
            names = list(item.names) if isinstance(item, ClassLabel) else occurring
        outside = sorted(present - set(names))
        if outside:
            raise DataError(
                f"column {self.setup.columns.label!r} holds {listed(outside)}, "
                f"not among data.label_names: {listed(names)}"
            )
        return type(self)(replace(self.setup, label_names=names))

    def head(self) -> dict[str, Any]:
        """One output for each tag."""
        return {
            "num_labels": len(self._names),
            "id2label": dict(enumerate(self._names)),
            "label2id": {name: index for index, name in enumerate(self._names)},
        }

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Windows of tokens; the tag of a word at its first sub-word, nothing to learn at the others. Windows without
        any, of words that the tokenizer makes nothing of, are left out: their mean loss would be that of no token."""
        index = {name: position for position, name in enumerate(self._names)}
        tags = [[index[tag] for tag in row] for row in self._tags(rows)]
        windows = self._windows(rows, tokenizer)
        labels = [
            [_NOT_TRAINED if word is None else tags[row][word] for word in words]
            for row, words in zip(windows["row"], windows["words"], strict=True)
        ]
        learned = [place for place, found in enumerate(labels) if set(found) != {_NOT_TRAINED}]
        return windows.remove_columns(["row", "words"]).add_column("labels", labels).select(learned)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad tokens and labels to the longest window of the batch."""
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=_NOT_TRAINED)

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The most probable tag of each word, and the entities: type, words from start up to end, text, and the mean
        probability of their tags."""
        windows = self._windows(rows, tokenizer)
        outputs = logits(model, tokenizer, windows.remove_columns(["row", "words"]), batch_size)
        sentences = rows[self.setup.columns.text]
        # A word that the tokenizer makes nothing of keeps what stands here
        tags = [[OUTSIDE] * len(sentence) for sentence in sentences]
        scores = [[1.0] * len(sentence) for sentence in sentences]
        for row, words, output in zip(windows["row"], windows["words"], outputs, strict=True):
            start = len(output) - len(words) if tokenizer.padding_side == "left" else 0
            probabilities = softmax(output[start : start + len(words)].astype(np.float64), axis=-1)
            for word, probability in zip(words, probabilities, strict=True):
                if word is not None:
                    best = int(probability.argmax())
                    tags[row][word], scores[row][word] = self._names[best], float(probability[best])
        return [self._answer(*found) for found in zip(sentences, tags, scores, strict=True)]

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Metrics of the answered tags. A tag that the model never met counts as missed."""
        return self._metrics([answer["tags"] for answer in answers], self._tags(rows))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """Finding no entity."""
        tags = self._tags(rows)
        return f"always {OUTSIDE!r}", self._metrics([[OUTSIDE] * len(row) for row in tags], tags)

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """The words of each text, between white space."""
        if pairs:
            raise DataError("this run reads single texts: leave the second ones out")
        return Dataset.from_dict({self.setup.columns.text: [text.split() for text in texts]})

    @property
    def _names(self) -> list[str]:
        return self.label_names or []

    def _answer(self, words: Sequence[str], tags: list[str], scores: Sequence[float]) -> Answer:
        entities = [
            {
                "type": kind,
                "start": start,
                "end": end,
                "text": " ".join(words[start:end]),
                "score": float(np.mean(scores[start:end])),
            }
            for kind, start, end in self._entities(tags)
        ]
        return {"entities": entities, "tags": tags}

    def _entities(self, tags: list[str]) -> list[tuple[str, int, int]]:
        """Type, first word and the word after the last one, of each entity."""
        if self.scheme == "default":
            return [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
        (found,) = seqeval.scheme.Entities([tags], getattr(seqeval.scheme, self.scheme)).entities
        return [(entity.tag, entity.start, entity.end) for entity in found]

    def _metrics(self, predicted: list[list[str]], targets: list[list[str]]) -> dict[str, float]:
        strict = {"mode": "strict", "scheme": getattr(seqeval.scheme, self.scheme)} if self.scheme != "default" else {}
        return {
            "precision": float(precision_score(targets, predicted, zero_division=0, **strict)),
            "recall": float(recall_score(targets, predicted, zero_division=0, **strict)),
            "f1": float(f1_score(targets, predicted, zero_division=0, **strict)),
            "accuracy": float(accuracy_score(targets, predicted)),
        }

    def _tags(self, rows: Dataset) -> list[list[str]]:
        """The tags of each row as text; DataError on what is none in the scheme."""
        column = self.setup.columns.label
        item = getattr(rows.features[column], "feature", None)
        numbered = item.names if isinstance(item, ClassLabel) else self.label_names
        tags: list[list[Any]] = rows[column][:]
        if getattr(item, "dtype", "").startswith(("int", "uint")):
            if numbered is None:
                raise DataError(f"column {column!r} holds numbers: say in data.label_names which tags they are")
            outside = {tag for row in tags for tag in row} - set(range(len(numbered)))
            if outside:
                raise DataError(f"column {column!r} holds {min(outside)}, expected 0 to {len(numbered) - 1}")
            tags = [[numbered[tag] for tag in row] for row in tags]
        prefixes = _PREFIXES.get(self.scheme, "BIES")
        form = re.compile(rf"{OUTSIDE}|[{prefixes}]-.+")
        wrong = sorted({str(tag) for row in tags for tag in row if not form.fullmatch(str(tag))})
        if wrong:
            scheme = "options.scheme" if self.scheme == "default" else self.scheme
            raise DataError(
                f"column {column!r} holds {listed(wrong)}: expected {OUTSIDE}, or {', '.join(prefixes)} with a type, "
                f"such as B-PER ({scheme})"
            )
        return tags

    def _windows(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """The model's inputs for each window, its ``row``, and for each token the word that it answers for, or None
        (``words``)."""
        if not tokenizer.is_fast:
            raise RecipeError("token_classification needs a model with a fast tokenizer, which knows a token's place")
        column, length = self.setup.columns.text, self.setup.max_length

        def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            # Joined, since words on their own would lose the space that many tokenizers mark the start of a word by
            encoded = tokenizer(
                [" ".join(words) for words in batch[column]],
                truncation=True,
                max_length=length,
                stride=length // 4,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            places = encoded.pop("overflow_to_sample_mapping")
            offsets = encoded.pop("offset_mapping")
            words = [_words_of(batch[column][place], spans) for place, spans in zip(places, offsets, strict=True)]
            return {**encoded, "row": [batch["row"][place] for place in places], "words": _once(places, words)}

        numbered = rows.select_columns([column]).add_column("row", list(range(len(rows))))
        return mapped(numbered, encode)


def _words_of(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word that each token belongs to, from its place in the words joined by spaces; None of special tokens."""
    lengths = np.array([len(word) for word in words])
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    found: list[int | None] = []
    for start, end in spans:
        last = end - 1  # the first character may be the space before the word
        word = int(np.searchsorted(starts, last, side="right")) - 1
        found.append(word if end > start and last < starts[word] + lengths[word] else None)
    return found


def _once(rows: Sequence[int], words: Sequence[Sequence[int | None]]) -> list[list[int | None]]:
    """``words`` with each word of a row at one token only: its first one in the window where it is farthest from an
    edge."""
    best: dict[tuple[int, int], tuple[int, int, int]] = {}  # distance from the edge, window, token
    for window, (row, found) in enumerate(zip(rows, words, strict=True)):
        seen: set[int] = set()
        for token, word in enumerate(found):
            if word is not None and word not in seen:
                seen.add(word)
                distance = min(token, len(found) - 1 - token)
                if distance > best.get((row, word), (-1, 0, 0))[0]:
                    best[row, word] = (distance, window, token)
    kept: list[list[int | None]] = [[None] * len(found) for found in words]
    for (_, word), (_, window, token) in best.items():
        kept[window][token] = word
    return kept
