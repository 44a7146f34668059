"""Transformers' Trainer as our runs need it: it measures as ``adalora evaluate`` does, and resumes to the same bits."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
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
from .data import DataError
from .tasks import Answer, Task, TellsLoss
from .tasks.base import batches_by_length, device_of
from .tasks.generation import IGNORED


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
        rows_on_the_way: int | None = None,
        **settings: Any,
    ) -> None:
        """A Trainer of ``model`` on the features in ``train_dataset``, measured on the held-out ``rows``.

        Args:
            averages_over_items: the model's loss is over all items of accumulated batches, if told their number.
            rows_on_the_way: evaluations before the last are on so many of the rows, always the same ones; None: on all.
            trace: of the run, if its method writes one.
            before: what led to the checkpoint to resume from.
        """
        self._trace, self._before = trace, before
        self._previous_loss: torch.Tensor | None = None
        self._task, self._tokenizer, self._rows = task, tokenizer, rows
        self._last: list[Answer] | None = None  # to all held-out rows, at the end
        some = rows_on_the_way is not None and rows_on_the_way < len(rows)
        self._on_the_way = sorted(Random(0).sample(range(len(rows)), rows_on_the_way or 0)) if some else None
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
        self._tr_loss += self._before.loss_since[self.args.process_index]
        self._globalstep_last_logged = self._before.step_logged
        ends_epoch = self.args.eval_strategy == "epoch" and self.state.epoch == int(self.state.epoch or 0)
        if ends_epoch and (not self.evaluations or self.evaluations[-1]["step"] != self.state.global_step):
            self.evaluate()  # the checkpoint was saved right before

    def mark_complete(self, checkpoint: Path, seconds: float) -> None:
        """The last callback: whatever a checkpoint should hold is in it when all processes are here."""
        since = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
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
        """Metrics on the held-out rows, logged as a Trainer does: on the way perhaps on some of them, at the end on
        all."""
        few, last = self._on_the_way, self.state.global_step >= self.state.max_steps
        rows = self._rows if few is None or last else self._rows.select(few)
        with self._looking() as model:
            answers = self._task.predict(model, self._tokenizer, rows, self.args.eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in self._task.metrics(answers, rows).items()}
        self.log(metrics)
        self._last = answers if last else None
        if few is not None and last:  # what the evaluations before can be compared with
            same = self._task.metrics([answers[index] for index in few], rows.select(few))
            self.log({f"curve_{name}": value for name, value in same.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, rows: Dataset) -> dict[str, float]:
        """Metrics on ``rows``. Leaves the random state and the model's mode as they were."""
        with self._looking() as model:
            answers = self._task.predict(model, self._tokenizer, rows, self.args.eval_batch_size)
        return self._task.metrics(answers, rows)

    def held_out_loss(self, rows: Dataset) -> float | None:
        """Mean of the model's own loss over ``rows``, or over the tokens that they have labels for, without what a
        method adds to it. None where the rows have no loss: no token of an answer is read of any, say."""
        if isinstance(self._task, TellsLoss) and self._last is not None and rows is self._rows:
            return self._task.loss(self._last, rows)
        assert self.model is not None
        collate: Any = self._task.collator(self._tokenizer, self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows that are left out
            try:
                features = self._task.features(rows, self._tokenizer, self.model)
            except DataError:
                return None
        total, items = 0.0, 0
        with self._looking() as model, torch.no_grad():
            plain: Any = model
            if self.args.world_size == 1:  # PEFT's AdaLoRA adds a penalty; what is sharded is whole in its root alone
                plain = getattr(model, "get_base_model", lambda: model)()
            for _, batch in batches_by_length(features, self.args.eval_batch_size, collate, device_of(model)):
                count = self._items(batch)
                if count:
                    total += plain(**batch).loss.item() * count
                    items += count
        return total / items if items else None

    def _items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """What the loss of a batch is the mean of: its tokens with labels, else its rows."""
        labels = batch.get("labels")
        if labels is None or labels.ndim < 2 or labels.is_floating_point():
            return len(batch["input_ids"])
        if self.model_accepts_loss_kwargs:  # a causal model, in which nothing predicts the first token
            labels = labels[:, 1:]
        return int((labels != IGNORED).sum())

    @contextmanager
    def _looking(self) -> Iterator[nn.Module]:
        """The model in the mode and precision of evaluation; random state and mode are as before afterwards."""
        assert self.model is not None
        training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(), self.autocast_smart_context_manager():
                yield self.model
        finally:
            self.model.train(training)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Step, epoch and metrics of each evaluation so far."""
        return self._logged("eval_")

    @property
    def curve(self) -> list[dict[str, Any]]:
        """As ``evaluations``, all on the same rows."""
        found = self._logged("eval_")
        return found if self._on_the_way is None else [*found[:-1], *self._logged("curve_")]

    def _logged(self, prefix: str) -> list[dict[str, Any]]:
        return [
            {
                "step": entry["step"],
                "epoch": entry["epoch"],
                "metrics": {
                    key.removeprefix(prefix): value
                    for key, value in entry.items()
                    if key.startswith(prefix) and key.removeprefix(prefix) in self._task.metric_names
                },
            }
            for entry in self.state.log_history
            if f"{prefix}{self._task.headline}" in entry
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
