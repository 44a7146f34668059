"""The recipe's ``training.report_to``: Trainer's own integrations, as one run uses them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy

from .monitoring import ReportRanks
from .recipe import RecipeError
from .runs import RunFolder

_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}  # that are not called as their integration is


def check(names: Iterable[str]) -> None:
    """RecipeError for a name that Transformers does not know, or whose package is not installed."""
    there: list[str] = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"training.report_to: {name!r} is none of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}; leave the key "
                "out to report to nobody"
            )
        if name not in there:
            raise RecipeError(
                f"training.report_to: {name} is not installed here: pip install {_PACKAGES.get(name, name)}"
            )


def run_name(folder: RunFolder) -> str:
    """What the run is called where it is reported to: never twice the same, so that no two runs are mixed."""
    return f"{folder.path.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def attach(
    trainer: Trainer,
    tensorboard: Path,
    resumed_step: int | None,
    ranks: Callable[[], Mapping[str, int]] | None,
    budget: Callable[[int], int] | None,
) -> None:
    """Let the Trainer report ranks and budget, too.

    Args:
        tensorboard: folder for TensorBoard's files.
        resumed_step: that a resumed run goes on from.
        ranks: of each matrix now; None of a method without ranks.
        budget: step -> budget; None of a method without one.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(tensorboard)
            callback.tb_writer = _writer(callback.logging_dir, None if resumed_step is None else resumed_step + 1)
    if ranks is not None:
        trainer.add_callback(ReportRanks(trainer, ranks=ranks, budget=budget))
    trainer.add_callback(_EvaluateAtTheEnd())


def _writer(folder: str, purge_step: int | None) -> Any:
    """A writer of TensorBoard's files. What an interrupted run wrote from ``purge_step`` on no longer counts."""
    try:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        tensorboard = importlib.import_module("tensorboardX")
    return tensorboard.SummaryWriter(log_dir=folder, purge_step=purge_step)


class _EvaluateAtTheEnd(TrainerCallback):
    """Those that report close when training ends, and the last evaluation of a run would come after that."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.NO:
            control.should_evaluate = True
