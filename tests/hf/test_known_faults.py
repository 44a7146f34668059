"""Faults of existing implementations, each as it shows there.

Elsewhere in these tests, by the headings of the design's list:

- Allocation that silently never runs: the loops of ``test_loops.py`` and ``test_trainers.py``; ``add_adapter`` and
  ``inject_adapter_in_model`` in ``test_adapters.py`` and ``test_several_adapters.py``.
- Numbers: infinite gradients, skipped steps, accumulation, half precision and the loss in ``test_loops.py``.
- Save, load, resume: rank 0 in ``test_adapters.py``; before, during and after pruning in ``test_resume.py``.
- Adapters and backends: names and several trainable adapters in ``test_several_adapters.py``; quantized layers in
  ``test_quantized.py``; parameters that shrink in ``test_adapters.py``; DDP with gradient checkpointing in
  ``tests/distributed``; the documented example in ``test_starts.py``.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError, StateError
from adalora.core.triplets import Triplets

from .models import batch, bert
from .test_loops import STEPS, adamw, make, one_step


def test_equal_ranks_train_and_smaller_ones_are_refused() -> None:
    """There: ``kthvalue(): selected number k out of range``."""
    model = make(init_r=3, target_r=3)
    optimizer = adamw(model)
    for _ in range(STEPS):
        one_step(model, optimizer)
    assert set(adalora.ranks(model).values()) == {3}
    with pytest.raises(ConfigError, match="init_r=2 is smaller than target_r=3"):
        make(init_r=2, target_r=3)


def test_initial_vectors_are_orthonormal_at_any_width() -> None:
    """There: standard deviation 0.02, ‖AAᵀ - I‖ = 5.3 at d = 4096, r = 64."""
    wide = Triplets.create("wide", 64, 4096, 64)
    gaussian = Triplets.create("wide", 64, 4096, 64, initialization="gaussian")
    identity = torch.eye(64)
    assert (wide.q @ wide.q.T - identity).norm() < 1e-4
    assert (gaussian.q @ gaussian.q.T - identity).norm() > 3


def test_between_two_masks_everything_that_is_not_zero_is_saved(tmp_path: Path) -> None:
    """There: 48 live λ in memory, 25 after reloading."""
    model = make(deltaT=4, tfinal=2)
    optimizer, allocator = adamw(model), adalora.allocator(model)
    for _ in range(6):  # a mask at step 4; momentum then moves pruned λ away from 0
        one_step(model, optimizer)
    alive = {t.name: int(t.lam.count_nonzero()) for t in allocator.triplets}
    assert sum(alive.values()) > allocator.live, "nothing came back: this shows nothing"
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, rank in alive.items():
        assert weights[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank


def test_saving_does_not_change_the_live_configuration(tmp_path: Path) -> None:
    """There: the adapter's name is stripped from the keys of the live rank pattern."""
    model = make()
    optimizer = adamw(model)
    for step in range(STEPS):
        one_step(model, optimizer)
        before = copy.deepcopy(model.peft_config["default"].to_dict())
        model.save_pretrained(tmp_path / str(step))
        adalora.export_lora(model, tmp_path / f"{step}e")
        after = model.peft_config["default"].to_dict()
        after["auto_mapping"], after["base_model_name_or_path"] = (
            before["auto_mapping"],
            before["base_model_name_or_path"],
        )
        assert after == before


@pytest.mark.parametrize("offset", [0, 1])
def test_no_step_is_magic(offset: int) -> None:
    """There: skipping the call at exactly total_step - tfinal raises AttributeError."""
    model = make()
    optimizer = adamw(model)
    for step in range(STEPS):
        one_step(model, optimizer)  # with zero_grad: importance was taken at the step, not at the call
        if step + offset != STEPS - 4:
            model.update_and_allocate(step + offset)
    assert adalora.allocator(model).manual
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))
    assert sum(t.rank for t in adalora.allocator(model).triplets) == 2 * len(adalora.ranks(model))


@pytest.mark.compatibility("PEFT's AdaLoRA", "`update_and_allocate(step)` of the model or of `base_model`")
def test_allocating_by_hand_with_the_hooks_numbers_is_the_same() -> None:
    by_hand, by_itself = make(), make()
    for model in (by_hand, by_itself):
        optimizer = adamw(model)
        for step in range(1, STEPS + 1):
            one_step(model, optimizer)
            if model is by_hand:
                model.base_model.update_and_allocate(step)
    assert adalora.ranks(by_hand) == adalora.ranks(by_itself)
    ours, theirs = get_peft_model_state_dict(by_hand), get_peft_model_state_dict(by_itself)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_allocating_before_any_step_is_a_clear_error() -> None:
    with pytest.raises(StateError, match="before any optimizer step"):
        make().update_and_allocate(1)


@pytest.mark.compatibility("PEFT's own methods", "`print_trainable_parameters`")
def test_trainable_parameters_are_counted_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """There: init_r to the end."""
    model = make()
    optimizer = adamw(model)
    model.print_trainable_parameters()
    for _ in range(STEPS):
        one_step(model, optimizer)
    model.print_trainable_parameters()
    first, last = (int(line.split()[2].replace(",", "")) for line in capsys.readouterr().out.splitlines())
    head = sum(w.numel() for n, w in model.named_parameters() if w.requires_grad and "lora_" not in n)
    assert last - head < 0.7 * (first - head)


def test_adapter_names_that_begin_alike() -> None:
    """There: a trainable ``default`` beside a frozen ``default_2`` is a TypeError."""
    model = make()
    settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query"], "total_step": STEPS}
    model.add_adapter("default_2", AdaLoraConfig(target_r=1, init_r=2, **settings))
    optimizer = adamw(model)
    for _ in range(STEPS):
        one_step(model, optimizer)
    assert adalora.allocator(model, "default").step == STEPS
    assert adalora.allocator(model, "default_2").step == 0


@pytest.mark.compatibility("Saving, loading, resuming", "`copy.deepcopy`, `torch.save` of a whole model")
def test_a_whole_model_can_be_pickled_and_goes_on_allocating() -> None:
    model = make()
    one_step(model, adamw(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again: nn.Module = torch.load(buffer, weights_only=False)
    optimizer = adamw(again)
    for _ in range(STEPS - 1):
        one_step(again, optimizer)
    assert adalora.allocator(again).live == 2 * len(adalora.ranks(again))


@pytest.mark.compatibility("Optimizers and precision", "Gradient checkpointing, reentrant and not")
def test_gradient_checkpointing() -> None:
    """There, with DDP: parameters "marked ready twice", as the regulariser is a second use of them in the graph."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        base = bert()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(2)
        config = AdaLoraConfig(
            task_type="SEQ_CLS", target_modules="all-linear", target_r=2, init_r=4, total_step=STEPS, tinit=1, tfinal=3
        )
        model = adalora.get_peft_model(base, config)
        optimizer = adamw(model)
        for _ in range(STEPS):
            one_step(model, optimizer)
        results.append((adalora.ranks(model), model(**batch("SEQ_CLS")).loss.item()))
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.compatibility("PEFT's AdaLoRA", "`update_and_allocate` after `zero_grad` of either kind")
def test_allocating_after_zero_grad_is_allocating_before_it(set_to_none: bool) -> None:
    """There: every rank pruned to 0, or a TypeError. The importance is taken before the optimizer's step."""
    lived = []
    for after in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = adamw(model)
        for step in range(1, STEPS + 1):
            model(**batch("SEQ_CLS", step)).loss.backward()
            optimizer.step()
            if after:
                optimizer.zero_grad(set_to_none=set_to_none)
            model.update_and_allocate(step)
            optimizer.zero_grad(set_to_none=set_to_none)
        lived.append(adalora.ranks(model))
    assert lived[0] == lived[1] and sum(lived[0].values()) == adalora.allocator(model).target_budget


def test_without_a_task_type_the_regulariser_acts_all_the_same() -> None:
    """There: skipped without a word when ``task_type`` is None, or when the loss is computed from the logits."""
    trained = []
    for task_type, from_logits in (("SEQ_CLS", False), (None, False), (None, True)):
        torch.manual_seed(0)
        base = bert()
        torch.manual_seed(1)
        model = adalora.get_peft_model(
            base,
            AdaLoraConfig(
                task_type=task_type, target_modules=["query"], target_r=2, init_r=4, total_step=STEPS, tinit=1,
                tfinal=3, orth_reg_weight=5.0, initialization="gaussian", modules_to_save=["classifier"],
            ),
        )  # fmt: skip
        optimizer = torch.optim.SGD([t for t in model.parameters() if t.requires_grad], 1e-2)
        for step in range(1, STEPS + 1):
            rows = batch("SEQ_CLS", step)
            if from_logits:
                labels = rows.pop("labels")
                loss = nn.functional.cross_entropy(model(**rows).logits, labels)
            else:
                loss = model(**rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(
            torch.cat([w.detach().flatten() for t in adalora.allocator(model).triplets for w in t.parameters])
        )
        errors = adalora.allocator(model).orthogonality_error()
        assert errors < 1.5, "it was 2 at the start, and nothing else brings it down"
    torch.testing.assert_close(trained[1], trained[0])
    torch.testing.assert_close(trained[2], trained[0])
