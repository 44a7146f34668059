"""Classes and numbers of whole texts: what is learned from the labels, and the metrics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import spearmanr

from adalora import tasks
from adalora.data import DataError
from adalora.pretrained import load_model, load_tokenizer
from adalora.recipe import RecipeError
from adalora.tasks import Columns, Options, Setup, Task

from .generators import END, PAD, model_of, tokenizer_of


def rows(labels: list[object]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {index}" for index in range(len(labels))], "label": labels})


def task(name: str, label_names: list[str] | None = None) -> Task:
    return tasks.get(name)(Setup(Columns("text", None, "label"), label_names, 16, Options()))


def test_metrics_of_classes() -> None:
    labels = rows(["a", "a", "b", "b", "b"])
    fitted = task("classification").fit(labels)
    found = fitted.metrics([{"label": label} for label in "abbba"], labels)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mcc"] == pytest.approx((1 * 2 - 1 * 1) / math.sqrt(2 * 3 * 2 * 3))
    answer, baseline = fitted.baseline(labels)
    assert answer == "always 'b'" and baseline == {"accuracy": 0.6, "macro_f1": pytest.approx(0.375), "mcc": 0.0}
    assert tuple(found) == tuple(baseline) == fitted.metric_names


def test_metrics_of_numbers() -> None:
    numbers = rows([1.0, 2.0, 4.0])
    fitted = task("regression").fit(numbers)
    found = fitted.metrics([{"value": value} for value in (2.0, 1.0, 4.0)], numbers)
    assert found["mse"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([2, 1, 4], [1, 2, 4])[0, 1])
    assert found["spearman"] == pytest.approx(spearmanr([2, 1, 4], [1, 2, 4]).statistic)
    _, baseline = fitted.baseline(numbers)
    assert baseline["mse"] == pytest.approx(np.var([1, 2, 4])) and math.isnan(baseline["pearson"])
    assert tuple(found) == tuple(baseline) == fitted.metric_names


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 9], ["9", "10"]),
        ([True, False, True], ["False", "True"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
    ],
)
def test_classes_have_names_and_an_order(labels: list[object], names: list[str]) -> None:
    assert task("classification").fit(rows(labels)).label_names == names


def test_declared_and_given_classes_keep_their_order() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "unused"])})
    declared = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features)
    fitted = task("classification").fit(declared)
    assert fitted.label_names == ["z", "a", "unused"]
    assert task("classification", ["b", "a"]).fit(rows(["a", "b"])).head()["label2id"] == {"b": 0, "a": 1}
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features)
    with pytest.raises(DataError, match="hides its labels"):
        fitted.baseline(hidden)
    unseen = Dataset.from_dict({"text": ["x"], "label": [2]}, features)
    with pytest.raises(DataError, match="'unused', not among the classes trained on"):
        fitted.baseline(unseen)
    again = task("classification", fitted.label_names)  # as a finished run's recipe restores it
    both = Dataset.from_dict({"text": ["x", "y", "z"], "label": [2, 2, 0]}, features)
    assert again.head() == fitted.head() and again.baseline(both)[0] == "always 'unused'"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1.5", "2"], "should hold numbers; row 1 has '1.5'"),
        ([1.0, math.nan], "row 2 has nan"),
        ([True, False], "row 1 has True"),
        ([2.0, 2.0], "one value only"),
    ],
)
def test_what_regression_cannot_learn(labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task("regression").fit(rows(labels))


def test_label_names_that_cannot_be_meant() -> None:
    with pytest.raises(RecipeError, match="label_names"):
        task("regression", ["a"])
    with pytest.raises(RecipeError, match="names a class twice: a, a"):
        task("classification", ["a", "a"])


@pytest.mark.parametrize("said", [END, None])
def test_a_decoder_reads_the_last_token_of_a_text_however_its_batch_is_padded(tmp_path: Path, said: int | None) -> None:
    """Also where the model's configuration has another padding token than the tokenizer, or none."""
    texts = rows(["a", "b"]).remove_columns("text").add_column("text", ["a film", "a good cast in a weak film"])
    tokenizer = tokenizer_of("llama", texts["text"])
    model = model_of("llama", len(tokenizer))
    model.config.pad_token_id = said
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fitted, tokenizer = task("classification").fit(texts), load_tokenizer(str(tmp_path))
    loaded = load_model(str(tmp_path), fitted, tokenizer)
    assert tokenizer.pad_token_id == PAD
    alone, together = (fitted.predict(loaded.eval(), tokenizer, texts, size) for size in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)
