"""Checkpoints of PEFT's AdaLoRA, of its present version and of older ones, become plain LoRA that computes the same."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora import ConfigError

from .models import ARCHITECTURES, batch, bert

TOLERANCE = 1e-5  # what the conversion promises; float32 logits of order 1
STEPS = 20
AREA = "PEFT's AdaLoRA"

pytestmark = [  # PEFT takes its own layers of rank 0 for parts of a sharded model, and its own patterns for LoRA's
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*tensor.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module.*lora_E"),
]


def compatible(what: str, **kwargs: Any) -> Any:
    return pytest.mark.compatibility(AREA, what, **kwargs)


def outputs(model: nn.Module, task_type: str) -> torch.Tensor:
    """Logits without labels: PEFT's AdaLoRA cannot compute a loss once it is loaded for inference."""
    inputs = batch(task_type, 1000)
    labels = inputs.pop("labels")
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = labels
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def peft_model(base: nn.Module, name: str = "bert", **settings: Any) -> peft.PeftModel:
    _, targets, task_type = ARCHITECTURES[name]
    defaults: dict[str, Any] = {
        "task_type": task_type, "target_modules": targets, "init_r": 6, "target_r": 2, "lora_alpha": 16,
        "total_step": STEPS, "tinit": 2, "tfinal": 6, "deltaT": 3, "orth_reg_weight": 0.1,
        "fan_in_fan_out": name == "gpt2",
    }  # fmt: skip
    return peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**{**defaults, **settings}))


def train(model: nn.Module, task_type: str, at: Callable[[int], None] = lambda step: None) -> None:
    """PEFT's loop, by hand; ``at`` is called after each step."""
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-2)
    model.train()
    for step in range(STEPS):
        model(**batch(task_type, step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        at(step)


def reloaded(base: nn.Module, directory: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)


def check_same(base: nn.Module, source: Path, reference: nn.Module, task_type: str = "SEQ_CLS") -> peft.PeftModel:
    """``source``, converted and loaded by stock PEFT as plain LoRA, answers as the reference does."""
    out = adalora.convert(source, source.with_name(f"{source.name}-plain"))
    plain = reloaded(base, out)
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    expected = outputs(reference, task_type)
    torch.testing.assert_close(outputs(plain, task_type), expected, rtol=0, atol=TOLERANCE)
    assert (expected - outputs(base, task_type)).abs().max() > 100 * TOLERANCE, (
        "nothing was learned: this shows nothing"
    )
    return plain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, peft.PeftModel, Path]:
    """(base, model, checkpoint after the end) of a BERT; to be copied, not changed."""
    torch.manual_seed(0)
    base = bert()
    model = peft_model(base, bias="all")
    train(model, "SEQ_CLS")
    folder = tmp_path_factory.mktemp("peft") / "end"
    model.save_pretrained(folder)
    return base, model, folder


@pytest.fixture
def checkpoint(trained: tuple[nn.Module, peft.PeftModel, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(trained[2], tmp_path / "checkpoint"))


def rewrite(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> None:
    """Change a checkpoint; a setting of None goes away."""
    if tensors is not None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "adapter_model.safetensors")
    file = directory / "adapter_config.json"
    known = {**json.loads(file.read_text()), **settings}
    file.write_text(
        json.dumps({key: value for key, value in known.items() if value is not None or key not in settings})
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


# --------------------------------------------------------------------------------------------------- what PEFT writes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bert", marks=compatible("Conversion of a checkpoint: BERT with its classifier")),
        pytest.param("gpt2", marks=compatible("Conversion of a checkpoint: Conv1D of GPT-2")),
        pytest.param("llama", marks=compatible("Conversion of a checkpoint: Llama")),
        pytest.param("t5", marks=compatible("Conversion of a checkpoint: T5")),
    ],
)
@pytest.mark.compatibility(AREA, "Conversion before pruning, between two masks and after the end")
def test_logits_equal_those_of_pefts_checkpoint_at_three_moments(name: str, tmp_path: Path) -> None:
    build, _, task_type = ARCHITECTURES[name]
    base = build()
    model = peft_model(base, name)
    moments = {1: "before", 7: "between", STEPS - 1: "after"}
    train(
        model,
        task_type,
        lambda step: model.save_pretrained(tmp_path / moments[step]) if step in moments else None,
    )
    for moment in moments.values():
        source = tmp_path / moment
        pattern = json.loads((source / "adapter_config.json").read_text())["rank_pattern"]
        assert (pattern is None) == (moment == "before")
        plain = check_same(base, source, reloaded(base, source), task_type)
        config = plain.peft_config["default"]
        ranks = [sum(mask) for mask in pattern.values()] if pattern else []
        assert sorted(set(config.rank_pattern.values())) == sorted({rank for rank in ranks if rank})
        assert len(config.exclude_modules or ()) == ranks.count(0)


@compatible("Conversion: layers of rank 0")
def test_a_layer_without_triplets_is_left_out(tmp_path: Path) -> None:
    base = bert()
    model = peft_model(base)
    train(model, "SEQ_CLS")
    pattern = model.peft_config["default"].rank_pattern
    emptied = "bert.encoder.layer.0.attention.self.query"
    pattern[f"{emptied}.lora_E.default"] = [False] * 6
    scale = 16 / (6 + 1e-5)
    expected = {}
    for key, mask in pattern.items():
        layer = model.get_submodule(f"base_model.model.{key.removesuffix('.lora_E.default')}")
        a, b, lam = (part["default"].detach()[..., :] for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        expected[key.removesuffix(".lora_E.default")] = scale * b[:, mask] @ (a * lam)[mask]
    model.save_pretrained(tmp_path / "source")
    plain = check_same(base, tmp_path / "source", reloaded(base, tmp_path / "source"))
    assert emptied in plain.peft_config["default"].exclude_modules
    assert not hasattr(plain.get_submodule(f"base_model.model.{emptied}"), "lora_A")
    for name, delta in expected.items():  # and not only what PEFT makes of it
        if bool(delta.any()):
            layer = plain.get_submodule(f"base_model.model.{name}")
            torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-7)


@compatible("Conversion: layers of rank 0")
def test_an_adapter_without_any_triplet_still_loads(checkpoint: Path, trained: Any) -> None:
    base, _, _ = trained
    tensors = {
        key: value[:0] if key.endswith(("lora_A", "lora_E")) else value[:, :0] if key.endswith("lora_B") else value
        for key, value in weights(checkpoint).items()
    }
    pattern = json.loads((checkpoint / "adapter_config.json").read_text())["rank_pattern"]
    rewrite(checkpoint, tensors, rank_pattern={key: [False] * 6 for key in pattern})
    plain = reloaded(base, adalora.convert(checkpoint, checkpoint.with_name("out")))
    assert all(not layer.get_delta_weight("default").any() for layer in plain.modules() if hasattr(layer, "lora_A"))


@compatible("Conversion: an adapter that was not trained")
def test_an_untrained_adapter_keeps_its_ranks_and_changes_nothing(tmp_path: Path) -> None:
    base = bert()
    peft_model(base).save_pretrained(tmp_path / "source")
    plain = reloaded(base, adalora.convert(tmp_path / "source", tmp_path / "out"))
    assert plain.peft_config["default"].r == 6
    assert torch.equal(outputs(plain, "SEQ_CLS"), outputs(base, "SEQ_CLS"))


class Pixels(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, kernel_size=(3, 2), padding=1)
        self.second = nn.Conv2d(8, 8, kernel_size=3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.second(self.first(x).tanh()).mean((2, 3)))
        return result


@compatible("Conversion of convolutions (give `base_model=`)")
@pytest.mark.parametrize("target_r", [1, 3])  # the first leaves a convolution without triplets
def test_convolutions(target_r: int, tmp_path: Path) -> None:
    base = Pixels()
    config = peft.AdaLoraConfig(
        target_modules=["first", "second", "head"], init_r=4, target_r=target_r, total_step=STEPS, tfinal=6
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-2)
    for step in range(STEPS):
        model(torch.randn(4, 3, 9, 9)).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "source")
    x = torch.randn(4, 3, 9, 9)
    expected = reloaded(base, tmp_path / "source").eval()(x)
    out = adalora.convert(tmp_path / "source", tmp_path / "out", base_model=base)
    torch.testing.assert_close(reloaded(base, out).eval()(x), expected, rtol=0, atol=TOLERANCE)
    assert (expected - base(x)).abs().max() > 100 * TOLERANCE
    assert ("first" in (reloaded(base, out).peft_config["default"].exclude_modules or ())) == (target_r == 1)
    dilated = copy.deepcopy(base)
    dilated.second.dilation = (2, 2)
    with pytest.raises(ConfigError, match="second is a convolution with dilation"):
        adalora.convert(tmp_path / "source", tmp_path / "dilated", base_model=dilated)
    blind = adalora.convert(tmp_path / "source", tmp_path / "blind")  # nothing says that they are no linear layers
    with pytest.raises(RuntimeError, match="size mismatch"):
        reloaded(base, blind)


# ------------------------------------------------------------------------------------------------- what PEFT once wrote


def pickled(directory: Path, model: nn.Module) -> None:
    torch.save(weights(directory), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def first_configurations(directory: Path, model: nn.Module) -> None:
    """Of 2023: settings that are gone, many that were not there yet."""
    old = {
        "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "target_modules", "lora_alpha",
        "lora_dropout", "bias", "modules_to_save", "fan_in_fan_out", "init_r", "target_r", "tinit", "tfinal", "deltaT",
        "beta1", "beta2", "orth_reg_weight", "rank_pattern",
    }  # fmt: skip
    file = directory / "adapter_config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if key in old}
    file.write_text(json.dumps({**settings, "merge_weights": True, "enable_lora": None, "r": 8, "total_step": None}))


def names_in_the_pattern(directory: Path, model: nn.Module) -> None:
    pattern = json.loads((directory / "adapter_config.json").read_text())["rank_pattern"]
    rewrite(directory, rank_pattern={f"{key}.default": mask for key, mask in pattern.items()})


def bias_without_base_layer(directory: Path, model: nn.Module) -> None:
    """Until 0.7 an adapted layer was a linear layer itself."""
    rewrite(directory, {key.replace(".base_layer.bias", ".bias"): value for key, value in weights(directory).items()})


def raw_state(directory: Path, model: nn.Module) -> None:
    """Of trainers that wrote the model's own state: names of adapters, nothing sliced, ``ranknum``, frozen heads."""
    trained = {
        key: value
        for key, value in model.state_dict().items()
        if "lora_" in key or "ranknum" in key or "bias" in key or "modules_to_save" in key or "original_module" in key
    }
    rewrite(directory, trained)


def ends_of_words(directory: Path, model: nn.Module) -> None:
    """Until 0.4 a target was any end of a name."""
    rewrite(directory, target_modules=["uery", "ey", "alue", "ense", "cheese"])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(pickled, marks=compatible("Conversion of older layouts: `adapter_model.bin`")),
        pytest.param(first_configurations, marks=compatible("Conversion of older layouts: configurations of 2023")),
        pytest.param(names_in_the_pattern, marks=compatible("Conversion of older layouts: names in `rank_pattern`")),
        pytest.param(bias_without_base_layer, marks=compatible("Conversion of older layouts: biases before 0.7")),
        pytest.param(raw_state, marks=compatible("Conversion of a raw, unsliced state dict")),
        pytest.param(ends_of_words, marks=compatible("Conversion of older layouts: `target_modules` before 0.4")),
    ],
)
def test_older_layouts_convert_alike(layout: Any, checkpoint: Path, trained: Any) -> None:
    base, model, source = trained
    layout(checkpoint, model)
    check_same(base, checkpoint, reloaded(base, source))


@compatible("Conversion: `bias=` and heads are carried along")
def test_trained_biases_and_heads_are_carried_along(checkpoint: Path, trained: Any) -> None:
    base, model, _ = trained
    plain = reloaded(base, adalora.convert(checkpoint, checkpoint.with_name("out")))
    compared = 0
    for name in ("bert.encoder.layer.0.attention.self.query.base_layer.bias", "bert.embeddings.LayerNorm.bias"):
        found = plain.get_parameter(f"base_model.model.{name}")
        assert torch.equal(found, model.get_parameter(f"base_model.model.{name}"))
        compared += int(not torch.equal(found, base.get_parameter(name.replace("base_layer.", ""))))
    assert compared == 2, "no bias was trained: this shows nothing"
    head = plain.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert not torch.equal(head.weight, base.classifier.weight)


@compatible("Conversion: lora_alpha of 0 or less")
@pytest.mark.parametrize("alpha", [0, -1])
def test_without_alpha_the_rank_is_the_scale(alpha: int, checkpoint: Path, trained: Any) -> None:
    """PEFT takes the rank of the layer as it loads it."""
    base, _, _ = trained
    rewrite(checkpoint, lora_alpha=alpha)
    check_same(base, checkpoint, reloaded(base, checkpoint))


@compatible("Conversion of half-precision checkpoints")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype: torch.dtype, checkpoint: Path, trained: Any) -> None:
    base, _, _ = trained
    rewrite(checkpoint, {key: value.to(dtype) for key, value in weights(checkpoint).items()})
    check_same(base, checkpoint, reloaded(base, checkpoint))
    converted = weights(checkpoint.with_name("checkpoint-plain"))
    assert {value.dtype for key, value in converted.items() if "lora_" in key} == {torch.float32}


def test_a_converted_adapter_can_be_trained_on_and_truncated(checkpoint: Path, trained: Any) -> None:
    base, _, _ = trained
    out = adalora.convert(checkpoint, checkpoint.with_name("out"))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), out, is_trainable=True)
    model(**batch("SEQ_CLS", 0)).loss.backward()
    assert all(w.grad is not None for name, w in model.named_parameters() if "lora_A" in name)


# ----------------------------------------------------------------------------------------------------------- mistakes


class Runs:
    """What a pickle may do when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@compatible("Conversion of a pickle that runs code", refused=True)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save({"lora_A": Runs(tmp_path / "ran")}, checkpoint / "adapter_model.bin")
    with pytest.raises(ConfigError, match="could run as code"):
        adalora.convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def plain_lora(directory: Path) -> None:
    rewrite(directory, peft_type="LORA")


def other_method(directory: Path) -> None:
    rewrite(directory, peft_type="PREFIX_TUNING")


def no_configuration(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def no_json(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


def no_keys(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("[]")


def no_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def cut_short(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_a_pickle(directory: Path) -> None:
    no_weights(directory)
    (directory / "adapter_model.bin").write_bytes(b"")


def no_state_dict(directory: Path) -> None:
    no_weights(directory)
    torch.save([torch.zeros(1)], directory / "adapter_model.bin")


def no_singular_values(directory: Path) -> None:
    tensors = weights(directory)
    del tensors[next(key for key in tensors if key.endswith("lora_E"))]
    rewrite(directory, tensors)


def no_triplets(directory: Path) -> None:
    rewrite(directory, {key: value for key, value in weights(directory).items() if "lora_" not in key})


def two_adapters(directory: Path) -> None:
    tensors = weights(directory)
    named = {f"{key}.{name}": value for name in ("a", "b") for key, value in tensors.items() if "lora_" in key}
    rewrite(directory, {key: value.clone() for key, value in named.items()})


def ranks_of_another(directory: Path) -> None:
    tensors = weights(directory)
    key = next(key for key, value in tensors.items() if key.endswith("lora_E") and 1 < len(value) < 6)
    name = key.removesuffix("lora_E")
    tensors |= {f"{name}lora_{part}": tensors[f"{name}lora_{part}"][1:] for part in "AE"}
    tensors[f"{name}lora_B"] = tensors[f"{name}lora_B"][:, 1:]
    rewrite(directory, tensors)


def shapes_that_do_not_fit(directory: Path) -> None:
    tensors = weights(directory)
    key = next(key for key, value in tensors.items() if key.endswith("lora_A") and len(value) > 1)
    rewrite(directory, tensors | {key: tensors[key][1:]})


def a_module_too_many(directory: Path) -> None:
    pattern = json.loads((directory / "adapter_config.json").read_text())["rank_pattern"]
    rewrite(directory, rank_pattern={**pattern, "bert.elsewhere.lora_E": [True] * 6})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            plain_lora, "plain LoRA already", marks=compatible("Conversion of what is LoRA already", refused=True)
        ),
        (other_method, "'PREFIX_TUNING', not PEFT's ADALORA"),
        (no_configuration, "there is no adapter_config.json"),
        (no_json, "not JSON"),
        (no_keys, "holds a list"),
        (no_weights, "neither adapter_model.safetensors nor adapter_model.bin"),
        (cut_short, "Was its writing interrupted"),
        (not_a_pickle, "cannot be read"),
        (no_state_dict, "not a state dict"),
        (no_singular_values, "has no lora_E"),
        (no_triplets, "hold no lora_A, lora_E and lora_B"),
        (two_adapters, "several adapters, a, b"),
        (ranks_of_another, "do not belong together"),
        (shapes_that_do_not_fit, r"expected \[r, d_in\]"),
        (a_module_too_many, "bert.elsewhere"),
    ],
)
def test_what_cannot_be_converted(damage: Any, words: str, checkpoint: Path, tmp_path: Path) -> None:
    damage(checkpoint)
    with pytest.raises(ConfigError, match=words):
        adalora.convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_from_and_where_to(checkpoint: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(ConfigError, match="the checkpoint itself"):
        adalora.convert(checkpoint, checkpoint / ".." / checkpoint.name)
    with pytest.raises(ConfigError, match="no folder"):
        adalora.convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        adalora.convert(checkpoint, tmp_path / "file")
    assert before == {file.name: file.read_bytes() for file in checkpoint.iterdir()}


def test_the_wrong_base_model_is_noticed(checkpoint: Path, tmp_path: Path, trained: Any) -> None:
    with pytest.raises(ConfigError, match="has no module bert"):
        adalora.convert(checkpoint, tmp_path / "out", base_model=Pixels())
    wider = copy.deepcopy(trained[0])
    wider.bert.encoder.layer[1].attention.self.value = nn.Linear(40, 32)
    with pytest.raises(ConfigError, match=r"\[32, 40\] in the base model, but \[32,\s+32\]"):
        adalora.convert(checkpoint, tmp_path / "out", base_model=wider)
    adalora.convert(checkpoint, tmp_path / "out", base_model=trained[0])
