"""What users of PEFT rely on for any adapter: merging, disabling, saving, loading, dtypes, generation, bookkeeping.

Several adapters in one model are in ``test_several_adapters.py``, kinds of layers in ``test_layers.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

import adalora
from adalora import AdaLoraConfig

from .models import ARCHITECTURES, bart, batch, bert, gpt2, llama, t5

STEPS = 8
TOLERANCE = 1e-5  # float32 logits of order 1 after a different order of the same products
SAVING, AS_PEFT = "Saving, loading, resuming", "PEFT's own methods"


class Pictures(nn.Module):
    """Convolution, BatchNorm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1))
        return result


class Words(nn.Module):
    """Embedding, Transformers' Conv1D, and a last layer narrower than any rank used here."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.conv = Conv1D(16, 12)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.conv(self.embedding(x)).relu().mean(1))
        return result


class Case(NamedTuple):
    """A model, what to adapt in it, and what to feed it."""

    build: Callable[[], nn.Module]
    targets: Any
    task_type: str | None = None
    data: Callable[[int], torch.Tensor] | None = None  # of a model that takes one tensor

    def config(self, **settings: Any) -> AdaLoraConfig:
        defaults: dict[str, Any] = {
            "task_type": self.task_type, "target_modules": self.targets, "target_r": 2, "init_r": 4, "lora_alpha": 16,
            "total_step": STEPS, "tinit": 1, "tfinal": 3, "deltaT": 1,
        }  # fmt: skip
        return AdaLoraConfig(**{**defaults, **settings})

    def adapted(self, **settings: Any) -> tuple[nn.Module, Any]:
        """(the base model, a copy of it with an adapter whose update is not zero)."""
        base = self.build().eval()
        return base, adalora.get_peft_model(
            copy.deepcopy(base), self.config(**{"init_lora_weights": False, **settings})
        ).eval()

    def run(self, model: nn.Module, seed: int = 1000) -> torch.Tensor:
        if self.data is not None:
            result: torch.Tensor = model(self.data(seed).to(_dtype_for(model, self.data(seed))))
            return result
        result = model(**batch(str(self.task_type), seed, 4)).logits
        return result  # noqa: RET504 (named for its type)

    def output(self, model: nn.Module) -> torch.Tensor:
        was_training = model.training
        with torch.no_grad():
            result = self.run(model.eval())
        model.train(was_training)
        return result

    def train(self, model: nn.Module, steps: int = STEPS) -> nn.Module:
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
        model.train()
        for step in range(steps):
            output = self.run(model, step)
            F.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel()) % 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model


def _dtype_for(model: nn.Module, data: torch.Tensor) -> torch.dtype:
    return next(model.parameters()).dtype if data.is_floating_point() else data.dtype


def pictures(seed: int) -> torch.Tensor:
    return torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


def words(seed: int) -> torch.Tensor:
    return torch.randint(20, (6, 7), generator=torch.Generator().manual_seed(seed))


CASES = {name: Case(*ARCHITECTURES[name]) for name in ("bert", "gpt2", "llama", "t5", "deberta")} | {
    "pictures": Case(Pictures, ["conv", "head"], None, pictures),
    "words": Case(Words, ["embedding", "conv", "head"], None, words),
}
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SOME = ("bert", "gpt2", "words")
some_models = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)
pytestmark = [  # PEFT changes its mind at each layer of a model with Conv1D and others
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"),
]


def assert_same(left: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(left.float(), right.float(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ forward, training


@pytest.mark.compatibility(AS_PEFT, "the first forward equals the base model's; `init_lora_weights=False` does not")
@every_model
def test_forward(case: Case) -> None:
    base, random = case.adapted()
    identity = adalora.get_peft_model(copy.deepcopy(base), case.config())
    assert torch.equal(case.output(identity), case.output(base))
    assert (case.output(random) - case.output(base)).abs().max() > 100 * TOLERANCE
    assert set(adalora.ranks(random).values()) == {4}, "a matrix narrower than the rank keeps its triplets"


@pytest.mark.compatibility(AS_PEFT, "training changes every part of the adapter and nothing else")
@every_model
def test_training_changes_the_adapter_alone(case: Case) -> None:
    _, model = case.adapted(compact=False, task_type=None)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    case.train(model, 3)
    for name, w in model.named_parameters():
        assert w.requires_grad == ("lora_" in name), name
        assert torch.equal(w, before[name]) != w.requires_grad, name


# ------------------------------------------------------------------------------------------- merging and disabling


@pytest.mark.compatibility(AS_PEFT, "`merge_adapter`, `unmerge_adapter`, `safe_merge`, `merge_and_unload`")
@every_model
def test_merging(case: Case) -> None:
    base, model = case.adapted()
    wanted = case.output(model)
    weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    assert_same(case.output(model), wanted)
    merged = {name: w.detach().clone() for name, w in model.named_parameters()}
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()  # a second time changes nothing
    assert all(torch.equal(w, merged[name]) for name, w in model.named_parameters())
    with model.disable_adapter():  # takes the merged update out for as long
        assert_same(case.output(model), case.output(base))
    if not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, w in model.named_parameters():
        assert_same(w, weights[name])
    assert_same(case.output(model), wanted)
    plain = model.merge_and_unload(progressbar=False)
    assert type(plain) is type(base)
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    assert_same(case.output(plain), wanted)


@pytest.mark.compatibility(AS_PEFT, "`safe_merge` refuses weights that are not finite", refused=True)
@some_models
def test_a_safe_merge_of_broken_weights_is_refused(case: Case) -> None:
    _, model = case.adapted()
    triplets = adalora.allocator(model).triplets[0]
    with torch.no_grad():
        triplets.lam[0] = torch.nan
    base = {n: w.detach().clone() for n, w in model.named_parameters() if "lora_" not in n}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(w, base[n]) for n, w in model.named_parameters() if n in base)


@pytest.mark.compatibility(AS_PEFT, "`disable_adapter`: nested, left by an exception, in the middle of training")
@every_model
def test_disabling(case: Case) -> None:
    base, model = case.adapted(task_type=None)
    case.train(model, 2)
    with torch.no_grad():  # statistics of BatchNorm are the base model's: they have moved
        for name, value in base.named_buffers():
            value.copy_(dict(model.get_base_model().named_buffers())[name])
    with_adapter, trainable = case.output(model), [n for n, w in model.named_parameters() if w.requires_grad]

    def restored() -> bool:
        same = torch.equal(case.output(model), with_adapter)
        return same and [n for n, w in model.named_parameters() if w.requires_grad] == trainable

    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(base))
        with model.disable_adapter():
            assert torch.equal(case.output(model), case.output(base))
        assert torch.equal(case.output(model), case.output(base))
    assert restored()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0  # noqa: B018
    assert restored()
    step = adalora.allocator(model).step
    with model.disable_adapter():
        model.add_module("probe", nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.probe(torch.ones(1)).sum().backward()
        optimizer.step()
    assert adalora.allocator(model).step == step, "a step that was not the adapter's"


@pytest.mark.compatibility(AS_PEFT, "`unload`, `get_base_model`: the base model as it was")
@every_model
def test_unloading(case: Case) -> None:
    base, model = case.adapted()
    assert type(model.get_base_model()) is type(base)
    unloaded = model.unload()
    assert [(n, type(m)) for n, m in unloaded.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert torch.equal(case.output(unloaded), case.output(base))


@pytest.mark.compatibility(AS_PEFT, "`merge_and_unload`, and a new adapter on the merged model")
@some_models
def test_a_merged_model_is_adapted_anew(case: Case, tmp_path: Path) -> None:
    _, model = case.adapted(task_type=None)
    merged = case.train(model).merge_and_unload()
    wanted = case.output(merged)
    again = adalora.get_peft_model(copy.deepcopy(merged), case.config(task_type=None))
    assert torch.equal(case.output(again), wanted)
    case.train(again)
    assert adalora.allocator(again).live == 2 * len(adalora.ranks(again))
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(merged), tmp_path)
    assert_same(case.output(loaded), case.output(again))


# -------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.compatibility(SAVING, "`save_pretrained` and `from_pretrained`, twice over, the same bytes")
@every_model
def test_saving_is_a_fixed_point(case: Case, tmp_path: Path) -> None:
    base, model = case.adapted()
    case.train(model, 3)
    model.save_pretrained(tmp_path / "1")
    model.save_pretrained(tmp_path / "2")
    first, second = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "12")
    assert first == second
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "1")
    loaded.save_pretrained(tmp_path / "3")
    stored, again = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "13")
    assert stored.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in stored.items())
    if not any(True for _ in base.buffers()) or case.task_type:
        assert_same(case.output(loaded), case.output(model))
    assert (tmp_path / "1" / "README.md").is_file()


@pytest.mark.compatibility(SAVING, "`low_cpu_mem_usage=True`, in `from_pretrained`, `load_adapter` and injection")
@some_models
def test_loading_through_the_meta_device(case: Case, tmp_path: Path) -> None:
    base, model = case.adapted()
    case.train(model)
    wanted = case.output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert {w.device.type for w in loaded.parameters()} == {"cpu"}
    assert_same(case.output(loaded), wanted)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    loaded.set_adapter("again")
    assert_same(case.output(loaded), wanted)
    injected = peft.inject_adapter_in_model(case.config(), copy.deepcopy(base), low_cpu_mem_usage=True)
    assert {w.device.type for n, w in injected.named_parameters() if "lora_" in n} == {"meta"}
    assert {w.device.type for k, w in peft.get_peft_model_state_dict(injected).items() if "lora_" in k} == {"meta"}
    peft.set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert {w.device.type for n, w in injected.named_parameters() if "lora_" in n} == {"cpu"}
    if case.task_type != "SEQ_CLS":  # whose head is not part of what was injected
        assert_same(case.output(injected), wanted)
    with pytest.warns(UserWarning, match="without their training state"):
        case.train(injected)
    assert adalora.allocator(injected).live == 2 * len(adalora.ranks(injected))


@pytest.mark.compatibility(SAVING, "another adapter's name, a subfolder, `selected_adapters`")
@some_models
def test_names_and_places(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model = adalora.get_peft_model(copy.deepcopy(base), case.config(init_lora_weights=False), adapter_name="mine")
    model.add_adapter("unwanted", case.config())
    model.save_pretrained(tmp_path, selected_adapters=["mine"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mine"]
    for settings in ({"subfolder": "mine"}, {"subfolder": "mine", "adapter_name": "theirs"}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **settings)
        assert_same(case.output(loaded), case.output(model))
        assert list(loaded.peft_config) == [settings.get("adapter_name", "default")]


@pytest.mark.compatibility(SAVING, "`AutoPeftModelFor...`, `PeftConfig.from_pretrained`")
@pytest.mark.parametrize(
    ("build", "task_type", "auto"),
    [
        (llama, "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
        (bert, "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
        (t5, "SEQ_2_SEQ_LM", peft.AutoPeftModelForSeq2SeqLM),
        (llama, None, peft.AutoPeftModel),
    ],
    ids=["llama", "bert", "t5", "llama without a task"],
)
def test_auto_classes(build: Callable[[], Any], task_type: str | None, auto: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = type(build()).from_pretrained(tmp_path / "base")
    case = Case(lambda: base, "all-linear", task_type or "CAUSAL_LM")
    config = case.config(init_lora_weights=False, task_type=task_type)
    model = adalora.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "adapter")
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "adapter")) is peft.LoraConfig
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert_same(case.output(loaded), case.output(model))
    assert not loaded.training


@pytest.mark.compatibility(SAVING, "`is_trainable`: frozen as loaded, or trained on as plain LoRA")
@pytest.mark.parametrize("is_trainable", [True, False])
@some_models
def test_loaded_trainable_or_not(case: Case, is_trainable: bool, tmp_path: Path) -> None:
    base, model = case.adapted()
    case.train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=is_trainable)
    trainable = {n for n, w in loaded.named_parameters() if w.requires_grad}
    assert bool(trainable) is is_trainable
    assert loaded.peft_config["default"].inference_mode is not is_trainable
    if is_trainable:
        before = case.output(loaded)
        case.train(loaded, 2)
        assert (case.output(loaded) - before).abs().max() > TOLERANCE


@pytest.mark.compatibility(
    SAVING, "a saved adapter taken up as AdaLoRA again (`from_pretrained(config=AdaLoraConfig)`)"
)
@some_models
def test_a_saved_adapter_is_pruned_further(case: Case, tmp_path: Path) -> None:
    base, model = case.adapted(target_r=3)
    case.train(model)
    model.save_pretrained(tmp_path)
    config = case.config(target_r=1, init_r=4)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config, is_trainable=True)
    assert_same(case.output(again), case.output(model))
    with pytest.warns(UserWarning, match="without their training state"):
        case.train(again)
    assert adalora.allocator(again).live == len(adalora.ranks(again))


@pytest.mark.compatibility(AS_PEFT, "`inference_mode=True`: nothing is trainable, everything computes")
@some_models
def test_inference_mode(case: Case) -> None:
    _, model = case.adapted()
    torch.manual_seed(0)
    base, frozen = case.adapted(inference_mode=True)
    assert not any(w.requires_grad for n, w in frozen.named_parameters() if "lora_" in n)
    assert (case.output(frozen) - case.output(base)).abs().max() > 100 * TOLERANCE
    assert all(w.requires_grad for n, w in model.named_parameters() if "lora_" in n)


@pytest.mark.compatibility(AS_PEFT, "`modules_to_save`, and the head of a sequence classifier")
@pytest.mark.parametrize(
    ("name", "settings", "saved"),
    [
        ("bert", {}, "classifier"),
        ("bert", {"task_type": None, "modules_to_save": ["pooler", "classifier"]}, "pooler.dense"),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head"),
        ("pictures", {"modules_to_save": ["head"], "target_modules": ["conv"]}, "head"),
    ],
    ids=["classifier", "pooler", "lm_head", "beside a convolution"],
)
def test_modules_to_save(name: str, settings: dict[str, Any], saved: str, tmp_path: Path) -> None:
    case = CASES[name]
    settings = {"target_modules": ["query", "value"], **settings} if name == "bert" else settings
    base, model = case.adapted(**settings)
    original = [w.detach().clone() for n, w in base.named_parameters() if f"{saved}." in n]
    case.train(model)
    assert original
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    kept = [value for key, value in stored.items() if f"{saved}." in key]
    assert len(kept) == len(original)
    assert not any(torch.equal(a, b) for a, b in zip(original, kept, strict=True))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    if name == "pictures":  # BatchNorm's statistics lie in the base model
        loaded.base_model.model.norm.load_state_dict(model.base_model.model.norm.state_dict())
    assert_same(case.output(loaded), case.output(model))
    assert_same(case.output(copy.deepcopy(model).merge_and_unload()), case.output(model))


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.compatibility(AS_PEFT, "float16 and bfloat16 base models, `autocast_adapter_dtype` or not: forward, merge")
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "half adapter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_model
def test_half_precision(case: Case, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    base = case.build().eval().to(dtype)
    model: Any = adalora.get_peft_model(
        copy.deepcopy(base), case.config(init_lora_weights=False, task_type=None), autocast_adapter_dtype=autocast
    ).eval()
    assert {w.dtype for n, w in model.named_parameters() if "lora_" in n} == {torch.float32 if autocast else dtype}
    wanted = case.output(model)
    assert wanted.dtype == dtype
    assert wanted.isfinite().all()
    rough = 40 * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()))  # the base weights are rounded anew
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast)
    assert {w.dtype for n, w in loaded.named_parameters() if "lora_" in n} == {torch.float32 if autocast else dtype}
    assert_same(case.output(loaded), wanted, rough)
    merged = model.merge_and_unload(safe_merge=True)
    assert {w.dtype for w in merged.parameters()} == {dtype}
    assert_same(case.output(merged), wanted, rough)


@pytest.mark.compatibility(AS_PEFT, "training under `torch.autocast`")
@every_model
def test_autocast(case: Case) -> None:
    _, model = case.adapted(task_type=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.train(model)
    assert {w.dtype for n, w in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.compatibility(AS_PEFT, "`generate`: greedy, beams, sampling, left padding, `inputs_embeds`, by position")
@pytest.mark.parametrize("build", [gpt2, llama, t5, bart], ids=lambda build: build.__name__)
def test_generation(build: Callable[[], Any]) -> None:
    _, targets, task_type = ARCHITECTURES[build.__name__]
    case = Case(build, targets, task_type)
    _, model = case.adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    rows = {key: value for key, value in batch(task_type, 3, 4).items() if key != "labels"}
    rows["attention_mask"] = rows["attention_mask"].clone()
    rows["attention_mask"][1, :5] = 0  # padded on the left
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": True},
        {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)},
    ]
    for way in ways:
        way = way if "generation_config" in way else {**way, "max_new_tokens": 5, "pad_token_id": 0}
        torch.manual_seed(1)
        ours = model.generate(**rows, **way)
        torch.manual_seed(1)
        assert torch.equal(ours, merged.generate(**rows, **way))
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if task_type == "CAUSAL_LM":
        by_place = model.generate(rows["input_ids"], **greedy)
        assert torch.equal(by_place[0], model.generate(**rows, **greedy)[0])
        embeds = model.get_input_embeddings()(rows["input_ids"])
        mask = torch.ones_like(rows["input_ids"])
        assert torch.equal(
            model.generate(inputs_embeds=embeds, attention_mask=mask, **greedy),
            model.generate(**{**rows, "attention_mask": mask}, **greedy)[:, rows["input_ids"].shape[1] :],
        )


# --------------------------------------------------------------------------------------------------------- bookkeeping


@pytest.mark.compatibility(AS_PEFT, "`get_model_status`, `get_layer_status`, `get_nb_trainable_parameters`")
@some_models
def test_status(case: Case) -> None:
    _, model = case.adapted(task_type=None)
    case.train(model)
    status, layers = model.get_model_status(), model.get_layer_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.num_adapter_layers == len(layers) == len(adalora.ranks(model))
    trained = sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    assert status.trainable_params == trained == model.get_nb_trainable_parameters()[0]
    assert all(layer.requires_grad == {"default": True} for layer in layers)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@pytest.mark.compatibility(AS_PEFT, "a model whose `config` is a dictionary, or missing")
@pytest.mark.parametrize("attribute", [{"hidden_size": 16, "tie_word_embeddings": False}, {}, None], ids=str)
def test_a_configuration_that_is_a_dictionary(attribute: dict[str, Any] | None, tmp_path: Path) -> None:
    case = CASES["words"]
    base = case.build().eval()
    if attribute is not None:
        base.config = attribute  # type: ignore[assignment]
    model = adalora.get_peft_model(copy.deepcopy(base), case.config(init_lora_weights=False))
    case.train(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")  # PEFT looks for the base model's
        model.save_pretrained(tmp_path)
    assert_same(case.output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), case.output(model))


@pytest.mark.compatibility("Choosing what to adapt", "`layer_replication`: copies with ranks of their own")
def test_replicated_layers(tmp_path: Path) -> None:
    case = Case(llama, ["q_proj", "v_proj"], "CAUSAL_LM")
    base, model = case.adapted(layer_replication=[[0, 2], [0, 2]])
    assert len(adalora.ranks(model)) == 8
    case.train(model)
    assert adalora.allocator(model).live == 16
    model.save_pretrained(tmp_path)
    assert_same(case.output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), case.output(model))


@pytest.mark.compatibility("Layers", "`trainable_token_indices` beside adapted layers")
def test_trainable_tokens(tmp_path: Path) -> None:
    case = Case(llama, ["q_proj", "v_proj"], "CAUSAL_LM")
    base, model = case.adapted(trainable_token_indices=[2, 5, 7])
    case.train(model)
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))
    model.save_pretrained(tmp_path)
    assert_same(case.output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), case.output(model))
    assert_same(case.output(copy.deepcopy(model).merge_and_unload()), case.output(model))
