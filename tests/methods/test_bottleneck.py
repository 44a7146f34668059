"""Bottleneck adapters: the papers' counts, their places in every family of models, and their start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, PreTrainedModel

from adalora import methods
from adalora.methods.bottleneck import Bottleneck, Extended
from adalora.recipe import Recipe, RecipeError

from .jobs import adapt, job_for, outputs, recipe_for, tiny_bert
from .test_sizes import deberta_v3_base


def recipe(name: str, width: int, **settings: Any) -> Recipe:
    return recipe_for(name, bottleneck={"width": width, **settings})


def added(model: PreTrainedModel, name: str, width: int, folder: Path) -> int:
    """Parameters of the adapters that the method adds to the model."""
    methods.get(name).adapt(model, job_for(recipe(name, width), folder))
    return sum(p.numel() for m in model.modules() if isinstance(m, Bottleneck) for p in m.parameters())


@pytest.mark.parametrize(
    ("name", "width", "paper"),
    [
        ("houlsby", 8, 0.31),
        ("houlsby", 16, 0.61),
        ("houlsby", 32, 1.22),
        ("pfeiffer", 16, 0.30),
        ("pfeiffer", 32, 0.60),
        ("pfeiffer", 64, 1.18),
    ],
)
def test_the_sizes_of_adaloras_tables(name: str, width: int, paper: float, tmp_path: Path) -> None:
    """DeBERTaV3-base, tables 1 and 5 of arXiv 2303.10512. The formula of Houlsby et al., 2 d m + m + d an adapter,
    gives 1.20M and 1.19M where the paper says 1.22M and 1.18M, which no whole width gives."""
    size = added(deberta_v3_base(), name, width, tmp_path)
    assert size == {"houlsby": 24, "pfeiffer": 12}[name] * (2 * 768 * width + width + 768)
    assert size / 1e6 == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize(("name", "published"), [("pfeiffer", 894_528), ("houlsby", 1_789_056)])
def test_the_sizes_of_adapterhub(name: str, published: int, tmp_path: Path) -> None:
    """BERT-base with a reduction factor of 16, `seq_bn` and `double_seq_bn` of the library that both authors use."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert added(model, name, 768 // 16, tmp_path) == published


@pytest.mark.parametrize(("name", "adapters"), [("houlsby", 24), ("pfeiffer", 12)])
def test_a_budget_finds_the_nearest_width(name: str, adapters: int) -> None:
    for parameters in (310_000, 1_220_000):
        width = methods.get(name).with_budget(deberta_v3_base(), recipe_for(name), parameters).bottleneck.width
        off = {w: abs(adapters * (2 * 768 * w + w + 768) - parameters) for w in range(1, 100)}
        assert width == min(off, key=lambda w: off[w])


FAMILIES: list[tuple[str, dict[str, Any], int, int]] = [
    # class, names in its configuration, layers with self-attention, layers with a feed-forward network
    ("RobertaForSequenceClassification", {"num_hidden_layers": 3}, 3, 3),
    ("ElectraForTokenClassification", {"num_hidden_layers": 3}, 3, 3),
    ("DebertaV2ForQuestionAnswering", {"num_hidden_layers": 3}, 3, 3),
    ("DistilBertForSequenceClassification", {"n_layers": 3, "dim": 16, "hidden_dim": 32, "n_heads": 2}, 3, 3),
    ("ModernBertForSequenceClassification", {"num_hidden_layers": 3}, 3, 3),
    ("BartForConditionalGeneration", {"encoder_layers": 2, "decoder_layers": 3, "d_model": 16}, 5, 5),
    ("T5ForConditionalGeneration", {"num_layers": 2, "num_decoder_layers": 3, "d_model": 16}, 5, 5),
    ("OPTForCausalLM", {"num_hidden_layers": 3, "ffn_dim": 32, "word_embed_proj_dim": 16}, 3, 3),
    ("GPT2LMHeadModel", {"n_layer": 3, "n_embd": 16, "n_head": 2}, 3, 3),
    ("LlamaForCausalLM", {"num_hidden_layers": 3}, 3, 3),
    ("Qwen2ForCausalLM", {"num_hidden_layers": 3, "num_key_value_heads": 2}, 3, 3),
    ("GPTNeoXForCausalLM", {"num_hidden_layers": 3}, 3, 3),
    ("PhiForCausalLM", {"num_hidden_layers": 3}, 3, 3),
]


@pytest.mark.parametrize(("kind", "settings", "attentions", "networks"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_every_family_has_its_places_and_answers_and_learns_with_them(
    kind: str, settings: dict[str, Any], attentions: int, networks: int, tmp_path: Path
) -> None:
    """Once behind each self-attention, never behind attention to the encoder, and once behind each network; the
    parameters of the adapters have gradients."""
    common = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    known = transformers.AutoConfig.for_model(getattr(transformers, kind).config_class.model_type)
    if "hidden_size" in known.to_dict():
        settings = sizes | settings
    config = type(known)(**common, **settings)
    model = getattr(transformers, kind)(config)
    model.config.pad_token_id = 0
    for name, places in (("pfeiffer", networks), ("houlsby", attentions + networks)):
        torch.manual_seed(0)
        fresh = getattr(transformers, kind)(config)
        adapted = methods.get(name).adapt(fresh, job_for(recipe(name, 4), tmp_path))
        extended = [module for module in adapted.model.modules() if isinstance(module, Extended)]
        assert len(extended) == places
        ids = torch.arange(3, 11)[None]
        decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        found = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
        first = found.logits if "logits" in found else found.start_logits + found.end_logits
        first.square().sum().backward()
        assert all(m.bottleneck.up.weight.grad.abs().sum() > 0 for m in extended)


def test_the_model_starts_near_what_it_was(tmp_path: Path) -> None:
    """Weights within 0.02, no biases: logits move by a hundredth, not more, and not by nothing."""
    base, (_, adapted) = outputs(tiny_bert()).logits, adapt("houlsby", tmp_path)
    bottlenecks = [module for module in adapted.model.modules() if isinstance(module, Bottleneck)]
    assert len(bottlenecks) == 4
    for linear in (part for bottleneck in bottlenecks for part in (bottleneck.down, bottleneck.up)):
        assert linear.weight.abs().max() <= 0.02 and linear.weight.std() > 0.005 and not linear.bias.any()
    adapted.model.classifier.load_state_dict(tiny_bert().classifier.state_dict())
    hidden = tiny_bert().bert(torch.arange(1, 9)[None]).last_hidden_state
    moved = adapted.model.bert.eval()(torch.arange(1, 9)[None]).last_hidden_state - hidden
    assert 0 < moved.abs().max() < 0.02 and base.isfinite().all()


def test_an_adapter_computes_the_papers_formula() -> None:
    adapter = Bottleneck(6, 2, "relu").double()
    y = torch.randn(3, 5, 6, dtype=torch.float64)
    hidden = (y @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    torch.testing.assert_close(adapter(y), y + hidden @ adapter.up.weight.T + adapter.up.bias)


def test_adapters_take_the_type_of_the_model(tmp_path: Path) -> None:
    model = tiny_bert().to(torch.bfloat16)
    adapted = methods.get("pfeiffer").adapt(model, job_for(recipe("pfeiffer", 4), tmp_path))
    assert {parameter.dtype for parameter in adapted.model.parameters()} == {torch.bfloat16}
    assert outputs(adapted.model).logits.dtype == torch.bfloat16


def test_generation_goes_through_the_adapters(tmp_path: Path) -> None:
    """Up-projections with large biases change what is written."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, **ends)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(1, 5)[None]
    generate: Callable[[], Any] = lambda: model.generate(  # noqa: E731
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    before = generate()
    methods.get("pfeiffer").adapt(model, job_for(recipe("pfeiffer", 4), tmp_path))
    for module in model.modules():
        if isinstance(module, Bottleneck):
            torch.nn.init.normal_(module.up.bias, std=10.0)
    assert not torch.equal(generate(), before)


def test_an_unknown_model_is_refused_with_what_is_known(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(
        RecipeError, match=r"do not know where in a MambaForCausalLM they belong; .*; T5; .*such as lora"
    ):
        methods.get("houlsby").adapt(model, job_for(recipe("houlsby", 4), tmp_path))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_activation_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bottleneck\.activation: Transformers has no 'gellu': did you mean gelu\?"):
        methods.get("houlsby").adapt(tiny_bert(), job_for(recipe("houlsby", 4, activation="gellu"), tmp_path))


def test_adapters_of_another_width_are_not_loaded(tmp_path: Path) -> None:
    method, adapted = adapt("pfeiffer", tmp_path, recipe("pfeiffer", 4))
    adapted.save(tmp_path)
    with pytest.raises(RecipeError, match=r"does not fit the model: .*bottleneck\.down.* has another shape"):
        method.load(tiny_bert(), recipe("pfeiffer", 5), tmp_path)
