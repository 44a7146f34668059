"""Training as a person follows it: a bar on a terminal, a line now and then elsewhere, one line an evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .report.terminal import number

_LINES = 10  # how many lines of progress a run writes where there is no terminal


class ShowProgress(TrainerCallback):
    """Prints to ``console``: steps, training loss, live triplets, and the metrics of each evaluation."""

    def __init__(self, console: Console, metric_names: tuple[str, ...]) -> None:
        self._console = console
        self._metric_names = metric_names
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._next_line = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, status="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        live = f", {logs['adalora/live']} triplets" if "adalora/live" in logs else ""
        status = f"loss {logs['loss']:.3f}{live}"
        self._bar.update(self._task, status=status)
        if not self._console.is_terminal and state.global_step >= self._next_line:
            self._say(state, status)
            self._next_line += max(1, state.max_steps // _LINES)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        found = metrics or {}
        shown = [f"{name} {number(found[f'eval_{name}'])}" for name in self._metric_names if f"eval_{name}" in found]
        self._say(state, f"held-out {', '.join(shown)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Put the terminal back, whatever ended the training."""
        self._bar.stop()

    def _say(self, state: TrainerState, what: str) -> None:
        epoch = f"epoch {state.epoch:.2g}, " if state.epoch is not None else ""
        self._console.print(f"  {epoch}step {state.global_step} of {state.max_steps}: {what}", highlight=False)
