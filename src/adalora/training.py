"""One run of a recipe, trained with Transformers' Trainer and written into its folder.

The recipe is written first and the metrics last, so a run that dies can be told from one that is done, and ``--resume``
continues it to the same bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from . import processes, reporters
from .files import unwritable, write_json, write_text
from .preparation import Prepared
from .pretrained import locate
from .recipe import Recipe, RecipeError, dump
from .report.page import write_report
from .report.ranks import draw_ranks
from .report.run import read_run, read_trace
from .runs import RunError
from .tasks import Signed
from .trainer import SteadyTrainer, diverged

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_LONGEST_EXAMPLE = 200  # characters


def train(prepared: Prepared, callbacks: Iterable[TrainerCallback] = (), report: bool = False) -> dict[str, Any]:
    """Train, write the run's folder, and return what ``metrics.json`` says; nothing in other processes than the first.

    Args:
        report: write ``report.html``, too.

    Raises:
        RunError: another process writes to the folder, or has since this run was prepared; or it cannot be written to.
        TrainingError: training broke.
    """
    folder, recipe = prepared.folder, prepared.recipe
    if recipe.training.learning_rate == "auto":
        raise RecipeError("training.learning_rate is auto, and nobody has searched for one: adalora.tuning.search does")
    processes.wait()  # every process has read the folder now
    if not processes.is_first():
        return _train(prepared, callbacks)
    with folder.alone():
        if folder.state() != prepared.folder_state:
            raise RunError(f"another training has written to {folder.path} in the meantime: start this one again")
        folder.sweep()
        if prepared.resumed_step is None:
            folder.clear(search=recipe.facts is None or recipe.facts.learning_rate is None)
        else:  # an incomplete checkpoint would count as the newest one when old ones are dropped
            folder.drop_checkpoints(after=prepared.resumed_step)
        write_text(folder.recipe, dump(recipe))
        try:
            metrics = _train(prepared, callbacks)
            if report:
                write_report(folder.report, [read_run(folder.path)])
        except Exception as error:
            reason = unwritable(error)
            if reason is None:
                raise
            raise RunError(
                f"output {folder.path} cannot be written to: {reason}. When that is mended, go on with "
                f"adalora train --resume --output {folder.path}"
            ) from error
    return metrics


def _train(prepared: Prepared, callbacks: Iterable[TrainerCallback]) -> dict[str, Any]:
    folder, recipe = prepared.folder, prepared.recipe
    trainer = trainer_for(prepared, callbacks)
    if recipe.training.report_to:
        ranks = prepared.adapted.ranks if prepared.initial_ranks else None
        budget = prepared.budget.budget if prepared.budget else None
        reporters.attach(trainer, folder.tensorboard, prepared.resumed_step, ranks, budget)
    outcome = trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
    if not math.isfinite(trainer.training_loss):  # of the last step
        raise diverged(trainer.training_loss, trainer.state.global_step, recipe.training.fp16)
    if not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    more_metrics = {split: trainer.measure(rows) for split, rows in prepared.more_evaluations.items()}
    loss = trainer.held_out_loss(prepared.evaluation)
    if not processes.is_first():
        return {}

    prepared.adapted.save(folder.path)
    if folder.trace.is_file():
        draw_ranks(read_trace(folder.trace), folder.picture, f"Learned ranks: {recipe.model} on {recipe.data.train}")
    seconds_before = prepared.before.seconds if prepared.before else 0.0
    metrics = {
        **_about(prepared),
        "metrics": trainer.evaluations[-1]["metrics"],
        "loss": loss,
        "more_metrics": more_metrics,
        "evaluations": trainer.evaluations,
        "curve": trainer.curve,
        "start_steps": prepared.start["start_steps"] if prepared.start else 0.0,
        "log": trainer.state.log_history,
        "training_loss": trainer.training_loss,
        "steps": trainer.state.global_step,
        "seconds": round(seconds_before + outcome.metrics["train_runtime"], 1),
        "memory": peak_memory(),
    }
    write_json(folder.metrics, metrics)
    return metrics


def trainer_for(prepared: Prepared, callbacks: Iterable[TrainerCallback] = ()) -> SteadyTrainer:
    """A Trainer that is about to train what was prepared."""
    return SteadyTrainer(
        prepared.task,
        prepared.tokenizer,
        prepared.evaluation,
        model=prepared.model,
        args=prepared.arguments,
        train_dataset=prepared.train,
        callbacks=[*prepared.adapted.callbacks, *callbacks],
        group_by_length=prepared.recipe.training.group_by_length,
        averages_over_items=prepared.form.task_type == "CAUSAL_LM",
        trace=prepared.folder.trace,
        before=prepared.before,
        rows_on_the_way=prepared.recipe.training.eval_rows,
    )


def peak_memory() -> dict[str, int | None]:
    """Largest memory so far, in bytes: resident memory of this process with all its libraries (None where the system
    does not say), and what was allocated on the GPU (None without one)."""
    peak = None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_bytes": None if peak is None else peak * unit, "gpu_peak_bytes": gpu}


def _about(prepared: Prepared) -> dict[str, Any]:
    """What was trained and how, and what came of it."""
    recipe, folder = prepared.recipe, prepared.folder
    ranks = prepared.adapted.ranks()
    saved = [file for file in folder.learned if file.suffix == ".safetensors" and file.is_file()]
    return {
        "model": recipe.model,
        "task": recipe.task,
        "method": recipe.method,
        "headline": prepared.task.headline,
        "learning_rate": recipe.training.learning_rate,
        "learning_rate_search": _search(recipe),
        "example": _example(prepared),
        "loading": {
            "base": locate(recipe.model),
            "auto_class": prepared.form.auto_class,
            "head": prepared.task.head(),
            "peft": (folder.path / "adapter_config.json").is_file(),
        },
        "versions": recipe.facts.versions if recipe.facts else {},
        "signatures": prepared.task.signatures(prepared.evaluation) if isinstance(prepared.task, Signed) else {},
        "resumed_from_step": prepared.resumed_step,
        "baseline": {"answer": prepared.baseline[0], "metrics": prepared.baseline[1]} if prepared.baseline else None,
        "initial_triplets": sum(prepared.initial_ranks.values()),
        "live_triplets": sum(ranks.values()),
        "ranks": ranks,
        "parameters": {
            "adapter_start": prepared.trainable_parameters - prepared.head_parameters,
            "adapter_saved": sum(map(_parameters, saved)) - prepared.head_parameters,
            "head": prepared.head_parameters,
            "trainable": prepared.trainable_parameters,
            "frozen": prepared.frozen_parameters,
        },
        "saved_bytes": {file.name: file.stat().st_size for file in saved},
    }


def _search(recipe: Recipe) -> dict[str, Any] | None:
    found = recipe.facts.learning_rate if recipe.facts else None
    return found.model_dump() if found else None


def _example(prepared: Prepared) -> dict[str, str]:
    """Options of ``adalora predict`` for the first held-out row that fits a line; none where rows are not texts."""
    data, rows = prepared.recipe.data, prepared.evaluation
    options = {"text": str(data.text)} | ({"text-pair": data.text_pair} if data.text_pair else {})
    for row in rows.select(range(min(len(rows), 50))) if set(options.values()) <= set(rows.column_names) else ():
        example = {option: row[column] for option, column in options.items()}
        plain = all(isinstance(text, str) and not set("'\n") & set(text) for text in example.values())
        if plain and sum(map(len, example.values())) <= _LONGEST_EXAMPLE:
            return example
    return {}


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file."""
    with safe_open(str(file), framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
