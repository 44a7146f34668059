"""What training, evaluation and prediction rely on, of every task that is registered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from adalora import tasks
from adalora.data import DataError
from adalora.files import to_json
from adalora.pretrained import load_model, load_tokenizer
from adalora.tasks import Setup, Task

from .generators import model_of, tokenizer_of

_TEXTS = {"first": ["a cat sat.", "it is late, so we go", "no"], "second": ["the cat sits", "it is early", "yes"]}
_MESSAGES = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in _TEXTS["first"]]
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
_TRIPLES = [["Aarhus", "leaderName", "Jacob"], ["Aarhus", "country", "Denmark"]]
_LABELS: dict[str, list[Any]] = {
    "classification": ["no", "yes", "no"],
    "regression": [0.5, 2.0, 1.0],
    "multi_label": [["a", "b"], ["b"], []],
    "token_classification": [["O", "B-X", "O"], ["B-X", "I-X", "O"], ["O", "O", "B-Y"]],
    "question_answering": [
        {"text": ["cat"], "answer_start": [4]},
        {"text": ["early"], "answer_start": [6]},
        {"text": ["yes"], "answer_start": [0]},
    ],
    "summarization": ["a cat", "late", "no"],
    "data_to_text": ["a cat", "late", "no"],
    "data_to_text/e2e": ["It is The Vaults.", "The Vaults it is.", "Bibimbap House."],
    "data_to_text/webnlg": [{"text": ["Jacob leads Aarhus.", "Aarhus is led by Jacob."]}] * 3,
    "data_to_text/dart": [{"source": ["x"], "text": ["Jacob leads Aarhus, Denmark."]}] * 3,
    "glue/stsb": [0.5, 2.0, 5.0],
    "glue/mnli": [0, 2, 1],
}
_INPUTS: dict[str, list[Any]] = {
    "token_classification": [["a", "cat", "sat"], ["it", "is", "late"], ["no", "no", "no"]],
    "data_to_text/e2e": ["name[The Vaults], near[Café]", "name[The Vaults], near[Café]", "name[Bibimbap House]"],
    "data_to_text/webnlg": [{"mtriple_set": [[" | ".join(_TRIPLES[0])]]}] * 3,
    "data_to_text/dart": [_TRIPLES] * 3,
    "instruction": _MESSAGES,
}


def rows_for(name: str) -> Dataset:
    columns = tasks.get(name).columns
    labels = _LABELS.get(name, [0, 1, 0] if name.startswith("glue/") else None)
    values = {columns.text: _INPUTS.get(name, _TEXTS["first"])}
    if columns.text_pair:
        values[columns.text_pair] = _TEXTS["second"]
    if labels is not None:
        values[columns.label] = labels
    return Dataset.from_dict(values)


def task_for(name: str) -> Task:
    kind = tasks.get(name)
    options = {"chat_template": _TEMPLATE, "max_new_tokens": 4} if name == "instruction" else {}
    options |= {"max_target_length": 8, "num_beams": 1} if kind.kind == "generation" and not options else {}
    return kind(Setup(kind.columns, None, 32, kind.options(**options)))


def model_for(task: Task, pieces: Path) -> tuple[PreTrainedModel, Any]:
    if task.kind == "generation":
        tokenizer = tokenizer_of("llama", _TEXTS["first"])
        return model_of("llama", len(tokenizer)), tokenizer
    tokenizer = load_tokenizer(str(pieces))
    return load_model(str(pieces), task, tokenizer), tokenizer


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_keeps_its_contract(name: str, pieces: Path) -> None:
    task, rows = task_for(name), rows_for(name)
    task.check(rows, "rows.jsonl")
    fitted = task.fit(rows)
    model, tokenizer = model_for(fitted, pieces)

    features = fitted.features(rows, tokenizer, model)
    assert len(features) >= 1 and all(features["input_ids"])
    batch = fitted.collator(tokenizer, model)([features[index] for index in range(len(features))])
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in model.parameters())

    model.eval()
    answers = fitted.predict(model, tokenizer, rows, batch_size=2)
    assert len(answers) == len(rows) and to_json(answers)
    metrics = fitted.metrics(answers, rows)
    assert tuple(metrics) == tuple(fitted.metric_names) and fitted.headline in metrics
    assert fitted.lower_is_better <= set(metrics)
    baseline = fitted.baseline(rows)
    assert baseline is None or (baseline[0] and set(baseline[1]) == set(metrics))

    restored = type(task)(replace(fitted.setup, label_names=fitted.label_names))  # as a finished run's recipe does
    assert restored.head() == fitted.head()
    assert to_json(restored.predict(model, tokenizer, rows, batch_size=2)) == to_json(answers)


@pytest.mark.parametrize("name", tasks.names())
def test_a_missing_column_is_named(name: str) -> None:
    task, rows = task_for(name), rows_for(name)
    for column in rows.column_names:
        with pytest.raises(DataError, match=column if name != "instruction" else "messages"):
            task.check(rows.add_column("other", ["x"] * 3).remove_columns([column]), "rows.jsonl")


@pytest.mark.parametrize("name", tasks.names())
def test_rows_need_no_targets_to_be_answered(name: str, pieces: Path) -> None:
    """``adalora predict`` has none."""
    task, rows = task_for(name), rows_for(name)
    fitted = task.fit(rows)
    model, tokenizer = model_for(fitted, pieces)
    label = fitted.columns.label
    asked = rows.remove_columns([label]) if label in rows.column_names else rows
    fitted.check(asked, "rows.jsonl", with_targets=False)
    assert len(fitted.predict(model.eval(), tokenizer, asked, batch_size=2)) == len(rows)
