"""Methods that add nothing to the model: counts of the papers, and what their files are good for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from adalora import methods
from adalora.methods import Job
from adalora.recipe import RecipeError

from .jobs import adapt, head_parameters, job_for, outputs, recipe_for, saved_parameters, tiny_bert
from .test_sizes import deberta_v3_base


def job(name: str, folder: Path) -> Job:
    return job_for(recipe_for(name), folder)


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0))


def test_full_is_saved_as_a_model_that_transformers_loads_by_itself(tmp_path: Path) -> None:
    _, adapted = adapt("full", tmp_path)
    adapted.save(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(loaded).logits, outputs(adapted.model).logits)
    assert all(parameter.requires_grad for parameter in adapted.model.parameters())


def test_full_keeps_tied_weights_tied(tmp_path: Path) -> None:
    model, method = tiny_gpt2(), methods.get("full")
    method.adapt(model, job("full", tmp_path)).save(tmp_path / "saved")
    loaded = method.load(tiny_gpt2(), recipe_for("full"), tmp_path / "saved")
    assert isinstance(loaded, GPT2LMHeadModel) and loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_bitfit_trains_the_papers_share_of_bert_large(tmp_path: Path) -> None:
    """0.08 % (table 1 of arXiv 2106.10199): in each layer four attention biases, two of the feed-forward network and
    two of layer norms; one of the embeddings' norm and one of the pooler."""
    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    methods.get("bitfit").adapt(model, job("bitfit", tmp_path))
    biases = sum(p.numel() for p in model.bert.parameters() if p.requires_grad)
    assert biases == 24 * (4 * 1024 + 4096 + 1024 + 2 * 1024) + 1024 + 1024
    assert f"{100 * biases / sum(p.numel() for p in model.bert.parameters()):.2f}" == "0.08"


def test_bitfit_trains_what_adalora_says_of_debertav3_base(tmp_path: Path) -> None:
    """0.1M (table 1 of arXiv 2303.10512)."""
    model = deberta_v3_base()
    methods.get("bitfit").adapt(model, job("bitfit", tmp_path))
    assert f"{sum(p.numel() for p in model.deberta.parameters() if p.requires_grad) / 1e6:.1f}" == "0.1"


def test_only_what_was_trained_is_in_the_file(tmp_path: Path) -> None:
    for name in ("head", "bitfit"):
        _, adapted = adapt(name, tmp_path / name)
        adapted.save(tmp_path / name)
        trained = {key for key, parameter in adapted.model.named_parameters() if parameter.requires_grad}
        assert set(load_file(tmp_path / name / "adapter_model.safetensors")) == trained
    assert saved_parameters(tmp_path / "head") == 0 and head_parameters() == 66
    assert saved_parameters(tmp_path / "bitfit") == 32 + 2 * (6 * 32 + 2 * 32) + 32


def test_a_model_without_biases_is_refused_before_anything_changes(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForSequenceClassification(config)
    with pytest.raises(RecipeError, match=r"method bitfit: tiny \(LlamaForSequenceClassification\) has no biases"):
        methods.get("bitfit").adapt(model, job("bitfit", tmp_path))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_language_model_has_no_output_layer_of_the_tasks_own(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method head: .* a language model's was pretrained with it"):
        methods.get("head").adapt(tiny_gpt2(), job("head", tmp_path))


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    _, adapted = adapt("head", tmp_path)
    adapted.save(tmp_path)
    with pytest.raises(RecipeError, match=r"does not fit the model: bert\..*bias \(one of 18\) is missing on one side"):
        methods.get("bitfit").load(tiny_bert(), recipe_for("bitfit"), tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"], ids=["none", "empty", "cut"])
def test_a_file_that_is_not_whole_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"adapter_model\.safetensors cannot be read: .* Was the run finished\?"):
        methods.get("head").load(tiny_bert(), recipe_for("head"), tmp_path)
