"""Loops that keep checkpoints of their own: torch.save, Accelerate, Lightning. Each resumes bit for bit as the docs
say, and says so when the schedule is left behind."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import adalora

from .models import logits
from .test_loops import STEPS, Rows, adamw, adapter_weights, make

AREA = "Saving, loading, resuming"
STOPS = [2, 5, 8, 10]  # before pruning, between masks, where the final phase begins, after ranks were compacted


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    rows = Rows().rows
    for k in numbers:
        model(**{key: value[8 * k : 8 * k + 8] for key, value in rows.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def uninterrupted(**settings: Any) -> nn.Module:
    model = make(**settings)
    steps(model, adamw(model), range(STEPS))
    return model


def assert_equal(resumed: nn.Module, model: nn.Module) -> None:
    assert adalora.ranks(resumed) == adalora.ranks(model)
    assert adalora.allocator(resumed).step == STEPS
    assert torch.equal(adapter_weights(resumed), adapter_weights(model))
    assert torch.equal(logits(resumed, "SEQ_CLS"), logits(model, "SEQ_CLS"))


def fresh(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model made again, with another adapter and head to be overwritten."""
    model = make(**settings)
    with torch.no_grad():
        for w in (w for w in model.parameters() if w.requires_grad):
            w.add_(torch.rand_like(w) * 0.1)
    return model, adamw(model)


# ----------------------------------------------------------------------------------------------------------- torch.save


@pytest.mark.compatibility(AREA, "`torch.save` of state dicts, the allocator's among them: bit for bit")
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("state_first", [False, True])
def test_torch_save_resumes_bit_for_bit(stop: int, state_first: bool) -> None:
    model = make(target_r=1)
    optimizer, file = adamw(model), io.BytesIO()
    steps(model, optimizer, range(stop))
    states = (model, optimizer, adalora.allocator(model))
    torch.save([each.state_dict() for each in states], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = fresh(target_r=1)
    loads = [(resumed, saved[0]), (again, saved[1]), (adalora.allocator(resumed), saved[2])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, state in loads[::-1] if state_first else loads:
            each.load_state_dict(state)
        steps(resumed, again, range(stop, STEPS))
    assert_equal(resumed, uninterrupted(target_r=1))


@pytest.mark.compatibility(AREA, "`load_state_dict` alone: the schedule does not come back, with a warning")
@pytest.mark.parametrize("look", [False, True])
def test_weights_without_the_schedule_are_told_of(look: bool) -> None:
    model = make()
    optimizer = adamw(model)
    steps(model, optimizer, range(9))
    saved = copy.deepcopy(model.state_dict())
    resumed, again = fresh()
    resumed.load_state_dict(saved)
    if look:  # which catches up with the new weights
        assert adalora.allocator(resumed).live == 2 * len(adalora.ranks(model))
    with pytest.warns(UserWarning, match=r"goes on from step 0.*adalora\.allocator\(model\)\.state_dict\(\)"):
        steps(resumed, again, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(copy.deepcopy(resumed.state_dict()))  # what is there already is no news
        resumed.load_state_dict({k: v for k, v in saved.items() if "lora_" not in k}, strict=False)
        steps(resumed, again, range(1, 2))


# ----------------------------------------------------------------------------------------------------------- Accelerate


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.compatibility(AREA, "Accelerate's `save_state` and `load_state`, rank 0 included: bit for bit")
@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("stop", STOPS)
def test_accelerate_resumes_bit_for_bit(stop: int, safe: bool, tmp_path: Path) -> None:
    def prepared(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        model, ours = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(adalora.allocator(model))
        return accelerator, model, ours

    model = make(target_r=1)
    accelerator, model, optimizer = prepared(model, adamw(model))
    steps(model, optimizer, range(stop))
    if stop == STOPS[-1]:
        assert 0 in [t.rank for t in adalora.allocator(model).triplets], "no layer was pruned away: this shows less"
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    accelerator, resumed, again = prepared(*fresh(target_r=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator.load_state(str(tmp_path))
        steps(resumed, again, range(stop, STEPS))
    assert_equal(resumed, uninterrupted(target_r=1))
    accelerator.load_state(str(tmp_path))  # into a model that has lost ranks itself
    steps(resumed, again, range(stop, STEPS))
    assert_equal(resumed, uninterrupted(target_r=1))


# ------------------------------------------------------------------------------------------------------------ Lightning


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:You defined",
    "ignore:.*treespec",
    "ignore:You're resuming from a checkpoint",
)
@pytest.mark.compatibility(AREA, "Lightning's `ckpt_path`: bit for bit")
@pytest.mark.parametrize("stop", STOPS)
def test_lightning_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, rows: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            first = 8 * self.global_step  # a plain loader begins anew where Lightning resumes within an epoch
            rows = {key: value[first : first + 8] for key, value in Rows().rows.items()}
            loss: torch.Tensor = self.model(**rows).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["adalora"] = adalora.allocator(self.model).state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            adalora.allocator(self.model).load_state_dict(checkpoint["adalora"])

    def fit(model: nn.Module, max_steps: int, checkpoint: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
        trainer.fit(Module(model.train()), loader, ckpt_path=checkpoint)
        return trainer

    first = make(target_r=1)
    fit(first, stop).save_checkpoint(tmp_path / "there.ckpt")
    resumed, _ = fresh(target_r=1)
    fit(resumed, STEPS, tmp_path / "there.ckpt")
    assert_equal(resumed.train(), uninterrupted(target_r=1))
