"""Several adapters in one model: trained, frozen, weighted, mixed in one batch, swapped and deleted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import adalora
from adalora import AdaLoraConfig, AdaLoraError, ConfigError, StateError

from .models import batch, bert, gpt2, logits

STEPS = 12
TOLERANCE = 1e-5  # float32 logits of order 1 after a different order of the same products
AREA = "Several adapters"


def config(**settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "target_r": 2, "init_r": 4,
        "lora_alpha": 16, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": STEPS,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


def second(**settings: Any) -> AdaLoraConfig:
    """Other modules, another budget, another scale, another length than :func:`config`."""
    own = {"target_modules": ["query", "key"], "target_r": 1, "init_r": 3, "lora_alpha": 6, "total_step": 8}
    return config(**{**own, "tinit": 1, "tfinal": 2, **settings})


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in parameters if w.requires_grad], lr=2e-2)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 5, **zero: bool) -> None:
    model.train()
    model(**batch("SEQ_CLS", seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad(**zero)


def train(model: nn.Module, steps: int = STEPS) -> nn.Module:
    optimizer = adamw(model.parameters())
    for step in range(steps):
        one_step(model, optimizer, step)
    return model


def weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {k: w.detach().clone() for k, w in model.named_parameters() if name in k.split(".")}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def exported(base: nn.Module, directory: Path, seed: int = 0, **settings: Any) -> Path:
    """A trained AdaLoRA adapter of ``base`` as a plain LoRA adapter on disk."""
    torch.manual_seed(seed)
    model = train(adalora.get_peft_model(copy.deepcopy(base), config(**settings)))
    return adalora.export_lora(model, directory)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.compatibility(AREA, "two trainable adapters, each with its own budget and schedule, one shared optimizer")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_turns_with_one_shared_optimizer(set_to_none: bool) -> None:
    model = adalora.get_peft_model(bert(), config())
    model.add_adapter("second", second())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)  # of both, whichever is active
    turns = ["default", "second"] * 8 + ["default"] * 4
    for step, name in enumerate(turns):
        model.set_adapter(name)
        one_step(model, optimizer, step, set_to_none=set_to_none)
    assert (adalora.allocator(model, "default").step, adalora.allocator(model, "second").step) == (12, 8)
    assert sum(adalora.ranks(model, "default").values()) == 2 * len(adalora.ranks(model, "default"))
    assert sum(adalora.ranks(model, "second").values()) == len(adalora.ranks(model, "second"))
    assert [a.budget for a in adalora.allocator(model, "second").trace] == sorted(
        (a.budget for a in adalora.allocator(model, "second").trace), reverse=True
    )
    with pytest.raises(StateError, match="several AdaLoRA adapters; name one: default, second"):
        adalora.ranks(model)


@pytest.mark.compatibility(AREA, "two trainable adapters, one optimizer each: as if each were trained alone")
def test_turns_with_an_optimizer_each_equal_training_alone() -> None:
    together = adalora.get_peft_model(bert(), config())
    together.add_adapter("second", second())
    alone = {name: copy.deepcopy(together) for name in ("default", "second")}

    def optimizer_of(model: Any, name: str) -> torch.optim.Optimizer:
        model.set_adapter(name)
        return adamw(model.parameters())

    optimizers = {name: optimizer_of(together, name) for name in alone}
    for step in range(12):
        for name in alone:
            if name == "default" or step < 8:
                together.set_adapter(name)
                one_step(together, optimizers[name], step)
    for name, model in alone.items():
        optimizer = optimizer_of(model, name)
        for step in range(12 if name == "default" else 8):
            one_step(model, optimizer, step)
        assert adalora.ranks(together, name) == adalora.ranks(model, name)
        assert same(weights(together, name), weights(model, name))


@pytest.mark.compatibility(AREA, "two adapters active at the same time, both trained and both allocated")
def test_both_active_at_once(tmp_path: Path) -> None:
    base = bert()
    model = adalora.get_peft_model(copy.deepcopy(base), config(task_type=None))  # PEFT: one classifier at a time
    model.add_adapter("second", second(task_type=None, total_step=STEPS))
    model.base_model.set_adapter(["default", "second"])
    train(model)
    assert {adalora.allocator(model, name).step for name in ("default", "second")} == {STEPS}
    assert adalora.allocator(model, "second").live == len(adalora.ranks(model, "second"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)


@pytest.mark.compatibility(AREA, "a frozen adapter (`inference_mode=True`) beside a trainable one")
def test_frozen_beside_trainable() -> None:
    model = adalora.get_peft_model(bert(), config())
    model.add_adapter("default_2", second(inference_mode=True))
    frozen = weights(model, "default_2")
    train(model)
    assert same(frozen, weights(model, "default_2"))
    assert adalora.allocator(model, "default").step == STEPS
    assert adalora.allocator(model, "default_2").step == 0
    assert adalora.allocator(model, "default").live == 2 * len(adalora.ranks(model, "default"))


@pytest.mark.parametrize(
    "name",
    ["default_2", "Übung 2", "query", "right_vectors", "singular_values"],
)
@pytest.mark.compatibility(AREA, "any adapter name: with spaces, not ASCII, the name of a module or of a parameter")
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
def test_any_name(name: str, tmp_path: Path) -> None:
    base = bert()
    model = adalora.get_peft_model(copy.deepcopy(base), config(), adapter_name=name)
    model.add_adapter("default", second())
    train(model)
    assert adalora.allocator(model, name).live == 2 * len(adalora.ranks(model, name))
    model.save_pretrained(tmp_path, selected_adapters=[name])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, adapter_name="other")
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)


@pytest.mark.compatibility(AREA, "an adapter name with a dot (PEFT's own rule)", refused=True)
def test_a_dot_in_a_name_is_refused() -> None:
    with pytest.raises((KeyError, ValueError), match=r"module name can.*t contain"):
        adalora.get_peft_model(bert(), config(), adapter_name="v1.0")


@pytest.mark.compatibility(AREA, "AdaLoRA beside plain LoRA in one model")
def test_beside_plain_lora(tmp_path: Path) -> None:
    base = bert()
    plain = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), plain, adapter_name="plain")
    model.add_adapter("budgeted", config())
    untouched = weights(model, "plain")
    model.set_adapter("budgeted")
    train(model)
    assert same(untouched, weights(model, "plain"))
    assert type(model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.plain")) is (
        nn.Linear
    )
    model.save_pretrained(tmp_path)
    for name in ("plain", "budgeted"):
        model.set_adapter(name)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    model.set_adapter("plain")
    train(model, 2)
    assert adalora.allocator(model, "budgeted").step == STEPS
    with pytest.raises(StateError, match="no active adapter is AdaLoRA's"):
        model.update_and_allocate(3)


@pytest.mark.compatibility(AREA, "`update_and_allocate` allocates the active adapters and no other")
def test_allocating_by_hand_is_for_the_active_adapters() -> None:
    model = adalora.get_peft_model(bert(), config())
    model.add_adapter("second", second())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(1, 9):
        for name in ("default", "second"):
            model.set_adapter(name)
            one_step(model, optimizer, step)
            if name == "second":
                model.update_and_allocate(step)
    assert adalora.allocator(model, "second").manual
    assert not adalora.allocator(model, "default").manual
    assert adalora.allocator(model, "second").live == len(adalora.ranks(model, "second"))
    assert adalora.allocator(model, "default").step == 8


# -------------------------------------------------------------------------------- choosing, disabling, deleting


@pytest.mark.compatibility(AREA, "`set_adapter`, `disable_adapter`")
def test_switching_and_disabling() -> None:
    base = bert()
    model = adalora.get_peft_model(copy.deepcopy(base), config(task_type=None))
    model.add_adapter("second", second(task_type=None))
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        train(model, 8)
        outputs[name] = logits(model, "SEQ_CLS")
        with model.disable_adapter():
            assert torch.equal(logits(model, "SEQ_CLS"), logits(base, "SEQ_CLS"))
            assert not any(w.requires_grad for k, w in model.named_parameters() if "lora_" in k)
        trained = {k for k, w in model.named_parameters() if w.requires_grad}
        assert trained
        assert all(name in k.split(".") for k in trained)
    assert (outputs["default"] - outputs["second"]).abs().max() > 10 * TOLERANCE
    for name in ("default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, "SEQ_CLS"), outputs[name])


@pytest.mark.compatibility(AREA, "`delete_adapter`: the other goes on, nothing of the deleted one stays")
@pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted")
def test_deleting() -> None:
    model = adalora.get_peft_model(bert(), config())
    model.add_adapter("second", second())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)  # goes on holding the deleted parameters
    for name in ("default", "second"):
        model.set_adapter(name)
        for step in range(3):
            one_step(model, optimizer, step)
    gone = weakref.ref(adalora.allocator(model, "second"))
    model.delete_adapter("second")
    gc.collect()
    assert gone() is None
    assert list(model.peft_config) == ["default"]
    assert not weights(model, "second")
    model.set_adapter("default")
    for step in range(STEPS - 3):
        one_step(model, optimizer, step)
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))
    model.add_adapter("second", config(target_modules=["key"]))  # the name is free again
    assert set(adalora.ranks(model, "second").values()) == {4}


@pytest.mark.compatibility(AREA, "`load_adapter` of a saved adapter, `is_trainable` or not, beside one in training")
@pytest.mark.parametrize("is_trainable", [True, False])
def test_loading_beside_one_in_training(is_trainable: bool, tmp_path: Path) -> None:
    base = bert()
    exported(base, tmp_path, seed=1)
    alone = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = adalora.get_peft_model(copy.deepcopy(base), config())
    model.load_adapter(tmp_path, "loaded", is_trainable=is_trainable)
    assert type(model.peft_config["loaded"]) is peft.LoraConfig
    assert model.peft_config["loaded"].inference_mode is not is_trainable
    train(model)
    assert adalora.allocator(model).step == STEPS
    model.set_adapter("loaded", inference_mode=not is_trainable)
    torch.testing.assert_close(logits(model, "SEQ_CLS"), logits(alone, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    assert any(w.requires_grad for w in model.parameters()) is is_trainable


# ------------------------------------------------------------------------------------------------ weighted adapters

FLAT = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def delta(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {
        key: module.get_delta_weight(name).detach()
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_A
    }


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(kind, marks=pytest.mark.compatibility(AREA, "`add_weighted_adapter` of exported adapters: " + how))
        for kinds, how in (
            (("svd", "cat"), "`svd`, `cat` (exact), any ranks"),
            (FLAT, "`linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`, exported with `pad=True`"),
            (BY_SVD[1:], "`ties_svd`, `dare_*_svd`, `magnitude_prune_svd`, any ranks"),
        )
        for kind in kinds
    ],
)
def test_weighted(combination: str, tmp_path: Path) -> None:
    base = bert()
    for seed, name in enumerate(("default", "second"), start=1):
        torch.manual_seed(seed)
        trained = train(adalora.get_peft_model(copy.deepcopy(base), config(task_type=None)))
        ranks = adalora.ranks(trained)
        assert len(set(ranks.values())) > 1, "one rank everywhere: the test shows less than it says"
        adalora.export_lora(trained, tmp_path / name, pad=combination in FLAT)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "default")
    model.load_adapter(tmp_path / "second", "second")
    if combination in FLAT and len({c.r for c in model.peft_config.values()}) > 1:
        pytest.fail("the seeds were chosen so that both have the same largest rank")
    options: dict[str, Any] = {} if combination in ("svd", "cat", "linear") else {"density": 0.7}
    if combination == "svd":
        options["svd_rank"] = sum(c.r for c in model.peft_config.values())  # enough for the sum of both
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type=combination, **options)
    parts, both = [delta(model, name) for name in ("default", "second")], delta(model, "both")
    wanted = {key: 0.7 * parts[0].get(key, torch.zeros(())) - 0.4 * parts[1].get(key, torch.zeros(())) for key in both}
    if combination in ("svd", "cat"):
        for key, value in both.items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=TOLERANCE)
    assert all(value.isfinite().all() for value in both.values())
    model.set_adapter("both")
    assert (logits(model, "SEQ_CLS") - logits(base, "SEQ_CLS")).abs().max() > 10 * TOLERANCE


@pytest.mark.compatibility(AREA, "`add_weighted_adapter` by `linear` when the ranks of a layer differ", refused=True)
def test_weighting_unequal_ranks_flatly_says_what_to_do(tmp_path: Path) -> None:
    base = bert()
    for seed, name in ((1, "default"), (2, "second")):
        exported(base, tmp_path / name, seed=seed, task_type=None)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "default")
    model.load_adapter(tmp_path / "second", "second")
    names = list(model.peft_config)
    with pytest.raises((ConfigError, ValueError), match=r"same r|same rank|ranks? of .* differ"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    assert list(model.peft_config) == names, "a refused call must leave nothing behind"


@pytest.mark.compatibility(AREA, "`add_weighted_adapter` of adapters still in training", refused=True)
def test_weighting_live_adapters_says_to_export_first() -> None:
    model = adalora.get_peft_model(bert(), config(task_type=None))
    model.add_adapter("second", second(task_type=None))
    with pytest.raises(ConfigError, match=r"default, second is still AdaLoRA's.*export_lora"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="svd")
    assert list(model.peft_config) == ["default", "second"]
    train(model)
    assert adalora.allocator(model, "default").live == 2 * len(adalora.ranks(model, "default"))


# ---------------------------------------------------------------------------- Transformers, injection, PeftMixedModel


@pytest.mark.compatibility(
    AREA,
    "Transformers: `model.add_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters`, `active_adapters`,"
    " `get_adapter_state_dict`, `save_pretrained`, `load_adapter`, `delete_adapter`",
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_transformers_own_methods(tmp_path: Path) -> None:
    base = bert()
    model = copy.deepcopy(base)
    model.add_adapter(config(), "first")
    model.add_adapter(second(), "second")
    for name, steps in (("first", STEPS), ("second", 8)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        train(model, steps)
        assert adalora.allocator(model, name).step == steps
    assert adalora.allocator(model, "second").live == len(adalora.ranks(model, "second"))
    model.disable_adapters()
    assert torch.equal(logits(model, "SEQ_CLS"), logits(base, "SEQ_CLS"))
    model.enable_adapters()
    state = model.get_adapter_state_dict("second")
    assert state
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    for name in ("first", "second"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        fresh = copy.deepcopy(base)
        fresh.load_adapter(str(tmp_path / name), name)
        torch.testing.assert_close(logits(fresh, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    with_both = logits(model, "SEQ_CLS")
    model.delete_adapter("first")
    assert torch.equal(logits(model, "SEQ_CLS"), with_both)
    with pytest.raises(StateError, match="no AdaLoRA adapter 'first'"):
        adalora.ranks(model, "first")


@pytest.mark.compatibility(AREA, "`peft.inject_adapter_in_model`, twice, into a bare model")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_injection() -> None:
    base = bert()
    model = peft.inject_adapter_in_model(config(), copy.deepcopy(base), "first")
    model = peft.inject_adapter_in_model(second(), model, "second")
    assert type(model) is type(base)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_adapter([name for name in ("first", "second") if name in layer.lora_A])
    train(model)
    for name, budget in (("first", 2), ("second", 1)):
        assert adalora.allocator(model, name).live == budget * len(adalora.ranks(model, name))
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        fresh = peft.inject_adapter_in_model(config() if name == "first" else second(), copy.deepcopy(base), name)
        assert not peft.set_peft_model_state_dict(fresh, state, adapter_name=name).unexpected_keys
        again = peft.get_peft_model_state_dict(fresh, adapter_name=name)
        for key, value in state.items():
            torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.compatibility(AREA, "`PeftMixedModel`: AdaLoRA together with LoHa")
def test_a_mixed_model(tmp_path: Path) -> None:
    base = bert()
    model = peft.get_peft_model(copy.deepcopy(base), config(), mixed=True)
    model.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["query"], init_weights=False))
    model.set_adapter(["default", "loha"])
    train(model)
    assert adalora.allocator(model).step == STEPS
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))
    adalora.export_lora(model, tmp_path)
    again = peft.PeftMixedModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model.set_adapter("default")
    torch.testing.assert_close(logits(again, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------- serving several at once


def both(tmp_path: Path, live: bool) -> tuple[nn.Module, Any]:
    """GPT-2 with two adapters, of which the second leaves some modules alone."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    configs = (config(target_modules=["c_attn", "c_fc"], **settings), second(target_modules=["c_attn"], **settings))
    base = gpt2()
    model = adalora.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="first")
    model.add_adapter("second", configs[1])
    for name, steps in (("first", 12), ("second", 8)):
        model.set_adapter(name)
        optimizer = adamw(model.parameters())
        for step in range(steps):
            model.train()
            model(**batch("CAUSAL_LM", step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if live:
        return base, model.eval()
    model.save_pretrained(tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", adapter_name="first")
    served.load_adapter(tmp_path / "second", "second")
    return base, served.eval()


@pytest.mark.parametrize(
    "live",
    [
        pytest.param(True, marks=pytest.mark.compatibility(AREA, "mixed batches (`adapter_names=`) of live adapters")),
        pytest.param(False, marks=pytest.mark.compatibility(AREA, "mixed batches (`adapter_names=`) of exported ones")),
    ],
)
def test_mixed_batches(live: bool, tmp_path: Path) -> None:
    base, model = both(tmp_path, live)
    rows = {key: value[:6] for key, value in batch("CAUSAL_LM", 3).items() if key != "labels"}
    names = ["first", "__base__", "second", "second", "first", "__base__"]
    with torch.no_grad():
        mixed = model(**rows, adapter_names=names).logits
        generated = model.generate(**rows, adapter_names=names, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for name in set(names):
            mine = [i for i, wanted in enumerate(names) if wanted == name]
            picked = {key: value[mine] for key, value in rows.items()}
            alone: Any = base.eval()
            if name != "__base__":
                model.set_adapter(name)
                alone = model
            torch.testing.assert_close(mixed[mine], alone(**picked).logits, rtol=0, atol=TOLERANCE)
            text = alone.generate(**picked, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert torch.equal(generated[mine], text)


@pytest.mark.parametrize(
    "prepared",
    [
        pytest.param(False, marks=pytest.mark.compatibility(AREA, "hotswap of other ranks, exported with `pad=True`")),
        pytest.param(
            True,
            marks=pytest.mark.compatibility(AREA, "hotswap after `prepare_model_for_compiled_hotswap(target_rank=)`"),
        ),
    ],
)
def test_hotswap(prepared: bool, tmp_path: Path) -> None:
    base = bert()
    wanted = {}
    for seed, (name, settings) in enumerate({"one": {}, "two": {"target_r": 1, "lora_alpha": 4}}.items()):
        torch.manual_seed(seed)
        trained = train(adalora.get_peft_model(copy.deepcopy(base), config(task_type=None, **settings)))
        adalora.export_lora(trained, tmp_path / name, pad=True)
        wanted[name] = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name), "SEQ_CLS")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    for name in ("two", "one", "two"):
        hotswap_adapter(model, str(tmp_path / name), adapter_name="default")
        torch.testing.assert_close(logits(model, "SEQ_CLS"), wanted[name], rtol=0, atol=TOLERANCE)


@pytest.mark.compatibility(AREA, "hotswap without `pad=True` (PEFT compares `alpha_pattern`)", refused=True)
def test_hotswap_of_rank_patterns_is_refused(tmp_path: Path) -> None:
    base = bert()
    for seed, name in ((1, "one"), (2, "two")):
        exported(base, tmp_path / name, seed=seed, task_type=None)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    before = weights(model, "default")
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default")
    assert same(before, weights(model, "default"))


@pytest.mark.compatibility(AREA, "hotswap into an adapter that is still AdaLoRA's", refused=True)
def test_hotswap_into_a_live_adapter_is_refused(tmp_path: Path) -> None:
    base = bert()
    torch.manual_seed(1)
    trained = train(adalora.get_peft_model(copy.deepcopy(base), config(task_type=None)))
    adalora.export_lora(trained, tmp_path, pad=True)
    model = adalora.get_peft_model(copy.deepcopy(base), config(task_type=None))
    before = weights(model, "default")
    with pytest.raises(AdaLoraError, match=r"export_lora.*load_adapter"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert same(before, weights(model, "default"))
