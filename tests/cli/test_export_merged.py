"""``adalora export --format merged``: the trained model, or exit code 2 and what to do; never the base alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import nn

import adalora as library
from adalora import AdaLoraConfig

from .conftest import Finished
from .test_export import refused, serving

Run = Callable[..., Finished]
TOKENS = torch.arange(20).view(2, 10)
TOLERANCE = 1e-5  # float32 outputs of order 1; merging adds ΔW to W before the product
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def llama(folder: Path, layers: int = 2) -> Path:
    T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).save_pretrained(folder)
    return folder


def trained(model: nn.Module, folder: Path, targets: Any, **settings: Any) -> Any:
    """The model with an adapter whose updates are not 0, saved in the folder."""
    config = AdaLoraConfig(target_modules=targets, target_r=2, init_r=3, total_step=20, **settings)
    model = library.get_peft_model(model, config)
    for part in library.allocator(model).triplets:
        with torch.no_grad():
            part.lam.copy_(torch.tensor([0.3, -0.2, 0.1]) / part.right.gain)
    library.export_lora(model, folder)
    return model.eval()


def hidden(model: Any) -> torch.Tensor:
    given = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS, **given)[0]
    return result


# ------------------------------------------------------------------------------------------------- what has its place


@serving("`adalora export --format merged`: an adapter of a model's body (`AutoModel`)")
def test_the_class_is_that_whose_modules_fit(adalora: Run, tmp_path: Path) -> None:
    body = T.AutoModel.from_pretrained(llama(tmp_path / "base"))
    model = trained(body, tmp_path / "adapter", ["q_proj"])
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    assert done.code == 0, done.err
    torch.testing.assert_close(hidden(T.AutoModel.from_pretrained("out")), hidden(model), rtol=0, atol=TOLERANCE)


@serving("`adalora export --format merged`: a vision-language model, `task_type` CAUSAL_LM")
def test_a_class_that_the_task_does_not_know(adalora: Run, tmp_path: Path) -> None:
    vision = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    config = T.LlavaConfig(text_config=T.LlamaConfig(**SIZES), vision_config=vision, image_token_index=63)
    T.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    base = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = trained(base, tmp_path / "adapter", r".*language_model.*q_proj", task_type="CAUSAL_LM")
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    assert done.code == 0, done.err
    merged = T.LlavaForConditionalGeneration.from_pretrained("out")
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (1, ["it adapts model.layers.1.self_attn.q_proj, which LlamaForCausalLM does not have", "--base"]),
        (3, ["LlamaForCausalLM has model.layers.2.self_attn.q_proj", "holds no tensors for it", "--base"]),
    ],
)
@serving("`adalora export --format merged` on a base model of fewer or more layers", refused=True)
def test_every_pair_has_a_place_and_no_further_layer_is_wrapped(
    adalora: Run, tmp_path: Path, layers: int, words: list[str]
) -> None:
    model = T.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base"))
    trained(model, tmp_path / "adapter", ["q_proj"], task_type="CAUSAL_LM")
    other = llama(tmp_path / "other", layers)
    refused(adalora("export", tmp_path / "adapter", "out", "--format", "merged", "--base", other), *words)


def test_other_tensors_have_their_place_or_are_named(adalora: Run, tmp_path: Path) -> None:
    model = T.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base"))
    trained(model, tmp_path / "adapter", ["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, words in (("base_model.model.tail.weight", "tail.weight is in it and has no place"), ("", "lm_head")):
        changed = {**tensors, key: torch.ones(3)} if key else dict(list(tensors.items()))
        if not key:
            changed["base_model.model.lm_head.weight"] = torch.ones(64, 31)
        save_file(changed, file, metadata={"format": "pt"})
        refused(adalora("export", tmp_path / "adapter", "out", "--format", "merged"), words)


# -------------------------------------------------------------------------------------------------- shared weights


def tied_qwen() -> nn.Module:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, tie_word_embeddings=True))


def tied_mamba() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    return T.MambaForCausalLM(T.MambaConfig(**sizes, tie_word_embeddings=True))


def tied_t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T.T5ForConditionalGeneration(T.T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("build", "targets", "settings"),
    [
        (tied_qwen, ["q_proj", "lm_head"], {}),
        (tied_qwen, ["q_proj", "embed_tokens"], {}),
        (tied_qwen, ["embed_tokens", "lm_head"], {}),
        (tied_qwen, ["q_proj"], {"modules_to_save": ["lm_head"]}),
        (tied_qwen, ["q_proj"], {}),
        (tied_mamba, ["x_proj", "lm_head"], {}),
        (tied_t5, ["q", "lm_head"], {}),
        (tied_t5, ["q", "shared"], {}),
    ],
    ids=["output", "embedding", "both", "output trained whole", "neither", "Mamba", "T5: output", "T5: shared"],
)
@serving("`adalora export --format merged`: tied weights, each its own (or refused: T5)")
def test_merged_is_trained_where_weights_are_shared(
    adalora: Run, tmp_path: Path, build: Callable[[], Any], targets: list[str], settings: dict[str, Any]
) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    kind = type(base)
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    loaded = kind.from_pretrained(tmp_path / "base")
    model = trained(loaded, tmp_path / "adapter", targets, task_type=task_type, **settings)
    if settings:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
        library.export_lora(model, tmp_path / "adapter")
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    if done.code and kind is T.T5ForConditionalGeneration:
        refused(done, "shares a weight", "--format lora")
        return
    assert done.code == 0, done.err
    merged = kind.from_pretrained("out")
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=0, atol=1e-4)
    assert (hidden(merged) - hidden(kind.from_pretrained(tmp_path / "base"))).abs().max() > 1e-3


@pytest.mark.compatibility(
    "PEFT's own methods", "`merge_adapter`, `merge_and_unload` into a weight that is tied: warned of"
)
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_in_memory_into_a_shared_weight_warns(call: str, tmp_path: Path) -> None:
    model = trained(tied_qwen(), tmp_path, ["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(
        UserWarning, match=r"lm_head shares its weight with model\.embed_tokens, which merging changes too"
    ):
        getattr(copy.deepcopy(model), call)()
    trained(tied_qwen(), tmp_path, ["q_proj"], task_type="CAUSAL_LM").merge_and_unload()  # warnings are errors here
    model.unload()


# ---------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"trainable_token_indices": [64, 65, 66, 67]}, False),
        ({"targets": ["embed_tokens", "q_proj"]}, True),
        ({"targets": ["lm_head", "q_proj"]}, True),
    ],
    ids=["trained whole", "trained tokens", "adapted embedding, output not saved", "rows that were not saved"],
)
@serving("`adalora export --format merged`: a vocabulary that was resized before training")
def test_a_resized_vocabulary(adalora: Run, tmp_path: Path, settings: dict[str, Any], told: bool) -> None:
    base = T.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base"))
    base.resize_token_embeddings(68, mean_resizing=False)
    targets = settings.pop("targets", ["q_proj"])
    model = trained(base, tmp_path / "adapter", targets, task_type="CAUSAL_LM", **settings)
    if told:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        pairs = {key: value for key, value in load_file(file).items() if ".lora_" in key}
        save_file(pairs, file, metadata={"format": "pt"})
        done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
        refused(done, "trained on 68 rows", "64 in", "--base MODEL")
        return
    done = adalora("export", tmp_path / "adapter", "out", "--format", "merged")
    assert done.code == 0, done.err
    merged = T.AutoModelForCausalLM.from_pretrained("out")
    assert merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size == 68
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=0, atol=TOLERANCE)
