"""One run of a recipe: validate everything, train with Transformers' Trainer, write the run's folder.

``prepare`` reads and checks, and writes nothing. ``train`` writes the recipe first and the metrics last, so a run that
dies can be told from one that is done, and ``--resume`` continues it to the same bits.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from . import AdaLoraCallback, AdaLoraConfig, allocator, export_lora, get_peft_model, last_checkpoint, ranks, tasks
from .core.errors import AdaLoraError
from .data import DataError, digest, has_splits, read_rows
from .files import write_json, write_text
from .pretrained import load_model, load_tokenizer, locate
from .recipe import Facts, Recipe, RecipeError, differences, dump
from .report.ranks import draw_ranks, read_trace
from .runs import Mode, RunError, RunFolder
from .tasks import Columns, Task

_PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets")

_FREE_TO_CHANGE = {"output", "training.logging_steps", "training.save_total_limit", "facts.versions"}
"""Keys that may differ when a run is resumed: they do not reach the weights."""


class TrainingError(AdaLoraError, RuntimeError):
    """Training itself went wrong."""


@dataclass
class Prepared:
    """A run that can start: everything is read and checked, nothing is written."""

    recipe: Recipe  # as resolved
    mode: Mode
    folder: RunFolder
    task: Task
    tokenizer: Any
    model: nn.Module  # with its adapter
    train: Dataset
    evaluation: Dataset
    arguments: TrainingArguments
    total_steps: int
    baseline: tuple[str, dict[str, float]]
    checkpoint: Path | None  # to resume from

    @property
    def finished(self) -> dict[str, Any] | None:
        """What ``metrics.json`` says, when the run to resume is finished already."""
        if self.mode != "resume" or not self.folder.metrics.is_file():
            return None
        found: dict[str, Any] = json.loads(self.folder.metrics.read_text(encoding="utf-8"))
        return found

    @property
    def schedule(self) -> str:
        """The budget's schedule in words."""
        return allocator(self.model).describe()

    @property
    def initial_ranks(self) -> dict[str, int]:
        """Rank of each adapted matrix at the start."""
        return ranks(self.model)

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees."""
        arguments = self.arguments
        return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)

    @property
    def resumed_step(self) -> int | None:
        """The step of the checkpoint to resume from."""
        return int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else None

    @property
    def trainable_parameters(self) -> int:
        """Parameters that are trained: the adapter's and the output layer's."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def frozen_parameters(self) -> int:
        """Parameters that stay as they were pretrained."""
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)


def columns_of(recipe: Recipe) -> Columns:
    """The columns that the recipe names."""
    return Columns(recipe.data.text, recipe.data.text_pair, recipe.data.label)


def read_evaluation_rows(recipe: Recipe, source: str | None = None, split: str | None = None) -> Dataset:
    """The rows to evaluate on, those of the recipe unless a source or a split is given, with the columns checked."""
    data = recipe.data
    source = source or data.eval or data.train
    rows = read_rows(source, split or data.eval_split, data.config, data.max_eval_rows)
    _check(rows, columns_of(recipe), source)
    return rows


def prepare(recipe: Recipe, mode: Mode = "new") -> Prepared:
    """Check all that can be checked before training, down to the schedule.

    Raises an AdaLoraError that says what to change; nothing has been written then.
    """
    folder = RunFolder(Path(recipe.output).expanduser())
    folder.check_target(mode)
    columns, data = columns_of(recipe), recipe.data
    fit = tasks.get(recipe.task).fit
    if data.eval is None and not has_splits(data.train):
        raise DataError(f"{data.train} is a single file: give the held-out rows in another, data.eval (--eval)")
    train_rows = read_rows(data.train, data.train_split, data.config, data.max_train_rows)
    _check(train_rows, columns, data.train)
    task = fit(train_rows, columns, data.label_names)
    eval_rows = read_evaluation_rows(recipe)
    targets = np.array(task.targets(eval_rows))

    recipe = recipe.model_copy(deep=True)
    recipe.data.label_names = task.label_names
    recipe.facts = Facts(
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        train_digest=digest(train_rows, [*columns.of_text(), columns.label]),
        versions={name: importlib.import_module(name).__version__ for name in _PACKAGES},
    )
    if mode == "resume":
        _check_unchanged(folder, recipe)

    arguments = _arguments(recipe, folder)
    set_seed(recipe.seed)  # the new output layer and the adapter start from random numbers
    tokenizer = load_tokenizer(recipe.model, data.max_length)
    model = get_peft_model(load_model(recipe.model, task, tokenizer), _adalora_config(recipe))
    total_steps, steps_per_epoch = _steps(arguments, len(train_rows))
    allocator(model).plan(total_steps, steps_per_epoch)
    return Prepared(
        recipe=recipe,
        mode=mode,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        model=model,
        train=features(train_rows, task, columns, tokenizer, data.max_length),
        evaluation=longest_first(features(eval_rows, task, columns, tokenizer, data.max_length)),
        arguments=arguments,
        total_steps=total_steps,
        baseline=task.baseline(targets),
        checkpoint=last_checkpoint(folder.checkpoints) if mode == "resume" else None,
    )


def train(prepared: Prepared, callbacks: Iterable[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, write the run's folder, and return what ``metrics.json`` says."""
    folder, recipe = prepared.folder, prepared.recipe
    if prepared.resumed_step is None:
        folder.clear()
    else:  # an incomplete checkpoint would count as the newest one when old ones are dropped
        folder.drop_checkpoints(after=prepared.resumed_step)
    write_text(folder.recipe, dump(recipe))

    trainer = _trainer(prepared, callbacks)
    outcome = trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
    evaluations = _evaluations(trainer.state, prepared.task)
    if not evaluations or evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        evaluations = _evaluations(trainer.state, prepared.task)

    export_lora(prepared.model, folder.path)
    draw_ranks(read_trace(folder.trace), folder.picture, f"Learned ranks: {recipe.model} on {recipe.data.train}")
    metrics = {
        **_about(prepared),
        "metrics": evaluations[-1]["metrics"],
        "evaluations": evaluations,
        "training_loss": outcome.training_loss,
        "steps": trainer.state.global_step,
        "seconds": round(outcome.metrics["train_runtime"], 1),
    }
    write_json(folder.metrics, metrics)
    return metrics


def _trainer(prepared: Prepared, callbacks: Iterable[TrainerCallback]) -> Trainer:
    grouped = prepared.recipe.training.group_by_length
    trainer = _SteadyTrainer(
        lengths=[len(tokens) for tokens in prepared.train["input_ids"]] if grouped else None,
        model=prepared.model,
        args=prepared.arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        compute_metrics=lambda prediction: prepared.task.metrics(_outputs_of(prediction), prediction.label_ids),
        callbacks=[AdaLoraCallback(trace_path=prepared.folder.trace), _StopWhenNotFinite(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _about(prepared: Prepared) -> dict[str, Any]:
    """What was trained, and what came of its ranks."""
    recipe, folder = prepared.recipe, prepared.folder
    answer, baseline = prepared.baseline
    found = ranks(prepared.model)
    return {
        "model": recipe.model,
        "task": recipe.task,
        "pairs": recipe.data.text_pair is not None,
        "loading": {"base": locate(recipe.model), "num_labels": prepared.task.head()["num_labels"]},
        "versions": recipe.facts.versions if recipe.facts else {},
        "resumed_from_step": prepared.resumed_step,
        "baseline": {"answer": answer, "metrics": baseline},
        "initial_triplets": sum(read_trace(folder.trace).initial.values()),
        "live_triplets": sum(found.values()),
        "ranks": found,
        "trainable_parameters": prepared.trainable_parameters,
        "adapter_bytes": folder.adapter[1].stat().st_size,
    }


def features(rows: Dataset, task: Task, columns: Columns, tokenizer: Any, max_length: int) -> Dataset:
    """The model's inputs and ``labels`` for each row."""
    return tasks.tokenize(rows, columns, tokenizer, max_length).add_column("labels", task.targets(rows))


def longest_first(rows: Dataset) -> Dataset:
    """Rows by falling length, so that a batch holds little padding and the largest one comes first."""
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda index: -lengths[index]), keep_in_memory=True)


class _SteadyTrainer(Trainer):
    """A Trainer whose training does not depend on when it evaluates, nor on where it was interrupted.

    ``lengths`` of the training rows: make batches of rows of like length, in an order that the seed and the
    epoch alone decide. (The stock sampler draws it from the random state of the moment, which a resumed run
    does not have.)
    """

    def __init__(self, *, lengths: list[int] | None, **settings: Any) -> None:
        self._lengths = lengths
        super().__init__(**settings)

    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **settings)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self._lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(batch, self._lengths, self.args.seed)


class _ByLength(LengthGroupedSampler):
    """Transformers' sampler with an order that depends on seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self._seed * 1_000_003 + self._epoch)
        return super().__iter__()  # type: ignore[no-untyped-call]


class _StopWhenNotFinite(TrainerCallback):
    """A loss that is nan or infinite does not come back: stop instead of training on nothing."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss became {loss} by step {state.global_step}: lower training.learning_rate, "
                "or train without fp16"
            )


def _arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    settings = recipe.training.model_dump(exclude={"group_by_length", "eval_steps", "save_steps", "warmup_steps"})
    settings |= {name: _whole(getattr(recipe.training, name)) for name in ("eval_steps", "save_steps", "warmup_steps")}
    try:
        return TrainingArguments(
            output_dir=str(folder.checkpoints),
            seed=recipe.seed,
            data_seed=recipe.seed,
            save_strategy="steps",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error


def _whole(interval: float | None) -> float | None:
    """A number of steps as an int; a fraction as it is."""
    return interval if interval is None or interval < 1 else int(interval)


def _adalora_config(recipe: Recipe) -> AdaLoraConfig:
    return AdaLoraConfig(task_type="SEQ_CLS", **recipe.adalora.model_dump())


def _steps(arguments: TrainingArguments, rows: int) -> tuple[int, int]:
    """Optimizer steps of the run and of an epoch, as the Trainer will count them."""
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    if arguments.max_steps > 0:
        return arguments.max_steps, per_epoch
    return math.ceil(arguments.num_train_epochs * per_epoch), per_epoch


def _check(rows: Dataset, columns: Columns, source: str) -> None:
    tasks.check_text(rows, columns, source)
    tasks.check_columns(rows, [columns.label], source)


def _check_unchanged(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the run that was interrupted."""
    changed = differences(folder.read_recipe(), recipe, ignore=_FREE_TO_CHANGE)
    if changed:
        raise RunError(
            f"the run in {folder.path} cannot be resumed, because its recipe or data changed: {'; '.join(changed)}. "
            f"Change it back (adalora train --resume --output {folder.path} takes the run's own recipe), "
            "or start over with --overwrite"
        )


def _outputs_of(prediction: EvalPrediction) -> np.ndarray:
    """The logits; some models return more beside them."""
    outputs = prediction.predictions
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _evaluations(state: TrainerState, task: Task) -> list[dict[str, Any]]:
    """Step, epoch and metrics of each evaluation so far."""
    return [
        {
            "step": entry["step"],
            "epoch": entry["epoch"],
            "metrics": {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_") and key.removeprefix("eval_") in task.metric_names
            },
        }
        for entry in state.log_history
        if f"eval_{task.headline}" in entry
    ]
