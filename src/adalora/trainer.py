"""Transformers' Trainer as our runs need it: it measures as ``adalora evaluate`` does, and resumes to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .core.errors import AdaLoraError
from .files import write_text
from .runs import COMPLETE
from .tasks import Task


class TrainingError(AdaLoraError, RuntimeError):
    """Training itself went wrong."""


class SteadyTrainer(Trainer):
    """A Trainer that evaluates as ``adalora evaluate`` does, and whose training does not depend on when it evaluates,
    nor on where it was interrupted.

    With ``group_by_length``, batches hold rows of like length, in an order that the seed and the epoch alone decide.
    (The stock sampler draws it from the random state of the moment, which a resumed run does not have.)
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        rows: Dataset,
        *,
        model: nn.Module,
        train_dataset: Dataset,
        callbacks: Iterable[TrainerCallback],
        group_by_length: bool,
        averages_over_items: bool,
        seconds_before: float,
        **settings: Any,
    ) -> None:
        """A Trainer of ``model`` on the features in ``train_dataset``, measured on the held-out ``rows``.

        Args:
            averages_over_items: the model's loss is over all items of accumulated batches, if told their number.
            seconds_before: of training, in the parts of the run that led to the checkpoint to resume from.
        """
        self._task, self._tokenizer, self._rows = task, tokenizer, rows
        self._lengths = [len(tokens) for tokens in train_dataset["input_ids"]] if group_by_length else None
        collate: Any = task.collator(tokenizer, model)
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            eval_dataset=rows,
            data_collator=collate,
            callbacks=[*callbacks, _StopWhenNotFinite(), _MarkComplete(seconds_before)],
            **settings,
        )
        self.remove_callback(PrinterCallback)
        # Transformers goes by the arguments that a model takes, but many take the number and average over one batch.
        self.model_accepts_loss_kwargs = averages_over_items

    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        """Metrics on the held-out rows, logged as a Trainer does."""
        metrics = {f"eval_{name}": value for name, value in self.measure(self._rows).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, rows: Dataset) -> dict[str, float]:
        """Metrics on ``rows``. Leaves the random state and the model's mode as they were."""
        task, tokenizer, size = self._task, self._tokenizer, self.args.eval_batch_size
        assert self.model is not None
        training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(), self.autocast_smart_context_manager():
                return task.metrics(task.predict(self.model, tokenizer, rows, size), rows)
        finally:
            self.model.train(training)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Step, epoch and metrics of each evaluation so far."""
        return [
            {
                "step": entry["step"],
                "epoch": entry["epoch"],
                "metrics": {
                    key.removeprefix("eval_"): value
                    for key, value in entry.items()
                    if key.startswith("eval_") and key.removeprefix("eval_") in self._task.metric_names
                },
            }
            for entry in self.state.log_history
            if f"eval_{self._task.headline}" in entry
        ]

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
            raise diverged(loss, state.global_step)


def diverged(loss: float, step: int) -> TrainingError:
    """The error for a training loss that is not finite."""
    return TrainingError(
        f"the training loss became {loss} by step {step}: lower training.learning_rate, or train without fp16"
    )


class _MarkComplete(TrainerCallback):
    """The last callback: whatever a checkpoint should hold is in it now."""

    def __init__(self, seconds_before: float) -> None:
        self._before = seconds_before

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            seconds = self._before + time.monotonic() - self._began
            write_text(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE, f"{seconds:.1f}\n")
