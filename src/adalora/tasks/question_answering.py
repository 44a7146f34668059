"""Extractive question answering, as SQuAD 1.1 and 2.0 have it: the answer to a question is a part of its context.

A context that is too long is read in windows, each with the whole question (Devlin et al., 2019, arXiv 1810.04805,
sections 4.2 and 4.3). A window that lacks the answer points at the first token, [CLS]; so does a question without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from pydantic import Field
from scipy.special import softmax
from torch import nn
from transformers.data.data_collator import pad_without_fast_tokenizer_warning
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import (
    Answer,
    Columns,
    ModelKind,
    Options,
    Setup,
    batches_by_length,
    check_columns,
    check_text,
    device_of,
    register,
    text_rows,
)
from .squad_metrics import squad_v1, squad_v2
from .squad_windows import Window, Windows, best_spans, cut, short

_ROWS_AT_ONCE = 2000  # bounds the memory that tokens and their places in the text take

_Scores = dict[tuple[int, int], float]
"""Score of each part of a context, by the characters where it begins and ends."""


class QuestionAnsweringOptions(Options):
    """Settings of windows and of answers."""

    unanswerable: bool = Field(
        False,
        description="Whether a question may have no answer, which empty lists in the label column say. The metrics are "
        "then those of SQuAD 2.0, else those of SQuAD 1.1.",
    )
    null_threshold: float = Field(
        0.0,
        description="With `unanswerable`: answer nothing where the score of no answer, the least of all windows, is "
        "above that of the best answer by more than this. Higher: more answers.",
    )
    doc_stride: int | None = Field(
        None,
        ge=0,
        description="Tokens that two neighbouring windows on a long context share. Default: a third of "
        "`data.max_length`, so 128 of 384.",
    )
    max_answer_length: int = Field(30, ge=1, description="Tokens of the longest answer.")
    n_best: int = Field(20, ge=1, description="Answers to weigh for each question, among which probability is shared.")


@register("question_answering")
class QuestionAnswering:
    """F1 and exact match of answers found in a context."""

    kind: ClassVar[ModelKind] = "question answering"
    columns: ClassVar[Columns] = Columns("question", "context", "answers")
    max_length: ClassVar[int] = 384
    options: ClassVar[type[Options]] = QuestionAnsweringOptions
    headline: ClassVar[str] = "f1"
    metric_names: tuple[str, ...] = ("f1", "exact_match")
    """More with ``unanswerable``: the same of the questions that have an answer, and of those that have none."""
    in_percent: ClassVar[bool] = True
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    label_names: list[str] | None = None

    def __init__(self, setup: Setup) -> None:
        if setup.label_names is not None:
            raise RecipeError("data.label_names has no meaning in task question_answering: leave it out")
        self.setup = setup
        self._options: QuestionAnsweringOptions = setup.options
        self._question, self._context, self._label = setup.columns.text, setup.columns.text_pair, setup.columns.label
        given = self._options.doc_stride
        self._shared = setup.max_length // 3 if given is None else given
        if self._shared >= setup.max_length:
            raise RecipeError(
                f"options.doc_stride is {self._shared}, the tokens that two windows share: it should be well below "
                f"data.max_length, {setup.max_length}, the tokens of a window"
            )
        if self._options.unanswerable:
            more = [f"{kind}_answer_{name}" for kind in ("has", "no") for name in self.metric_names]
            self.metric_names = (*self.metric_names, *more)

    # --- the rows -----------------------------------------------------------------------------------

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """Questions and contexts are text; answers are two lists of the same length."""
        for column in self.setup.columns.of_text():  # neither may be blank
            check_text(rows, [column], source)
        if with_targets:
            check_columns(rows, [self._label], source)
            for number, value in enumerate(rows[self._label], 1):
                self._check_answers(value, f"column {self._label!r} of {source}, row {number}")

    def _check_answers(self, value: Any, place: str) -> None:
        if not _is_answers(value):
            raise DataError(
                f"{place}: expected answers and where they begin in the context, such as "
                f"{{'text': ['Paris'], 'answer_start': [17]}}, it holds {short(value)}"
            )
        if not value["text"] and not self._options.unanswerable:
            raise DataError(
                f"{place}: there is no answer. If questions may have none, as in SQuAD 2.0, say so with "
                "options.unanswerable: true; else leave the row out"
            )

    def fit(self, rows: Dataset) -> Self:
        """Every answer stands where it is said to stand, and there is one at least."""
        answers = 0
        for number, row in enumerate(rows.select_columns([self._context, self._label]), 1):
            for text, start in zip(row[self._label]["text"], row[self._label]["answer_start"], strict=True):
                answers += 1
                there = row[self._context][max(start, 0) :][: len(text)]
                if not text.strip():
                    raise DataError(f"column {self._label!r}, row {number}: an answer is blank")
                if there != text or start < 0:
                    raise DataError(
                        f"column {self._label!r}, row {number}: the answer {short(text)} is not in column "
                        f"{self._context!r} at answer_start {start}, counted in characters from 0; {short(there)} is. "
                        "Correct it, or leave the row out"
                    )
        if not answers:
            raise DataError(f"column {self._label!r} has no answer in any of {len(rows)} rows: nothing can be learned")
        return self

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """Questions, each with its context."""
        return text_rows(self.setup.columns, texts, pairs)

    # --- the model's inputs -------------------------------------------------------------------------

    def head(self) -> dict[str, Any]:
        """Two outputs for each token: that the answer begins there, and that it ends there."""
        return {"num_labels": 2}

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """The windows on all contexts, with the tokens where the first answer begins and ends."""
        parts = []
        for chunk, windows in self._read(rows, tokenizer):
            answers = [_characters(value) for value in chunk[self._label]]
            begins, ends = zip(*(window.positions(answers[window.row]) for window in windows.read), strict=True)
            parts.append(Dataset.from_dict({**windows.inputs, "start_positions": begins, "end_positions": ends}))
        return concatenate_datasets(parts)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad on the right, whatever the tokenizer likes better, so that positions stay what they are."""
        return lambda rows: pad_without_fast_tokenizer_warning(  # type: ignore[no-untyped-call]
            tokenizer, rows, padding_side="right", return_tensors="pt"
        )

    def _read(self, rows: Dataset, tokenizer: Any) -> Iterator[tuple[Dataset, Windows]]:
        """``rows`` in parts, and the windows on each part."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
            questions, contexts = chunk[self._question][:], chunk[self._context][:]
            yield chunk, cut(questions, contexts, tokenizer, self.setup.max_length, self._shared, start + 1)

    # --- the answers --------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The best part of each context, "" for no answer.

        ``start`` is the character of the context where the answer begins, None of no answer. ``score`` is the answer's
        share of a softmax over the ``n_best`` answers, and over no answer where that is possible.
        """
        answers: list[Answer] = []
        for chunk, windows in self._read(rows, tokenizer):
            scores: list[_Scores] = [{} for _ in range(len(chunk))]
            nothing = [np.inf] * len(chunk)
            inputs, collate = Dataset.from_dict(windows.inputs), self.collator(tokenizer, model)
            for chosen, batch in batches_by_length(inputs, batch_size, collate, device_of(model)):
                outputs = model(**batch)
                read = [windows.read[index] for index in chosen]
                self._gather(outputs.start_logits.float(), outputs.end_logits.float(), read, scores, nothing)
            answers += map(self._answer, chunk[self._context][:], scores, nothing)
        return answers

    def _gather(
        self, begin: torch.Tensor, end: torch.Tensor, read: list[Window], scores: list[_Scores], nothing: list[float]
    ) -> None:
        """Add what a batch of windows says to what is known of their rows: of a part of the context that several
        windows hold the highest score, and of no answer the lowest, as one window with an answer is enough."""
        found = best_spans(begin, end, read, self._options.max_answer_length, self._options.n_best)
        for window, null, *spans in zip(read, (begin[:, 0] + end[:, 0]).tolist(), *found, strict=True):
            nothing[window.row] = min(nothing[window.row], null)
            best, first, last = (values[np.isfinite(spans[0])] for values in spans)
            known = scores[window.row]
            for span, score in zip(window.spans(first, last), best.tolist(), strict=True):
                known[span] = max(score, known.get(span, -np.inf))

    def _answer(self, context: str, scores: _Scores, null: float) -> Answer:
        """The answer to one question. Tokens may hold the space before a word, answers do not."""
        trimmed: _Scores = {}
        for (begin, end), score in scores.items():
            span = _trimmed(context[begin:end], begin)
            if span[0] < span[1]:
                trimmed[span] = max(score, trimmed.get(span, -np.inf))
        best = sorted(trimmed.items(), key=lambda item: (-item[1], item[0]))[: self._options.n_best]
        if not best:  # a context without words
            return {"answer": "", "score": 1.0, "start": None, "no_answer_probability": 1.0, "n_best": []}
        possible = self._options.unanswerable
        *shares, none = softmax([*(score for _, score in best), null if possible else -np.inf]).tolist()
        n_best = [
            {"answer": context[begin:end], "score": share, "start": begin}
            for ((begin, end), _), share in zip(best, shares, strict=True)
        ]
        empty = possible and null - best[0][1] > self._options.null_threshold
        chosen = {"answer": "", "score": none, "start": None} if empty else n_best[0]
        return {**chosen, "no_answer_probability": none, "n_best": n_best}

    # --- their quality ------------------------------------------------------------------------------

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """In percent: what SQuAD 2.0's official script says where a question may have no answer, else SQuAD 1.1's."""
        official = squad_v2 if self._options.unanswerable else squad_v1
        return official([answer["answer"] for answer in answers], [value["text"] for value in rows[self._label]])

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]] | None:
        """Never answering, where that can be right."""
        if not self._options.unanswerable:
            return None
        return "never an answer", self.metrics([{"answer": ""}] * len(rows), rows)


def _is_answers(value: Any) -> bool:
    """Whether a value is a list of texts and as long a list of places."""
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    return (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(start, int) for start in starts)
    )


def _characters(answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """Where the first answer begins and ends in the context, without the space around it; None of no answer."""
    return _trimmed(answers["text"][0], answers["answer_start"][0]) if answers["text"] else None


def _trimmed(text: str, begin: int) -> tuple[int, int]:
    """The characters from which on and up to which ``text``, which begins at ``begin``, is more than space."""
    return begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
