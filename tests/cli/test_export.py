"""``adalora export`` and ``adalora convert``: what is written is loaded by what it is for, and computes the same."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import adalora as library
from adalora import AdaLoraConfig

from ..hf.models import ARCHITECTURES, batch, logits
from .conftest import Finished

Run = Callable[..., Finished]
TOLERANCE = 1e-5  # float32 logits of order 1; merging adds ΔW to W before the product


def serving(what: str, **kwargs: Any) -> Any:
    return pytest.mark.compatibility("Serving", what, **kwargs)


def refused(done: Finished, *words: str) -> None:
    """One line on stderr, code 2, nothing written."""
    assert done.code == 2, done
    assert "Traceback" not in done.err and done.err.strip().splitlines()[-1].strip("│ ╯")
    for word in words:
        assert word in " ".join(done.err.split()), done.err
    assert not Path("out").exists()


def adapted(
    name: str, folder: Path, steps: int = 8, base: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, nn.Module]:
    """(base, model): a tiny model in ``folder/base``, and an adapter trained on it in ``folder/adapter``."""
    build, targets, task_type = ARCHITECTURES[name]
    base = build() if base is None else base
    base.save_pretrained(folder / "base")
    config = AdaLoraConfig(**{
        "task_type": task_type, "target_modules": targets, "target_r": 2, "init_r": 3, "lora_alpha": 12,
        "total_step": steps, "tinit": 0, "tfinal": 2, "deltaT": 1, "fan_in_fan_out": name == "gpt2", **settings,
    })  # fmt: skip
    model = library.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-2)
    for step in range(steps):
        model(**batch(task_type, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    library.export_lora(model, folder / "adapter")
    assert len(set(library.ranks(model).values())) > 1, "one rank everywhere: this shows less"
    return base, model.eval()


def config_of(folder: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return result


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


# --------------------------------------------------------------------------------------------------------- of a run


@pytest.fixture
def run(finished: Path) -> Path:
    """A copy of a finished run, in the present folder."""
    return Path(shutil.copytree(finished, Path("run")))


def answers(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**tokenizer("the film is superb", return_tensors="pt")).logits
    return result


def of_run(run: Path, tiny_model: Path) -> torch.Tensor:
    """What the run itself answers, loaded by stock PEFT."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    return answers(peft.PeftModel.from_pretrained(base, run), AutoTokenizer.from_pretrained(tiny_model))


@serving("`adalora export --format lora` of a run")
def test_a_run_as_lora(adalora: Run, run: Path, tiny_model: Path) -> None:
    done = adalora("export", run, "out")
    assert done.code == 0, done.err
    ranks = json.loads((run / "metrics.json").read_text())["ranks"]
    assert f"{sum(map(bool, ranks.values()))} modules" in done.out and "24 triplets" in done.out
    assert "out/adapter_model.safetensors" in done.out and "bytes" in done.out
    assert sorted(file.name for file in Path("out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.testing.assert_close(of_run(Path("out"), tiny_model), of_run(run, tiny_model), rtol=0, atol=0)


@serving("`adalora export --format merged`: BERT classifier of a run")
def test_a_run_merged_is_a_model_with_its_labels(adalora: Run, run: Path, tiny_model: Path) -> None:
    done = adalora("export", run, "out", "--format", "merged")
    assert done.code == 0, done.err
    model = AutoModelForSequenceClassification.from_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("out")
    torch.testing.assert_close(answers(model, tokenizer), of_run(run, tiny_model), rtol=0, atol=TOLERANCE)
    assert set(model.config.id2label.values()) == {"fresh", "rotten"}
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


@serving("`adalora export` of a checkpoint of a run")
@pytest.mark.parametrize("form", ["lora", "merged"])
def test_a_checkpoint_in_the_middle_of_pruning(adalora: Run, run: Path, tiny_model: Path, form: str) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-12"
    done = adalora("export", checkpoint, "out", "--format", form)
    assert done.code == 0, done.err
    expected = of_run(checkpoint, tiny_model)
    if form == "lora":
        assert torch.equal(of_run(Path("out"), tiny_model), expected)
    else:
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained("out"),
            AutoTokenizer.from_pretrained("out"),
        )
        torch.testing.assert_close(answers(model, tokenizer), expected, rtol=0, atol=TOLERANCE)
        assert set(model.config.id2label.values()) == {"fresh", "rotten"}


@serving("`adalora export --rank K --max-rank-pad --dtype`")
def test_rank_padding_and_type(adalora: Run, run: Path, tiny_model: Path) -> None:
    done = adalora("export", run, "out", "--rank", 1, "--max-rank-pad", "--dtype", "bfloat16")
    assert done.code == 0 and "12 triplets, padded with zeros" in done.out, done
    config = config_of("out")
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == {} == config["alpha_pattern"]
    tensors = weights("out")
    rows = [value for key, value in tensors.items() if key.endswith("lora_A.weight")]
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {len(value) for value in rows} == {config["r"]}
    assert sum(int(value.any(1).sum()) for value in rows) == 12, "one triplet for each of 12 matrices"
    assert of_run(Path("out"), tiny_model).isfinite().all()


@serving("`adalora export --format merged --rank K`")
def test_a_merged_model_of_a_smaller_rank(adalora: Run, run: Path, tiny_model: Path) -> None:
    assert adalora("export", run, "out", "--rank", 1).code == 0
    assert adalora("export", run, "whole", "--format", "merged", "--rank", 1, "--dtype", "float32").code == 0
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained("whole"),
        AutoTokenizer.from_pretrained("whole"),
    )
    torch.testing.assert_close(answers(model, tokenizer), of_run(Path("out"), tiny_model), rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------------ merged models


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        pytest.param(
            "llama",
            AutoModelForCausalLM,
            marks=serving("`adalora export --format merged`: Llama (`AutoModelForCausalLM`)"),
        ),
        pytest.param(
            "gpt2",
            AutoModelForCausalLM,
            marks=serving("`adalora export --format merged`: GPT-2 (`AutoModelForCausalLM`)"),
        ),
        pytest.param(
            "t5", AutoModelForSeq2SeqLM, marks=serving("`adalora export --format merged`: T5 (`AutoModelForSeq2SeqLM`)")
        ),
        pytest.param(
            "bert",
            AutoModelForSequenceClassification,
            marks=serving("`adalora export --format merged`: any adapter with a trained head"),
        ),
    ],
)
def test_merged_models_load_with_their_auto_class(adalora: Run, name: str, loader: Any, tmp_path: Path) -> None:
    _, model = adapted(name, tmp_path)
    task_type = ARCHITECTURES[name][2]
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    assert done.code == 0, done.err
    merged = loader.from_pretrained("out")
    torch.testing.assert_close(logits(merged, task_type), logits(model, task_type), rtol=0, atol=TOLERANCE)


def test_a_head_of_another_size_than_the_base_says(adalora: Run, tmp_path: Path) -> None:
    base = ARCHITECTURES["bert"][0]()
    base.classifier, base.config.num_labels, base.num_labels = nn.Linear(32, 5), 5, 5
    _, model = adapted("bert", tmp_path, base=base)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    encoder = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    (tmp_path / "base" / "config.json").write_text(json.dumps(encoder))
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained("out")
    torch.testing.assert_close(logits(merged, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)


def test_without_a_task_the_base_says_what_it_is(adalora: Run, tmp_path: Path) -> None:
    _, model = adapted("llama", tmp_path, task_type=None)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "merged"), "base", "--base MODEL")
    base = ["--base", tmp_path / "elsewhere"]
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged", *base, "--dtype", "bfloat16")
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained("out")
    assert merged.dtype == torch.bfloat16
    expected = dict(model.merge_and_unload().named_parameters())
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value.float(), expected[name], rtol=2**-8, atol=1e-6)  # half of bfloat16's last bit


def test_the_wrong_base_model(adalora: Run, tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    adapted("gpt2", tmp_path / "other")
    base = tmp_path / "other" / "base"
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged", "--base", base)
    refused(done, "does not fit", "--base")


# ---------------------------------------------------------------------------------------------------------- llama.cpp


@serving("`adalora export --format gguf-ready`: what `convert_lora_to_gguf.py` reads")
def test_what_llama_cpp_computes_is_what_was_trained(adalora: Run, tmp_path: Path) -> None:
    """By its own rules: pairs named alike and nothing else, one lora_alpha, a scale of alpha / (columns of lora_b)."""
    base, model = adapted("llama", tmp_path)
    done = adalora("export", tmp_path / "adapter", "out", "--format", "gguf-ready")
    assert done.code == 0, done.err
    config, tensors = config_of("out"), weights("out")
    assert Path(config["base_model_name_or_path"]) == tmp_path / "base"
    assert len({value.shape[0] for key, value in tensors.items() if "lora_A" in key}) == 1
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part = next((part for part in ("lora_A", "lora_B") if f".{part}.weight" in key), None)
        assert part is not None and value.ndim == 2 and value.dtype == torch.float32
        name = key.replace("base_model.model.", "").replace(f".{part}.weight", "")
        pairs.setdefault(name, {})[part] = value
    served = copy.deepcopy(base)
    for name, pair in pairs.items():
        scale = config["lora_alpha"] / pair["lora_B"].shape[1]
        served.get_submodule(name).weight.data += scale * pair["lora_B"] @ pair["lora_A"]
    torch.testing.assert_close(logits(served, "CAUSAL_LM"), logits(model, "CAUSAL_LM"), rtol=0, atol=TOLERANCE)


@serving("`adalora export --format gguf-ready`: Conv1D, DoRA, heads, biases", refused=True)
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gpt2", {}, ["Conv1D", "--format merged"]),
        ("llama", {"use_dora": True}, ["no DoRA", "--format merged"]),
        ("bert", {}, ["classifier", "--format merged"]),
        ("opt", {"bias": "lora_only"}, ["bias", "--format merged"]),
    ],
)
def test_what_llama_cpp_cannot_read(
    adalora: Run, name: str, settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    adapted(name, tmp_path, **settings)
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "gguf-ready"), *words)


@serving("llama.cpp's own `convert_lora_to_gguf.py` on a `gguf-ready` adapter")
def test_the_converter_of_llama_cpp_reads_it(adalora: Run, tmp_path: Path) -> None:
    folder = os.environ.get("ADALORA_LLAMA_CPP_SOURCES")
    if folder is None:
        pytest.skip("needs llama.cpp's sources: set ADALORA_LLAMA_CPP_SOURCES to their folder")
    base, model = adapted("llama", tmp_path)
    assert adalora("export", tmp_path / "adapter", "out", "--format", "gguf-ready").code == 0
    converter = [sys.executable, f"{folder}/convert_lora_to_gguf.py", "out", "--base", str(tmp_path / "base")]
    done = subprocess.run([*converter, "--outfile", "out.gguf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, f"{folder}/gguf-py")
    try:
        from gguf import GGUFReader
    finally:
        sys.path.pop(0)
    reader = GGUFReader("out.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == len(weights("out"))
    merged, compared = model.merge_and_unload(), 0
    for name, b in tensors.items():
        if not name.endswith("ffn_up.weight.lora_b"):
            continue
        module = f"model.layers.{name.split('.')[1]}.mlp.up_proj"
        delta = merged.get_submodule(module).weight - base.get_submodule(module).weight
        found = alpha / b.shape[1] * b @ tensors[name.replace("lora_b", "lora_a")]
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)
        compared += 1
    assert compared


def test_llama_cpp_needs_to_know_the_base_model(adalora: Run, tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    config = config_of(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "gguf-ready"), "--base MODEL")
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "merged"), "--base MODEL")
    done = adalora("export", tmp_path / "adapter", "out", "--format", "gguf-ready", "--base", "org/model")
    assert done.code == 0 and config_of("out")["base_model_name_or_path"] == "org/model"


# ---------------------------------------------------------------------------------------------------------- Diffusers


def unet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 3, 8))


def transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    return model, (torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8), torch.randn(2, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("build", "component"),
    [
        pytest.param(
            build,
            component,
            marks=[
                serving(f"`adalora export --format diffusers`: {name}"),
                serving(f"Diffusers' own `save_lora_adapter` and `load_lora_adapter`: {name}"),
            ],
        )
        for build, component, name in ((unet, "unet", "UNet"), (transformer, "transformer", "SD3 transformer"))
    ],
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # of rank 0, which Diffusers does not wrap anyway
def test_diffusers_loads_what_was_trained(adalora: Run, build: Any, component: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs Diffusers: pip install diffusers")
    base, inputs = build()
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    schedule: dict[str, Any] = {"total_step": 6, "tinit": 0, "tfinal": 1, "deltaT": 1}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(AdaLoraConfig(target_modules=targets, target_r=1, init_r=3, lora_alpha=8, **schedule))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-1)
    for _ in range(6):
        model(*inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(library.ranks(model).values())) > 2, "one rank everywhere: this shows less"
    library.export_lora(model, tmp_path / "adapter")
    done = adalora("export", tmp_path / "adapter", "out", "--format", "diffusers")
    assert done.code == 0, done.err
    fresh = copy.deepcopy(base)
    fresh.load_lora_adapter("out", prefix=component, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        expected = model(*inputs).sample
        torch.testing.assert_close(fresh(*inputs).sample, expected, rtol=0, atol=TOLERANCE)
        assert (base(*inputs).sample - expected).abs().max() > 100 * TOLERANCE
    assert {layer.scaling["default_0"] for layer in fresh.modules() if hasattr(layer, "scaling")} == {1.0}

    model.save_lora_adapter("own", weight_name="pytorch_lora_weights.safetensors")
    again = copy.deepcopy(base)
    again.load_lora_adapter("own", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).sample, expected, rtol=0, atol=TOLERANCE)


def test_the_part_of_a_pipeline_may_have_to_be_named(adalora: Run, tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "diffusers"), "--component")
    done = adalora("export", tmp_path / "adapter", "out", "--format", "diffusers", "--component", "text_encoder_3")
    assert done.code == 0, done.err
    tensors = load_file("out/pytorch_lora_weights.safetensors")
    assert all(key.startswith("text_encoder_3.model.layers.") for key in tensors)


def test_diffusers_reads_no_heads(adalora: Run, tmp_path: Path) -> None:
    adapted("bert", tmp_path)
    refused(
        adalora("export", tmp_path / "adapter", "out", "--format", "diffusers", "--component", "unet"), "classifier"
    )


# --------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*tensor.*have invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module.*lora_E")
@pytest.mark.compatibility("PEFT's AdaLoRA", "`adalora convert DIR OUT`, then `adalora export`")
def test_a_checkpoint_of_peft_is_converted_and_exported(adalora: Run, tmp_path: Path) -> None:
    base = ARCHITECTURES["bert"][0]()
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], init_r=4, target_r=2, total_step=10, tfinal=2
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-2)
    for step in range(10):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "peft")
    refused(adalora("export", tmp_path / "peft", "out"), "adalora convert")
    done = adalora("convert", tmp_path / "peft", "out")
    assert done.code == 0 and "8 triplets" in done.out, done
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), "out")
    torch.testing.assert_close(logits(plain, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    assert adalora("export", "out", "smaller", "--rank", 1).code == 0

    again = adalora("convert", tmp_path / "peft", "out")
    assert again.code == 2 and "not empty" in again.err and "--overwrite" in again.err
    assert adalora("convert", tmp_path / "peft", "out", "--overwrite").code == 0
    twice = adalora("convert", "out", "other")
    assert twice.code == 2 and "plain LoRA already" in twice.err and not Path("other").exists()
    itself = adalora("convert", tmp_path / "peft", tmp_path / "peft", "--overwrite")
    assert itself.code == 2 and "the adapter itself" in itself.err


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], ["no folder nowhere"]),
        (["run"], ["OUT"]),
        ([], ["DIR"]),
        (["run", "out", "--format", "gguf"], ["'gguf'", "lora, merged, gguf-ready, diffusers"]),
        (["run", "out", "--dtype", "int8"], ["'int8'", "float32, float16, bfloat16"]),
        (["run", "out", "--rank", "0"], ["rank=0", "above 0"]),
        (["run", "out", "--rank", "half"], ["--rank", "valid number"]),
        (["run", "out", "--rank", "3"], ["36 triplets, but the adapter has 24", "choose 2 or less"]),
        (["run", "out", "--format", "merged", "--max-rank-pad"], ["no ranks to pad"]),
        (["run", "out", "--format", "merged", "--base", "nowhere/at/all"], ["nowhere/at/all", "--base"]),
        (["run", "out", "--component", "unet"], ["Diffusers", "lora"]),
        (["run", "out", "--format", "gguf-ready"], ["classifier", "--format merged"]),
        (["run", "run"], ["the adapter itself"]),
        (["run/checkpoints/checkpoint-12", "run", "--overwrite"], ["run is the folder of a run"]),
        (["run", "run/recipe.yaml"], ["is a file"]),
        (["run/recipe.yaml", "out"], ["no folder run/recipe.yaml"]),
        (["run/checkpoints", "out"], ["not the folder of an adapter"]),
        (["run", "out", "--overwrite", "--quick"], ["--quick"]),
    ],
)
def test_what_cannot_be_exported(adalora: Run, run: Path, arguments: list[str], words: list[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(adalora("export", *arguments), *words)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_unfinished_run_says_how_to_finish_it(adalora: Run, run: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors", "metrics.json"):
        (run / file).unlink()
    refused(adalora("export", run, "out"), "not finished", "--resume")


def test_overwriting_replaces_what_an_engine_would_load(adalora: Run, run: Path) -> None:
    out = Path("out")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = adalora("export", run, "out")
    assert done.code == 2 and "not empty" in done.err and [file.name for file in out.iterdir()] == ["notes.txt"]
    assert adalora("export", run, "out", "--overwrite").code == 0
    assert adalora("export", run, "out", "--format", "merged", "--overwrite").code == 0
    names = {file.name for file in out.iterdir()}
    assert "model.safetensors" in names and (out / "notes.txt").read_text() == "mine"
    assert not {"adapter_model.safetensors", "adapter_config.json"} & names, "the adapter would be loaded once more"
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in out.iterdir())


def test_float16_overflow_names_the_tensor(adalora: Run, tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    tensors = weights(tmp_path / "adapter")
    key = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {key: tensors[key] * 1e7}, tmp_path / "adapter" / "adapter_model.safetensors")
    refused(adalora("export", tmp_path / "adapter", "out", "--dtype", "float16"), "lora_A", "bfloat16")
    merged = adalora("export", tmp_path / "adapter", "out", "--format", "merged", "--dtype", "float16")
    refused(merged, "too large for float16", "bfloat16")


def test_a_method_that_leaves_no_lora_is_named(adalora: Run, tiny_model: Path, files: Path) -> None:
    rows = ["--train", files / "train.csv", "--eval", files / "test.csv"]
    short = ["--set", "training.max_steps=2", "--output", "head"]
    done = adalora("train", "--model", tiny_model, *rows, "--method", "head", *short)
    assert done.code == 0, done.err
    refused = adalora("export", "head", "out")
    assert refused.code == 2 and "trained by method head, which leaves no LoRA adapter" in refused.err
    assert not Path("out").exists()
