"""How causal and encoder-decoder models learn to answer a text with a text, and how they do it then.

A causal model reads ``input + separator`` and goes on with the target and the end-of-text token; its loss is on those
two alone. An encoder-decoder model reads the input, and its decoder makes the target, tokenized as the tokenizer does
with targets; the model itself shifts the labels to get the decoder's input. In both, the input is cut at
``data.max_length`` tokens (the separator counts and stays) and the target at ``options.max_target_length``, so that a
long input never costs its target.

Answers are made by greedy or beam search, which draws no random numbers. Causal prompts are padded on the left, so
that every row of a batch goes on right after its own last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field, model_validator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from typing_extensions import Self

from ..recipe import RecipeError
from .base import Options, Setup, batches_by_length, device_of

IGNORED = -100  # a label that the loss passes over


class GenerationOptions(Options):
    """How targets are cut and answers made."""

    max_target_length: int = Field(64, ge=2, description="Tokens kept of a target, and of an answer at most.")
    min_target_length: int = Field(0, ge=0, description="Tokens of an answer at least.")
    num_beams: int = Field(4, ge=1, description="Beams of the search for an answer; 1: greedy.")
    length_penalty: float = Field(1.0, description="Beams: a higher value prefers longer answers.")
    no_repeat_ngram_size: int = Field(
        0,
        ge=0,
        description="No sequence of so many tokens occurs twice in an answer, nor, with a causal model, in input and "
        "answer together; 0: it may.",
    )
    source_prefix: str = Field("", description="Put before each input, such as `summarize: ` for T5.")
    separator: str = Field("\n", description="Put between input and target, for causal models.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_target_length > self.max_target_length:
            raise ValueError(
                f"min_target_length ({self.min_target_length}) is above max_target_length ({self.max_target_length})"
            )
        return self

    def search(self) -> dict[str, Any]:
        """The same in the words of ``transformers.GenerationConfig``."""
        beams = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return beams | {
            "do_sample": False,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_target_length,
            "min_new_tokens": self.min_target_length,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }


# --- from texts to tokens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of inputs and targets as one model wants them."""

    tokenizer: Any
    max_length: int
    options: GenerationOptions
    causal: bool

    @classmethod
    def of(cls, setup: Setup, tokenizer: Any, model: nn.Module) -> Encoder:
        """RecipeError when the model has no room for the lengths, or the tokenizer no end of a text."""
        config: Any = model.config
        options: GenerationOptions = setup.options
        encoder = cls(tokenizer, setup.max_length, options, causal=not config.is_encoder_decoder)
        if tokenizer.eos_token_id is None:
            raise RecipeError("the model's tokenizer has no end-of-text token, by which an answer would end")
        limit = getattr(config, "max_position_embeddings", None)
        both = f"data.max_length ({setup.max_length}) + options.max_target_length ({options.max_target_length})"
        if limit is not None and encoder.causal and setup.max_length + options.max_target_length > limit:
            raise RecipeError(f"{both} should be {limit} at most, which is what the model reads: lower one of them")
        if limit is not None and options.max_target_length > limit:
            raise RecipeError(f"options.max_target_length should be {limit} at most, which is what the model reads")
        if encoder.causal and len(encoder._separator) >= setup.max_length:
            raise RecipeError(f"data.max_length ({setup.max_length}) leaves no room beside options.separator")
        return encoder

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        """What the model reads before it answers."""
        if not texts:
            return []
        separator = self._separator if self.causal else []
        given = [self.options.source_prefix + text for text in texts]
        tokens = self.tokenizer(given, truncation=True, max_length=self.max_length - len(separator))["input_ids"]
        return [self._open(row) + separator for row in tokens]

    def pairs(self, texts: Sequence[str], targets: Sequence[str]) -> dict[str, list[list[int]]]:
        """``input_ids`` and ``labels`` to learn each target from its text."""
        if not texts:
            return {"input_ids": [], "labels": []}
        sources = self.sources(texts)
        most = self.options.max_target_length
        if not self.causal:
            labels = self.tokenizer(text_target=list(targets), truncation=True, max_length=most)["input_ids"]
            return {"input_ids": sources, "labels": labels}
        room = {"truncation": True, "max_length": most - 1}  # an end of text comes after it
        tokens = self.tokenizer(list(targets), add_special_tokens=False, **room)["input_ids"]
        answers = [[*row, self.tokenizer.eos_token_id] for row in tokens]
        return {
            "input_ids": [source + answer for source, answer in zip(sources, answers, strict=True)],
            "labels": [[IGNORED] * len(source) + answer for source, answer in zip(sources, answers, strict=True)],
        }

    @property
    def _separator(self) -> list[int]:
        if not self.options.separator:
            return []
        return list(self.tokenizer(self.options.separator, add_special_tokens=False)["input_ids"])

    def _open(self, tokens: list[int]) -> list[int]:
        """A causal model's input does not end here, whatever its tokenizer puts at the end of a text."""
        ended = self.causal and tokens and tokens[-1] == self.tokenizer.eos_token_id
        return tokens[:-1] if ended else tokens


@dataclass(frozen=True)
class Pad:
    """Makes a batch of rows with ``input_ids`` and perhaps ``labels``: tensors [rows, longest], and the mask."""

    token: int
    side: Literal["left", "right"]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad(tokens, self.token),
            "attention_mask": self._pad([torch.ones_like(row) for row in tokens], 0),
        }
        if "labels" in rows[0]:
            batch["labels"] = self._pad([torch.tensor(row["labels"]) for row in rows], IGNORED)
        return batch

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.side)


# --- from tokens to answers -------------------------------------------------------------------------


@torch.no_grad()
def write(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], batch_size: int, **settings: Any
) -> list[str]:
    """What the model writes after each prompt, or in answer to it: without the prompt and special tokens.

    ``settings`` are those of ``transformers.GenerationConfig``; what the model brings of its own does not count, but
    for the special tokens that it starts and ends with.
    """
    if not prompts:
        return []
    causal = not model.config.is_encoder_decoder  # type: ignore[union-attr]
    inputs = Dataset.from_dict({"input_ids": [list(prompt) for prompt in prompts]})
    pad = Pad(tokenizer.pad_token_id, "left" if causal else "right")
    answers = [""] * len(prompts)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with _generating(model, ends | settings):
        for chosen, batch in batches_by_length(inputs, batch_size, pad, device_of(model)):
            written = model.generate(**batch)  # type: ignore[operator]
            if causal:
                written = written[:, batch["input_ids"].shape[1] :]
            plain = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for index, answer in zip(chosen, plain, strict=True):
                answers[index] = answer.strip()
    return answers


@contextmanager
def _generating(model: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """The model out of training, and wherever it or a wrapper looks up how to generate, ``settings``."""
    owners: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    kept = [owner.generation_config for owner in owners]
    own: Any = model.generation_config
    special = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id") and value is not None}
    replaced: Any = GenerationConfig(**special | settings)  # type: ignore[no-untyped-call]
    training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = replaced
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config
        model.train(training)
