"""Ranks reach TensorBoard, Weights & Biases and Trackio: real files, read back."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

import adalora
from adalora import AdaLoraCallback, ConfigError
from adalora.monitoring import PICTURE, PICTURES, ReportRanks, mean_ranks
from adalora.report.grid import arrange
from adalora.report.ranks import rank_figure

from .test_loops import STEPS, Rows, make, trainer

KINDS = {"attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"}


def train(folder: Path, reporter: str, **arguments: Any) -> torch.nn.Module:
    """An AdaLoRA model, trained for 12 steps by a Trainer that reports its ranks."""
    model = make(total_step=None, tinit=2, tfinal=4, target_modules=["query", "value", "dense"])
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-2,
        report_to=[reporter],
        logging_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    ours = Trainer(model, settings, train_dataset=Rows(), callbacks=[AdaLoraCallback()])
    ours.add_callback(ReportRanks(ours))
    ours.train()
    return model


def changes(model: torch.nn.Module) -> list[int]:
    """The first step, and those whose allocation changed a rank."""
    allocator = adalora.allocator(model)
    ranks = [(0, allocator.initial_ranks), *((allocation.step, allocation.ranks) for allocation in allocator.trace)]
    return [0, *(step for (_, before), (step, after) in pairwise(ranks) if after != before)]


def size_of(ranks: dict[str, int]) -> tuple[int, int]:
    """Width and height of their heat map, in pixels."""
    figure = rank_figure(arrange(ranks), 4, "")
    width, height = (figure.get_size_inches() * 100).astype(int)
    return int(width), int(height)


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = train(tmp_path, "tensorboard")

    events = accumulator.EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars, final = set(events.Tags()["scalars"]), adalora.ranks(model)
    kinds = {tag.removeprefix("train/adalora/rank/") for tag in scalars if tag.startswith("train/adalora/rank/")}
    assert kinds >= KINDS and kinds == set(mean_ranks(final))
    assert {"train/adalora/budget", "train/adalora/live", "train/adalora/orthogonality", "train/loss"} <= scalars
    live = [(event.step, event.value) for event in events.Scalars("train/adalora/live")]
    assert [step for step, _ in live] == [2, 4, 6, 8, 10, 12]
    assert live[0][1] == 4 * len(final) and live[-1][1] == 2 * len(final) == sum(final.values())
    last = {kind: events.Scalars(f"train/adalora/rank/{kind}")[-1].value for kind in kinds}
    assert last == pytest.approx(mean_ranks(final))

    pictures = events.Images(PICTURE)
    assert [event.step for event in pictures] == changes(model)
    shown = [Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB") for event in pictures]
    assert {picture.size for picture in shown} == {size_of(final)}
    assert np.any(np.asarray(shown[0]) != np.asarray(shown[-1]))


def test_a_long_run_sends_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("adalora.monitoring._send", lambda callback, picture, step: sent.append(step))
    model = make(total_step=None, tinit=2, tfinal=2, deltaT=1, init_r=8, target_r=1, target_modules=["query"])
    ours = trainer(model, tmp_path, callbacks=[AdaLoraCallback()], num_train_epochs=6)  # 72 steps
    ours.add_callback(ReportRanks(ours))
    ours.train()
    steps = list(dict.fromkeys(sent))
    assert 5 < len(steps) <= PICTURES and steps[0] == 0
    assert changes(model)[-1] <= steps[-1] <= changes(model)[-1] + 4  # the last picture shows the ranks that stay


def test_log_lines_reach_those_that_report_whatever_their_order(tmp_path: Path) -> None:
    """Transformers calls its own reporters first; without ``ReportRanks`` they miss what AdaLoraCallback adds."""
    pytest.importorskip("tensorboard")

    def scalars(ranks: bool) -> set[str]:
        seen: set[str] = set()

        class Reporter(TensorBoardCallback):
            """Hears what TensorBoard would."""

            def _init_summary_writer(self, args: Any) -> None: ...

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                seen.update(logs)

        callbacks = [Reporter(), AdaLoraCallback()]
        ours = trainer(make(total_step=None), tmp_path, callbacks=callbacks, logging_strategy="steps", logging_steps=4)
        if ranks:
            ours.add_callback(ReportRanks(ours))
        ours.train()
        return seen

    assert "adalora/live" not in scalars(ranks=False)
    assert {"adalora/live", "adalora/rank/output.dense"} <= scalars(ranks=True)


def test_trackio_gets_scalars_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    for name in ("TRACKIO_DIR", "MEDIA_DIR"):
        for module in [m for m in sys.modules.values() if getattr(m, "__name__", "").startswith("trackio")]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / name.lower())
    model = train(tmp_path, "trackio", project="adalora-test", run_name="ranks", trackio_static_space_id=False)
    assert trackio.__version__
    databases = list(tmp_path.rglob("*.db"))
    assert databases
    with sqlite3.connect(databases[0]) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    assert any("train/adalora/live" in row for row in rows)
    assert sum(PICTURE in row for row in rows) == len(changes(model))
    assert list(tmp_path.rglob("*.png"))


def test_weights_and_biases_gets_scalars_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    model = train(tmp_path, "wandb", run_name="ranks")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/adalora/live"] == summary["train/adalora/budget"] > 0
    assert summary[PICTURE]["_type"] == "image-file"
    assert len(list(tmp_path.rglob("media/images/**/*.png"))) == len(changes(model))


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(make(total_step=STEPS), tmp_path)
    monkeypatch.delitem(sys.modules, "adalora.report.ranks", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ConfigError, match=r"matplotlib\S* is missing: pip install 'adalora\[train\]'"):
        ReportRanks(ours)
