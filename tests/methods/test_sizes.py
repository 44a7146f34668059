"""Parameters are counted on a copy without weights, and agree with the papers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from adalora.methods.sizes import body_without_weights, lora_parameters, nearest, parse_budget, rank_for
from adalora.recipe import RecipeError

from .jobs import POOLER, recipe_for, tiny_bert


def deberta_v3_base() -> PreTrainedModel:
    """The shape of the paper's encoder, without weights."""
    config = DebertaV2Config(
        vocab_size=128100,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )
    with torch.device("meta"):
        return DebertaV2ForSequenceClassification(config)


def test_lora_on_debertav3_base_has_the_papers_sizes() -> None:
    """Table 1 of AdaLoRA: 1.33M at rank 8, 0.33M at rank 2; 12 x (4 (768 + 768) + 2 (768 + 3072)) a rank."""
    model = deberta_v3_base()
    sizes = {rank: lora_parameters(model, "all-linear", None, rank) for rank in (2, 8)}
    assert sizes == {rank: 12 * (4 * 2 * 768 + 2 * 3840) * rank for rank in (2, 8)}
    assert [f"{size / 1e6:.2f}M" for size in sizes.values()] == ["0.33M", "1.33M"]


def test_lora_on_bart_large_has_the_papers_share() -> None:
    """Table 3 of AdaLoRA: 1.10 % at rank 8."""
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig())  # bart-large is the default
    whole = sum(parameter.numel() for parameter in model.parameters())
    attention, network = 4 * 2 * 1024, 2 * (1024 + 4096)  # a rank; decoder layers attend twice
    size = lora_parameters(model, "all-linear", None, 8)
    assert size == 8 * (12 * (attention + network) + 12 * (2 * attention + network))
    assert f"{100 * size / whole:.1f}" == "1.1"


def test_the_count_is_that_of_an_adapter_on_the_model_itself() -> None:
    for dora in (False, True):
        counted = lora_parameters(tiny_bert(), "all-linear", POOLER, 3, use_dora=dora)
        config = LoraConfig(r=3, target_modules="all-linear", exclude_modules=[*POOLER, "classifier"], use_dora=dora)
        adapted = get_peft_model(tiny_bert(), config)
        assert counted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_counting_leaves_model_and_random_state_alone() -> None:
    model, state = tiny_bert(), torch.get_rng_state()
    before = {name: (id(value), value.device.type, value.requires_grad) for name, value in model.named_parameters()}
    lora_parameters(model, "all-linear", None, 4)
    body = body_without_weights(model)
    assert torch.equal(state, torch.get_rng_state())
    after = {name: (id(value), value.device.type, value.requires_grad) for name, value in model.named_parameters()}
    assert before == after
    assert {value.device.type for value in (*body.parameters(), *body.buffers())} == {"meta"}
    assert sum(p.numel() for p in body.parameters()) == sum(p.numel() for p in model.base_model.parameters())


def test_gpt2s_transposed_layers_are_counted() -> None:
    """2 layers of (32, 96), (32, 32), (32, 128) and (128, 32), without PEFT's warning about them; the output layer,
    which is tied to the embedding, is no target."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    assert lora_parameters(GPT2LMHeadModel(config), "all-linear", None, 1) == 2 * (128 + 64 + 160 + 160)


@pytest.mark.parametrize(("parameters", "n"), [(60, 1), (100, 1), (124, 1), (125, 1), (126, 2), (175, 2), (1_000, 19)])
def test_the_nearest_size_is_taken_and_of_two_the_smaller(parameters: int, n: int) -> None:
    """Sizes 100, 150, 200, ..."""
    assert nearest(recipe_for("lora"), "rank", parameters, 100, 150) == n


def test_a_budget_may_be_twice_too_small_and_no_less() -> None:
    recipe = recipe_for("lora")
    assert nearest(recipe, "rank", 51, 100, 200) == 1
    with pytest.raises(RecipeError, match="50 parameters are too few for lora on tiny, which has 100 at rank 1"):
        nearest(recipe, "rank", 50, 100, 200)


def test_a_budget_is_a_number_or_a_rank_on_the_methods_own_matrices() -> None:
    model = tiny_bert()
    assert parse_budget(5000, model, recipe_for("lora")) == 5000
    assert parse_budget("rank 3", model, recipe_for("lora")) == 3 * 12 * 64
    for more in (99_999_999_999, "rank 99999"):
        with pytest.raises(RecipeError, match="more than the"):
            parse_budget(more, model, recipe_for("lora"))
    queries = {"target_modules": ["query"]}
    assert parse_budget("rank 3", model, recipe_for("lora", lora=queries)) == 3 * 2 * 64
    assert parse_budget("rank 3", model, recipe_for("adalora", adalora=queries)) == 3 * 2 * 64
    assert parse_budget("rank 0.25", model, recipe_for("lora")) == 3 * 64
    assert parse_budget("rank 1.3", model, recipe_for("adalora", adalora=queries)) == 166  # 1.3 x 128 = 166.4
    assert parse_budget(" rank  3 ", model, recipe_for("houlsby")) == 3 * 13 * 64, "all linear modules of the body"


@pytest.mark.parametrize("budget", [0, -1, "rank 0", "rank 0.0", "rank", "8", "rank -1", "0.3M"])
def test_any_other_budget_is_an_error_that_shows_both_forms(budget: int | str) -> None:
    with pytest.raises(
        RecipeError, match=r"number of parameters \(330000\), or a rank \(`rank 8`, `rank 0.25`\) \(given: "
    ):
        parse_budget(budget, tiny_bert(), recipe_for("lora"))


def test_targets_that_match_nothing_name_what_could() -> None:
    recipe = recipe_for("lora")
    with pytest.raises(RecipeError, match=r"target_modules: 'no' matches nothing .* called dense, key, query, value;"):
        rank_for(tiny_bert(), recipe, 1000, target_modules="no", exclude_modules=None)
    with pytest.raises(RecipeError, match=r"matches nothing .* \(exclude_modules: '\.\*query'\)"):
        rank_for(tiny_bert(), recipe, 1000, target_modules=".*query", exclude_modules=".*query")
