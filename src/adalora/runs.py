"""A run's folder: what lies in it, when and by whom it may be written to, and what may be removed from it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from .checkpoints import MANIFEST, Progress, read_manifest
from .core.errors import AdaLoraError
from .files import HeldError, holding
from .recipe import Recipe, validate
from .recipe_text import read_raw

Mode = Literal["new", "overwrite", "resume"]

_PATIENCE = 1.0  # seconds; one who only looks whether a folder is taken has gone by then


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
    def search(self) -> Path:
        """The search for a learning rate, where the recipe leaves it to one."""
        return self.path / "tuning"

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
        try:
            self._check_target(mode)
            self._check_writable()
        except (OSError, ValueError) as error:  # a ValueError: a name that no system takes
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"output {self.path} cannot be written to ({reason}): choose another folder with --output"
            ) from error
        if self._lock.is_file():
            with self._held():
                pass

    def _check_target(self, mode: Mode) -> None:
        if mode == "resume":
            self.read_recipe()
            return
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output {self.path} is a file: give the name of a folder")
        beside = (self._lock, self.search)
        if not self.path.is_dir() or all(path in beside for path in self.path.iterdir()):
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

    def check_room(self, size: int) -> None:
        """RunError where fewer than ``size`` bytes are free."""
        free = shutil.disk_usage(self._nearest()).free
        if free < size:
            raise RunError(
                f"output {self.path} needs {size:,} bytes at least, and {free:,} are free there: make room, or choose "
                "another folder with --output"
            )

    def _nearest(self) -> Path:
        """The folder, or the nearest above it that there is. OSError where its name is none."""
        return next(place for place in (self.path, *self.path.absolute().parents) if place.exists())

    def _check_writable(self) -> None:
        """OSError unless files can be made here."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self.path.lstat()  # a name that no system takes
        there = self._nearest()
        if not there.is_dir():
            raise RunError(f"output {self.path} lies in {there}, which is a file: choose another folder with --output")
        with tempfile.TemporaryFile(dir=there):
            pass

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder and be the one process that writes to it.

        Raises:
            RunError: another process is, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"output {self.path} cannot be made: {error.strerror}") from error
        with self._held():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with holding(self._lock, _PATIENCE):
                yield
        except HeldError as error:
            raise RunError(
                f"another training writes to {self.path} ({error}): wait for it, or choose another folder with --output"
            ) from None

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    def state(self) -> tuple[object, ...]:
        """What another training in this folder would change."""
        written = self.recipe.stat().st_mtime_ns if self.recipe.is_file() else None
        return written, self.metrics.is_file(), self.last_checkpoint()

    def clear(self, search: bool = True) -> None:
        """Remove what a run writes, and nothing else; its search for a learning rate may stay."""
        if search:
            self.clear_search()
        drawn = (self.report, self.directions, self.picture)
        for file in (self.metrics, *self.learned, *drawn, self.trace, self.recipe):
            file.unlink(missing_ok=True)
        for file in self.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        self.drop_checkpoints(after=-1)
        self.sweep()

    def sweep(self) -> None:
        """Remove what a process that was killed while it wrote has left beside its files."""
        for left in (*self.path.glob(".*.tmp"), *self.path.glob(".export-*"), *self.path.glob("*.part")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def clear_search(self) -> None:
        """Remove what a search for a learning rate writes."""
        for file in (self.search / "study.log", self.search / "recipe.yaml"):
            file.unlink(missing_ok=True)

    def drop_checkpoints(self, after: int) -> None:
        """Remove the checkpoints of steps later than ``after``."""
        for step, checkpoint in self._checkpoints():
            if step > after and not checkpoint.is_symlink():
                shutil.rmtree(checkpoint)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        complete = [(step, path) for step, path in self._checkpoints() if (path / MANIFEST).is_file()]
        return max(complete)[1] if complete else None

    def progress_at(self, checkpoint: Path) -> Progress:
        """How far the run had come at a complete checkpoint; CheckpointError when that was damaged since."""
        return read_manifest(checkpoint, self.trace)

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
