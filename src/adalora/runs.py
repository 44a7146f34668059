"""A run's folder: what lies in it, when it may be written to, and what may be removed from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from .core.errors import AdaLoraError
from .recipe import Recipe, validate
from .recipe_text import read_raw

Mode = Literal["new", "overwrite", "resume"]

COMPLETE = "complete"
"""A file that a run writes into a checkpoint when everything else is in it: the seconds of training so far."""


class RunError(AdaLoraError):
    """A run's folder that cannot be used in the way that was asked for."""


class RunFolder(NamedTuple):
    """The files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe as resolved: written first, so that any run can be resumed."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """Written last: its presence says that the run is complete."""
        return self.path / "metrics.json"

    @property
    def trace(self) -> Path:
        return self.path / "trace.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "ranks.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def directions(self) -> Path:
        """How magnitude and direction of the weights changed, where that was analysed."""
        return self.path / "directions.json"

    @property
    def learned(self) -> list[Path]:
        """What methods write when training is done: an adapter, or a whole model."""
        names = ("adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json")
        return [*(self.path / name for name in names), *sorted(self.path.glob("model*.safetensors*"))]

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, where a recipe asks for them."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read_recipe(self) -> Recipe:
        """The recipe of the run in this folder; RunError when no run wrote here."""
        if not self.path.is_dir():
            raise RunError(f"there is no folder {self.path}")
        if not self.recipe.is_file():
            raise RunError(f"{self.path} is not the folder of a run: there is no {self.recipe.name} in it")
        raw = read_raw(self.recipe)
        if "facts" not in raw:
            raise RunError(f"{self.path} is not the folder of a run: {self.recipe.name} was not written by one")
        return validate(raw, str(self.recipe))

    def check_trained(self) -> Recipe:
        """The recipe of the finished run in this folder; RunError when there is nothing to use yet."""
        recipe = self.read_recipe()
        if not self.metrics.is_file() or not any(file.is_file() for file in self.learned):
            raise RunError(f"the run in {self.path} is not finished: adalora train --resume --output {self.path}")
        return recipe

    def check_target(self, mode: Mode) -> None:
        """RunError unless a run in this mode may write here. Changes nothing."""
        if mode == "resume":
            self.read_recipe()
            return
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output {self.path} is a file: give the name of a folder")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self._was_written_by_a_run():
            raise RunError(
                f"output folder {self.path} is not empty and holds no run, so nothing in it will be touched: "
                "choose another folder with --output"
            )
        if mode == "new":
            step = "" if self.metrics.is_file() else "--resume to continue it, "
            raise RunError(
                f"output folder {self.path} holds a run already: {step}--overwrite to replace it, "
                "or another folder with --output"
            )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        drawn = (self.report, self.directions, self.picture)
        for file in (self.metrics, *self.learned, *drawn, self.trace, self.recipe):
            file.unlink(missing_ok=True)
        for file in self.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        self.drop_checkpoints(after=-1)

    def drop_checkpoints(self, after: int) -> None:
        """Remove the checkpoints of steps later than ``after``."""
        for step, checkpoint in self._checkpoints():
            if step > after and not checkpoint.is_symlink():
                shutil.rmtree(checkpoint)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        complete = [(step, path) for step, path in self._checkpoints() if (path / COMPLETE).is_file()]
        return max(complete)[1] if complete else None

    def seconds_until(self, checkpoint: Path | None) -> float:
        """Seconds of training that led to a complete checkpoint; 0 without one, or where it does not say."""
        return float((checkpoint / COMPLETE).read_text(encoding="utf-8").strip() or 0) if checkpoint else 0.0

    def _checkpoints(self) -> Iterator[tuple[int, Path]]:
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            step = checkpoint.name.removeprefix("checkpoint-")
            if step.isdecimal():
                yield int(step), checkpoint

    def _was_written_by_a_run(self) -> bool:
        try:
            self.read_recipe()
        except AdaLoraError:
            return False
        return True
