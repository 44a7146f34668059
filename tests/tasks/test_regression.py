"""Regression: the output layer starts where the training rows are."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from adalora.tasks import Columns, Setup, StartsOutput, get

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
ROWS = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1.0, 2.0, 4.5]})


def task() -> StartsOutput:
    kind = get("regression")
    fitted = kind(Setup(Columns("text", None, "label"), None, 16, kind.options())).fit(ROWS)
    assert isinstance(fitted, StartsOutput)
    return fitted


def answers(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), attention_mask=torch.ones(2, 3)).logits


@pytest.mark.parametrize(
    "model",
    [
        BertForSequenceClassification(BertConfig(**SMALL, num_labels=1)),
        RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=1, pad_token_id=0)),
    ],
    ids=["linear", "two layers"],
)
def test_a_new_output_layer_answers_the_mean_of_the_training_rows(model: nn.Module) -> None:
    before = answers(model)
    body = {name: value.clone() for name, value in model.base_model.named_parameters()}
    task().start_output(model)
    torch.testing.assert_close(answers(model), before + 2.5)
    for name, value in model.base_model.named_parameters():
        assert torch.equal(value, body[name])


def test_an_output_layer_that_was_trained_goes_on_from_where_it_is() -> None:
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))
    nn.init.constant_(model.classifier.bias, 0.25)
    before = answers(model)
    task().start_output(model)
    assert torch.equal(answers(model), before)


def test_an_output_layer_without_a_bias_is_left_as_it_is() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config)
    before = answers(model)
    task().start_output(model)
    assert torch.equal(answers(model), before)
