"""Summaries: their columns, their metrics, and what the first sentences alone are worth."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from adalora import tasks
from adalora.data import DataError, read_rows, sample
from adalora.tasks import Columns, Setup

from ..data import benchmark_data
from .generators import model_of, task_of, tokenizer_of

ROWS = Dataset.from_dict(
    {
        "document": ["A cat sat. It slept. It woke. It ate.", "The dog ran. Nobody saw it. It rained."],
        "summary": ["A cat sat.\nIt slept.", "Rain fell."],
    }
)


def test_what_the_task_is_by_default() -> None:
    kind = tasks.get("summarization")
    assert kind.columns == Columns("document", None, "summary") and kind.headline in kind.metric_names
    options = kind.options().model_dump()
    assert options == {
        "max_target_length": 64,
        "min_target_length": 0,
        "num_beams": 4,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "source_prefix": "",
        "separator": "\nTL;DR:\n",
    }


def test_metrics_and_baseline() -> None:
    """Two of six words of the second answer and its reference are the same; rows count alike."""
    task = task_of("summarization")
    task.check(ROWS, "here")
    found = task.metrics([{"output": "A cat sat. It slept."}, {"output": "rain in the"}], ROWS)
    assert tuple(found) == task.metric_names
    assert found["rouge1"] == found["rougeL"] == found["rougeLsum"] == pytest.approx(100 * (1 + 2 / 5) / 2)
    assert found["rouge2"] == pytest.approx(50)
    answer, baseline = task.baseline(ROWS)  # 2 and 1 sentences: 1.5 on average, which is rounded to 2
    assert answer == "the first 2 sentences"
    lead = [{"output": "A cat sat. It slept."}, {"output": "The dog ran. Nobody saw it."}]
    assert baseline == task.metrics(lead, ROWS)
    assert task.baseline(ROWS.select([1]))[0] == "the first sentence"
    many = Dataset.from_dict({"document": ["A. B. C."], "summary": [" ".join(["So it is."] * 9)]})
    assert task.baseline(many)[0] == "the first 3 sentences"


def test_a_causal_model_is_asked_for_a_summary() -> None:
    tokenizer = tokenizer_of("gpt2", ROWS["document"])
    features = task_of("summarization").features(ROWS, tokenizer, model_of("gpt2", len(tokenizer)))
    assert tokenizer.decode(features[1]["input_ids"]) == f"{ROWS[1]['document']}\nTL;DR:\nRain fell.</s>"


def test_rows_of_texts() -> None:
    task = task_of("summarization")
    rows = task.rows_of(["one", "two"], None)
    assert rows.to_dict() == {"document": ["one", "two"]}
    task.check(rows, "the command line", with_targets=False)
    with pytest.raises(DataError, match="single texts"):
        task.rows_of(["one"], ["two"])
    with pytest.raises(DataError, match="has no column 'summary'"):
        task.check(rows, "the command line")


@pytest.mark.parametrize(
    ("name", "columns", "split", "answer", "least"),
    [
        # lead-1 of XSum has 16.30/1.60/11.95 in Narayan et al. (2018), on all 11,334 rows of the test split
        ("xsum/default", Columns("document", None, "summary"), "test", "the first sentence", 13),
        # lead-3 has 29.1/11.1/25.9 on CNN's part, to which the first rows of each split belong (Narayan et al. 2018b)
        ("cnn_dailymail/3.0.0", Columns("article", None, "highlights"), "validation", "the first 3 sentences", 25),
    ],
)
def test_the_first_sentences_of_real_news(
    name: str, columns: Columns, split: str, answer: str, least: float, tmp_path: Path
) -> None:
    """Near what is published for them, of a hundred rows."""
    rows = sample(read_rows(str(benchmark_data(name)), split), 100)
    kind = tasks.get("summarization")
    task = kind(Setup(columns, None, 512, kind.options()))
    task.check(rows, name)
    said, found = task.baseline(rows)
    assert said == answer and least < found["rouge1"] < least + 9
    assert found["rouge2"] < found["rougeL"] <= found["rougeLsum"] <= found["rouge1"]
