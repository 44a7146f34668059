"""Instruction tuning: conversations in, the loss on the assistant's answers only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import nn
from torch.nn import functional
from typing_extensions import Self

from ..data import DataError
from ..recipe import RecipeError
from .base import Answer, Columns, ModelKind, Options, Setup, batches_by_length, device_of, register, text_rows
from .chat import Chat, Conversation, Encoded, conversations
from .generation import IGNORED, Pad, write
from .packing import PadPacks, pack, prepare_packing

NO_TEMPLATE = "none"
SHORT_ANSWER = 64
"""Characters. Where no answer is longer, ``exact_match: auto`` measures it."""

_LARGEST_EXPONENT = 700.0  # that a float holds


class InstructionOptions(Options):
    """What instruction tuning can be told."""

    chat_template: str | None = Field(
        None,
        description="How conversations are written: a Jinja template, or the path of a file that holds one; "
        f"`{NO_TEMPLATE}`: prompt and completion as they are. Default: the tokenizer's own.",
    )
    packing: bool = Field(
        False, description="Several rows in one sequence of up to data.max_length tokens, none of which sees another."
    )
    exact_match: bool | Literal["auto"] = Field(
        "auto",
        description="Let the model answer, and compare with the last answer of each row. "
        f"auto: where none is longer than {SHORT_ANSWER} characters.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Tokens of an answer that the model gives.")


@register("instruction")
class Instruction:
    """Perplexity of the answers' tokens, exact match of short ones, and how many tokens were judged."""

    kind: ClassVar[ModelKind] = "generation"
    columns: ClassVar[Columns] = Columns("prompt", None, "completion")
    max_length: ClassVar[int] = 512
    options: ClassVar[type[Options]] = InstructionOptions
    headline: ClassVar[str] = "perplexity"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match", "answer_tokens")
    in_percent: ClassVar[bool] = False
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    label_names: list[str] | None = None

    def __init__(self, setup: Setup) -> None:
        if setup.label_names is not None:
            raise RecipeError("data.label_names has no meaning in task instruction: leave it out")
        if setup.columns.text_pair is not None:
            raise RecipeError("data.text_pair has no meaning in task instruction: leave it out")
        self.setup = setup
        self._options: InstructionOptions = setup.options
        self._template = _template(self._options.chat_template)

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """Every row is a conversation, one that ends with an answer when ``with_targets``."""
        conversations(rows, self.setup.columns, source, with_targets)

    def fit(self, rows: Dataset) -> Self:
        """The task itself: there are no labels to find."""
        return self

    def head(self) -> dict[str, Any]:
        """Nothing: the output layer is the pretrained one."""
        return {}

    def features(self, rows: Dataset, tokenizer: Any, model: nn.Module) -> Dataset:
        """Tokens, and labels that leave out all but the answers; several rows in each sequence with ``packing``.

        Rows of which ``max_length`` leaves no answer are left out, with a warning that counts them.

        Raises:
            DataError: no row stays, or the template cannot tell a row's answers.
            RecipeError: a model that is not causal, or that cannot keep packed rows apart.
        """
        self._check_model(model)
        encoded = self._encoded(self._conversations(rows, with_targets=True), self._chat(tokenizer))
        inputs = [_labelled(row) for row in encoded if any(row.learned[1:])]  # nothing predicts the first token
        lost = len(encoded) - len(inputs)
        if lost:
            message = f"{lost} of {len(encoded)} rows have no token of an answer in their first {self.setup.max_length}"
            if not inputs:
                raise DataError(f"{message} (data.max_length): raise it")
            warnings.warn(f"{message} (data.max_length): they are left out", stacklevel=2)
        if not self._options.packing:
            return Dataset.from_list(inputs)
        prepare_packing(model)
        return pack(inputs, self.setup.max_length)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Pad on the right."""
        return PadPacks(tokenizer.pad_token_id) if self._options.packing else Pad(tokenizer.pad_token_id, "right")

    def predict(self, model: nn.Module, tokenizer: Any, rows: Dataset, batch_size: int) -> list[Answer]:
        """The model's ``text`` for rows that lack an answer, and for all where exact match is measured.

        Of rows that have one, the negative log-likelihood of their answers' tokens, ``nll``, and their number,
        ``tokens``.
        """
        self._check_model(model)
        chat, given = self._chat(tokenizer), self._conversations(rows, with_targets=False)
        answers: list[Answer] = [{} for _ in given]
        answered = [index for index, conversation in enumerate(given) if conversation.answer is not None]
        scored = self._encoded([given[index] for index in answered], chat)
        for index, (nll, tokens) in zip(answered, _losses(model, tokenizer, scored, batch_size), strict=True):
            answers[index] |= {"nll": nll, "tokens": tokens}
        compared = self._compares([given[index] for index in answered])
        asked = [index for index, conversation in enumerate(given) if compared or conversation.answer is None]
        prompts = [chat.ask(given[index].question, self._longest_prompt(model)) for index in asked]
        search = {"do_sample": False, "max_new_tokens": self._options.max_new_tokens, "eos_token_id": chat.ends()}
        for index, text in zip(asked, write(model, tokenizer, prompts, batch_size, **search), strict=True):
            answers[index]["output"] = text
        return answers

    def metrics(self, answers: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Perplexity is the exponential of the mean over all tokens of answers; exact match is nan where no texts
        were asked for."""
        tokens = sum(answer["tokens"] for answer in answers)
        mean = sum(answer["nll"] for answer in answers) / tokens if tokens else math.nan
        wanted = [conversation.answer or "" for conversation in self._conversations(rows, with_targets=True)]
        pairs = zip(answers, wanted, strict=True)
        same = [answer["output"].strip() == text.strip() for answer, text in pairs if "output" in answer]
        return {
            "perplexity": math.inf if mean > _LARGEST_EXPONENT else math.exp(mean),
            "exact_match": sum(same) / len(same) if same else math.nan,
            "answer_tokens": tokens,
        }

    def baseline(self, rows: Dataset) -> None:
        """None: a perplexity that takes no model depends on how a tokenizer cuts text."""

    def rows_of(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """Each text as what a user says."""
        return text_rows(self.setup.columns, texts, pairs)

    def _conversations(self, rows: Dataset, with_targets: bool) -> list[Conversation]:
        return conversations(rows, self.setup.columns, "the rows", with_targets)

    def _chat(self, tokenizer: Any) -> Chat:
        if self._template is not None:
            return Chat(tokenizer, None if self._template == NO_TEMPLATE else self._template)
        return Chat(tokenizer, tokenizer.get_chat_template() if tokenizer.chat_template else None)

    def _encoded(self, given: Sequence[Conversation], chat: Chat) -> list[Encoded]:
        found = []
        for number, conversation in enumerate(given, start=1):
            try:
                found.append(chat.encode(conversation, self.setup.max_length))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        return found

    def _compares(self, given: Sequence[Conversation]) -> bool:
        """Whether to measure the exact match of the last answers."""
        if self._options.exact_match == "auto":
            return all(0 < len(conversation.answer or "") <= SHORT_ANSWER for conversation in given)
        return self._options.exact_match

    def _check_model(self, model: nn.Module) -> None:
        config: Any = model.config
        if config.is_encoder_decoder:
            raise RecipeError("task instruction needs a causal language model; this one has an encoder and a decoder")
        if self._longest_prompt(model) < 1:
            raise RecipeError(
                f"options.max_new_tokens ({self._options.max_new_tokens}) should be below "
                f"{config.max_position_embeddings}, which is what the model reads at most"
            )

    def _longest_prompt(self, model: nn.Module) -> int:
        """Tokens that leave room for an answer."""
        limit = getattr(model.config, "max_position_embeddings", None)
        longest = self.setup.max_length
        return longest if limit is None else min(longest, limit - self._options.max_new_tokens)


def _labelled(row: Encoded) -> dict[str, list[int]]:
    """A row to train on: the loss is on the tokens of answers alone."""
    labels = [token if learned else IGNORED for token, learned in zip(row.tokens, row.learned, strict=True)]
    return {"input_ids": row.tokens, "labels": labels}


@torch.no_grad()
def _losses(model: nn.Module, tokenizer: Any, encoded: Sequence[Encoded], batch_size: int) -> list[tuple[float, int]]:
    """The negative log-likelihood of the answers' tokens of each row, summed, and their number."""
    found = [(0.0, 0)] * len(encoded)
    if not encoded:
        return found
    inputs = Dataset.from_list([_labelled(row) for row in encoded])
    for chosen, batch in batches_by_length(inputs, batch_size, Pad(tokenizer.pad_token_id, "right"), device_of(model)):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        for row, scores, wanted in zip(chosen, logits, labels, strict=True):
            learned = wanted != IGNORED
            nll = functional.cross_entropy(scores[learned].float(), wanted[learned], reduction="sum")
            found[row] = (nll.item(), int(learned.sum()))
    return found


def _template(option: str | None) -> str | None:
    """The text of the template that the option names or is."""
    if option is None or option == NO_TEMPLATE or "{{" in option or "{%" in option:
        return option
    path = Path(option).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"options.chat_template: no file {option}: expected a Jinja template, the path of a file that holds one, "
            f"or {NO_TEMPLATE}"
        )
    return path.read_text(encoding="utf-8")
