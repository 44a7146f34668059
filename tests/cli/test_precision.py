"""Checkpoints in half precision: what is trained is float32, with every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from adalora import methods
from adalora.preparation import prepare
from adalora.pretrained import load_model
from adalora.reading import task_of
from adalora.recipe import validate
from adalora.runs import RunFolder

from .conftest import Finished, reviews, write_csv

Run = Callable[..., Finished]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOW_RANK = {name for name in methods.names() if methods.get(name).section in ("adalora", "lora")}


@pytest.fixture(scope="module", params=HALF)
def half(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT as a checkpoint in half precision, with rows that have three stars on average."""
    folder = tmp_path_factory.mktemp("half") / request.param
    AutoModel.from_pretrained(tiny_model).to(HALF[request.param]).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    for name, count, seed in (("train", 48, 1), ("test", 40, 2)):
        rows = [{"text": row["text"], "label": "4" if row["label"] == "fresh" else "2"} for row in reviews(count, seed)]
        write_csv(folder / f"{name}.csv", rows)
    return folder


@pytest.mark.parametrize("method", methods.names())
def test_what_is_trained_is_float32(half: Path, method: str) -> None:
    """As a loss scaler wants it. A base that stays as it is keeps the checkpoint's precision."""
    raw = {"model": str(half / "model"), "task": "regression", "method": method, "output": "run"}
    data = {"train": str(half / "train.csv"), "eval": str(half / "test.csv")}
    settings = {"exclude_modules": ".*pooler.*", "modules_to_save": ["embeddings.LayerNorm", "word_embeddings"]}
    section = methods.get(method).section
    sections = {section: settings} if section in ("adalora", "lora") else {}
    prepared = prepare(validate({**raw, "data": data, **sections}, "test"))
    trained = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    query = next(value for name, value in prepared.model.named_parameters() if "query" in name and value.ndim == 2)
    assert query.dtype == (HALF[half.name] if method in LOW_RANK else torch.float32)

    batch = prepared.task.collator(prepared.tokenizer, prepared.model)([prepared.train[row] for row in range(4)])
    for autocast in (False, True):
        with torch.autocast("cpu", HALF[half.name], enabled=autocast):
            loss = prepared.model(**batch).loss
        loss.backward()
        assert loss.isfinite() and any(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("method", methods.names())
def test_small_steps_count_and_a_run_answers_as_it_was_measured(adalora: Run, half: Path, method: str) -> None:
    section = methods.get(method).section
    exclude = ["--set", f"{section}.exclude_modules=.*pooler.*"] if section in ("adalora", "lora") else []
    done = adalora(
        *("train", "--task", "regression", "--method", method, "--model", half / "model", "--output", "run", *exclude),
        *("--train", half / "train.csv", "--eval", half / "test.csv", "--lr", 1e-3, "--batch-size", 8),
        *("--set", "training.max_steps=6", "--max-length", 16),
    )
    assert done.code == 0, done.err
    learned = {key: value for file in Path("run").glob("*.safetensors") for key, value in load_file(file).items()}
    bias = next(value for key, value in learned.items() if key.endswith("classifier.bias"))
    assert bias.dtype == torch.float32
    assert 1e-4 < abs(bias.item() - 3.0) < 0.01, "it began at 3, where a step of 1e-3 is lost in half precision"
    expected = json.loads(Path("run/metrics.json").read_text())["metrics"]
    found = json.loads(adalora("evaluate", "run", "--json").out)["metrics"]
    assert found["mse"] == pytest.approx(expected["mse"], rel=1e-3)  # the base rounds products in another order

    recipe = RunFolder(Path("run")).check_trained()
    tokenizer, used = AutoTokenizer.from_pretrained(half / "model"), methods.get(method)
    loaded = used.load(load_model(recipe.model, task_of(recipe), tokenizer, used.base_precision), recipe, Path("run"))
    assert any(torch.equal(value, bias) for name, value in loaded.named_parameters() if value.shape == bias.shape)
