"""Tasks: every one in the registry keeps the contract; each one's own numbers are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import spearmanr

from adalora import tasks
from adalora.data import DataError
from adalora.recipe import RecipeError
from adalora.tasks import Columns

COLUMNS = Columns("text", None, "label")
LABELS = {"classification": ["no", "yes", "no", "maybe"], "regression": [0.5, 2.0, 1.0, 4.0]}


def rows(labels: list[object]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {index}" for index in range(len(labels))], "label": labels})


@pytest.mark.parametrize("name", tasks.names())
def test_the_contract_of_every_task(name: str) -> None:
    """A perfect answer scores better than the best constant one, and a run's recipe restores the task."""
    assert name in LABELS, "give the new task labels to learn"
    task = tasks.get(name).fit(rows(LABELS[name]), COLUMNS, None)
    targets = np.array(task.targets(rows(LABELS[name])))
    outputs = np.eye(task.head()["num_labels"])[targets] * 9 if targets.dtype.kind == "i" else targets[:, None]
    answer, baseline = task.baseline(targets)
    found = task.metrics(outputs, targets)
    assert tuple(found) == tuple(baseline) == task.metric_names
    assert found[task.headline] == pytest.approx(1) and answer.startswith("always ")
    restored = tasks.get(name)(task.label_names, "label")
    assert restored.head() == task.head() and restored.answers(outputs) == task.answers(outputs)
    assert len(task.answers(outputs)) == 4


def test_metrics_of_classes() -> None:
    task = tasks.get("classification").fit(rows(["a", "a", "b", "b", "b"]), COLUMNS, None)
    targets = np.array([0, 0, 1, 1, 1])
    outputs = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]])  # answers a b b b a
    found = task.metrics(outputs, targets)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mcc"] == pytest.approx((1 * 2 - 1 * 1) / math.sqrt(2 * 3 * 2 * 3))
    answer, baseline = task.baseline(targets)
    assert answer == "always 'b'" and baseline == {"accuracy": 0.6, "macro_f1": pytest.approx(0.375), "mcc": 0.0}


def test_metrics_of_numbers() -> None:
    task = tasks.get("regression").fit(rows([1.0, 2.0, 4.0]), COLUMNS, None)
    targets = np.array([1.0, 2.0, 4.0])
    found = task.metrics(np.array([[2.0], [1.0], [4.0]]), targets)
    assert found["mse"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([2, 1, 4], targets)[0, 1])
    assert found["spearman"] == pytest.approx(spearmanr([2, 1, 4], targets).statistic)
    _, baseline = task.baseline(targets)
    assert baseline["mse"] == pytest.approx(np.var(targets)) and math.isnan(baseline["pearson"])


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
    assert tasks.get("classification").fit(rows(labels), COLUMNS, None).label_names == names


def test_declared_and_given_classes_keep_their_order() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "unused"])})
    declared = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features)
    fit = tasks.get("classification").fit
    assert fit(declared, COLUMNS, None).label_names == ["z", "a", "unused"]
    assert fit(rows(["a", "b"]), COLUMNS, ["b", "a"]).targets(rows(["b"])) == [0]
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features)
    with pytest.raises(DataError, match="hides its labels"):
        fit(declared, COLUMNS, None).targets(hidden)
    unseen = Dataset.from_dict({"text": ["x"], "label": [2]}, features)
    with pytest.raises(DataError, match="'unused', not among the classes trained on"):
        fit(declared, COLUMNS, None).targets(unseen)


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
        tasks.get("regression").fit(rows(labels), COLUMNS, None)


def test_classes_mean_nothing_to_regression() -> None:
    with pytest.raises(RecipeError, match="label_names"):
        tasks.get("regression").fit(rows([1.0, 2.0]), COLUMNS, ["a"])
