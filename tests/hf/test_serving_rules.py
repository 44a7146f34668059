"""What engines do with an exported adapter: their loaders' rules in our own words, and the engines themselves.

An engine reads two files and adds ΔW = scale · B A to the weights it knows by name; engines differ in what they refuse
and in where they take the scale and the ranks from. Each function below is one loader in a few lines, with the files
that it was written after; it returns the ΔW that the engine would compute, and the test holds the resulting logits to
those of the model in training. The engines that can be had run at the end.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import adalora
from adalora import AdaLoraConfig
from adalora.serving import export

TOLERANCE = 1e-4  # float32 logits of order 10 after products in another order
VOCABULARY = 64


class RefusedError(Exception):
    """What an engine's loader would say."""


class Files(NamedTuple):
    """An adapter's folder as an engine sees it."""

    config: dict[str, Any]
    pairs: dict[str, tuple[Tensor, Tensor]]  # B [d_out, r] and A [r, d_in] by module name
    others: list[str]  # every other key


def read(folder: Path) -> Files:
    """The two files; a tensor is known by its name alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
    names = [match[1] for match in map(pattern.fullmatch, tensors) if match]
    pairs = {name: tuple(tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "BA") for name in names}
    return Files(config, pairs, sorted(tensors))


def layer(name: str) -> int:
    return int(re.search(r"layers\.(\d+)\.", name)[1])


# -------------------------------------------------------------------------------------------------- loaders' rules


def vllm(folder: Path, *, reads_patterns: bool = False, max_lora_rank: int = 8) -> dict[str, Tensor]:
    """vllm/lora: peft_helper.py (configuration), utils.py and lora_model.py (names), layers/*.py (shapes).

    Modules that are left out count as zero, also one of three that vLLM packs into ``qkv_proj``; each tensor is copied
    into a buffer of ``max_lora_rank`` with the rank that it has. Versions before rank_pattern was read have one scale.
    """
    config, pairs, others = read(folder)
    unknown = [key for key in others if not re.search(r"\.(classifier|score)\.(weight|bias)$", key)]
    faults = [
        name
        for name in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora")
        if config.get(name)
    ]
    faults += [name for name in config["modules_to_save"] or [] if name not in ("classifier", "score")]
    faults += ["bias"] if config["bias"] != "none" else []
    faults += (
        ["init_lora_weights"] if config["init_lora_weights"] not in (True, "gaussian", "eva", "orthogonal") else []
    )
    faults += unknown
    if max([config["r"], *config["rank_pattern"].values()]) > max_lora_rank:
        faults.append("max_lora_rank")
    if faults:
        raise RefusedError(", ".join(faults))

    def of(pattern: str, name: str, otherwise: float) -> float:
        found = config[pattern] if reads_patterns else {}
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)

    deltas = {}
    for name, (b, a) in pairs.items():
        rank, alpha = of("rank_pattern", name, config["r"]), of("alpha_pattern", name, config["lora_alpha"])
        assert len(a) <= max_lora_rank
        deltas[name] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
    return deltas


def sglang(folder: Path) -> dict[str, Tensor]:
    """sglang/srt/lora: lora_config.py and lora.py (one scale), mem_pool.py (one rank), lora.py (what is stacked)."""
    config, pairs, others = read(folder)
    if isinstance(config["target_modules"], str) and config["target_modules"] != "all-linear":
        raise RefusedError("target_modules is a regular expression")
    if config["use_dora"] or others:
        raise RefusedError(f"use_dora={config['use_dora']}, {others}")
    if overridden := {rank for rank in config["rank_pattern"].values() if rank != config["r"]}:
        raise RefusedError(f"ranks {overridden} beside r={config['r']}")
    for name, (_, a) in pairs.items():
        if len(a) != config["r"]:
            raise RefusedError(f"{name} has rank {len(a)}, not r={config['r']}")
        for part, needed in (
            ("k_proj", "q_proj"),
            ("v_proj", "q_proj"),
            ("q_proj", "v_proj"),
            ("up_proj", "gate_proj"),
        ):
            if name.endswith(part) and name.replace(part, needed) not in pairs:
                raise RefusedError(f"{name} without its {needed}")
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (b, a) in pairs.items()}


def lorax(folder: Path) -> dict[str, Tensor]:
    """predibase/lorax and text-generation-inference, server/.../adapters/lora.py: a stack over layers of each type.

    A type that is missing in one layer is dropped in all, without a word; ranks are padded to 8, above that to the next
    multiple of 16, and must then be equal within a type.
    """
    config, pairs, others = read(folder)
    if others:
        raise RefusedError(", ".join(others))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    kinds: dict[str, list[str]] = {}
    for name in pairs:
        kinds.setdefault(name.rsplit(".", 1)[1], []).append(name)
    layers = {layer(name) for name in pairs}
    deltas = {}
    for kind, names in kinds.items():
        padded = {8 if len(pairs[name][1]) <= 8 else math.ceil(len(pairs[name][1]) / 16) * 16 for name in names}
        if len(padded) > 1:
            raise RefusedError(f"{kind} has the padded ranks {sorted(padded)}")
        if len(names) == len(layers):
            deltas |= {name: scale * pairs[name][0] @ pairs[name][1] for name in names}
    return deltas


def llama_cpp(folder: Path) -> dict[str, Tensor]:
    """convert_lora_to_gguf.py (what it reads) and src/llama-adapter.h (one alpha, over the rank of each tensor)."""
    config, pairs, others = read(folder)
    if others:
        raise RefusedError(f"unexpected {others}")
    return {name: config["lora_alpha"] / b.shape[1] * b @ a for name, (b, a) in pairs.items()}


# ------------------------------------------------------------------------------------------------ adapters to serve


class Served(NamedTuple):
    """A trained model whose matrices ended at different ranks, exported in every way that engines want it."""

    root: Path  # with base/, plain/, padded/, gguf/
    base: nn.Module
    ranks: dict[str, int]
    prompts: Tensor
    before: Tensor  # the base model's logits
    logits: Tensor  # with the adapter


def serve(root: Path, **settings: Any) -> Served:
    """Train a tiny Llama until its ranks differ, and export it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    base = LlamaForCausalLM.from_pretrained(root / "base")
    defaults: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_alpha": 16, "total_step": 12, "tinit": 2,
        "tfinal": 3, "deltaT": 2,
    }  # fmt: skip
    model = adalora.get_peft_model(copy.deepcopy(base), AdaLoraConfig(**{**defaults, **settings}))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    for _ in range(12):
        tokens = torch.randint(4, VOCABULARY, (4, 16)) // 8 * 8 % VOCABULARY
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    prompts = torch.randint(4, VOCABULARY, (2, 8))
    adalora.export_lora(model, root / "plain")
    export(root / "plain", root / "padded", pad=True)
    export(root / "plain", root / "gguf", "gguf-ready")
    with torch.no_grad():
        before, logits = base(input_ids=prompts).logits, model(input_ids=prompts).logits
    assert (logits - before).abs().max() > 1, "an adapter that does nothing shows nothing"
    return Served(root, base, adalora.ranks(model), prompts, before, logits)


def tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Different ranks, none of them 0."""
    served = serve(tmp_path_factory.mktemp("uneven"), target_r=5, init_r=6)
    assert len(set(served.ranks.values())) > 1 and min(served.ranks.values()) > 0, served.ranks
    return served


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Different ranks, and whole matrices pruned away."""
    served = serve(tmp_path_factory.mktemp("pruned"), target_r=2, init_r=6)
    gone = [name for name, rank in served.ranks.items() if rank == 0]
    assert 0 < len(gone) < len(served.ranks), served.ranks
    return served


def logits_with(served: Served, deltas: dict[str, Tensor]) -> Tensor:
    """The base model's logits with these updates in its weights."""
    model = copy.deepcopy(served.base)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta
        return model(input_ids=served.prompts).logits


def error(served: Served, deltas: dict[str, Tensor]) -> float:
    return float((logits_with(served, deltas) - served.logits).abs().max())


# ------------------------------------------------------------------------------------------------------- by the rules


@pytest.mark.compatibility("Serving", "vLLM: its loader's rules, whether it reads rank patterns or not")
@pytest.mark.parametrize("reads_patterns", [True, False])
@pytest.mark.parametrize("form", ["plain", "padded"])
@pytest.mark.parametrize("ranks", ["uneven", "pruned"])
def test_vllm_takes_the_adapter_as_it_is_saved(
    ranks: str, form: str, reads_patterns: bool, request: pytest.FixtureRequest
) -> None:
    served = request.getfixturevalue(ranks)
    assert error(served, vllm(served.root / form, reads_patterns=reads_patterns)) < TOLERANCE


@pytest.mark.compatibility("Serving", "vLLM: DoRA, `bias`, `modules_to_save` (serve them merged)", refused=True)
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head"),
    ],
)
def test_vllm_can_see_what_it_does_not_know(settings: dict[str, Any], word: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adalora.get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)),
        AdaLoraConfig(**{"target_modules": ["q_proj", "v_proj"], "target_r": 2, "total_step": 20, **settings}),
    )  # fmt: skip
    model(input_ids=torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1, 2, dtype=torch.long)).loss.backward()
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1).step()
    with pytest.raises(RefusedError, match=word):
        vllm(adalora.export_lora(model, tmp_path))


@pytest.mark.compatibility("Serving", "vLLM: `max_lora_rank` counts what is left, not `init_r`")
def test_the_rank_that_vllm_must_allow_is_the_largest_that_is_left(tmp_path: Path) -> None:
    served = serve(tmp_path, target_r=2, init_r=12)
    largest = max(served.ranks.values())
    assert largest < 12
    vllm(tmp_path / "plain", max_lora_rank=largest)
    with pytest.raises(RefusedError, match="max_lora_rank"):
        vllm(tmp_path / "plain", max_lora_rank=largest - 1)


@pytest.mark.compatibility("Serving", "SGLang: its loader's rules, with `--max-rank-pad` (not run)")
@pytest.mark.parametrize("ranks", ["uneven", "pruned"])
def test_sglang_takes_a_padded_adapter(ranks: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(ranks)
    with pytest.raises(RefusedError, match="beside r="):
        sglang(served.root / "plain")
    assert error(served, sglang(served.root / "padded")) < TOLERANCE


@pytest.mark.compatibility(
    "Serving", "LoRAX and Text Generation Inference: their loader's rules, with `--max-rank-pad` (not run)"
)
@pytest.mark.parametrize("ranks", ["uneven", "pruned"])
def test_lorax_takes_a_padded_adapter(ranks: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(ranks)
    assert error(served, lorax(served.root / "padded")) < TOLERANCE


def test_lorax_drops_a_kind_of_module_that_one_layer_lacks(pruned: Served) -> None:
    assert error(pruned, lorax(pruned.root / "plain")) > 0.1, "then padding would not need the pruned modules"


@pytest.mark.compatibility("Serving", "llama.cpp: one alpha over each tensor's rank, with `--format gguf-ready`")
@pytest.mark.parametrize("ranks", ["uneven", "pruned"])
def test_llama_cpp_divides_alpha_by_the_rank_of_each_tensor(ranks: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(ranks)
    assert error(served, llama_cpp(served.root / "plain")) > 0.1, "then nothing would need padding"
    assert error(served, llama_cpp(served.root / "gguf")) < TOLERANCE


# ------------------------------------------------------------------------------------------------------- really served

LLAMA_CPP = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.llama import LlamaModel
LlamaModel.set_vocab = LlamaModel._set_vocab_none  # the tokenizer is not one of those that llama.cpp knows
sys.argv = sys.argv[2:]
runpy.run_path(sys.path[0] + "/" + sys.argv[0], run_name="__main__")
"""


def engine(module: str, variable: str) -> str:
    """The Python that has an engine: this one, or one that the environment names."""
    if found := os.environ.get(variable):
        return found
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed, and {variable} names no Python that has it")
    return sys.executable


def run(*command: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def served_by(python: str, name: str, served: Served, forms: list[str]) -> dict[str, float]:
    """Largest difference of log probabilities from the model in training, for each form and for the base model."""
    np.save(served.root / "prompts.npy", served.prompts.numpy())
    run(python, Path(__file__).with_name("serving_run.py"), name, served.root, *forms)
    got = np.load(served.root / "logprobs.npz")
    expected = {"base": served.before} | dict.fromkeys(forms, served.logits)
    return {
        form: float(np.abs(got[form] - logits.double().log_softmax(-1).numpy()).max())
        for form, logits in expected.items()
    }


@pytest.mark.slow
@pytest.mark.compatibility("Serving", "vLLM serves an adapter: logits")
def test_vllm_serves_what_was_trained(pruned: Served) -> None:
    errors = served_by(engine("vllm", "ADALORA_VLLM_PYTHON"), "vllm", pruned, ["plain", "padded"])
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.compatibility("Serving", "llama.cpp serves an adapter of `--format gguf-ready`: logits")
def test_llama_cpp_serves_what_was_trained(pruned: Served) -> None:
    python = engine("llama_cpp", "ADALORA_LLAMA_CPP_PYTHON")
    sources = os.environ.get("ADALORA_LLAMA_CPP_SOURCES")
    if not sources:
        pytest.skip("ADALORA_LLAMA_CPP_SOURCES names no folder with llama.cpp's convert_lora_to_gguf.py")
    root = pruned.root
    to_f32 = ("--outtype", "f32", "--outfile")
    run(sys.executable, "-c", LLAMA_CPP, sources, "convert_hf_to_gguf.py", root / "base", *to_f32, root / "base.gguf")
    for form in ("plain", "gguf"):
        converter = Path(sources) / "convert_lora_to_gguf.py"
        run(sys.executable, converter, "--base", root / "base", *to_f32, root / f"{form}.gguf", root / form)
    errors = served_by(python, "llama_cpp", pruned, ["plain", "gguf"])
    assert max(errors["base"], errors["gguf"]) < TOLERANCE, errors
    assert errors["plain"] > 0.1, "then nothing would need padding"
