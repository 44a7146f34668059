"""Budgets in parameters and fractions of a rank on whole models, down to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adalora
from adalora import AdaLoraConfig
from adalora.core.errors import ConfigError

from .models import ARCHITECTURES, batch

PHASES: dict[str, Any] = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


def trained(name: str, **settings: Any) -> Any:
    build, targets, task_type = ARCHITECTURES[name]
    torch.manual_seed(0)
    values = {**PHASES, "target_modules": targets, "task_type": task_type, "fan_in_fan_out": name == "gpt2", **settings}
    model: Any = adalora.get_peft_model(build(), AdaLoraConfig(**values))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for step in range(12):
        model(**batch(task_type, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("rank_by", ["score", "score_per_parameter"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "target", [{"target_r": 1.3, "init_r": 3}, {"target_r": 0.25}, {"budget": 555, "init_r": 1}], ids=str
)
def test_what_is_saved_is_within_a_triplet_of_the_budget(
    name: str, target: dict[str, Any], rank_by: str, tmp_path: Path
) -> None:
    model = trained(name, budget_unit="parameters", rank_by=rank_by, **target)
    ours = adalora.allocator(model)
    adalora.export_lora(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = sum(value.numel() for key, value in tensors.items() if "lora_" in key)
    largest = max(ours.costs)
    assert ours.target_budget - largest < saved == ours.spent <= ours.target_budget
    assert ours.target_budget == target.get("budget", int(target.get("target_r", 0) * sum(ours.costs)))
    assert "parameters (as LoRA of rank" in ours.describe()


def test_a_resumed_training_keeps_its_budget_in_parameters(tmp_path: Path) -> None:
    model = trained("bert", budget_unit="parameters", target_r=0.5)
    adalora.save_state(model, tmp_path)
    again: Any = adalora.get_peft_model(ARCHITECTURES["bert"][0](), model.peft_config["default"])
    adalora.load_state(again, tmp_path)
    assert adalora.ranks(again) == adalora.ranks(model)
    assert adalora.allocator(again).spent == adalora.allocator(model).spent


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 100, "budget_unit": "parameters"}, "budget=100 does not say at which rank to start: give init_r"),
        ({"budget": 100, "target_r": 2, "init_r": 4}, "one of the two"),
        ({"target_r": 0}, "average rank above 0"),
        (
            {"target_r": 2.5, "init_r": 2},
            r"init_r=2 is smaller than target_r=2.5.*init_r=4 .*init_r=3 for no",
        ),
        ({"init_r": 1.5}, "init_r=1.5 must be a whole number"),
        ({"budget_unit": "bytes"}, "budget_unit='bytes' is not known"),
    ],
)
def test_budgets_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdaLoraConfig(target_modules=["query"], **settings)


def test_the_start_is_half_as_much_again_rounded_up() -> None:
    starts = {target: AdaLoraConfig(target_r=target).init_r for target in (0.25, 0.5, 0.7, 1, 2, 2.5, 8)}
    assert starts == {0.25: 1, 0.5: 1, 0.7: 2, 1: 2, 2: 3, 2.5: 4, 8: 12}
