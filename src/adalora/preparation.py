"""From a recipe to a run that can start: everything that can be checked is, and nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, get_scheduler, set_seed

from . import methods, processes, reporters
from .checkpoints import Progress
from .core.schedule import Schedule
from .methods import Adapted, Job, Method, head_modules
from .methods.sizes import parse_budget
from .pretrained import Form, form_of, load_model
from .reading import Material, read
from .recipe import Recipe, RecipeError, TrainingSection, differences
from .runs import Mode, RunError, RunFolder
from .tasks import StartsOutput, Task

_FREE_TO_CHANGE = {
    "output",
    "training.logging_steps",
    "training.save_total_limit",
    "training.report_to",
    "facts.versions",
}
"""Keys that may differ when a run is resumed: they do not reach the weights."""


SHARE = 0.05
"""Of the training's steps, those of one trial of a search for a learning rate."""
FEWEST_STEPS = 12
MOST_TRIALS = 5
_FEWEST_ROWS, _MOST_ROWS = 48, 512  # to measure the loss on
_USUAL_RATE = {"full": 1e-4}  # every other method trains few parameters


class Course(NamedTuple):
    """What a search for a learning rate does, as far as it is known before."""

    first: float  # the rate to begin with
    steps: int  # of each trial
    total_steps: int  # of the training
    train_rows: int  # that a trial may see
    rows: int  # training rows that the loss is measured on


@dataclass
class Prepared:
    """A run that can start: everything is read and checked, nothing is written."""

    material: Material  # what was read
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

    def batches(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Training batches in an order of their own, which training does not follow."""
        collate = self.task.collator(self.tokenizer, self.model)
        return _batches(self.train, collate, self.arguments.train_batch_size, self.recipe.seed)

    @property
    def search(self) -> Course | None:
        """The search for a learning rate that comes first; its trials cost about a quarter of the training."""
        if self.recipe.training.learning_rate != "auto":
            return None
        total, rows = self.total_steps, len(self.material.train)
        steps = min(total, max(FEWEST_STEPS, round(SHARE * total)))
        seen = steps * self.rows_per_step
        measured = max(1, min(max(seen // 2, _FEWEST_ROWS), _MOST_ROWS, rows // 5))
        return Course(_USUAL_RATE.get(self.recipe.method, 1e-3), steps, total, min(seen, rows - measured), measured)

    @property
    def start(self) -> dict[str, Any] | None:
        """What is looked at before the first step, on how many training rows, and how many optimizer steps have as many
        forward and backward passes. None where nothing is."""
        start, arguments = self.adapted.start, self.arguments
        if start is None:
            return None
        rows = min(start.batches * arguments.train_batch_size * arguments.world_size, len(self.train))
        batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
        steps = start.sweeps * batches / arguments.gradient_accumulation_steps
        return {"what": start.what, "rows": rows, "sweeps": start.sweeps, "start_steps": steps}

    @property
    def resumed_step(self) -> int | None:
        """The step of the checkpoint to resume from."""
        return int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else None


def prepare(recipe: Recipe, mode: Mode = "new") -> Prepared:
    """Check all that can be checked before training, down to the schedule.

    Raises an AdaLoraError that says what to change; nothing has been written then.
    """
    folder = RunFolder(Path(recipe.output).expanduser())
    if processes.is_first():  # which may write, before the others look
        folder.check_target(mode)
    checkpoint, state = folder.last_checkpoint() if mode == "resume" else None, folder.state()
    material = read(recipe)
    if mode == "resume":
        _take_over_rate(folder.read_recipe(), material.recipe)
    return ready(material, folder, mode, state, checkpoint)


def ready(
    material: Material, folder: RunFolder, mode: Mode, state: tuple[object, ...], checkpoint: Path | None = None
) -> Prepared:
    """What was read, with the model made trainable. Nothing is written.

    Args:
        state: the folder's, from before anything was read.
        checkpoint: to resume from.
    """
    recipe, task, tokenizer = material.recipe.model_copy(deep=True), material.task, material.tokenizer
    method = methods.get(recipe.method)
    arguments = _arguments(recipe, folder)
    if recipe.training.learning_rate == "auto" and arguments.world_size > 1:
        raise RecipeError(
            "training.learning_rate: auto is searched for in one process: run adalora tune, then train the recipe that "
            "it writes in several"
        )
    set_seed(recipe.seed)  # the new output layer and the adapter start from random numbers
    model = load_model(recipe.model, task, tokenizer, method.base_precision)
    if isinstance(task, StartsOutput):
        task.start_output(model)
    if recipe.budget is not None:
        recipe = _within_budget(recipe, method, model)
    if mode == "resume":
        _check_unchanged(folder, recipe)
    before = _progress(folder, checkpoint, arguments)
    features = task.features(material.train, tokenizer, model)
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
        material=material,
        recipe=recipe,
        mode=mode,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        form=form,
        adapted=adapted,
        train=features,
        evaluation=material.evaluation,
        more_evaluations=material.more_evaluations,
        arguments=arguments,
        total_steps=total_steps,
        baseline=material.baseline,
        checkpoint=checkpoint,
        before=before,
        folder_state=state,
        initial_ranks=dict(adapted.ranks()),
        head_parameters=head,
        trainable_parameters=trainable,
        frozen_parameters=sum(size for size, _ in sizes.values()) - trainable - copies,
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
    if settings["learning_rate"] == "auto":  # all else can be checked before it is known
        settings["learning_rate"] = TrainingSection.model_fields["learning_rate"].default
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


def _take_over_rate(before: Recipe, recipe: Recipe) -> None:
    """A rate that the interrupted run has searched for is what ``auto`` means when it is resumed."""
    rate, asked = before.training.learning_rate, recipe.training.learning_rate
    if before.facts is not None and recipe.facts is not None and asked in ("auto", rate):
        recipe.training.learning_rate, recipe.facts.learning_rate = rate, before.facts.learning_rate


def _check_unchanged(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the run that was interrupted."""
    changed = differences(folder.read_recipe(), recipe, ignore=_FREE_TO_CHANGE)
    if changed:
        raise RunError(
            f"the run in {folder.path} cannot be resumed, because its recipe or data changed: {'; '.join(changed)}. "
            f"Change it back (adalora train --resume --output {folder.path} takes the run's own recipe), "
            "or start over with --overwrite"
        )
