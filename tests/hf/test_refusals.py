"""What is refused is refused before the model is touched, through every way in, and whatever PEFT rewrites."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError, StateError
from adalora.hf.convert import read_peft_adalora
from adalora.hf.plain import PlainAdapter

from .models import gpt2, llama, mixtral

EXPERTS = ["q_proj", "w1", "w2", "w3"]


def config(targets: Any = EXPERTS, **settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"target_modules": targets, "target_r": 2, "init_r": 4, "total_step": 20, **settings})


def snapshot(model: nn.Module) -> list[Any]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, id(weight), weight.requires_grad) for name, weight in model.named_parameters())]


def add_to_another(model: nn.Module, settings: AdaLoraConfig) -> None:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"]), "other").add_adapter("ours", settings)


WAYS: dict[str, Callable[[nn.Module, AdaLoraConfig], Any]] = {
    "adalora.get_peft_model": adalora.get_peft_model,
    "peft.get_peft_model": peft.get_peft_model,
    "PeftMixedModel": lambda model, settings: peft.get_peft_model(model, settings, mixed=True),
    "inject_adapter_in_model": lambda model, settings: peft.inject_adapter_in_model(settings, model),
    "Transformers' add_adapter": lambda model, settings: model.add_adapter(settings),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compatibility("Layers", "fused experts, by the usual names or `all-linear`", refused=True)
def test_fused_experts_are_refused_by_every_way_in(way: str) -> None:
    model = mixtral()
    before = snapshot(model)
    for targets in (EXPERTS, "all-linear", r".*\.(q_proj|w1|w2|w3)"):
        with pytest.raises(ConfigError, match=r"takes in experts of Mixtral.*fused.*target_modules=\[.*'q_proj'"):
            WAYS[way](model, config(targets))
        assert snapshot(model) == before
    with pytest.raises(ConfigError, match=r"without also targeting w3"):
        WAYS[way](model, config(["q_proj", "w1"]))
    assert snapshot(model) == before
    WAYS[way](model, config(["q_proj"]))  # what it says to write
    assert len(list(adalora.ranks(model))) == 2


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_fused_experts_are_refused_beside_another_adapter_and_in_an_upgrade() -> None:
    model = mixtral()
    with pytest.raises(ConfigError, match="takes in experts"):
        add_to_another(model, config())
    model = peft.get_peft_model(mixtral(), peft.LoraConfig(target_modules=EXPERTS))
    with pytest.raises(ConfigError, match="stays plain LoRA"):
        adalora.upgrade(model, "default", config())
    model.peft_config["default"].target_parameters = None  # a configuration that does not say what it made
    with pytest.raises(ConfigError, match=r"also matched .*of MixtralExperts"):
        adalora.upgrade(model, "default", config())


def test_a_field_that_is_set_later_is_refused_too() -> None:
    settings = config(["q_proj"])
    settings.target_parameters = ["experts.gate_up_proj"]
    model = mixtral()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="target_parameters does not go with AdaLoRA"):
        peft.get_peft_model(model, settings)
    assert snapshot(model) == before


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.line = nn.Conv1d(4, 4, 1, groups=2)
        self.out = nn.Linear(4, 2)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("build", "settings", "words"),
    [
        (Unusual, {"target_modules": ["words", "line", "out"]}, "without groups"),
        (Unusual, {"target_modules": ["words", "out"], "rank_pattern": {"words": 1, "out": 1}}, "below the target"),
        (gpt2, {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}, "ensure_weight_tying"),
        (llama, {"target_modules": ["q"]}, "matches nothing"),
    ],
)
def test_what_is_only_seen_in_the_layers_is_taken_out_again(
    build: Callable[[], nn.Module], settings: dict[str, Any], words: str
) -> None:
    model = build()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=words):
        adalora.get_peft_model(model, config(**{"targets": None, **settings}))
    assert snapshot(model) == before


# --------------------------------------------------------------------------------------------- two layers, one key


def test_two_layers_on_one_key_are_an_error_in_every_writer_and_reader(tmp_path: Path) -> None:
    model = adalora.get_peft_model(llama(), config(["q_proj"]))
    inner = model.base_model.model.model.layers[0].self_attn
    twice = copy.deepcopy(inner.q_proj)
    twice.base_layer = inner.q_proj
    inner.q_proj = twice
    for write in (model.save_pretrained, lambda folder: adalora.export_lora(model, folder)):
        with pytest.raises(StateError, match=r"two layers of 'default' would be saved under one name.*q_proj"):
            write(tmp_path / "out")
    a, b = torch.zeros(2, 4), torch.zeros(4, 2)
    pair = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    doubled = pair | {f"base_model.model.{key}": value for key, value in pair.items()}
    with pytest.raises(ConfigError, match=r"x\.lora_A\.weight twice"):
        PlainAdapter.of(peft.LoraConfig(r=2, target_modules=["x"]), doubled)
    both = pair | {"x.lora_embedding_A": a, "x.lora_embedding_B": b}
    with pytest.raises(ConfigError, match=r"x\.lora_embedding_A twice"):
        PlainAdapter.of(peft.LoraConfig(r=2, target_modules=["x"]), both)
    old = {f"{prefix}x.lora_{part}": a for prefix in ("", "base_model.model.") for part in "ABE"}
    save_file({key: value.clone() for key, value in old.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    with pytest.raises(ConfigError, match="twice"):
        read_peft_adalora(tmp_path)


def test_a_field_that_is_none_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'target_rank': did you mean target_r"):
        AdaLoraConfig(target_rank=2)
    with pytest.raises(TypeError, match="its fields are"):  # by which PEFT knows files of later versions
        AdaLoraConfig(xyzzy=2)
    assert copy.deepcopy(AdaLoraConfig(target_r=2)).target_r == 2
