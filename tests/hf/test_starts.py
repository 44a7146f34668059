"""Where training starts from: PEFT's initializations, trained LoRA adapters, and loops written for PEFT's AdaLoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError, StateError

from .models import batch, bert, gpt2, llama, logits

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 logits of order 1 after a QR and an SVD
RANK, TARGET, STEPS = 4, 2, 16


def lora(**settings: Any) -> peft.LoraConfig:
    defaults: dict[str, Any] = {
        "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "r": RANK, "lora_alpha": 8,
    }  # fmt: skip
    return peft.LoraConfig(**{**defaults, **settings})


def budget(**settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "target_r": TARGET, "init_r": RANK,
        "lora_alpha": 8, "total_step": STEPS, "tinit": 2, "tfinal": 4, "deltaT": 1,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


def train(model: nn.Module, steps: int, task_type: str = "SEQ_CLS", lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr)
    for step in range(steps):
        model(**batch(task_type, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """s·B A of every layer, as PEFT computes it."""
    return {
        name: module.get_delta_weight(adapter_name).detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def corda(model: nn.Module, config: peft.LoraConfig) -> None:
    pytest.importorskip("attr", reason="PEFT's CorDA imports attrs, which PEFT does not install")
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for seed in range(4):
            model(**batch("SEQ_CLS", seed, size=1))  # PEFT expects one row a batch

    preprocess_corda(model, config, run_model=run)


def lora_ga(model: nn.Module, config: peft.LoraConfig) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def run() -> None:
        for seed in range(2):
            model(**batch("SEQ_CLS", seed)).loss.backward()

    preprocess_loraga(model, config, train_step=run)


INITIALIZATIONS: dict[str, tuple[Any, dict[str, Any], Callable[..., None] | None]] = {
    "random (`True`)": (True, {}, None),
    "`False`: B A is not 0": (False, {}, None),
    "`gaussian`": ("gaussian", {}, None),
    "`pissa`": ("pissa", {}, None),
    "`pissa_niter_4`": ("pissa_niter_4", {}, None),
    "`olora`": ("olora", {}, None),
    "`orthogonal`": ("orthogonal", {}, None),
    "`corda`": ("corda", {"corda_config": CordaConfig(corda_method="kpm"), "target_modules": ["query"]}, corda),
    "`lora_ga`": ("lora_ga", {"lora_ga_config": LoraGAConfig()}, lora_ga),
    "`loftq`": ("loftq", {"loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=1)}, None),
}


@pytest.mark.parametrize(
    ("value", "settings", "prepare"),
    [
        pytest.param(*case, marks=pytest.mark.compatibility("Initializations", what), id=what)
        for what, case in INITIALIZATIONS.items()
    ],
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")  # LoRA-GA's, on the first layer
def test_the_update_at_step_0_is_pefts(
    value: Any, settings: dict[str, Any], prepare: Callable[..., None] | None, tmp_path: Path
) -> None:
    """Base weights that PEFT changes are changed the same way, B A is the same, and training goes on from there."""
    if value == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT's LoftQ computes on a GPU alone")
    base = bert()
    if prepare is not None:
        prepare(base, lora(init_lora_weights=value, **settings))
    torch.manual_seed(5)
    theirs = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=value, **settings))
    torch.manual_seed(5)
    ours = peft.get_peft_model(copy.deepcopy(base), budget(init_lora_weights=value, **settings))
    expected, found = deltas(theirs), deltas(ours)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], **TOLERANCE)
    torch.testing.assert_close(logits(ours, "SEQ_CLS"), logits(theirs, "SEQ_CLS"), **TOLERANCE)
    starts_at_0 = value in (True, "gaussian", "orthogonal")
    assert all(delta.abs().max() < 1e-6 for delta in found.values()) == starts_at_0
    changed = {n: w for n, w in theirs.named_parameters() if "base_layer" in n}
    for name, weight in ours.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(weight, changed[name])

    residual = copy.deepcopy(ours).unload()
    train(ours, STEPS)
    assert adalora.allocator(ours).live == TARGET * len(found)
    ours.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(residual, str(tmp_path))
    torch.testing.assert_close(logits(stock, "SEQ_CLS"), logits(ours, "SEQ_CLS"), **TOLERANCE)


@pytest.mark.compatibility("Initializations", "`eva` (`initialize_lora_eva_weights`)")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_evas_vectors_become_right_singular_vectors(rho: float, tmp_path: Path) -> None:
    """EVA redistributes ranks and writes to A after the model is made; both are taken over, with Λ = 0."""
    base = llama()
    batches = [batch("CAUSAL_LM", seed) for seed in range(6)]
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "eva",
        "eva_config": peft.EvaConfig(rho=rho), "lora_alpha": 8,
    }  # fmt: skip

    def made(config: peft.LoraConfig) -> peft.PeftModel:
        torch.manual_seed(3)
        model = peft.get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return model

    theirs = made(peft.LoraConfig(r=4, **settings))
    ours = made(AdaLoraConfig(target_r=2, init_r=4, total_step=STEPS, tinit=2, tfinal=4, deltaT=1, **settings))
    torch.testing.assert_close(logits(ours, "CAUSAL_LM"), logits(base, "CAUSAL_LM"), rtol=0, atol=0)
    vectors = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.detach()
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    triplets = adalora.allocator(ours).triplets
    assert {t.name: t.rank for t in triplets} == {name: len(a) for name, a in vectors.items()}
    for t in triplets:
        q, a = t.factors.q.detach(), vectors[t.name]
        torch.testing.assert_close(q @ q.T, torch.eye(t.rank), **TOLERANCE)
        torch.testing.assert_close((a @ q.T) @ q, a, rtol=1e-4, atol=1e-4)  # the same space
        assert not t.lam.any()
    train(ours, STEPS, "CAUSAL_LM")
    assert adalora.allocator(ours).live == 2 * len(triplets)
    ours.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(logits(stock, "CAUSAL_LM"), logits(ours, "CAUSAL_LM"), **TOLERANCE)


# --------------------------------------------------------------------------------------- trained LoRA adapters


def trained_lora(build: Callable[[], nn.Module], task_type: str, directory: Path, **settings: Any) -> nn.Module:
    base = build()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=task_type, r=RANK, **settings))
    train(model, 10, task_type)
    model.save_pretrained(str(directory))
    return base


@pytest.mark.parametrize(
    ("build", "task_type", "settings"),
    [
        pytest.param(
            bert, "SEQ_CLS", {"target_modules": "all-linear", "lora_alpha": 8},
            marks=pytest.mark.compatibility("Initializations", "a trained LoRA adapter (`adalora.upgrade`)"),
        ),
        pytest.param(
            gpt2, "CAUSAL_LM", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True},
            marks=pytest.mark.compatibility("Initializations", "a trained rsLoRA adapter (`adalora.upgrade`)"),
        ),
        pytest.param(
            llama, "CAUSAL_LM", {"target_modules": ["q_proj", "up_proj"], "use_dora": True,
                                 "rank_pattern": {"up_proj": 6}},
            marks=pytest.mark.compatibility("Initializations", "a trained DoRA adapter (`adalora.upgrade`)"),
        ),
    ],
)  # fmt: skip
def test_a_trained_lora_adapter_goes_on_under_a_budget(
    build: Callable[[], nn.Module], task_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = trained_lora(build, task_type, tmp_path / "lora", **settings)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"), is_trainable=True)
    before, updates = logits(model, task_type), deltas(model)
    ours = adalora.upgrade(model, "default", AdaLoraConfig(target_r=2, total_step=STEPS, tinit=2, tfinal=4, deltaT=1))
    assert ours is adalora.allocator(model)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, updates[name], **TOLERANCE)
    torch.testing.assert_close(logits(model, task_type), before, **TOLERANCE)
    for t in ours.triplets:
        p, lam, q = (part.detach() for part in t.factors)
        torch.testing.assert_close(p.T @ p, torch.eye(t.rank), **TOLERANCE)
        torch.testing.assert_close(q @ q.T, torch.eye(t.rank), **TOLERANCE)
        assert bool((lam.diff() <= 0).all()) and lam.min() >= 0
    assert model.peft_config["default"].lora_alpha == settings.get("lora_alpha", 8)
    train(model, STEPS, task_type)
    assert ours.live == 2 * len(ours.triplets)
    model.save_pretrained(str(tmp_path / "pruned"))
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "pruned"))
    torch.testing.assert_close(logits(stock, task_type), logits(model, task_type), **TOLERANCE)


@pytest.mark.compatibility("Initializations", "an adapter of Transformers' `add_adapter` (`adalora.upgrade`)")
def test_an_adapter_of_transformers_can_be_upgraded() -> None:
    model = bert()
    model.add_adapter(lora(), adapter_name="mine")
    ours = adalora.upgrade(model, "mine", budget())
    train(model, STEPS)
    assert ours.live == TARGET * len(ours.triplets) and adalora.ranks(model, "mine") == ours.ranks()


@pytest.mark.compatibility("Initializations", "what cannot be upgraded", refused=True)
def test_what_cannot_be_upgraded_says_why(tmp_path: Path) -> None:
    base = trained_lora(bert, "SEQ_CLS", tmp_path, target_modules=["query"])
    frozen = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    live = adalora.get_peft_model(bert(), budget())
    other = peft.get_peft_model(
        bert(), peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    )
    trained = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True)
    untouched = logits(trained, "SEQ_CLS")
    cases: list[tuple[nn.Module, str, Any, type[Exception], str]] = [
        (bert(), "default", budget(), StateError, r"has no adapter 'default' \(none at all\)"),
        (trained, "other", budget(), StateError, r"has no adapter 'other' \(default\)"),
        (frozen, "default", budget(), StateError, "is frozen.*is_trainable=True"),
        (live, "default", budget(), StateError, "is AdaLoRA's already"),
        (other, "default", budget(), ConfigError, "is a IA3Config; LoRA adapters alone"),
        (trained, "default", lora(), ConfigError, "takes an AdaLoraConfig, not LoraConfig"),
        (trained, "default", budget(target_r=6, init_r=6), ConfigError, "target_r=6 is above the rank 4"),
    ]
    for model, name, config, error, message in cases:
        with pytest.raises(error, match=message):
            adalora.upgrade(model, name, config)
    assert torch.equal(logits(trained, "SEQ_CLS"), untouched)


# --------------------------------------------------------------------------------------- loops written for PEFT


def by_hand(model: nn.Module, steps: int) -> Iterator[int]:
    """PEFT's place for the call, with PEFT's step numbers, from 0."""
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-2)
    for i in range(steps):
        output = model(**batch("SEQ_CLS", i))
        output.loss.backward()
        optimizer.step()
        model.update_and_allocate(i)
        optimizer.zero_grad()
        yield i


@pytest.mark.compatibility("PEFT's AdaLoRA", "its documented example, without `total_step`")
def test_pefts_documented_example_runs_with_another_import() -> None:
    """``r``, ``delta_t``, ``peft_type``, no ``total_step``: pruning ends at step ``tfinal``, and a warning says so."""
    config = AdaLoraConfig(
        peft_type="ADALORA", task_type="SEQ_CLS", r=8, target_modules=["query", "value"], init_r=12, tinit=10,
        tfinal=50, delta_t=10, lora_alpha=32, lora_dropout=0.01, orth_reg_weight=0.5,
    )  # fmt: skip
    assert (config.target_r, config.init_r, config.deltaT, config.tfinal) == (8, 12, 10, 50)
    model = peft.get_peft_model(bert(), config)
    lived: dict[int, int] = {}
    with pytest.warns(
        UserWarning, match="tfinal=50 is read as the step at which pruning ends.*32 from step 50"
    ) as caught:
        for i in by_hand(model, 60):
            lived[i] = adalora.allocator(model).live
    assert len(caught) == 1, "said once"
    matrices = len(adalora.ranks(model))
    budgets = [
        12 * matrices if i <= 10 else 8 * matrices + int(4 * matrices * (1 - (i - 10) / 40) ** 3) for i in range(51)
    ]
    assert [lived[i] for i in (10, 20, 30, 40, 50)] == [budgets[i] for i in (10, 20, 30, 40, 50)]
    assert lived[59] == 8 * matrices == sum(adalora.ranks(model).values())
    assert [a.step for a in adalora.allocator(model).trace] == [20, 30, 40, 50]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"tinit": 2, "tfinal": 4}, 2), ({"tinit": 0.2, "tfinal": 0.3}, 1), ({"tinit": 5, "tfinal": 4}, 1)],
)
def test_without_total_step_and_without_a_call_the_error_comes_at_once(settings: dict[str, Any], steps: int) -> None:
    """Only where ``tfinal`` could be meant as an end does the first step pass: a loop by hand calls right after it."""
    model = adalora.get_peft_model(bert(), budget(total_step=None, **settings))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-2)
    with pytest.raises(adalora.ScheduleError, match=r"total_step=.*AdaLoraCallback\(\)"):
        for step in range(1, 4):
            model(**batch("SEQ_CLS", step)).loss.backward()
            optimizer.step()
    assert step == steps


def test_by_hand_with_a_fraction_and_no_total_is_an_error() -> None:
    model = adalora.get_peft_model(bert(), budget(total_step=None, tfinal=0.3))
    ours = adalora.allocator(model)
    ours.step = 1
    with pytest.raises(adalora.ScheduleError, match=r"update_and_allocate.* needs AdaLoraConfig"):
        model.update_and_allocate(1)


def test_two_names_of_one_field() -> None:
    assert AdaLoraConfig(delta_t=7).deltaT == 7 == AdaLoraConfig(deltaT=7, delta_t=7).deltaT
    assert "delta_t" not in AdaLoraConfig(delta_t=7).to_dict()
    with pytest.raises(ConfigError, match="delta_t=7 and deltaT=5 are two names of one field"):
        AdaLoraConfig(delta_t=7, deltaT=5)


def test_a_written_configuration_is_read_back(tmp_path: Path) -> None:
    config = budget(delta_t=None)
    config.save_pretrained(str(tmp_path))
    assert AdaLoraConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace("{", '{"of_tomorrow": 1,', 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert AdaLoraConfig.from_pretrained(str(tmp_path)).target_r == TARGET
    assert ["of_tomorrow" in str(warning.message) for warning in caught] == [True]
