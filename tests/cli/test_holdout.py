"""Rows held out of the training rows: what is together, what is in proportion, and what is said and refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from adalora.data import DataError, hold_out

from .conftest import Finished, reviews, write_csv

Run = Callable[..., Finished]
ROWS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.sampled_from("abc")), min_size=4, max_size=60)


def table(rows: list[tuple[int, int, str]]) -> Dataset:
    first, second, label = zip(*rows, strict=True)
    return Dataset.from_dict({"first": list(first), "second": list(second), "label": list(label)})


@given(ROWS, st.integers(1, 30), st.sampled_from([[["first"]], [["first"], ["second"]], [["first", "second"]]]))
def test_groups_are_on_one_side_and_no_class_is_lost(
    rows: list[tuple[int, int, str]], size: int, together: list[list[str]]
) -> None:
    before = table(rows)
    try:
        train, held = hold_out(before, size, together, before["label"])
    except DataError:
        return
    assert 1 <= len(held) <= size and len(train) + len(held) == len(rows)
    assert Counter(map(str, [*train, *held])) == Counter(map(str, before))
    assert set(train["label"]) == set(before["label"]), "each class keeps rows to train on"
    for columns in together:
        sides = [{tuple(row[name] for name in columns) for row in side} for side in (train, held)]
        assert not sides[0] & sides[1]


def test_the_same_rows_are_held_out_whatever_their_order() -> None:
    rows = Dataset.from_list(reviews(200, seed=0))
    first, again = (
        hold_out(order, 0.1, [["text"]], None).held_out for order in (rows, rows.select(range(199, -1, -1)))
    )
    assert len(first) == 20 and sorted(first["text"]) == sorted(again["text"])
    more = Dataset.from_list([*reviews(200, seed=0), *reviews(10, seed=1)])
    assert len(set(first["text"]) & set(hold_out(more, 20, [["text"]], None).held_out["text"])) >= 16


@pytest.mark.parametrize("size", [0.1, 30, 31])
def test_classes_are_in_proportion(size: float) -> None:
    rows = Dataset.from_dict({"text": [str(index) for index in range(300)], "label": ["a"] * 240 + ["b"] * 60})
    train, held = hold_out(rows, size, [["text"]], rows["label"])
    assert Counter(held["label"]) == {"a": 24 + (size == 31), "b": 6} and len(train) + len(held) == 300


def test_one_file_is_enough(adalora: Run, tiny_model: Path) -> None:
    """Training, plan and evaluation speak of the same rows, whatever the seed."""
    write_csv(Path("all.csv"), reviews(80, seed=1))
    run = ["--model", tiny_model, "--train", "all.csv", "--holdout", 0.2, "--set", "training.max_steps=6"]
    run += ["--max-length", 16, "--set", "adalora.exclude_modules=.*pooler.*"]
    plan = adalora("plan", *run)
    words = " ".join(plan.out.split())
    assert plan.code == 0, plan.err
    assert "64 training rows of all.csv" in words
    assert "16 held-out rows of all.csv, the same for every seed, none with the text of a training row" in words
    facts = json.loads(adalora("plan", *run, "--json").out)["eval_rows"]
    assert (facts["count"], facts["split"], facts["holdout"], facts["together"]) == (16, None, 0.2, ["text"])
    scores = []
    for seed in (0, 1):
        assert adalora("train", *run, "--seed", seed, "--output", f"run-{seed}").code == 0
        measured = json.loads(adalora("evaluate", f"run-{seed}", "--json").out)
        assert measured["rows"] == 16
        assert measured["metrics"] == json.loads(Path(f"run-{seed}/metrics.json").read_text())["metrics"]
        scores.append(measured["baseline"])
    assert scores[0] == scores[1], "the same rows"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--holdout", 80], "leaves none of the 80 rows to train on"),
        (["--holdout", 0.999], "leaves none of the 80 rows to train on"),
        (["--holdout", 0.001], "is less than one"),
        (["--holdout", 2.5], "a whole number of rows, or a share of all rows below 1"),
        (["--holdout", -1], "greater than 0"),
        (["--holdout", 8, "--holdout-by", "film"], "data.holdout_by: all.csv has no column 'film': its columns are"),
        (["--holdout", 8, "--holdout-by", "label"], "rows with the same label stay together"),
        (["--holdout-by", "text"], "give holdout, too"),
        (["--holdout", 8, "--eval", "all.csv"], "give it or eval, not both"),
        (["--holdout", 8, "--set", "data.eval_split=test"], "give it or eval_split, not both"),
        (["--holdout", 8, "--set", "data.train_split=first"], "holds no splits, so no 'first'"),
    ],
)
def test_what_cannot_be_held_out(adalora: Run, tiny_model: Path, flags: list[object], words: str) -> None:
    write_csv(Path("all.csv"), reviews(80, seed=1))
    refused = adalora("train", "--model", tiny_model, "--train", "all.csv", *flags)
    assert refused.code == 2 and words in " ".join(refused.err.split()) and refused.err.count("\n") == 1
    assert not Path("runs").exists()
