"""From a recipe to a run that can start: everything that can be checked is, and nothing is written."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, get_scheduler, set_seed

from . import methods, processes, reporters, tasks
from .checkpoints import Progress
from .core.schedule import Schedule
from .data import DataError, Split, digest, has_splits, hold_out, read_rows, sample
from .methods import Adapted, Job, Method, head_modules
from .methods.sizes import parse_budget
from .pretrained import Form, form_of, load_model, load_tokenizer, longest
from .recipe import METHOD_SECTIONS, DataSection, Facts, Recipe, RecipeError, differences, validated
from .runs import Mode, RunError, RunFolder
from .tasks import StartsOutput, Stratified, Task
from .tasks.base import check_columns

_PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets")

_FREE_TO_CHANGE = {
    "output",
    "training.logging_steps",
    "training.save_total_limit",
    "training.report_to",
    "facts.versions",
}
"""Keys that may differ when a run is resumed: they do not reach the weights."""


@dataclass
class Prepared:
    """A run that can start: everything is read and checked, nothing is written."""

    recipe: Recipe  # as resolved
    mode: Mode
    folder: RunFolder
    task: Task
    tokenizer: Any
    form: Form
    adapted: Adapted
    train: Dataset  # features
    evaluation: Dataset  # rows
    more_evaluations: dict[str, Dataset]  # rows, by split
    arguments: TrainingArguments
    total_steps: int
    baseline: tuple[str, dict[str, float]] | None
    checkpoint: Path | None  # to resume from
    before: Progress | None  # what led to it
    folder_state: tuple[object, ...]  # when it was looked at
    initial_ranks: dict[str, int]  # of each adapted matrix; empty without ranks
    head_parameters: int  # of the output layer that the task made
    trainable_parameters: int  # the output layer's included
    frozen_parameters: int

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.adapted.model

    @property
    def schedule(self) -> str:
        """What will happen to the budget, in words."""
        return self.adapted.schedule

    @property
    def budget(self) -> Schedule | None:
        """What may live after each step; None of a method that has no budget."""
        header = self.adapted.header
        return Schedule(**header()["schedule"]) if header else None

    @property
    def finished(self) -> dict[str, Any] | None:
        """What ``metrics.json`` says, when the run to resume is finished already."""
        if self.mode != "resume" or not self.folder.metrics.is_file():
            return None
        found: dict[str, Any] = json.loads(self.folder.metrics.read_text(encoding="utf-8"))
        return found

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees."""
        arguments = self.arguments
        return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)

    @property
    def resumed_step(self) -> int | None:
        """The step of the checkpoint to resume from."""
        return int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else None


def completed(recipe: Recipe) -> Recipe:
    """A copy whose columns and method are spelled out where the recipe leaves them to its task and method.

    Raises:
        RecipeError: an unknown task or method, or a section that the method does not read.
    """
    columns, section = tasks.get(recipe.task).columns, methods.get(recipe.method).section
    for unused in METHOD_SECTIONS:
        if unused in recipe.model_fields_set and unused != section:
            reads = f"reads the section `{section}`" if section else "has no settings"
            raise RecipeError(f"the section `{unused}` has no meaning for method {recipe.method}, which {reads}")
    recipe = recipe.model_copy(deep=True, update={section: getattr(recipe, section)} if section else {})
    data = recipe.data
    data.text = data.text or columns.text
    data.text_pair = data.text_pair or columns.text_pair
    data.label = data.label or columns.label
    return recipe


def task_of(recipe: Recipe) -> Task:
    """The task of a completed recipe."""
    kind, data = tasks.get(recipe.task), recipe.data
    options = validated(kind.options, recipe.options, f"task {recipe.task}", "options.")
    assert data.text is not None and data.label is not None and data.max_length is not None  # completed
    columns = tasks.Columns(data.text, data.text_pair, data.label)
    return kind(tasks.Setup(columns, data.label_names, data.max_length, options))


def read_evaluation_rows(recipe: Recipe, task: Task, source: str | None = None, split: str | None = None) -> Dataset:
    """The rows to evaluate on, those of the recipe unless a source or a split is given, with the columns checked.

    Of another source all rows are taken. Raises DataError when a split is asked for of a source that holds none.
    """
    data = recipe.data
    place = source or data.eval or data.train
    if data.holdout is not None and source is None and split is None:
        return sample(_divided(recipe, task).held_out, data.max_eval_rows)
    if split is not None:
        _check_holds(place, split)
    elif source is None:
        _check_split(place, data, "eval_split")
    rows = read_rows(place, split or data.eval_split, data.config)
    task.check(rows, place)
    return sample(rows, data.max_eval_rows) if source is None else rows


def _training_rows(recipe: Recipe, task: Task) -> Dataset:
    """All rows to train on. They are all checked, so that a fault is in the row that it names."""
    data = recipe.data
    if data.holdout is not None:
        return _divided(recipe, task).train
    if data.eval is None and not has_splits(data.train):
        raise DataError(
            f"{data.train} holds no splits: hold some of its rows out, data.holdout (--holdout 0.1), or give the "
            "held-out rows in another, data.eval (--eval)"
        )
    return _checked(recipe, task)


def _checked(recipe: Recipe, task: Task) -> Dataset:
    data = recipe.data
    _check_split(data.train, data, "train_split")
    rows = read_rows(data.train, data.train_split, data.config)
    task.check(rows, data.train)
    return rows


def _divided(recipe: Recipe, task: Task) -> Split:
    """The rows of the training source, all of them checked, in those to train on and those held out."""
    data, rows = recipe.data, _checked(recipe, task)
    assert data.holdout is not None
    check_columns(rows, data.holdout_by or [], f"data.holdout_by: {data.train}")
    read = [column for column in (data.text, data.text_pair) if column and column in rows.column_names]
    together = [[column] for column in data.holdout_by or ()] or [read or rows.column_names]
    return hold_out(rows, data.holdout, together, task.strata(rows) if isinstance(task, Stratified) else None)


def prepare(recipe: Recipe, mode: Mode = "new") -> Prepared:
    """Check all that can be checked before training, down to the schedule.

    Raises an AdaLoraError that says what to change; nothing has been written then.
    """
    folder = RunFolder(Path(recipe.output).expanduser())
    if processes.is_first():  # which may write, before the others look
        folder.check_target(mode)
    checkpoint, state = folder.last_checkpoint() if mode == "resume" else None, folder.state()
    recipe = completed(recipe)
    data, method = recipe.data, methods.get(recipe.method)
    tokenizer = load_tokenizer(recipe.model, data.max_length)
    if data.max_length is None:
        data.max_length = min(tasks.get(recipe.task).max_length, longest(recipe.model, tokenizer))
    task = task_of(recipe)
    train_rows = sample(_training_rows(recipe, task), data.max_train_rows)
    task = task.fit(train_rows)
    eval_rows = read_evaluation_rows(recipe, task)
    baseline = task.baseline(eval_rows)
    more_rows = {split: read_evaluation_rows(recipe, task, split=split) for split in data.more_eval_splits}

    data.label_names = task.label_names
    recipe.facts = Facts(
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        train_digest=digest(train_rows, train_rows.column_names),
        versions={name: importlib.import_module(name).__version__ for name in _PACKAGES},
    )
    arguments = _arguments(recipe, folder)
    set_seed(recipe.seed)  # the new output layer and the adapter start from random numbers
    model = load_model(recipe.model, task, tokenizer, method.base_precision)
    if isinstance(task, StartsOutput):
        task.start_output(model)
    if recipe.budget is not None:
        recipe = _within_budget(recipe, method, model)
    if mode == "resume":
        _check_unchanged(folder, recipe)
    before = _progress(folder, checkpoint, arguments)
    features = task.features(train_rows, tokenizer, model)
    total_steps, steps_per_epoch = _steps(arguments, len(features))
    form = form_of(recipe.model, task)
    job = Job(
        recipe=recipe,
        task_type=form.task_type,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batches=lambda: _batches(features, task.collator(tokenizer, model), arguments.train_batch_size, recipe.seed),
        trace=folder.trace,
    )
    head = sum(p.numel() for name in head_modules(model) for p in model.get_submodule(name).parameters())
    adapted = method.adapt(model, job)
    _check_optimizer(arguments, adapted.model)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in adapted.model.named_parameters()}
    trainable = sum(size for size, trained in sizes.values() if trained)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    if processes.is_first():  # at least one checkpoint beside what is written in the end
        folder.check_room(2 * sum(p.numel() * p.element_size() for p in trained))
    copies = sum(size for name, (size, _) in sizes.items() if ".original_module." in name)  # PEFT's, of the head
    return Prepared(
        recipe=recipe,
        mode=mode,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        form=form,
        adapted=adapted,
        train=features,
        evaluation=eval_rows,
        more_evaluations=more_rows,
        arguments=arguments,
        total_steps=total_steps,
        baseline=baseline,
        checkpoint=checkpoint,
        before=before,
        folder_state=state,
        initial_ranks=dict(adapted.ranks()),
        head_parameters=head,
        trainable_parameters=trainable,
        frozen_parameters=sum(size for size, _ in sizes.values()) - trainable - copies,
    )


def _check_split(source: str, data: DataSection, key: str) -> None:
    """A split that the recipe names must be one; the default stands for all rows of a source without splits."""
    if getattr(data, key) != DataSection.model_fields[key].default:
        _check_holds(source, getattr(data, key))


def _check_holds(source: str, split: str) -> None:
    if not has_splits(source):
        raise DataError(
            f"{source} holds no splits, so no {split!r}: leave the split out, or give a folder with a file for each "
            f"split ({split}.csv, ...)"
        )


def _within_budget(recipe: Recipe, method: Method, model: PreTrainedModel) -> Recipe:
    assert recipe.budget is not None
    if not method.takes_budget:
        raise RecipeError(f"budget: method {recipe.method} has the size that it has: leave the budget out")
    return method.with_budget(model, recipe, parse_budget(recipe.budget, model, recipe))


def _batches(features: Dataset, collate: Any, size: int, seed: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """Training batches in an order of their own, for methods that look at data before training."""
    for batch in features.shuffle(seed=seed).iter(size):
        yield collate([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])


def _arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    settings = recipe.training.model_dump(
        exclude={"group_by_length", "eval_rows", "eval_steps", "save_steps", "warmup_steps"}
    )
    reporters.check(recipe.training.report_to)
    settings |= {name: _whole(getattr(recipe.training, name)) for name in ("eval_steps", "save_steps", "warmup_steps")}
    try:
        arguments = TrainingArguments(
            output_dir=str(folder.checkpoints),
            seed=recipe.seed,
            data_seed=recipe.seed,
            save_strategy="steps",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # bfloat16 on a CPU has to be asked for
            run_name=reporters.run_name(folder) if recipe.training.report_to else None,
            disable_tqdm=True,
            **settings,
        )
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error
    _check_scheduler(arguments)
    return arguments


def _check_scheduler(arguments: TrainingArguments) -> None:
    """A Trainer would find out when training begins, or at the first evaluation."""
    kind = SchedulerType(arguments.lr_scheduler_type)
    advice = "take linear, cosine, constant_with_warmup or another that needs no more than the keys of `training`"
    if kind.value in ("reduce_lr_on_plateau", "greedy"):
        raise RecipeError(
            f"training.lr_scheduler_type: {kind.value} goes by the loss on held-out rows, which is not measured: "
            f"{advice}"
        )
    try:
        get_scheduler(
            kind,
            torch.optim.SGD([torch.zeros(1)], arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(100),
            num_training_steps=100,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"training.lr_scheduler_type: {kind.value} is not possible here ({error}): {advice}"
        ) from error


def _check_optimizer(arguments: TrainingArguments, model: nn.Module) -> None:
    """Some come in packages of their own."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        raise RecipeError(f"training.optim: {error}") from error


def _whole(interval: float | None) -> float | None:
    """A number of steps as an int; a fraction as it is."""
    return interval if interval is None or interval < 1 else int(interval)


def _steps(arguments: TrainingArguments, rows: int) -> tuple[int, int]:
    """Optimizer steps of the run and of an epoch, as the Trainer will count them."""
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    if arguments.max_steps > 0:
        return arguments.max_steps, per_epoch
    return math.ceil(arguments.num_train_epochs * per_epoch), per_epoch


def _progress(folder: RunFolder, checkpoint: Path | None, arguments: TrainingArguments) -> Progress | None:
    """How far an interrupted run had come. RunError where it would go on in another number of processes."""
    if checkpoint is None:
        return None
    found = folder.progress_at(checkpoint)
    if found.processes != arguments.world_size:
        raise RunError(
            f"the run in {folder.path} was trained by {found.processes} processes and would go on with other rows a "
            f"step in {arguments.world_size}: resume it with torchrun --nproc-per-node {found.processes}, "
            "or start over with --overwrite"
        )
    return found


def _check_unchanged(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the run that was interrupted."""
    changed = differences(folder.read_recipe(), recipe, ignore=_FREE_TO_CHANGE)
    if changed:
        raise RunError(
            f"the run in {folder.path} cannot be resumed, because its recipe or data changed: {'; '.join(changed)}. "
            f"Change it back (adalora train --resume --output {folder.path} takes the run's own recipe), "
            "or start over with --overwrite"
        )
