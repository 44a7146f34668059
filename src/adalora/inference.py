"""What a finished run is good for: evaluate it, and let it answer. Loads the adapter with stock PEFT alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding

from . import tasks
from .data import DataError, read_rows
from .pretrained import load_model, load_tokenizer
from .recipe import Recipe
from .runs import RunFolder
from .tasks import Columns, Task
from .training import columns_of, read_evaluation_rows


class Evaluation(NamedTuple):
    """Metrics of a run on some rows, beside the best constant answer's."""

    source: str
    rows: int
    metrics: dict[str, float]
    baseline_answer: str
    baseline: dict[str, float]


def evaluate_run(folder: Path, source: str | None = None, split: str | None = None, batch_size: int = 64) -> Evaluation:
    """Metrics of the run in ``folder`` on its own held-out rows, or on those of ``source``.

    Raises RunError when there is no finished run, DataError when the rows do not fit its task.
    """
    recipe = RunFolder(folder).check_trained()
    rows = read_evaluation_rows(recipe, source, split)
    columns = columns_of(recipe)
    task = _task(recipe, columns)
    targets = np.array(task.targets(rows))
    outputs = _Loaded.of(folder, recipe, task).outputs(rows, columns, recipe.data.max_length, batch_size)
    answer, baseline = task.baseline(targets)
    name = source or recipe.data.eval or recipe.data.train
    return Evaluation(name, len(rows), task.metrics(outputs, targets), answer, baseline)


def predict_run(
    folder: Path, texts: Sequence[str], pairs: Sequence[str] | None = None, batch_size: int = 64
) -> list[dict[str, Any]]:
    """What the run in ``folder`` says about each text (or pair of texts).

    Raises RunError when there is no finished run, DataError when second texts are missing or too many.
    """
    recipe = RunFolder(folder).check_trained()
    columns = columns_of(recipe)
    if columns.text_pair is None and pairs:
        raise DataError(f"the run in {folder} reads single texts: leave the second ones out")
    if columns.text_pair is not None and len(pairs or ()) != len(texts):
        raise DataError(
            f"the run in {folder} reads pairs of texts: give a second text for each first one "
            f"({len(texts)} first, {len(pairs or ())} second)"
        )
    if not texts:
        return []
    given = {columns.text: list(texts)} | ({columns.text_pair: list(pairs)} if columns.text_pair and pairs else {})
    task = _task(recipe, columns)
    loaded = _Loaded.of(folder, recipe, task)
    outputs = loaded.outputs(Dataset.from_dict(given), columns, recipe.data.max_length, batch_size)
    return task.answers(outputs)


def read_texts(folder: Path, file: Path) -> tuple[list[str], list[str] | None]:
    """The texts, and second texts where the run's task has them, in a file: lines of a .txt, or the columns
    of a data file that the run was trained on."""
    recipe = RunFolder(folder).check_trained()
    columns = columns_of(recipe)
    if file.suffix.lower() == ".txt":
        if not file.is_file():
            raise DataError(f"no file {file}")
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()], None
    rows = read_rows(str(file), "train")
    tasks.check_text(rows, columns, str(file))
    return list(rows[columns.text]), list(rows[columns.text_pair]) if columns.text_pair else None


def _task(recipe: Recipe, columns: Columns) -> Task:
    return tasks.get(recipe.task)(recipe.data.label_names, columns.label)


class _Loaded(NamedTuple):
    """A model with the run's adapter, ready to answer."""

    model: PeftModel
    tokenizer: Any

    @classmethod
    def of(cls, folder: Path, recipe: Recipe, task: Task) -> _Loaded:
        tokenizer = load_tokenizer(recipe.model, recipe.data.max_length)
        model = PeftModel.from_pretrained(load_model(recipe.model, task, tokenizer), str(folder))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), tokenizer)

    @torch.inference_mode()
    def outputs(self, rows: Dataset, columns: Columns, max_length: int, batch_size: int) -> np.ndarray:
        """Logits, [rows, labels], computed in batches of like length."""
        inputs = tasks.tokenize(rows, columns, self.tokenizer, max_length)
        lengths = [len(tokens) for tokens in inputs["input_ids"]]
        order = sorted(range(len(inputs)), key=lambda index: -lengths[index])
        collate = DataCollatorWithPadding(self.tokenizer)
        parts = []
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([inputs[index] for index in chosen])
            batch = {name: values.to(self.model.device) for name, values in batch.items()}
            parts.append(self.model(**batch).logits.float().cpu().numpy())
        return np.concatenate(parts)[np.argsort(order)]
