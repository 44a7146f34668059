"""Training as a person follows it: one live line on a terminal, a line now and then elsewhere, one an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .report.terminal import clock, number

_LINES = 10  # how many lines of progress a run writes where there is no terminal
_GAP = "  "
_SHORTEST_BAR, _LONGEST_BAR = 8, 30


@dataclass(frozen=True)
class Budget:
    """A budget that training divides, as far as one who watches asks about it."""

    at: Callable[[int], int]
    """What may live after a step."""
    phase: Callable[[int], str]
    """What a step belongs to: warm-up, pruning or final. Empty where nothing is pruned."""
    live: Callable[[], int]
    """What lives now; on a GPU, this waits for it."""


class ShowProgress(TrainerCallback):
    """Prints to ``console``: steps, budget and what lives of it, training loss, time left, and each evaluation.

    Args:
        console: a terminal gets one line that changes; anything else gets about ten lines in all.
        metric_names: what each evaluation prints, in this order.
        headline: the metric that the live line keeps in view.
        budget: None for a method that has none.
    """

    def __init__(
        self, console: Console, metric_names: tuple[str, ...], headline: str = "", budget: Budget | None = None
    ) -> None:
        self._console = console
        self._metric_names = metric_names
        self._headline = headline
        self._budget = budget
        self._line = Progress(_Line(console), console=console, disable=not console.is_interactive)
        self._shown: dict[str, str] = {}
        self._next_line = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._next_line = state.global_step
        self._task = self._line.add_task("", total=state.max_steps, completed=state.global_step, parts=self._shown)
        self._line.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._budget is not None:
            self._shown["phase"] = self._budget.phase(state.global_step)
            self._shown["budget"] = f"budget {self._budget.at(state.global_step)}"
        self._line.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self._shown["loss"] = f"loss {logs['loss']:.3f}"
        if self._budget is not None:
            self._shown["live"] = f"live {self._budget.live()}"
        if not self._console.is_interactive and state.global_step >= self._next_line:
            said = (self._shown.get(part) for part in ("loss", "budget", "live", "phase"))
            self._say(state, ", ".join(filter(None, said)))
            self._next_line += max(1, state.max_steps // _LINES)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        found = metrics or {}
        said = {
            name: f"{name} {number(found[f'eval_{name}'])}" for name in self._metric_names if f"eval_{name}" in found
        }
        if self._headline in said:
            self._shown["held-out"] = said[self._headline]
        self._say(state, f"held-out {', '.join(said.values())}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Put the terminal back, whatever ended the training."""
        self._line.stop()

    def _say(self, state: TrainerState, what: str) -> None:
        epoch = f"epoch {state.epoch:.2g}, " if state.epoch is not None else ""
        self._console.print(f"  {epoch}step {state.global_step} of {state.max_steps}: {what}", highlight=False)


class _Part(NamedTuple):
    text: str
    style: str
    importance: int  # where a terminal is too narrow for all parts, the least important go


class _Line(ProgressColumn):
    """All that is known, in one line that never wraps."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._console = console

    def render(self, task: Task) -> Text:
        shown: dict[str, str] = task.fields["parts"]
        known = [
            _Part(f"{task.completed:.0f}/{task.total:.0f}", "progress.download", 9),
            _Part(shown.get("phase", ""), "bold", 3),
            _Part(shown.get("budget", ""), "", 6),
            _Part(shown.get("live", ""), "", 5),
            _Part(shown.get("loss", ""), "", 7),
            _Part(shown.get("held-out", ""), "", 4),
            _Part(_time(task), "progress.remaining", 8),
        ]
        room = self._console.width - 2  # a margin, so that no terminal moves to the next line
        parts = _that_fit([part for part in known if part.text], room)
        bar = min(room - _width(parts) - len(_GAP), _LONGEST_BAR)
        line = Text()
        if bar >= _SHORTEST_BAR:
            done = int(bar * (task.percentage / 100))
            mark = "-" if self._console.options.ascii_only else "━"
            line.append(mark * done, "bar.complete").append(mark * (bar - done), "bar.back").append(_GAP)
        return line.append_text(Text(_GAP).join(Text(part.text, part.style) for part in parts))


def _that_fit(parts: list[_Part], room: int) -> list[_Part]:
    while len(parts) > 1 and _width(parts) > room:
        parts = [part for part in parts if part is not min(parts, key=lambda part: part.importance)]
    return parts


def _width(parts: list[_Part]) -> int:
    return sum(len(part.text) for part in parts) + len(_GAP) * (len(parts) - 1)


def _time(task: Task) -> str:
    if task.finished:
        return f"took {clock(task.elapsed or 0)}"
    return "" if task.time_remaining is None else f"{clock(task.time_remaining)} left"
