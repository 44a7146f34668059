"""Ranks, wherever a Trainer reports to.

    trainer = Trainer(model=model, args=TrainingArguments(report_to=["tensorboard"]), callbacks=[AdaLoraCallback()])
    trainer.add_callback(ReportRanks(trainer))

A Trainer calls those that report before the callbacks that it was given, so these would add to a log line that has been
sent already. ``ReportRanks`` moves the ones that report to the end.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from . import ranks as ranks_of
from .core.errors import ConfigError
from .report.grid import Grid, arrange, cells

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

PICTURES = 20
"""At most so many pictures a run."""
PICTURE = "train/adalora/ranks"
"""What the pictures are called, beside ``train/adalora/live``, as Transformers calls a log line's ``adalora/live``."""
_DPI = 100


class ReportRanks(TrainerCallback):
    """Sends the ranks to whatever a Trainer reports to (its ``report_to``): as scalars in each log line, and, to
    TensorBoard, Weights & Biases and Trackio, as pictures.

    Log lines gain ``adalora/rank/KIND``, the mean rank of the matrices of one kind, such as ``attention.self.query``,
    beside what ``AdaLoraCallback`` adds. The heat map of all ranks, layers by kinds, is sent at the start, when ranks
    have changed (20 times at most), and at the end.

    Args:
        trainer: of an AdaLoRA model; add the callback to it with ``trainer.add_callback``.
        ranks: for other methods: the rank of each matrix now, by its name.
        budget: for other methods: step -> budget.

    Raises:
        ConfigError: matplotlib, which draws, is not installed.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        ranks: Callable[[], Mapping[str, int]] | None = None,
        budget: Callable[[int], int] | None = None,
    ) -> None:
        self._figure = _drawing()
        self._handler = trainer.callback_handler
        model: Any = trainer.model
        self._ranks = ranks or (lambda: ranks_of(model))
        self._budget = budget
        self._highest = max(self._ranks().values(), default=1)  # before a resumed training shrinks them
        self._sent: dict[str, int] = {}
        self._next_picture = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        callbacks = self._handler.callbacks
        self._handler.callbacks = sorted(callbacks, key=lambda callback: isinstance(callback, kinds))  # it is stable
        self._send_picture(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self._next_picture:
            self._send_picture(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._send_picture(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        ranks = self._ranks()
        logs.setdefault("adalora/live", sum(ranks.values()))
        if self._budget is not None:
            logs.setdefault("adalora/budget", self._budget(state.global_step))
        logs.update({f"adalora/rank/{kind}": mean for kind, mean in mean_ranks(ranks).items()})

    def _send_picture(self, state: TrainerState) -> None:
        between = math.ceil(state.max_steps / (PICTURES - 2))  # the first and the last one are not among those
        self._next_picture = state.global_step + max(1, between)
        ranks = dict(self._ranks())  # in every process: sharded ones have to work together
        if ranks == self._sent or not state.is_world_process_zero:
            return
        self._sent = ranks
        picture = self._draw(ranks, f"Ranks after step {state.global_step}: {sum(ranks.values())} triplets")
        for callback in self._handler.callbacks:
            _send(callback, picture, state.global_step)

    def _draw(self, ranks: Mapping[str, int], title: str) -> np.ndarray[Any, Any]:
        """The heat map as pixels: [height, width, 3], uint8."""
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = self._figure(arrange(ranks), self._highest, title)
        figure.set_dpi(_DPI)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def mean_ranks(ranks: Mapping[str, int]) -> dict[str, float]:
    """The mean rank of the matrices of each kind."""
    _, kinds, rows = cells(ranks)
    of_kind = {kind: [ranks[name] for cell in row for name in cell] for kind, row in zip(kinds, rows, strict=True)}
    return {kind: sum(found) / len(found) for kind, found in of_kind.items()}


def _send(callback: TrainerCallback, picture: np.ndarray[Any, Any], step: int) -> None:
    """To where ``callback`` reports, if that takes pictures."""
    if isinstance(callback, TensorBoardCallback):
        if callback.tb_writer is not None:
            callback.tb_writer.add_image(PICTURE, picture, step, dataformats="HWC")
    elif isinstance(callback, WandbCallback | TrackioCallback):
        service: Any = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
        service.log({PICTURE: service.Image(picture), "train/global_step": step})


def _drawing() -> Callable[[Grid, int, str], Figure]:
    try:
        from .report.ranks import rank_figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ReportRanks draws pictures of ranks, for which {error.name} is missing: pip install 'adalora[train]'"
        ) from error
    return rank_figure
