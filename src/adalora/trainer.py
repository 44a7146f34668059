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

from . import processes
from .checkpoints import Progress, write_manifest
from .core.errors import AdaLoraError
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
        trace: Path,
        before: Progress | None,
        **settings: Any,
    ) -> None:
        """A Trainer of ``model`` on the features in ``train_dataset``, measured on the held-out ``rows``.

        Args:
            averages_over_items: the model's loss is over all items of accumulated batches, if told their number.
            trace: of the run, if its method writes one.
            before: what led to the checkpoint to resume from.
        """
        self._trace, self._before = trace, before
        self._previous_loss: torch.Tensor | None = None
        self._task, self._tokenizer, self._rows = task, tokenizer, rows
        self._lengths = [len(tokens) for tokens in train_dataset["input_ids"]] if group_by_length else None
        collate: Any = task.collator(tokenizer, model)
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            eval_dataset=rows,
            data_collator=collate,
            callbacks=[*callbacks, _GoOn(self)],
            **settings,
        )
        self.remove_callback(PrinterCallback)
        # Transformers goes by the arguments that a model takes, but many take the number and average over one batch.
        self.model_accepts_loss_kwargs = averages_over_items

    def training_step(self, *args: Any, **settings: Any) -> torch.Tensor:
        """A Trainer's, which stops at a loss that is nan or infinite: it does not come back."""
        loss: torch.Tensor = super().training_step(*args, **settings)
        # That of the batch before: a GPU has it by now, and need not be waited for.
        if self._previous_loss is not None and not math.isfinite(self._previous_loss.item()):
            raise diverged(self._previous_loss.item(), self.state.global_step, self.args.fp16)
        self._previous_loss = loss.detach()
        return loss

    @property
    def training_loss(self) -> float:
        """Mean over all steps, those before an interruption included."""
        return float(self._total_loss_scalar) / max(1, self.state.global_step)

    def go_on(self) -> None:
        """Before the first step: what a Trainer that resumes does not know, or has lost."""
        if self._before is None:
            return
        self._total_loss_scalar = self._before.loss_logged
        self._tr_loss += self._before.loss_since
        self._globalstep_last_logged = self._before.step_logged
        ends_epoch = self.args.eval_strategy == "epoch" and self.state.epoch == int(self.state.epoch or 0)
        if ends_epoch and (not self.evaluations or self.evaluations[-1]["step"] != self.state.global_step):
            self.evaluate()  # the checkpoint was saved right before

    def mark_complete(self, checkpoint: Path, seconds: float) -> None:
        """The last callback: whatever a checkpoint should hold is in it when all processes are here."""
        since = self.accelerator.gather(self._tr_loss).mean().item()
        processes.wait()
        if not self.state.is_world_process_zero:
            return
        progress = Progress(
            seconds=round(seconds + (self._before.seconds if self._before else 0.0), 1),
            processes=int(self.args.world_size),
            loss_logged=float(self._total_loss_scalar),
            loss_since=since,
            step_logged=self._globalstep_last_logged,
        )
        write_manifest(checkpoint, self._trace, progress)

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


def diverged(loss: float, step: int, fp16: bool) -> TrainingError:
    """The error for a training loss that is not finite."""
    advice = "lower training.learning_rate, or train without fp16" if fp16 else "lower training.learning_rate"
    return TrainingError(f"the training loss became {loss} by step {step}: {advice}")


class _GoOn(TrainerCallback):
    """The last callback: resumes what a Trainer does not, and marks checkpoints that are complete."""

    def __init__(self, trainer: SteadyTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()
        self._trainer.go_on()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._trainer.mark_complete(checkpoint, time.monotonic() - self._began)
