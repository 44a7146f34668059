"""LoRA and its variants: what makes each of them one, and that stock PEFT loads what they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from adalora import methods
from adalora.methods import Adapted, low_rank
from adalora.methods.sizes import lora_parameters
from adalora.recipe import RecipeError

from .jobs import POOLER, adapt, job_for, outputs, recipe_for, rows, tiny_bert, trainer_for

VARIANTS = ["dora", "eva", "lora", "lora_gradient", "pissa", "rslora"]
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def tiny_deberta() -> PreTrainedModel:
    """With a pooler beside the body, and attention that multiplies relative positions by its query and key too."""
    config = DebertaV2Config(
        vocab_size=10,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    )
    return DebertaV2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_peft_loads_the_adapter_on_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    _, adapted = adapt(name, tmp_path, steps=4)
    trainer_for(adapted, tmp_path, steps=4).train()
    adapted.save(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "saved")
    torch.testing.assert_close(outputs(loaded).logits, outputs(adapted.model).logits, atol=1e-6, rtol=0)
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["inference_mode"] and settings["init_lora_weights"] is True
    assert settings["eva_config"] is None and settings["task_type"] == "SEQ_CLS"
    if name != "dora":  # whose norms merging recomputes
        torch.testing.assert_close(
            outputs(loaded.merge_and_unload()).logits, outputs(adapted.model).logits, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_layer_is_trained_and_not_adapted(name: str, tmp_path: Path) -> None:
    """DeBERTa's pooler belongs to it, though a linear module as others are."""
    job = job_for(
        recipe_for(name, lora={"exclude_modules": None, "modules_to_save": ["embeddings.LayerNorm"]}), tmp_path
    )
    adapted = methods.get(name).adapt(tiny_deberta(), job)
    assert len(adapted.ranks()) == 6 and not any("pooler" in matrix for matrix in adapted.ranks())
    adapted.save(tmp_path)
    saved = set(load_file(tmp_path / "adapter_model.safetensors"))
    for part in ("pooler.dense.weight", "classifier.bias", "deberta.embeddings.LayerNorm.weight"):
        assert f"base_model.model.{part}" in saved


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "eva"])
def test_the_model_starts_as_it_was(name: str, tmp_path: Path) -> None:
    """To single precision: PiSSA subtracts what it adds. EVA's B is zero, too, but with another output layer here."""
    model = tiny_bert()
    expected = outputs(model).logits
    adapted = methods.get(name).adapt(model, job_for(recipe_for(name), tmp_path))
    torch.testing.assert_close(outputs(adapted.model).logits, expected, atol=1e-5, rtol=0)


def test_the_variants_differ_in_what_they_are_named_for(tmp_path: Path) -> None:
    found = {name: layers(adapt(name, tmp_path)[1].model) for name in VARIANTS}
    scales = {name: {layer.scaling["default"] for layer in adapters} for name, adapters in found.items()}
    assert scales.pop("rslora") == {8 / 4**0.5}  # alpha 8, rank 4
    assert all(scale == {8 / 4} for scale in scales.values())
    assert [name for name, adapters in found.items() if adapters[0].use_dora["default"]] == ["dora"]


def test_pissa_takes_the_largest_singular_triplets_out_of_the_base(tmp_path: Path) -> None:
    original = tiny_bert().bert.encoder.layer[0].attention.self.query.weight
    _, adapted = adapt("pissa", tmp_path)
    layer = layers(adapted.model)[0]
    values, all_values = torch.linalg.svdvals(layer.base_layer.weight), torch.linalg.svdvals(original)
    torch.testing.assert_close(values[:28], all_values[4:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default") + layer.base_layer.weight, original)


def test_pissa_is_saved_with_twice_its_rank(tmp_path: Path) -> None:
    _, adapted = adapt("pissa", tmp_path)
    adapted.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    shapes = {value.shape for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_" in key}
    assert shapes == {(8, 32), (32, 8)} and set(adapted.ranks().values()) == {4}


def test_eva_starts_from_the_main_directions_of_a_matrix_inputs(tmp_path: Path) -> None:
    """Those of the first layer's, padding left out, by an eigendecomposition of their covariance; and ranks move, but
    not their sum."""
    data = rows()
    base = tiny_bert()
    with torch.no_grad():
        inputs = base.bert.embeddings(torch.tensor(data["input_ids"])).flatten(0, 1)
    directions = torch.linalg.eigh(torch.cov(inputs.T)).eigenvectors.flip(1)[:, :2].T
    _, adapted = adapt("eva", tmp_path)
    query = next(layer for layer in layers(adapted.model))
    cosines = (query.lora_A["default"].weight[:2] @ directions.T).abs().diagonal()
    assert (cosines > 0.98).all(), cosines  # an incremental decomposition, stopped when it changes by under 1 %
    assert not query.lora_B["default"].weight.any()
    ranks = adapted.ranks()
    assert sum(ranks.values()) == 4 * 12 and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8


def test_the_gradient_start_is_the_right_singular_vectors_of_the_loss(tmp_path: Path) -> None:
    """Of the mean loss of the batches it looked at, in evaluation mode; B = 0 and rows of length 1."""
    recipe = recipe_for("lora_gradient", lora={"r": 3})
    _, adapted = adapt("lora_gradient", tmp_path, recipe)
    assert adapted.start is not None and (adapted.start.batches, adapted.start.sweeps) == (8, 4)
    model = adapted.model.eval()
    found = layers(model)
    for layer in found:
        layer.get_base_layer().weight.requires_grad_(True)
    batches = list(job_for(recipe, tmp_path).batches())  # four, of eight that it would look at
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for layer in found:
        a, g = layer.lora_A["default"].weight.detach(), layer.get_base_layer().weight.grad
        assert not layer.lora_B["default"].weight.any()
        torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-5)
        held = float((g @ a.T).square().sum() / torch.linalg.svdvals(g)[:3].square().sum())
        assert 0.97 < held <= 1 + 1e-5


def test_eva_reads_real_tokens_alone() -> None:
    config = low_rank.LoraConfig(init_lora_weights="eva", eva_config=low_rank.EvaConfig())
    mask, x = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.arange(12.0).view(2, 3, 2)
    batch = {"input_ids": mask, "attention_mask": mask}
    taken = low_rank._at_real_tokens((x,), low_rank._real_tokens(batch, config), "query")
    assert taken.tolist() == [[0, 1], [2, 3], [6, 7]]
    answers = {"labels": torch.tensor([[-100, 5, -100], [5, -100, -100]])}
    taken = low_rank._at_real_tokens(x, low_rank._real_tokens(batch | answers, config), "query")
    assert taken.tolist() == [[2, 3], [6, 7]], "tokens that it should predict"
    summary = {"labels": torch.tensor([[5, 5], [5, -100]])}
    masks = low_rank._real_tokens(batch | summary, config)
    assert low_rank._at_real_tokens(x, masks, "encoder").tolist() == [[0, 1], [2, 3], [6, 7]]
    assert low_rank._at_real_tokens(x[:, :2], masks, "decoder").tolist() == [[0, 1], [2, 3], [6, 7]]
    assert low_rank._at_real_tokens(x[:, 0], masks, "pooler").tolist() == [[0, 1], [6, 7]]


def test_eva_on_an_encoder_decoder_and_a_language_model(tmp_path: Path) -> None:
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=20,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=16,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **ENDS,
        )
    )
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, **ENDS))
    batch = {"input_ids": torch.randint(3, 20, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    for model, kind, labels in ((bart, "SEQ_2_SEQ_LM", torch.randint(3, 20, (4, 6))), (gpt, "CAUSAL_LM", None)):
        job = job_for(recipe_for("eva", lora={"r": 2, "exclude_modules": None}), tmp_path)
        own = batch | {"labels": batch["input_ids"] if labels is None else labels}
        own_job = type(job)(**{**vars(job), "task_type": kind, "batches": lambda own=own: [own] * 3})
        ranks = methods.get("eva").adapt(model, own_job).ranks()
        assert sum(ranks.values()) == 2 * len(ranks) == 2 * {"SEQ_2_SEQ_LM": 16, "CAUSAL_LM": 4}[kind]


def test_eva_gives_up_where_a_matrix_sees_too_few_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler sees one input a row: batches of four never hold the eight that rank 4 needs. PEFT would go on for
    ever."""
    monkeypatch.setattr(low_rank, "EVA_STEPS", 10)
    job = job_for(recipe_for("eva", lora={"exclude_modules": None}), tmp_path)
    few = type(job)(**{**vars(job), "batches": lambda: list(rows().with_format("torch").iter(4))})
    with pytest.raises(
        RecipeError, match=r"did not settle in 10 batches\. .* than 2 x lora\.r \(8\): raise training\."
    ):
        methods.get("eva").adapt(tiny_bert(), few)


@pytest.mark.parametrize(("name", "most"), [("pissa", 32), ("eva", 16)])
def test_more_directions_than_a_matrix_has_are_refused(name: str, most: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.r: method {name} finds at most {most} directions in bert\.\S+query"):
        adapt(name, tmp_path, recipe_for(name, lora={"r": most + 1}))


def test_a_budget_keeps_the_proportion_of_alpha_to_rank() -> None:
    for lora, alpha in (({}, 6.0), ({"r": 8, "lora_alpha": 32}, 12.0)):
        sized = methods.get("lora").with_budget(tiny_bert(), recipe_for("lora", lora=lora), 3 * 12 * 64)
        assert (sized.lora.r, sized.lora.lora_alpha) == (3, alpha)


def test_a_budget_leaves_a_recipe_as_it_is_that_has_its_rank() -> None:
    """A resumed run resolves its own resolved recipe, and is refused when that moves by a rounding error: 16 * 11 / 6
    does not survive another * 11 / 11."""
    budget = lora_parameters(tiny_bert(), "all-linear", POOLER, 11)
    once = methods.get("lora").with_budget(tiny_bert(), recipe_for("lora", lora={"r": 6, "lora_alpha": 16}), budget)
    assert once.lora.r == 11
    assert methods.get("lora").with_budget(tiny_bert(), once, budget) == once


def test_targets_that_match_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"target_modules: .*'querry'.* matches nothing in BertForSequenceClass"):
        adapt("lora", tmp_path, recipe_for("lora", lora={"target_modules": ["querry"]}))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    adapted: Adapted = adapt("lora", tmp_path)[1]
    files = ("adapter_config.json", "adapter_model.safetensors")
    written = []
    for place in ("one", "two"):
        adapted.save(tmp_path / place)
        written.append([(tmp_path / place / file).read_bytes() for file in files])
    assert written[0] == written[1]
