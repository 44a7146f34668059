"""What is saved, merged and loaded computes what was in memory, on every architecture and at any step."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError, StateError

from .models import ARCHITECTURES, batch, bert, gpt2, llama, logits

TOLERANCE = 1e-5  # float32 logits of order 1 after a different order of the same products


def config_for(name: str, **settings: Any) -> AdaLoraConfig:
    _, targets, task_type = ARCHITECTURES[name]
    defaults: dict[str, Any] = {
        "task_type": task_type, "target_modules": targets, "target_r": 2, "init_r": 4, "lora_alpha": 16,
        "total_step": 24, "tinit": 2, "tfinal": 8, "deltaT": 3,
    }  # fmt: skip
    if name == "gpt2":
        defaults["fan_in_fan_out"] = True
    return AdaLoraConfig(**{**defaults, **settings})


def train(model: nn.Module, task_type: str, steps: int, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """A plain loop without a single call for AdaLoRA; yields after each step."""
    model.train()
    for step in range(1, steps + 1):
        loss = model(**batch(task_type, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def adamw(model: nn.Module, lr: float = 2e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=lr)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.compatibility(
    "Layers", "BERT, GPT-2, Llama, OPT, T5, BART, DeBERTa-v2: saved, loaded by stock PEFT, merged"
)
def test_saved_and_merged_logits_equal_those_in_memory_at_every_step(name: str, tmp_path: Path) -> None:
    build, _, task_type = ARCHITECTURES[name]
    base = build()
    model = adalora.get_peft_model(copy.deepcopy(base), config_for(name))
    assert torch.equal(logits(model, task_type), logits(base, task_type)), "Λ = 0 must leave the model as it was"
    start = logits(model, task_type)
    for step in train(model, task_type, 24, adamw(model)):
        if step not in (1, 2, 3, 4, 5, 7, 15, 16, 17, 24):  # before, at and between masks; final phase; end
            continue
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / f"{step}")
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), "saving must not change the model"
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{step}")
        assert type(loaded.peft_config["default"]) is peft.LoraConfig
        torch.testing.assert_close(logits(loaded, task_type), logits(model, task_type), rtol=0, atol=TOLERANCE)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits(merged, task_type), logits(model, task_type), rtol=0, atol=TOLERANCE)
    assert (logits(model, task_type) - start).abs().max() > 100 * TOLERANCE, (
        "nothing was learned: the test shows nothing"
    )
    matrices = len(adalora.ranks(model))
    assert sum(adalora.ranks(model).values()) == 2 * matrices
    assert len(set(adalora.ranks(model).values())) > 1


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
    ],
    ids=lambda v: next(iter(v)),
)
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT's, for its own lora_bias
def test_variants_of_lora(name: str, variant: dict[str, Any], tmp_path: Path) -> None:
    build, _, task_type = ARCHITECTURES[name]
    if variant.get("lora_bias") and name == "llama":
        pytest.skip("Llama's linear layers have no bias to merge into")
    if variant.get("init_lora_weights") == "pissa" and name == "gpt2":
        pytest.skip("PEFT's PiSSA does not transpose Conv1D")
    base = build()
    same = {"target_modules": ARCHITECTURES[name][1], "task_type": task_type, "fan_in_fan_out": name == "gpt2"}
    plain = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=16, **same, **variant))
    torch.manual_seed(3)
    model = adalora.get_peft_model(copy.deepcopy(base), config_for(name, **variant))
    torch.testing.assert_close(logits(model, task_type), logits(plain, task_type), rtol=0, atol=TOLERANCE)
    for step in train(model, task_type, 24, adamw(model)):
        if step in (5, 12, 24):
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(logits(merged, task_type), logits(model, task_type), rtol=0, atol=TOLERANCE)
    if variant.get("init_lora_weights") != "pissa":  # PiSSA changes the base weights: it is loaded onto those
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(logits(loaded, task_type), logits(model, task_type), rtol=0, atol=TOLERANCE)
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT's, for its own lora_bias
def test_a_trained_bias_of_b_comes_back_into_a_live_adapter() -> None:
    """It is saved with the scale in it, like A."""
    base = bert()
    models = [adalora.get_peft_model(copy.deepcopy(base), config_for("bert", lora_bias=True)) for _ in range(2)]
    with torch.no_grad():
        for name, w in models[0].named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                w.normal_()
    layer = next(m for m in models[0].modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    assert layer.scaling["default"] != 1
    peft.set_peft_model_state_dict(models[1], peft.get_peft_model_state_dict(models[0]))
    torch.testing.assert_close(logits(models[1], "SEQ_CLS"), logits(models[0], "SEQ_CLS"), rtol=0, atol=TOLERANCE)


@pytest.mark.compatibility("PEFT's own methods", "`peft.get_peft_model`")
def test_stock_get_peft_model_gives_the_same_model() -> None:
    base = bert()
    models = []
    for make in (adalora.get_peft_model, peft.get_peft_model):
        torch.manual_seed(0)
        models.append(make(copy.deepcopy(base), config_for("bert")))
    ours, stock = models
    assert type(ours) is type(stock)
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    theirs = stock.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
    for model in models:
        for _ in train(model, "SEQ_CLS", 24, adamw(model)):
            pass
    assert adalora.ranks(ours) == adalora.ranks(stock)
    torch.testing.assert_close(logits(ours, "SEQ_CLS"), logits(stock, "SEQ_CLS"), rtol=0, atol=0)


@pytest.mark.compatibility("Several adapters", "`add_adapter`, `inject_adapter_in_model`, Transformers' `add_adapter`")
def test_every_way_peft_adds_an_adapter_is_upgraded() -> None:
    """Also add_adapter on layers that carry LoRA already, inject_adapter_in_model, Transformers' add_adapter."""
    second = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    second.add_adapter("budgeted", config_for("bert", target_modules=["query", "value"]))
    second.set_adapter("budgeted")
    injected = peft.inject_adapter_in_model(config_for("bert", target_modules=["query", "value"]), bert(), "budgeted")
    native = bert()
    native.add_adapter(config_for("bert", target_modules=["query", "value"]), "budgeted")
    for model in (second, injected, native):
        assert len(adalora.ranks(model, "budgeted")) == 4
        for _ in train(model, "SEQ_CLS", 24, adamw(model)):
            pass
        assert adalora.allocator(model, "budgeted").step == 24
        assert sum(adalora.ranks(model, "budgeted").values()) == 8


def test_plain_lora_is_left_alone() -> None:
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith("lora_A.default"))
    with pytest.raises(StateError, match="has no AdaLoRA adapter"):
        adalora.ranks(model)


@pytest.mark.compatibility("Serving", "stock PEFT in a process without adalora")
def test_a_process_without_adalora_loads_the_adapter(tmp_path: Path) -> None:
    """What a server does: stock PEFT, no import of this library, the logits of the model that was trained."""
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model = adalora.get_peft_model(copy.deepcopy(base), config_for("bert"))
    for _ in train(model, "SEQ_CLS", 20, adamw(model)):
        pass
    adalora.export_lora(model, tmp_path / "adapter")
    save_file({**batch("SEQ_CLS", 7), "logits": logits(model, "SEQ_CLS", 7)}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
root = sys.argv[1]
base = AutoModelForSequenceClassification.from_pretrained(root + "/base")
model = PeftModel.from_pretrained(base, root + "/adapter").eval()
expected = load_file(root + "/expected.safetensors")
wanted = expected.pop("logits")
with torch.no_grad():
    served = (model(**expected).logits - wanted).abs().max().item()
    merged = (model.merge_and_unload()(**expected).logits - wanted).abs().max().item()
assert not any(name.split(".")[0] == "adalora" for name in sys.modules)
print(served, merged)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    served, merged = map(float, done.stdout.split()[-2:])
    assert served < TOLERANCE
    assert merged < TOLERANCE


def test_the_exported_configuration_makes_the_scale_one(tmp_path: Path) -> None:
    model = adalora.get_peft_model(bert(), config_for("bert", use_rslora=True))
    for _ in train(model, "SEQ_CLS", 24, adamw(model)):
        pass
    adalora.export_lora(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: rank for name, rank in adalora.ranks(model).items() if rank}
    assert saved["peft_type"] == "LORA"
    assert saved["r"] == saved["lora_alpha"] == max(ranks.values())
    assert saved["rank_pattern"] == saved["alpha_pattern"] == ranks
    assert not saved["use_rslora"]
    assert set(saved) <= set(peft.LoraConfig().to_dict()), "no key that stock PEFT does not know"
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, rank in ranks.items():
        assert weights[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "temporary files are left"
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "a server under another user reads both files or none"


@pytest.mark.compatibility("Saving, loading, resuming", "layers of rank 0")
def test_a_layer_of_rank_zero_is_left_out_and_loads(tmp_path: Path) -> None:
    base = bert()
    model = adalora.get_peft_model(copy.deepcopy(base), config_for("bert"))
    allocator = adalora.allocator(model)
    for step in train(model, "SEQ_CLS", 24, adamw(model)):
        if step == 10:  # a matrix whose triplets never matter
            dead = allocator.triplets[0]
            dead.p.requires_grad_(False).zero_()
            dead.q.requires_grad_(False).zero_()
            dead.lam.data.zero_()  # (frozen, it would stand outside the budget)
    assert adalora.ranks(model)[dead.name] == 0
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if dead.name in key]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)


def test_an_untrained_adapter_saves_and_loads_at_its_full_rank(tmp_path: Path) -> None:
    base = bert()
    adalora.get_peft_model(copy.deepcopy(base), config_for("bert")).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].r == 4
    assert torch.equal(logits(loaded, "SEQ_CLS"), logits(base, "SEQ_CLS"))
    for _ in train(loaded, "SEQ_CLS", 3, adamw(loaded)):  # as plain LoRA, it can still learn
        pass
    assert all(layer.lora_A["default"].weight.any() for layer in loaded.modules() if hasattr(layer, "lora_A"))


@pytest.mark.compatibility("Saving, loading, resuming", "`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def test_state_dict_round_trip_through_peft(tmp_path: Path) -> None:
    """get_peft_model_state_dict is plain LoRA; set_peft_model_state_dict reads it back, at any rank."""
    model = adalora.get_peft_model(bert(), config_for("bert"))
    fresh = copy.deepcopy(model)
    for step in train(model, "SEQ_CLS", 24, adamw(model)):
        if step in (4, 24):
            plain = peft.get_peft_model_state_dict(model)
            assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) or "classifier" in key for key in plain)
            result = peft.set_peft_model_state_dict(fresh, plain)
            assert not result.unexpected_keys
            torch.testing.assert_close(logits(fresh, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
            for key, value in peft.get_peft_model_state_dict(fresh).items():
                torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-7)
    full = bert()
    resumed = adalora.get_peft_model(full, config_for("bert"))
    resumed.load_state_dict(model.state_dict())  # torch's own way, with compacted shapes
    torch.testing.assert_close(logits(resumed, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=0)


def test_weights_loaded_without_their_training_state_warn() -> None:
    model, trained = (adalora.get_peft_model(bert(), config_for("bert")) for _ in range(2))
    for _ in train(trained, "SEQ_CLS", 2, adamw(trained)):
        pass
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(trained))
    with pytest.warns(UserWarning, match="without their training state"):
        for _ in train(model, "SEQ_CLS", 2, adamw(model)):
            pass


@pytest.mark.compatibility("Saving, loading, resuming", "`copy.deepcopy`, `torch.save` of a whole model")
def test_deep_copies_allocate_on_their_own() -> None:
    model = adalora.get_peft_model(bert(), config_for("bert"))
    twin = copy.deepcopy(model)
    for _ in train(twin, "SEQ_CLS", 24, adamw(twin)):
        pass
    assert adalora.allocator(twin).step == 24
    assert adalora.allocator(model).step == 0
    assert adalora.allocator(model).live == 4 * len(adalora.ranks(model))


def test_compaction_shrinks_parameters_and_optimizer_state() -> None:
    model = adalora.get_peft_model(bert(), config_for("bert"))
    optimizer = adamw(model)

    def trainable() -> int:
        return sum(w.numel() for n, w in model.named_parameters() if w.requires_grad and "lora_" in n)

    full = trainable()
    for step in train(model, "SEQ_CLS", 24, optimizer):
        if step == 15:
            with pytest.raises(StateError, match="pruning goes on until 16"):
                adalora.compact(model)
            assert trainable() == full
    assert trainable() < 0.6 * full
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape


def test_compact_by_hand_after_masks_only() -> None:
    model = adalora.get_peft_model(bert(), config_for("bert", compact=False))
    optimizer = adamw(model)
    for _ in train(model, "SEQ_CLS", 20, optimizer):
        pass
    before = logits(model, "SEQ_CLS")
    assert {t.rank for t in adalora.allocator(model).triplets} == {4}
    adalora.compact(model, optimizer)
    assert sum(t.rank for t in adalora.allocator(model).triplets) == 2 * len(adalora.ranks(model))
    torch.testing.assert_close(logits(model, "SEQ_CLS"), before, rtol=0, atol=1e-6)
    for _ in train(model, "SEQ_CLS", 2, optimizer):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"matches nothing.*attention|matches nothing.*query"),
        ({"init_r": 1}, "init_r=1 is smaller than target_r=2"),
        ({"tinit": 20, "tfinal": 10}, "no step is left for pruning"),
        ({"importance": "sensitvity"}, "importance='sensitvity' is not known"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"singular_gain": 0.0}, "singular_gain=0.0"),
        ({"initialization": "zeros"}, "initialization='zeros'"),
        ({"r": 16}, "r=16 beside target_r=2"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight=-1.0"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"tfinal": "three epochs"}, "tfinal='three epochs'"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters does not go with AdaLoRA"),
        ({"rank_pattern": {"query": 1, "key": 1, "value": 1, "dense": 1}}, "below the target"),
    ],
    ids=str,
)
def test_bad_settings_say_what_to_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adalora.get_peft_model(bert(), config_for("bert", **settings))


@pytest.mark.compatibility("Saving, loading, resuming", "`config.to_dict()` of a live adapter: what a plain LoRA needs")
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "upgrade"])
def test_the_configuration_of_a_live_adapter_is_that_of_a_plain_one(way: str, tmp_path: Path) -> None:
    model = llama()
    budget = AdaLoraConfig(target_modules=["q_proj", "v_proj"], target_r=2, init_r=4, total_step=20)
    if way == "get_peft_model":
        model = adalora.get_peft_model(model, budget)
    elif way == "add_adapter":
        model.add_adapter(budget, "default")
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        adalora.upgrade(model, "default", budget)
    triplets = adalora.allocator(model).triplets
    for live in ([4, 4, 4, 4], [1, 0, 3, 4]):  # as after a step; asked before the state dict, and after it
        with torch.no_grad():
            for part, count in zip(triplets, live, strict=True):
                part.lam[:count], part.lam[count:] = 0.5, 0.0
        config = model.peft_config["default"]
        written = {key: value for key, value in config.to_dict().items() if key != "peft_type"}
        config.save_pretrained(str(tmp_path / "alone"))
        tensors = peft.get_peft_model_state_dict(model)
        assert {key: value for key, value in config.to_dict().items() if key != "peft_type"} == written
        assert peft.LoraConfig.from_pretrained(str(tmp_path / "alone")).rank_pattern == written["rank_pattern"]
        tensors = {f"base_model.model.{key.removeprefix('base_model.model.')}": w for key, w in tensors.items()}
        fresh = peft.get_peft_model(llama(), peft.LoraConfig(**written))
        found = peft.set_peft_model_state_dict(fresh, tensors)
        assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora_" in key]
        layers = [layer for layer in fresh.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
        assert [layer.r["default"] for layer in layers] == [count for count in live if count]
        assert all(layer.scaling["default"] == 1 for layer in layers)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        triplets[0].lam.zero_()
    assert copied.peft_config["default"].to_dict() == {**written, "peft_type": "LORA"}, "of its own model"
    assert len(model.peft_config["default"].to_dict()["exclude_modules"]) == 2
    alone = copy.deepcopy(model.peft_config["default"])
    assert alone.to_dict()["target_r"] == 2, "no adapter is live"
    assert pickle.loads(pickle.dumps(model.peft_config["default"])).target_r == 2


def test_defaults_and_names_of_the_configuration() -> None:
    assert (AdaLoraConfig(r=4).target_r, AdaLoraConfig(r=4).init_r, AdaLoraConfig(r=4).r) == (4, 6, 6)
    assert (AdaLoraConfig(target_r=1).init_r, AdaLoraConfig(target_r=8).init_r) == (2, 12)
    paper = AdaLoraConfig.paper(target_r=4)
    assert (paper.initialization, paper.singular_gain, paper.orthogonality) == ("gaussian", 1.0, "squared")
    assert AdaLoraConfig.paper(target_r=4, orth_reg_weight=0.3).orth_reg_weight == 0.3
    assert isinstance(AdaLoraConfig(), peft.LoraConfig)
    assert AdaLoraConfig().peft_type == peft.PeftType.LORA


def test_configuration_alone_reads_back_as_it_was(tmp_path: Path) -> None:
    config = config_for("bert", tinit="1 epoch")
    config.save_pretrained(str(tmp_path))
    assert AdaLoraConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()


def test_paper_starts_from_gaussian_vectors_and_no_gain() -> None:
    model = adalora.get_peft_model(
        gpt2(), AdaLoraConfig.paper(target_r=8, init_r=16, target_modules=["c_attn"], fan_in_fan_out=True, total_step=9)
    )
    triplets = adalora.allocator(model).triplets[0]
    assert 0.017 < triplets.p.std() < 0.023
    assert triplets.right.gain == 1.0


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    model = adalora.get_peft_model(bert(), config_for("bert"))
    with pytest.raises(StateError, match="does not exist"):
        adalora.load_state(model, tmp_path)
    path = adalora.save_state(model, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="is not an AdaLoRA state"):
        adalora.load_state(model, tmp_path)
    path.write_bytes(whole)
    adalora.load_state(model, tmp_path)
    other = adalora.get_peft_model(bert(), config_for("bert", target_modules=["query"]))
    with pytest.raises(StateError, match="of another model"):
        adalora.load_state(other, tmp_path)
