"""Every kind of layer that PEFT's LoRA adapts: trained under a budget, saved, merged, and taken apart again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as lora_config
from torch import nn
from torch.nn import functional as F  # noqa: N812

import adalora
from adalora import AdaLoraConfig, ConfigError

from .models import batch, bert, gpt2, llama, logits, t5

STEPS = 20


class Zoo(nn.Module):
    """One layer of each kind in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.conv1d = nn.Conv1d(6, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv2d = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding=1)
        self.conv3d = nn.Conv3d(4, 4, 3, padding=1)
        self.pointwise = nn.Conv2d(4, 5, 1)
        self.grouped = nn.Conv2d(5, 10, 3, groups=5, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.out = nn.Linear(500, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.conv1d(self.embedding(ids).mT).mT
        h = h + self.linear(h)
        h = h + self.attention(h, h, h)[0]
        h = self.conv2d(h.unsqueeze(1)).relu()
        h = h + self.conv3d(h.unsqueeze(2)).squeeze(2)
        return self.out(self.norm(self.grouped(self.pointwise(h))).flatten(1))  # type: ignore[no-any-return]


IDS, LABELS = torch.arange(40).reshape(4, 10) % 20, torch.tensor([0, 1, 2, 0])


def config(*targets: str, **settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "target_modules": list(targets), "target_r": 2, "init_r": 3, "lora_alpha": 6, "total_step": STEPS, "tinit": 2,
        "tfinal": 6, "deltaT": 2,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """No graph is kept, for it would pin the shapes of P, Λ and Q."""
    return model.eval()(IDS)  # type: ignore[no-any-return]


def train_through(model: nn.Module, base: nn.Module, directory: Path) -> None:
    """Train a whole schedule; at three places what is saved, and what is merged, computes what is in memory."""
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(STEPS):
        F.cross_entropy(model.train()(IDS), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 9, STEPS - 1):
            expected = output(model)
            model.save_pretrained(str(directory))
            stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory))
            carry_statistics(model, stock)
            torch.testing.assert_close(output(stock), expected, rtol=1e-5, atol=1e-5)
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)
            copied = copy.deepcopy(model)
            copied.merge_adapter()
            copied.unmerge_adapter()
            torch.testing.assert_close(output(copied), expected, rtol=1e-5, atol=1e-5)
    ours = adalora.allocator(model)
    assert ours.live == ours.target_budget == 2 * len(ours.triplets) and ours.frozen
    assert sum(t.rank for t in ours.triplets) == ours.target_budget, "compacted in memory"


def carry_statistics(source: nn.Module, target: nn.Module) -> None:
    """BatchNorm's running statistics are not the adapter's: they lie in the base model."""
    theirs = dict(source.named_buffers())
    for name, value in target.named_buffers():
        value.copy_(theirs[name])


KINDS = {
    "Linear": ("linear",),
    "Conv1d": ("conv1d",),
    "Conv2d": ("conv2d",),
    "Conv2d of size 1": ("pointwise",),
    "Conv3d": ("conv3d",),
    "Embedding": ("embedding",),
    "nn.MultiheadAttention": ("attention",),
    "all of them under one budget": ("linear", "conv1d", "conv2d", "pointwise", "conv3d", "embedding", "attention"),
}


@pytest.mark.parametrize(
    "targets", [pytest.param(t, marks=pytest.mark.compatibility("Layers", what), id=what) for what, t in KINDS.items()]
)
@pytest.mark.filterwarnings("ignore:All adapters are already merged")  # an attention layer merges its projections twice
@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_a_layer_is_trained_saved_merged_and_loaded(targets: tuple[str, ...], tmp_path: Path) -> None:
    base = Zoo()
    model = adalora.get_peft_model(copy.deepcopy(base), config(*targets))
    torch.testing.assert_close(model(IDS), copy.deepcopy(base)(IDS), rtol=0, atol=1e-6)
    train_through(model, base, tmp_path)


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        pytest.param(t, s, marks=pytest.mark.compatibility("LoRA variants", what), id=f"{what} {'-'.join(t)}")
        for what, s, kinds in [
            ("DoRA (`use_dora`)", {"use_dora": True}, ["linear", "conv1d", "conv2d", "conv3d", "embedding"]),
            ("rsLoRA (`use_rslora`)", {"use_rslora": True}, ["linear", "conv2d", "embedding"]),
            ("`lora_bias`", {"lora_bias": True}, ["linear", "conv2d"]),
            ("`bias='lora_only'`", {"bias": "lora_only"}, ["linear", "conv2d"]),
            ("`bias='all'`", {"bias": "all"}, ["linear"]),
        ]
        for t in [(kind,) for kind in kinds]
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")  # PEFT expects matrices alone
def test_a_variant_of_a_layer(targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path) -> None:
    base = Zoo()
    model = adalora.get_peft_model(copy.deepcopy(base), config(*targets, **settings))
    train_through(model, base, tmp_path)


def test_a_convolution_keeps_the_shapes_of_its_kernels_and_its_state_resumes(tmp_path: Path) -> None:
    """Checkpoints of the training hold P and Q as they are; a state of another kernel is refused."""
    torch.manual_seed(1)
    model = adalora.get_peft_model(Zoo(), config("conv2d", "embedding"))
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for _ in range(9):
        F.cross_entropy(model(IDS), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    adalora.save_state(model, tmp_path)
    torch.manual_seed(1)
    resumed = adalora.get_peft_model(Zoo(), config("conv2d", "embedding"))
    adalora.load_state(resumed, tmp_path)
    for ours, theirs in zip(adalora.allocator(resumed).triplets, adalora.allocator(model).triplets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters, theirs.parameters, strict=True))
    assert torch.equal(adalora.allocator(resumed).scores(), adalora.allocator(model).scores())
    conv, _ = sorted(adalora.allocator(resumed).triplets, key=lambda t: t.name)
    assert conv.q.shape == (3, 1, 3, 2) and conv.p.shape == (4, 3, 1, 1) and conv.shape == (4, 6)

    other = Zoo()
    other.conv2d = nn.Conv2d(1, 4, (2, 3), stride=(1, 2), padding=1)
    with pytest.raises(adalora.StateError, match=r"conv2d is 4 x 1 x 3 x 2, the model's 4 x 1 x 2 x 3"):
        adalora.load_state(adalora.get_peft_model(other, config("conv2d", "embedding")), tmp_path)


@pytest.mark.compatibility("Layers", "Embedding in half precision, cast by PEFT")
def test_an_embedding_is_cast_moved_frozen_and_deleted_as_a_whole() -> None:
    base = Zoo().to(torch.bfloat16)
    kept = adalora.get_peft_model(copy.deepcopy(base), config("embedding"), autocast_adapter_dtype=False)
    cast = adalora.get_peft_model(copy.deepcopy(base), config("embedding"))
    for model, dtype in ((kept, torch.bfloat16), (cast, torch.float32)):
        (triplets,) = adalora.allocator(model).triplets
        assert {w.dtype for w in triplets.parameters} == {dtype}
        assert all(w.requires_grad for w in triplets.parameters)
        model.add_adapter("second", config("embedding"))
        model.set_adapter("second")
        assert not any(w.requires_grad for w in triplets.parameters)
        model.set_adapter("default")
        assert all(w.requires_grad for w in triplets.parameters)
        model.delete_adapter("second")
        with pytest.raises(adalora.StateError):
            adalora.allocator(model, "second")
        assert model(IDS).isfinite().all()


@pytest.mark.compatibility("Layers", "convolution with groups or dilation", refused=True)
def test_a_convolution_with_groups_or_dilation_is_refused() -> None:
    dilated = Zoo()
    dilated.conv2d = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding=2, dilation=2)
    with pytest.raises(ConfigError, match=r"conv2d \(Conv2d with dilation=\(2, 2\)\)"):
        adalora.get_peft_model(dilated, config("conv2d"))
    with (
        pytest.warns(UserWarning, match="Merging is not supported"),
        pytest.raises(ConfigError, match=r"convolutions without groups or dilation.*grouped \(Conv2d with groups=5\)"),
    ):
        adalora.get_peft_model(Zoo(), config("grouped", init_r=5))


REFUSED = [
    ("Layers", "MoE `target_parameters`", "target_parameters", ["experts.weight"]),
    ("LoRA variants", "KaSA", "kasa_config", lora_config.KasaConfig()),
    ("LoRA variants", "VeLoRA", "velora_config", lora_config.VeloraConfig()),
    ("LoRA variants", "MonteCLoRA", "monteclora_config", lora_config.MontecloraConfig()),
    ("LoRA variants", "BD-LoRA", "use_bdlora", lora_config.BdLoraConfig()),
    ("LoRA variants", "Arrow routing", "arrow_config", lora_config.ArrowConfig()),
    ("Initializations", "MiCA", "init_lora_weights", "mica"),
]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        pytest.param(setting, value, marks=pytest.mark.compatibility(area, what, refused=True), id=what)
        for area, what, setting, value in REFUSED
    ],
)
def test_what_has_no_triplets_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}.*does not go with AdaLoRA: .*peft\.LoraConfig"):
        config("linear", **{setting: value})


# ----------------------------------------------------------------------------------------------- choosing what to adapt


def names_of(model: nn.Module) -> set[str]:
    return set(adalora.ranks(model))


@pytest.mark.compatibility("Choosing what to adapt", "`target_modules='all-linear'`")
def test_all_linear_means_what_it_means_in_peft() -> None:
    for build, task_type in ((bert, "SEQ_CLS"), (llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")):
        ours = adalora.get_peft_model(
            build(), AdaLoraConfig(task_type=task_type, target_modules="all-linear", target_r=2, total_step=10)
        )
        theirs = peft.get_peft_model(build(), peft.LoraConfig(task_type=task_type, target_modules="all-linear"))
        assert names_of(ours) == {
            name.removeprefix("base_model.model.")
            for name, module in theirs.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(
            {"target_modules": r".*\.1\..*\.(query|value)"},
            {"layer.1.attention.self.query", "layer.1.attention.self.value"},
            marks=pytest.mark.compatibility("Choosing what to adapt", "a regular expression"),
        ),
        pytest.param(
            {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
            {"layer.1.attention.self.query"},
            marks=pytest.mark.compatibility("Choosing what to adapt", "`layers_to_transform`, `layers_pattern`"),
        ),
        pytest.param(
            {"target_modules": ["query", "value"], "exclude_modules": ["value"]},
            {"layer.0.attention.self.query", "layer.1.attention.self.query"},
            marks=pytest.mark.compatibility("Choosing what to adapt", "`exclude_modules`"),
        ),
    ],
    ids=["regex", "layers", "exclude"],
)
def test_modules_are_chosen_as_in_peft(settings: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    base = bert()
    chosen = AdaLoraConfig(task_type="SEQ_CLS", target_r=1, init_r=3, total_step=8, tinit=1, tfinal=2, **settings)
    model = adalora.get_peft_model(copy.deepcopy(base), chosen)
    assert {name.removeprefix("bert.encoder.") for name in names_of(model)} == expected
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(8):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(stock, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=1e-5, atol=1e-5)


@pytest.mark.compatibility("Choosing what to adapt", "`rank_pattern`, `alpha_pattern` as initial ranks and scales")
def test_patterns_give_initial_ranks_and_scales(tmp_path: Path) -> None:
    base = bert()
    model = adalora.get_peft_model(
        copy.deepcopy(base),
        AdaLoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value", "intermediate.dense"], target_r=2, init_r=4,
            lora_alpha=8, rank_pattern={"query": 6, "layer.1.attention.self.value": 3}, alpha_pattern={"value": 12},
            total_step=12, tinit=2, tfinal=4, deltaT=1,
        ),
    )  # fmt: skip
    ours = adalora.allocator(model)
    by_name = {t.name.removeprefix("bert.encoder."): t.rank for t in ours.triplets}
    assert by_name["layer.0.attention.self.query"] == 6 and by_name["layer.1.attention.self.value"] == 3
    assert by_name["layer.0.attention.self.value"] == 4 and ours.initial_budget == 6 * 2 + 4 + 3 + 4 * 2
    layer = model.base_model.model.bert.encoder.layer[0].attention.self
    assert layer.value.scaling["default"] == 3.0 and layer.query.scaling["default"] == 8 / 6
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(12):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ours.live == 2 * 6
    model.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(stock, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=1e-5, atol=1e-5)


@pytest.mark.compatibility("Layers", "Conv1D of GPT-2 (`fan_in_fan_out`)")
def test_fan_in_fan_out_is_found_out_by_peft(tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed; whether it is told or not, PEFT sets the flag, and the export carries it."""
    base = gpt2()
    told = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn"], target_r=2, total_step=9, fan_in_fan_out=True
    )
    model = adalora.get_peft_model(copy.deepcopy(base), told)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(9):
        model(**batch("CAUSAL_LM", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adalora.export_lora(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert stock.peft_config["default"].fan_in_fan_out
    torch.testing.assert_close(logits(stock, "CAUSAL_LM"), logits(model, "CAUSAL_LM"), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        adalora.get_peft_model(
            gpt2(), AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], target_r=2, total_step=9)
        )


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.compatibility("Layers", "embedding or output layer with tied weights")
def test_one_of_two_tied_layers_is_adapted(targets: list[str], tmp_path: Path) -> None:
    base = gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    model = adalora.get_peft_model(
        copy.deepcopy(base), AdaLoraConfig(task_type="CAUSAL_LM", target_modules=targets, target_r=1, total_step=9)
    )
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(9):
        model(**batch("CAUSAL_LM", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adalora.allocator(model).live == 1
    model.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(stock, "CAUSAL_LM"), logits(model, "CAUSAL_LM"), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.compatibility("Layers", "both of two tied layers (`ensure_weight_tying`)", refused=True)
def test_both_tied_layers_cannot_be_pruned_apart() -> None:
    with pytest.raises(ConfigError, match=r"ensure_weight_tying would make .*lm_head.* share the factors"):
        adalora.get_peft_model(
            gpt2(),
            AdaLoraConfig(
                task_type="CAUSAL_LM", target_modules=["wte", "lm_head"], target_r=2, total_step=9,
                ensure_weight_tying=True,
            ),
        )  # fmt: skip
