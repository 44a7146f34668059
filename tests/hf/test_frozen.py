"""What is frozen is not trained, so it takes no part in the budget; what can then learn nothing is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError

from .models import bert
from .test_loops import STEPS, adamw, make, one_step

AREA = "Choosing what to adapt"


def freeze(model: nn.Module, *parts: str) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and any(part in name for part in parts):
            parameter.requires_grad_(False)


def run(model: nn.Module, steps: int = STEPS, **settings: Any) -> torch.optim.Optimizer:
    optimizer = adamw(model, **settings)
    for _ in range(steps):
        one_step(model, optimizer)
    return optimizer


def upgraded(**settings: Any) -> nn.Module:
    """A LoRA adapter whose B A is not 0, under a budget from now on."""
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(bert(), lora)
    config = AdaLoraConfig(**{"target_r": 2, "total_step": STEPS, "tinit": 2, "tfinal": 4, "deltaT": 1, **settings})
    adalora.upgrade(model, "default", config)
    return model


@pytest.mark.compatibility(AREA, "Λ frozen while it is 0 (LoRA-FA, by hand or by PEFT's optimizer)", refused=True)
@pytest.mark.parametrize("parts", [("lora_A",), ("singular_values",), ("layer.0.attention.self.query.lora_A",)])
def test_singular_values_that_stay_0_are_an_error_at_the_first_step(parts: tuple[str, ...]) -> None:
    """No gradient would reach P and Q, and nothing would be learned without a word."""
    model = make()
    freeze(model, *parts)
    before = [w.detach().clone() for w in model.parameters()]
    with pytest.raises(ConfigError, match=r"are frozen while they are 0.*right_vectors"):
        run(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_pefts_lora_fa_optimizer_is_refused_at_its_first_step() -> None:
    model = make()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=16, lr=1e-2)  # freezes lora_A
    with pytest.raises(ConfigError, match="LoRA-FA"):
        one_step(model, optimizer)


@pytest.mark.compatibility(AREA, "P or Q frozen: the rest is trained within the budget")
@pytest.mark.parametrize("parts", [("right_vectors",), ("lora_B",), ("right_vectors", "lora_B")])
def test_frozen_vectors(parts: tuple[str, ...]) -> None:
    model = upgraded()
    freeze(model, *parts)
    frozen = {n: w.detach().clone() for n, w in model.named_parameters() if "lora_" in n and not w.requires_grad}
    assert frozen
    run(model)
    allocator = adalora.allocator(model)
    assert allocator.frozen and allocator.live == 8 == sum(t.rank for t in allocator.triplets)
    for name, parameter in model.named_parameters():
        if name in frozen:  # what is left of it has its values
            old, dim = frozen[name], 1 if "lora_B" in name else 0
            assert all(any(torch.equal(row, was) for was in old.unbind(dim)) for row in parameter.unbind(dim))


@pytest.mark.compatibility(AREA, "Λ of every matrix frozen: nothing is left for a budget", refused=True)
def test_a_budget_over_nothing_is_an_error() -> None:
    model = upgraded()
    freeze(model, "lora_A")
    with pytest.raises(ConfigError, match=r"of all 4 matrices are frozen.*plain LoRA"):
        run(model, 1)


@pytest.mark.compatibility(AREA, "a frozen layer of the adapter: it keeps its rank, outside the budget")
@pytest.mark.parametrize("part", ["layer.0", "layer.0.attention.self.query.lora_A"])
@pytest.mark.parametrize("compact", [True, False])
def test_a_frozen_layer_keeps_its_rank_and_the_others_keep_the_budget(compact: bool, part: str, tmp_path: Path) -> None:
    model = upgraded(compact=compact)
    freeze(model, part)
    frozen = {n: w.detach().clone() for n, w in model.named_parameters() if "lora_" in n and not w.requires_grad}
    optimizer = run(model, 7)
    allocator = adalora.allocator(model)
    inside = 2 if part == "layer.0" else 3
    assert (allocator.initial_budget, allocator.target_budget) == (4 * inside, 2 * inside)
    assert allocator.budget == allocator.live < 4 * inside
    adalora.save_state(model, tmp_path)
    resumed = upgraded(compact=compact)
    freeze(resumed, part)
    resumed.load_state_dict({n: w for n, w in model.state_dict().items() if "classifier" in n}, strict=False)
    adalora.load_state(resumed, tmp_path)
    again = adamw(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (resumed, again)):
        for _ in range(STEPS - 7):
            one_step(each, its)
    whole = {name for name in adalora.ranks(model) if f"{name}.lora_A".startswith(f"bert.encoder.{part}")}
    assert len(whole) == 4 - inside
    for each in (model, resumed):
        ranks = adalora.ranks(each)
        assert sum(r for n, r in ranks.items() if n not in whole) == 2 * inside == adalora.allocator(each).live
        assert {rank for name, rank in ranks.items() if name in whole} == {4}
        assert all(torch.equal(w, frozen[n]) for n, w in each.named_parameters() if n in frozen)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_layer_that_is_frozen_later_keeps_the_rank_it_has() -> None:
    """And one that is trained again competes again: the budget is that of the layers that are trained."""
    model = upgraded(tinit=1, tfinal=2)
    optimizer = run(model, 5)
    ranks = adalora.ranks(model)
    freeze(model, "layer.0")
    for _ in range(STEPS - 5):
        one_step(model, optimizer)
    allocator = adalora.allocator(model)
    now = adalora.ranks(model)
    assert {n: r for n, r in now.items() if "layer.0" in n} == {n: r for n, r in ranks.items() if "layer.0" in n}
    assert allocator.live == 4 == sum(r for n, r in now.items() if "layer.1" in n)


def test_an_adapter_that_is_frozen_as_a_whole_waits() -> None:
    """It is not active for the time being; nothing of its budget changes."""
    model = make()
    freeze(model, "lora_")
    allocator = adalora.allocator(model)
    allocator.plan(STEPS)
    run(model, 3)
    assert allocator.step == 0 and allocator.target_budget == 2 * len(allocator.triplets)
