"""What a run measures: the loss on held-out rows, and a curve on the same rows throughout."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from adalora.preparation import Prepared, prepare
from adalora.recipe import validate
from adalora.training import train

from .cli.conftest import own_cache, reviews, tiny_model
from .tasks.generators import model_of, tokenizer_of

__all__ = ["own_cache", "tiny_model"]

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 4}


def run(model: Path, folder: Path, rows: DatasetDict, task: str, **more: Any) -> tuple[Prepared, dict[str, Any]]:
    """Four steps of training, and what it measured."""
    rows.save_to_disk(folder / "rows")
    data = {"train": str(folder / "rows"), "max_length": 32}
    raw = {"model": str(model), "task": task, "output": str(folder / "run"), "data": data}
    training = TRAINING | {"per_device_eval_batch_size": 7, **more.pop("training", {})}
    prepared = prepare(validate({**raw, "training": training, **more}, "test"))
    return prepared, train(prepared)


def numbers(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": 1.0 * len(row["text"].split())} for row in reviews(count, seed)]


def both(make: Any) -> DatasetDict:
    return DatasetDict({"train": Dataset.from_list(make(24, 1)), "validation": Dataset.from_list(make(20, 2))})


@torch.no_grad()
def by_hand(prepared: Prepared) -> float:
    """One row at a time, without padding, the method's wrapper left out: each counts by its labelled tokens."""
    model: Any = prepared.model.eval().get_base_model()  # type: ignore[operator]
    features = prepared.task.features(prepared.evaluation, prepared.tokenizer, model)
    collate = prepared.task.collator(prepared.tokenizer, model)
    total, items = 0.0, 0
    for row in features:
        batch = collate([row])
        labels = batch["labels"]
        count = int((labels[:, 1:] != -100).sum()) if labels.ndim == 2 else 1
        total, items = total + model(**batch).loss.item() * count, items + count
    return total / items


@pytest.mark.parametrize("from_answers", [True, False])
@pytest.mark.parametrize(
    ("task", "make", "method"),
    [
        ("classification", reviews, "lora"),
        ("classification", reviews, "peft_adalora"),  # which adds a penalty to the loss of every forward pass
        ("regression", numbers, "lora"),
    ],
)
def test_the_held_out_loss_is_the_models_own(
    task: str,
    make: Any,
    method: str,
    from_answers: bool,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a task's answers tell it or the model is run again. Sums in another order and float32: 1e-5, relative."""
    if not from_answers:
        monkeypatch.setattr("adalora.trainer.TellsLoss", type("Nothing", (), {}))
    prepared, metrics = run(tiny_model, tmp_path, both(make), task, method=method)
    assert metrics["loss"] == pytest.approx(by_hand(prepared), rel=1e-5)


def test_the_held_out_loss_of_a_language_model_is_over_its_tokens(tmp_path: Path) -> None:
    """Rows with longer answers count more, however they are padded together."""

    def make(count: int, seed: int) -> list[dict[str, str]]:
        return [{"text": row["label"], "target": row["text"]} for row in reviews(count, seed)]

    tokenizer = tokenizer_of("llama", [row["text"] for row in reviews(24, 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    model_of("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    options = {"num_beams": 1, "max_target_length": 12}
    prepared, metrics = run(tmp_path / "model", tmp_path, both(make), "data_to_text", method="lora", options=options)
    assert metrics["loss"] == pytest.approx(by_hand(prepared), rel=1e-5)


def test_evaluations_on_the_way_may_be_on_some_rows(tiny_model: Path, tmp_path: Path) -> None:
    """The same ones each time; what is reported is of all; the curve ends on the same rows as it began."""
    some = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": 6}
    prepared, metrics = run(tiny_model, tmp_path / "some", both(reviews), "classification", training=some)
    _, whole = run(tiny_model, tmp_path / "whole", both(reviews), "classification", training=some | {"eval_rows": None})
    assert [point["step"] for point in metrics["curve"]] == [2, 4] == [p["step"] for p in metrics["evaluations"]]
    assert metrics["metrics"] == whole["metrics"] == metrics["evaluations"][-1]["metrics"]
    assert metrics["curve"][0] == metrics["evaluations"][0] and whole["curve"] == whole["evaluations"]
    task, few = prepared.task, prepared.evaluation.select(sorted(Random(0).sample(range(20), 6)))
    found = task.metrics(task.predict(prepared.model.eval(), prepared.tokenizer, few, 4), few)
    assert metrics["curve"][-1]["metrics"] == found
    assert metrics["start_steps"] == 0
