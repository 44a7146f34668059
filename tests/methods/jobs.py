"""A tiny BERT, rows that it can learn, and a Trainer: what the tests of methods share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from adalora import methods
from adalora.methods import Adapted, Job, Method
from adalora.recipe import Recipe, validate

STEPS = 24
POOLER = ["pooler.dense"]  # its matrix would be the thirteenth


def tiny_bert(**settings: Any) -> PreTrainedModel:
    """A random BERT of two layers with twelve matrices of one size, so that each rank costs 64 parameters a matrix
    wherever it goes; the same at every call but for its output layer."""
    config = BertConfig(
        vocab_size=10,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.1,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = BertForSequenceClassification(config)
    nn.init.normal_(model.classifier.weight, std=0.1)
    return model.eval()


def rows(count: int = 64) -> Dataset:
    """Rows of eight words, of four for one class and four others for the other."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    tokens = torch.randint(1, 5, (count, 8), generator=draw) + 4 * labels[:, None]
    return Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist(), "labels": labels.tolist()}
    )


def recipe_for(name: str, **sections: Any) -> Recipe:
    """A recipe with this method, the pooler left out where matrices are named."""
    section = methods.get(name).section
    settings: dict[str, Any] = sections.pop(section, {}) if section else {}
    if section in ("adalora", "lora"):
        settings = {"exclude_modules": POOLER} | settings
    raw = {"model": "tiny", "method": name, "data": {"train": "rows"}, **({section: settings} if section else {})}
    return validate({**raw, **sections}, "test")


def job_for(recipe: Recipe, folder: Path, steps: int = STEPS) -> Job:
    """What training says to the method."""

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for batch in rows().with_format("torch").iter(16):
            yield dict(batch)

    return Job(recipe, "SEQ_CLS", steps, steps_per_epoch=4, batches=batches, trace=folder / "trace.jsonl")


def adapt(name: str, folder: Path, recipe: Recipe | None = None, steps: int = STEPS) -> tuple[Method, Adapted]:
    """A tiny BERT, trainable by the method."""
    method = methods.get(name)
    return method, method.adapt(tiny_bert(), job_for(recipe or recipe_for(name), folder, steps))


def trainer_for(adapted: Adapted, folder: Path, steps: int = STEPS, **settings: Any) -> Trainer:
    """A Trainer that takes so many steps of 16 rows."""
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=16,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        dataloader_pin_memory=False,
        **{"learning_rate": 1e-2, "save_strategy": "no"} | settings,
    )
    return Trainer(adapted.model, arguments, train_dataset=rows(), callbacks=list(adapted.callbacks))


@torch.no_grad()
def outputs(model: nn.Module) -> Any:
    """Loss and logits on all rows."""
    training = model.training
    found = model.eval()(**{name: torch.tensor(rows()[name]) for name in rows().column_names})
    model.train(training)
    return found


def head_parameters() -> int:
    return sum(parameter.numel() for parameter in tiny_bert().classifier.parameters())


def saved_parameters(folder: Path) -> int:
    """Numbers in what was saved, without the output layer's."""
    files = itertools.chain(folder.glob("adapter_model.safetensors"), folder.glob("model.safetensors"))
    return sum(value.numel() for file in files for value in load_file(file).values()) - head_parameters()
