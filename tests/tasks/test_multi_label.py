"""Several labels for one text: what they may look like, what is learned from them and how it is measured."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adalora import tasks
from adalora.data import DataError
from adalora.recipe import RecipeError
from adalora.tasks import Columns, Setup, Task

from ..cli.conftest import Finished

LABELS = [["a", "b"], ["b"], [], ["c"]]


def multi_label(label_names: list[str] | None = None, **options: object) -> Task:
    kind = tasks.get("multi_label")
    return kind(Setup(Columns("text", None, "labels"), label_names, 32, kind.options(**options)))


def rows(labels: list[object]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {index}" for index in range(len(labels))], "labels": labels})


def declared() -> Dataset:
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["c", "b", "a", "unused"]))})
    return Dataset.from_dict({"text": ["x", "y", "z", "w"], "labels": [[2, 1], [1], [], [0]]}, features)


def columns(**values: list[object]) -> Dataset:
    return Dataset.from_dict({"text": ["x", "y", "z", "w"], **values})


def test_metrics_of_labels() -> None:
    """Three right, one too many (c), one missed (b). F1 of a is 1, of b 2/3, of c 2/3; two rows are all right."""
    task = multi_label().fit(rows(LABELS))
    found = task.metrics([{"labels": labels} for labels in (["a"], ["b"], ["c"], ["c"])], rows(LABELS))
    assert found == pytest.approx({"micro_f1": 6 / 8, "macro_f1": 7 / 9, "subset_accuracy": 2 / 4})
    assert tuple(found) == task.metric_names and task.headline in found


def test_a_single_label_is_measured_by_its_own_f1() -> None:
    """Not by how often it is rightly left out. It is answered 3 times, 2 of them rightly, and 4 rows have it."""
    given = rows([["a"]] * 4 + [[]] * 6)
    task = multi_label().fit(given)
    found = task.metrics([{"labels": labels} for labels in [["a"], ["a"], [], []] + [["a"]] + [[]] * 5], given)
    assert found == pytest.approx({"micro_f1": 4 / 7, "macro_f1": 4 / 7, "subset_accuracy": 7 / 10})
    nothing = task.metrics([{"labels": []}] * 10, given)
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "subset_accuracy": 0.6}


def test_the_baseline_is_the_best_constant_answer() -> None:
    """With a in 3 of 4 rows, b in 2 and c in none: {a} has F1 6/9, {a, b} 10/13."""
    task = multi_label(["a", "b", "c"]).fit(rows([["a"], ["a", "b"], ["a", "b"], []]))
    answer, found = task.baseline(rows([["a"], ["a", "b"], ["a", "b"], []]))
    assert answer == "always 'a', 'b'"
    assert found == pytest.approx({"micro_f1": 10 / 13, "macro_f1": (6 / 7 + 2 / 3) / 3, "subset_accuracy": 2 / 4})


@pytest.mark.parametrize(
    ("task", "given", "names"),
    [
        (multi_label(), rows(LABELS), ["a", "b", "c"]),
        (multi_label(), rows([[10, 9], [9], [], [11]]), ["9", "10", "11"]),
        (multi_label(["c", "b", "a"]), rows(LABELS), ["c", "b", "a"]),
        (multi_label(), declared(), ["c", "b", "a", "unused"]),
        (
            multi_label(label_columns=["a", "b", "c"]),
            columns(a=[1, 0, 0, 0], b=[True, True, False, False], c=[0.0, 0.0, 0.0, 1.0]),
            ["a", "b", "c"],
        ),
    ],
)
def test_every_form_of_labels(task: Task, given: Dataset, names: list[str]) -> None:
    """A perfect answer to the same four rows, in all the forms that they may have."""
    task.check(given, "rows")
    task = task.fit(given)
    assert task.label_names == names and task.head()["num_labels"] == len(names)
    one, two, three = ("10", "9", "11") if "9" in names else ("a", "b", "c")
    perfect = [{"labels": labels} for labels in ([one, two], [two], [], [three])]
    assert task.metrics(perfect, given)["subset_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (
            multi_label(),
            rows(["a", "b"]),
            "hold a list of labels; row 1 has 'a'. For .* options.label_columns",
        ),
        (multi_label(), rows([[0.5], [1.0]]), "row 1 has"),
        (multi_label(), rows([[["a"]], [["b"]]]), "row 1 has"),
        (multi_label(), rows([[], []]), "no row has any label"),
        (multi_label(["a"]), rows(LABELS), "holds 'b', 'c', not among the labels trained on: 'a'"),
        (multi_label(), rows([["a"], None]), "'labels' of rows is empty in 1 of 2 rows"),
        (multi_label(label_columns=["a"]), columns(b=[0, 1, 0, 1]), "rows has no column 'a'"),
        (multi_label(label_columns=["a"]), columns(a=[0, 1, 2, 1]), "'a' should hold 0 or 1; row 3 has 2"),
        (multi_label(label_columns=["a"]), columns(a=["no", "yes", "no", "no"]), "row 1 has 'no'"),
    ],
)
def test_labels_that_cannot_be_meant(task: Task, given: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.check(given, "rows")
        task.fit(given)


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(RecipeError, match="name one of them twice"):
        multi_label(["a", "a"])
    with pytest.raises(RecipeError, match="the labels are those columns"):
        multi_label(["b"], label_columns=["a"])


def test_the_loss_is_the_binary_cross_entropy_of_every_label(pieces: Path) -> None:
    task = multi_label().fit(rows(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    model = AutoModelForSequenceClassification.from_pretrained(pieces, **task.head()).eval()
    features = task.features(rows(LABELS), tokenizer, model)
    assert features["labels"][:] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    output = model(**task.collator(tokenizer, model)(list(features)))
    chances = output.logits.detach().double().sigmoid()
    right = torch.where(torch.tensor(features["labels"][:]) == 1, chances, 1 - chances)
    assert output.loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)  # float32 against float64


def test_the_threshold_decides(pieces: Path) -> None:
    """An answer holds the labels whose probability is high enough, whatever order the rows are batched in."""
    model = AutoModelForSequenceClassification.from_pretrained(pieces, num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    given = Dataset.from_dict({"text": ["a much longer text", "b", "a text"]})
    answers = [
        multi_label(["a", "b", "c"], threshold=threshold).predict(model, tokenizer, given, 2)
        for threshold in (0.4, 0.5, 0.6)
    ]
    for threshold, found in zip((0.4, 0.5, 0.6), answers, strict=True):
        for text, answer in zip(given["text"], found, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).logits.sigmoid()[0].tolist()
            assert answer["scores"] == pytest.approx(dict(zip("abc", alone, strict=True)), abs=1e-5)  # padding's
            assert answer["labels"] == [name for name, score in answer["scores"].items() if score >= threshold]
    assert len({json.dumps([answer["labels"] for answer in found]) for found in answers}) > 1


def test_train_and_predict(adalora: Callable[..., Finished], pieces: Path) -> None:
    """Each of three letters in the text is a label; half of the rows have several."""
    draw = random.Random(0)
    for name, count in (("train", 128), ("test", 32)):
        lines = []
        for _ in range(count):
            labels = draw.sample("xyz", draw.randint(0, 3))
            text = draw.sample([*labels, *"abcd"], 4 + len(labels))
            lines.append(json.dumps({"text": " ".join(text), "labels": labels}))
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    done = adalora(
        *("train", "--model", pieces, "--task", "multi_label", "--train", "train.jsonl", "--eval", "test.jsonl"),
        *("--epochs", 5, "--lr", 3e-2, "--batch-size", 16, "--max-length", 16, "--output", "run"),
        *("--set", "training.eval_strategy=no", "--set", "training.save_steps=999", "--set", "options.threshold=0.4"),
    )
    assert done.code == 0, done.err
    found = json.loads(Path("run/metrics.json").read_text())
    assert found["metrics"]["micro_f1"] > found["baseline"]["metrics"]["micro_f1"] + 0.1
    answer = json.loads(adalora("predict", "run", "--text", "x a y b", "--json").out)
    assert answer["text"] == "x a y b" and sorted(answer["scores"]) == ["x", "y", "z"]
    assert answer["labels"] == [name for name, score in answer["scores"].items() if score >= 0.4]
