"""Quantized bases: the adapter is trained to its budget, merged and exported on each as on an ordinary model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig

from .models import VOCABULARY, batch

STEPS = 12
TARGET = 2
CAUSAL = "CAUSAL_LM"
AREA = "Quantized bases"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to"),
    pytest.mark.filterwarnings("ignore:Unmerge lora module to"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast from"),
]


def llama() -> nn.Module:
    """Widths that every method's group or block of weights divides."""
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
        )
    )  # fmt: skip


def from_pretrained(directory: Path, config: Any) -> nn.Module:
    llama().save_pretrained(directory)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map="cpu")
    return model


def bitsandbytes(directory: Path, **settings: Any) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return from_pretrained(directory, BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings))


def torchao(directory: Path, name: str, **settings: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return from_pretrained(directory, TorchAoConfig(getattr(quantization, name)(**settings)))


def hqq(bits: int) -> nn.Module:
    """Transformers 5 does not quantize with HQQ yet; the library itself does."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model = llama()
    for name, linear in projections(model):
        settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=32)
        quantized = quantize.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, quantized)
    return model


def gptqmodel(kernel: str, bits: int = 4, group: int = 32) -> nn.Module:
    """GPT-QModel's own layer and packing, with each group's range as scale: its calibration needs no part here."""
    qlinear = pytest.importorskip(
        f"gptqmodel.nn_modules.qlinear.{kernel}", reason="gptqmodel (and optimum), whose layers PEFT uses, is missing"
    )
    pytest.importorskip("optimum", reason="optimum, which PEFT asks for beside gptqmodel, is missing")
    layer = qlinear.TorchLinear if kernel == "torch" else qlinear.AwqTorchLinear
    model = llama().to(torch.bfloat16)
    for name, linear in projections(model):
        linear.to(torch.float16)
        groups = linear.weight.detach().float().unflatten(1, (-1, group))
        scales = ((groups.amax(2) - groups.amin(2)) / (2**bits - 1)).half()
        zeros = (-groups.amin(2) / scales.float()).round().clamp(0, 2**bits - 1)
        quantized = layer(
            bits=bits, group_size=group, sym=False, desc_act=False, in_features=linear.in_features,
            out_features=linear.out_features, bias=False, register_buffers=True,
        )  # fmt: skip
        quantized.optimize = lambda *_, **__: None  # it would compile each layer
        quantized.pack(linear, scales, zeros, torch.arange(linear.in_features, dtype=torch.int32) // group)
        quantized.post_init()
        model.set_submodule(name, quantized)
    return model


def aqlm() -> nn.Module:
    """Random codes and codebooks: a layer of AQLM is trained elsewhere, and only loaded.

    One thread: those of its kernel for CPUs add to one vector without a lock, so that no two calls agree.
    """
    layer = pytest.importorskip("aqlm", reason="aqlm is not installed").QuantizedLinear
    pytest.importorskip("numba", reason="numba, which runs AQLM's kernel for CPUs, is not installed").set_num_threads(1)
    model = llama()
    generator = torch.Generator().manual_seed(7)
    for name, linear in projections(model):
        quantized = layer(linear.in_features, linear.out_features, 8, 1, 1, 8, bias=False, dtype=torch.float32)
        quantized.codes.data.random_(-128, 128, generator=generator)
        quantized.codebooks.data.normal_(0.0, 0.1, generator=generator)
        quantized.scales.data.fill_(1.0)
        model.set_submodule(name, quantized)
    return model


def eetq() -> nn.Module:
    layer = pytest.importorskip("eetq", reason="eetq is not installed, and its kernels need a GPU").EetqLinear
    model = llama().half().cuda()
    for name, linear in projections(model):
        model.set_submodule(name, layer(linear.in_features, linear.out_features, bias=False, device="cuda"))
    return model


def projections(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


Build = Callable[[Path], nn.Module]
MERGEABLE: dict[str, Build] = {
    "bitsandbytes 4-bit (nf4)": lambda at: bitsandbytes(at, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes 4-bit (fp4)": lambda at: bitsandbytes(at, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes 4-bit (nf4, double quantization)": lambda at: bitsandbytes(
        at, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes 8-bit": lambda at: bitsandbytes(at, load_in_8bit=True),
    "torchao int8, weights only": lambda at: torchao(at, "Int8WeightOnlyConfig"),
    "torchao int8, weights and activations": lambda at: torchao(at, "Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 (`IntxWeightOnlyConfig`)": lambda at: torchao(at, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "HQQ 4-bit": lambda at: hqq(4),
    "HQQ 8-bit": lambda at: hqq(8),
}
KINDS: dict[str, Build] = {
    **MERGEABLE,
    "GPTQ 4-bit (GPT-QModel)": lambda at: gptqmodel("torch"),
    "AWQ 4-bit (GPT-QModel)": lambda at: gptqmodel("torch_awq"),
    "AQLM": lambda at: aqlm(),
    "EETQ 8-bit": lambda at: eetq(),
}


def over(kinds: dict[str, Build], what: str) -> pytest.MarkDecorator:
    """One row of the table for each kind of base."""
    rows = [pytest.param(k, marks=pytest.mark.compatibility(AREA, f"{k}: {what}"), id=k) for k in kinds]
    return pytest.mark.parametrize("kind", rows)


def outputs(model: nn.Module) -> torch.Tensor:
    """Logits in training mode, which for lack of dropout are those of evaluation.

    On processors with AVX512-BF16 bitsandbytes packs 4-bit weights anew when a model in evaluation mode is called, and
    then neither PEFT's merge nor its own backward pass reads them right (bitsandbytes issue 2078 is of this kind).
    """
    model.train()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch(CAUSAL, 1000)).logits
    return logits.float()


def adapt(base: nn.Module, **settings: Any) -> nn.Module:
    defaults: dict[str, Any] = {
        "task_type": CAUSAL, "target_modules": TARGETS, "target_r": TARGET, "init_r": 4, "lora_alpha": 16,
        "tinit": 1, "tfinal": 4, "deltaT": 1, "total_step": STEPS,
    }  # fmt: skip
    torch.manual_seed(5)
    return adalora.get_peft_model(base, AdaLoraConfig(**{**defaults, **settings}))


def train(
    model: nn.Module, steps: int = STEPS, state: dict[str, Any] | None = None
) -> tuple[list[float], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-2)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch(CAUSAL)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def assert_budget_reached(model: nn.Module) -> None:
    allocator = adalora.allocator(model)
    ranks = adalora.ranks(model)
    assert allocator.frozen and allocator.step == STEPS
    assert allocator.trace[-1].step == STEPS - 4
    assert len(ranks) == 14
    assert allocator.live == sum(ranks.values()) == TARGET * len(ranks)
    assert all(0 <= rank <= 4 for rank in ranks.values()) and len(set(ranks.values())) > 1
    assert {t.name: t.rank for t in allocator.triplets} == ranks, "nothing was compacted"


def stored(base: nn.Module) -> Iterator[tuple[str, type, bytes]]:
    """What the base holds, by name: quantized weights must stay what they are, bit for bit."""
    for name, module in base.named_modules():
        if "lora_" not in name:
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                parts = [getattr(value, part) for part in ("qdata", "scale") if hasattr(value, part)] or [value]
                content = b"".join(part.detach().contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
                yield f"{name}.{key}".replace("base_model.model.", "").replace(".base_layer", ""), type(value), content


def skip_where_lora_does_not_train(kind: str, directory: Path) -> None:
    lora = get_peft_model(KINDS[kind](directory / "lora"), LoraConfig(target_modules=TARGETS, task_type=CAUSAL))
    try:
        lora(**batch(CAUSAL)).loss.backward()
    except Exception as error:  # of whatever kind: it is not ours
        pytest.skip(f"PEFT's plain LoRA does not train on it either ({type(error).__name__})")


@over(KINDS, "training, allocation, export")
def test_trains_to_its_budget_and_exports(kind: str, tmp_path: Path) -> None:
    """What is exported, stock PEFT loads on the same quantized base, with the same logits."""
    if kind not in MERGEABLE:
        skip_where_lora_does_not_train(kind, tmp_path)
    base = KINDS[kind](tmp_path / "base")
    plain = outputs(base)
    before = list(stored(base))  # some lay their codes out anew when they are first called
    model = adapt(base)
    assert torch.equal(outputs(model), plain), "Λ = 0 must change nothing"
    losses, _ = train(model)
    assert losses[-1] < losses[0] - 0.2
    assert_budget_reached(model)
    assert [entry for entry in stored(model) if "lora_" not in entry[0]] == before
    trained = outputs(model)
    assert (trained - plain).abs().max() > 0.1
    adalora.export_lora(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(KINDS[kind](tmp_path / "base"), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    # s·ρ·Λ is folded into A: the same products in another order. Where activations are quantized as
    # well, or are bfloat16, one that lies at the edge of two values comes down on either side.
    coarse = kind.endswith("activations") or model.dtype == torch.bfloat16
    torch.testing.assert_close(outputs(loaded), trained, rtol=0, atol=0.1 if coarse else 1e-4)
    assert (outputs(loaded) - trained).abs().mean() < (1e-2 if coarse else 1e-5)


@over(MERGEABLE, "merge, unmerge, merge and unload")
def test_merging_costs_what_quantizing_again_costs(kind: str, tmp_path: Path) -> None:
    """The merged weights are quantized anew, as PEFT does it for any LoRA: an error of the base's own resolution."""
    model = adapt(MERGEABLE[kind](tmp_path / "base"))
    with model.disable_adapter():
        plain = outputs(model)
    train(model)
    adalora.export_lora(model, tmp_path / "adapter")
    live = outputs(model)
    effect = (live - plain).abs().mean()

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).abs().mean() / effect

    resolution = 0.05 if "8" in kind else 0.35  # 256 levels a block, or 16
    model.merge_adapter()
    merged = outputs(model)
    assert distance(merged, live) < resolution
    model.unmerge_adapter()
    assert distance(outputs(model), live) < resolution
    unloaded = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in unloaded.modules())
    assert distance(outputs(unloaded), live) < 1.5 * resolution, "quantized a third time"

    stock = PeftModel.from_pretrained(MERGEABLE[kind](tmp_path / "base"), tmp_path / "adapter")
    # a weight at the edge of two levels comes down on either side
    assert distance(outputs(stock.merge_and_unload()), merged) < resolution / 4


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of outputs(), without gradients
@pytest.mark.compatibility(AREA, "bitsandbytes: `prepare_model_for_kbit_training`, then Transformers' `Trainer`")
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit (nf4)", "bitsandbytes 8-bit"])
def test_prepared_for_training_under_a_trainer(kind: str, tmp_path: Path) -> None:
    """It casts the rest to float32 and checkpoints gradients, which reentrantly asks for inputs that require them."""
    base = prepare_model_for_kbit_training(
        KINDS[kind](tmp_path / "base"), gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    model = adapt(base, total_step=None, task_type=CAUSAL)
    rows = batch(CAUSAL, size=8 * STEPS)
    run = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=2e-2,
            report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
            logging_strategy="no",
        ),
        train_dataset=[{key: value[row] for key, value in rows.items()} for row in range(8 * STEPS)],
        callbacks=[AdaLoraCallback()],
    )  # fmt: skip
    run.train()
    assert model.base_model.model.is_gradient_checkpointing
    assert_budget_reached(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(KINDS[kind](tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=1e-3)


@pytest.mark.compatibility(AREA, "bitsandbytes, torchao, HQQ: an interrupted training resumes exactly")
@pytest.mark.parametrize(
    "kind", ["bitsandbytes 4-bit (nf4)", "bitsandbytes 8-bit", "torchao int8, weights only", "HQQ 4-bit"]
)
def test_resumes_exactly(kind: str, tmp_path: Path) -> None:
    whole, first, second = (adapt(KINDS[kind](tmp_path / str(part))) for part in range(3))
    train(whole)
    optimizer = train(first, 5)[1]
    adalora.save_state(first, tmp_path)
    adalora.load_state(second, tmp_path)
    train(second, STEPS - 5, optimizer.state_dict())
    assert_budget_reached(second)
    assert torch.equal(outputs(second), outputs(whole))
