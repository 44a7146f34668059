"""Weights that change past the allocator: optimizers over copies of the parameters, and averages of weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import adalora
from adalora import StateError

from .models import batch
from .test_loops import STEPS, adamw, make

UNSEEN = "no optimizer step of its parameters was seen"
BROUGHT_BACK = "are not 0 any more"


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [w for w in model.parameters() if w.requires_grad]


def train(model: nn.Module, after: Callable[[int], None] = lambda step: None, steps: int = STEPS) -> None:
    optimizer = adamw(model)
    for step in range(steps):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def train_copies(model: nn.Module, by_hand: bool = False) -> None:
    ours, own = adalora.allocator(model), trained(model)
    copies = [w.detach().clone() for w in own]
    optimizer = torch.optim.AdamW(copies, lr=1e-2)
    for step in range(STEPS):
        model(**batch("SEQ_CLS", step)).loss.backward()
        if by_hand:
            ours.before_step()
        for w, c in zip(own, copies, strict=True):
            c.grad, w.grad = w.grad, None
        optimizer.step()
        with torch.no_grad():
            for w, c in zip(own, copies, strict=True):
                w.copy_(c)
            if by_hand:
                ours.after_step()
                for w, c in zip(own, copies, strict=True):
                    c.copy_(w)


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved_triplets(model: nn.Module, directory: Path) -> int:
    model.save_pretrained(str(directory))  # type: ignore[operator]
    tensors = load_file(directory / "adapter_model.safetensors")
    return sum(len(value) for key, value in tensors.items() if "lora_A" in key)


SAVES: dict[str, Callable[[Any, Path], object]] = {
    "save_pretrained": lambda model, directory: model.save_pretrained(str(directory)),
    "get_peft_model_state_dict": lambda model, _: get_peft_model_state_dict(model),
    "export_lora": adalora.export_lora,
    "save_state": adalora.save_state,
}


@pytest.mark.parametrize("save", SAVES)
def test_the_first_save_tells_of_a_training_that_was_not_seen(save: str, tmp_path: Path) -> None:
    model = make()
    train_copies(model)
    with pytest.warns(UserWarning, match=UNSEEN):
        SAVES[save](model, tmp_path)
    with silence():  # once
        SAVES[save](model, tmp_path)


def test_a_loaded_adapter_that_is_then_trained_unseen(tmp_path: Path) -> None:
    model, other = make(), make()
    train(model)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    with silence():
        other.save_pretrained(str(tmp_path))  # type: ignore[operator]
    train_copies(other)
    with pytest.warns(UserWarning, match=UNSEEN):
        other.save_pretrained(str(tmp_path))  # type: ignore[operator]


def resumed(tmp_path: Path) -> nn.Module:
    model, other = make(), make()
    train(model, steps=5)
    adalora.save_state(model, tmp_path)
    adalora.load_state(other, tmp_path)
    return other


def copied_by_torch(_: Path) -> nn.Module:
    model, other = make(), make()
    train(model)
    other.load_state_dict(model.state_dict())
    return other


def by_hand(_: Path) -> nn.Module:
    model: Any = make()
    optimizer = adamw(model)
    for step in range(STEPS):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return model  # type: ignore[no-any-return]


def restarted(_: Path) -> nn.Module:
    model = make()
    train(model)
    adalora.allocator(model).restart()
    return model


def cast(_: Path) -> nn.Module:
    return make(init_lora_weights="pissa").to(torch.bfloat16).float()


SEEN: dict[str, Callable[[Path], nn.Module]] = {
    "untrained": lambda _: make(),
    "PiSSA": lambda _: make(init_lora_weights="pissa"),
    "PiSSA, cast": cast,
    "loaded by load_state_dict": copied_by_torch,
    "resumed": resumed,
    "by hand": by_hand,
    "restarted": restarted,
}


@pytest.mark.parametrize("how", SEEN)
def test_what_was_seen_or_never_trained_is_saved_without_a_word(how: str, tmp_path: Path) -> None:
    model = SEEN[how](tmp_path)
    with silence():
        model.save_pretrained(str(tmp_path / "saved"))  # type: ignore[operator]
        adalora.save_state(model, tmp_path / "saved")


def test_a_step_by_hand_reaches_the_budget(tmp_path: Path) -> None:
    """The way that the warning names: to the bit what an optimizer over the parameters does."""
    model, plain = make(compact=False), make(compact=False)
    train_copies(model, by_hand=True)
    train(plain)
    with silence():
        assert saved_triplets(model, tmp_path) == sum(adalora.ranks(plain).values())
    for ours, theirs in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("begins", [0, STEPS - 3])  # before ranks are compacted, and after
def test_an_averaged_model_keeps_to_the_budget(compact: bool, begins: int, tmp_path: Path) -> None:
    model = make(compact=compact)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def update(step: int) -> None:
        if step >= begins:
            average.update_parameters(model)

    train(model, update)
    ranks, module = adalora.ranks(model), average.module
    if compact or begins:
        assert sum(adalora.allocator(module).sizes) == sum(ranks.values()) or not compact
        with silence():
            assert saved_triplets(module, tmp_path) == sum(ranks.values())
    else:
        with pytest.warns(UserWarning, match=BROUGHT_BACK):
            assert saved_triplets(module, tmp_path) == sum(ranks.values())
    before = adalora.allocator(module).triplets[0].lam.clone()
    average.update_parameters(model)
    assert not torch.equal(before, adalora.allocator(module).triplets[0].lam)


def test_an_average_is_sliced_as_its_model_is() -> None:
    """Its surviving triplets are those of an average that was never sliced."""
    models = [make(compact=compact) for compact in (True, False)]
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for model in models]
    last = STEPS - 4  # pruning ends with the step after these: until then the two are one training
    for model, average in zip(models, averages, strict=True):
        train(model, lambda step, a=average, m=model: a.update_parameters(m) if step < last - 1 else None, last)  # type: ignore[misc]
        average.update_parameters(model)
    mask = adalora.allocator(models[1]).mask
    assert adalora.allocator(models[0]).frozen and not bool(mask.all())
    cut, whole = (torch.cat([t.lam for t in adalora.allocator(average.module).triplets]) for average in averages)
    assert torch.equal(cut, whole[mask])


def test_an_average_of_other_ranks_says_so() -> None:
    model = make()
    average = AveragedModel(model)
    train(model)
    adalora.compact(model)  # once more, from other ranks than the average's
    with pytest.raises(StateError, match="make a new average"):
        average.update_parameters(model)


def test_an_average_before_pruning_ends_is_saved_without_a_word(tmp_path: Path) -> None:
    model = make()
    average = AveragedModel(model)
    train(model, lambda _: average.update_parameters(model), steps=5)
    with silence():
        average.module.save_pretrained(str(tmp_path))
        adalora.save_state(average.module, tmp_path)


def test_a_copy_is_no_average() -> None:
    """A snapshot keeps its ranks when the model is compacted, and one that trains has a budget of its own."""
    model = make()
    snapshot, twin = copy.deepcopy(model), copy.deepcopy(model)
    train(model)
    sizes = adalora.allocator(snapshot).sizes
    assert sizes == adalora.allocator(snapshot).initial_ranks
    train(twin)
    assert adalora.ranks(twin) == adalora.ranks(model)


@pytest.mark.filterwarnings("ignore::UserWarning:diffusers")
def test_averaged_weights_that_are_copied_into_the_model(tmp_path: Path) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    model = make(compact=False)
    average = training_utils.EMAModel(trained(model), decay=0.9, use_ema_warmup=False)
    train(model, lambda _: average.step(trained(model)))
    budget = sum(adalora.ranks(model).values())
    average.copy_to(trained(model))
    with pytest.warns(UserWarning, match=BROUGHT_BACK):
        adalora.export_lora(model, tmp_path / "exported")
    with silence():
        assert saved_triplets(model, tmp_path) == budget
    adalora.compact(model)
    assert sum(adalora.allocator(model).sizes) == budget


def test_loraplus_has_all_factors_of_an_embedding_in_one_group() -> None:
    model = make(target_modules=["query", "word_embeddings"])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-4
    )
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    found: dict[str, set[float]] = {}
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name and parameter.requires_grad:
            found.setdefault("embedding", set()).add(rates[id(parameter)])
        elif "query" in name and parameter.requires_grad:
            found.setdefault(name.rpartition(".")[2], set()).add(rates[id(parameter)])
    assert found == {
        "embedding": {5e-4},
        "right_vectors": {1e-3},  # A
        "singular_values": {16e-3},  # what starts at 0, as B does
        "weight": {16e-3},  # P
    }
    model(**batch("SEQ_CLS")).loss.backward()
    optimizer.step()
    assert adalora.allocator(model).step == 1
