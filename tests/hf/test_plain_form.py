"""``load_state_dict`` of the same adapter as plain LoRA, as trainers do that rebuild a model from its checkpoint: taken
over whole, or refused before anything is copied."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adalora
from adalora import AdaLoraConfig, StateError

# PEFT takes the bias of a lora_B for a part of a sharded model.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'.*tensor.*have invalid shape.*lora_B.bias")
INPUTS = torch.arange(20).view(2, 10)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.line = nn.Conv1d(12, 8, 3, padding=1)
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 24)
        self.narrow = nn.Linear(24, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.line(self.words(x).mT).mT.tanh()
        hidden = hidden + self.look(hidden, hidden, hidden)[0]
        result: torch.Tensor = self.head(self.narrow(self.wide(hidden).tanh()).tanh())
        return result


VARIANTS: dict[str, dict[str, Any]] = {
    "all kinds of layers": {"target_modules": ["words", "line", "look", "wide", "narrow"]},
    "DoRA": {"target_modules": ["wide", "narrow"], "use_dora": True},
    "a bias of B": {"target_modules": ["wide", "narrow"], "lora_bias": True},
    "a head": {"target_modules": ["words", "wide", "narrow"], "modules_to_save": ["head"]},
}


def adapted(base: nn.Module, live: int, **settings: Any) -> peft.PeftModel:
    """Trained so far that layers in turn have ``live`` triplets, one, or none."""
    config = AdaLoraConfig(target_r=2, init_r=3, lora_alpha=6, total_step=20, **settings)
    model = adalora.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for index, part in enumerate(adalora.allocator(model).triplets):
            count = (live, 0, 1)[index % 3]
            part.lam[:count], part.lam[count:] = torch.randn(count), 0
        for name, weight in model.named_parameters():
            if "modules_to_save" in name or "lora_B.default.bias" in name:
                weight.add_(torch.randn_like(weight))
    return model


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within a module of a trainer's"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.compatibility("Saving, loading, resuming", "`load_state_dict` of the adapter as plain LoRA")
def test_the_plain_form_is_taken_over_whole(variant: str, wrapped: bool, tmp_path: Path) -> None:
    base = Mixed().eval()
    best = adapted(base, 3, **VARIANTS[variant]).eval()
    best.save_pretrained(str(tmp_path))
    plain: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model: Any = adapted(base, 2, **VARIANTS[variant]).eval()
    assert (model(INPUTS) - best(INPUTS)).abs().max() > 1e-2
    into, of = (nn.Sequential(nn.Identity(), model), nn.Sequential(nn.Identity(), plain)) if wrapped else (model, plain)
    found = into.load_state_dict(of.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    torch.testing.assert_close(model(INPUTS), best(INPUTS), rtol=0, atol=1e-5)  # another order of the same products
    live = {part.name: int((part.lam != 0).sum()) for part in adalora.allocator(best).triplets}
    assert adalora.ranks(model) == live and 0 in live.values()
    torch.testing.assert_close(copy.deepcopy(model)(INPUTS), model(INPUTS))
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())  # its own form goes by itself
    torch.testing.assert_close(again(INPUTS), model(INPUTS))


def _stray(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.head.lora_A.default.weight"] = torch.zeros(2, 6)


def _other_shape(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.narrow.lora_B.default.weight"] = torch.zeros(7, 1)


def _half(state: dict[str, torch.Tensor]) -> None:
    del state["base_model.model.narrow.lora_B.default.weight"]


def _both(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.narrow.lora_A.default.right_vectors"] = torch.zeros(1, 24)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_stray, r"head, which it adapts, is not adapted here"),
        (_other_shape, r"narrow has A \[1, 24\] and B \[7, 1\], which do not fit \[r, 24\] and \[6, r\]"),
        (_half, r"narrow has A \[1, 24\] and B None"),
        (_both, r"narrow is there as P, Λ and Q beside it"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_copied(change: Any, words: str, tmp_path: Path) -> None:
    base, settings = Mixed(), {"target_modules": ["words", "wide", "narrow"]}
    adapted(base, 3, **settings).save_pretrained(str(tmp_path))
    state = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).state_dict()
    change(state)
    model = adapted(base, 2, **settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StateError, match=f"nothing of it was copied: {words}"):
        model.load_state_dict(state, strict=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
