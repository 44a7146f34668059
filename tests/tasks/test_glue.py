"""GLUE: each task reads its columns, names its classes and measures what the benchmark measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from adalora import tasks
from adalora.data import DataError, read_rows, sample
from adalora.recipe import RecipeError
from adalora.tasks import Setup, Task
from adalora.tasks.glue import GLUE

from ..cli.conftest import Finished
from ..data import benchmark_data

OFFICIAL = {
    "cola": ["mcc"],
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "wnli": ["accuracy"],
}
"""The benchmark's metrics in its order (Wang et al., table 1)."""


def glue(name: str, label_names: list[str] | None = None, max_length: int = 32) -> Task:
    kind = tasks.get(f"glue/{name}")
    return kind(Setup(kind.columns, label_names, max_length, kind.options()))


def labelled(*labels: object) -> Dataset:
    """Rows of sentence pairs."""
    texts = [f"sentence {index}" for index in range(len(labels))]
    return Dataset.from_dict({"sentence1": texts, "sentence2": texts, "sentence": texts, "label": list(labels)})


def answers(*labels: str) -> list[dict[str, object]]:
    return [{"label": label} for label in labels]


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_metrics_are_the_benchmarks(name: str) -> None:
    kind = tasks.get(f"glue/{name}")
    assert list(kind.metric_names[: len(OFFICIAL[name])]) == OFFICIAL[name]
    assert kind.headline in kind.metric_names
    assert len(OFFICIAL) == len(GLUE) == sum(task.startswith("glue/") for task in tasks.names())


def test_matthews_correlation_of_cola() -> None:
    """Three true positives, one true negative, one false of each: (3·1 - 1·1) / √(4·4·2·2) = 1/4."""
    given = answers(*["acceptable"] * 3, "unacceptable", "unacceptable", "acceptable")
    assert glue("cola").metrics(given, labelled(1, 1, 1, 1, 0, 0)) == {"mcc": pytest.approx(0.25)}


def test_accuracy_and_f1_of_mrpc_are_of_the_equivalent_pairs() -> None:
    """As above, by another measure: F1 is 2·3 / (2·3 + 1 + 1) = 3/4 for equivalent, 1/2 for the others."""
    given = answers(*["equivalent"] * 3, "not_equivalent", "not_equivalent", "equivalent")
    found = glue("mrpc").metrics(given, labelled(1, 1, 1, 1, 0, 0))
    assert found == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(0.75)}
    _, baseline = glue("mrpc").baseline(labelled(1, 1, 1, 1, 0, 0))
    assert baseline == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(0.8)}


def test_accuracy_of_three_classes() -> None:
    given = answers("entailment", "neutral", "neutral")
    assert glue("mnli").metrics(given, labelled(0, 1, 2)) == {"accuracy": pytest.approx(2 / 3)}


def test_both_correlations_of_stsb_and_their_mean() -> None:
    """Deviations from 2.75 are -1.75, -.75, .25, 2.25: Pearson 7.75 / 8.75. Two ranks swap: Spearman 1 - 6·2/60."""
    task = glue("stsb")
    found = task.metrics([{"value": value} for value in (1.0, 2.0, 3.0, 5.0)], labelled(1.0, 3.0, 2.0, 5.0))
    pearson, spearman = 7.75 / 8.75, 0.8
    assert found == pytest.approx({"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2})
    answer, baseline = task.baseline(labelled(1.0, 3.0, 2.0, 5.0))
    assert answer == "always 2.75" and all(math.isnan(baseline[name]) for name in task.metric_names)


@pytest.mark.parametrize("labels", [[1, 0, 1], ["entailment", "not_entailment", "entailment"]])
def test_numbers_mean_the_benchmarks_classes(labels: list[object]) -> None:
    """Data without declared classes: WNLI and RTE have the same two in opposite orders."""
    task = glue("wnli").fit(labelled(*labels))
    assert task.label_names == ["not_entailment", "entailment"]
    assert task.metrics(answers("entailment", "not_entailment", "entailment"), labelled(*labels))["accuracy"] == 1.0
    rte = glue("rte").fit(labelled(*labels))
    assert rte.label_names == ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("rte", [0, 1, 2], r"'label' should hold 0 \(entailment\), 1 \(not_entailment\) or those names; row 3 has 2"),
        ("rte", [-1, -1], "hides its labels"),
        ("rte", ["yes", "no"], "holds 'no', 'yes', not among"),
        ("rte", [0, 0], "only the class 'entailment'"),
        ("stsb", [-1.0, -1.0], "hides its labels"),
        ("stsb", ["3.2", "4.1"], "should hold numbers; row 1 has '3.2'"),
    ],
)
def test_labels_that_are_not_the_benchmarks(name: str, labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        glue(name).fit(labelled(*labels))


def test_the_classes_cannot_be_renamed() -> None:
    with pytest.raises(RecipeError, match="its own classes, not_equivalent, equivalent"):
        glue("mrpc", ["different", "same"])
    assert glue("mrpc", ["not_equivalent", "equivalent"]).label_names == ["not_equivalent", "equivalent"]


@pytest.mark.parametrize(
    ("name", "split", "declared"),
    [
        ("cola", "validation", True),
        ("sst2", "validation", True),
        ("mrpc", "train", True),
        ("stsb", "validation", False),
        ("mnli", "validation_matched", True),
        ("qnli", "validation", True),
        ("rte", "train", True),
        ("wnli", "train", True),
    ],
)
def test_features_of_the_real_rows(name: str, split: str, declared: bool, pieces: Path) -> None:
    """Its columns are there, its classes are those that the data declares, and every row becomes tokens and a label."""
    folder = benchmark_data(f"glue/{name}")
    rows = sample(read_rows(str(folder), split), 100)
    task = glue(name)
    task.check(rows, str(folder))
    task = task.fit(rows)
    if declared:
        assert task.label_names == rows.features["label"].names
    features = task.features(rows, AutoTokenizer.from_pretrained(pieces), None)
    assert len(features) == 100 and max(map(len, features["input_ids"])) <= 32
    assert np.allclose(features["labels"], rows["label"])


def test_train_and_evaluate_on_mrpc(adalora: Callable[..., Finished], pieces: Path) -> None:
    """Columns, classes and metrics come with the name of the task; other splits are measured too."""
    benchmark_data("glue/mrpc")
    done = adalora(
        *("train", "--model", pieces, "--task", "glue/mrpc", "--train", benchmark_data("glue/mrpc")),
        *("--set", "data.max_train_rows=32", "--set", "data.max_eval_rows=16", "--epochs", 1, "--batch-size", 16),
        *(
            "--set",
            "data.more_eval_splits=[test]",
            "--set",
            "training.save_steps=99",
            "--max-length",
            32,
            "--output",
            "run",
        ),
    )
    assert done.code == 0, done.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert list(metrics["metrics"]) == list(metrics["more_metrics"]["test"]) == ["accuracy", "f1"]
    done = adalora("evaluate", "run", "--json")
    assert done.code == 0 and json.loads(done.out)["metrics"] == pytest.approx(metrics["metrics"])
