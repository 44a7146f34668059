"""The gradient start on real architectures, against dense decompositions of the true gradient of W0."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

import adalora
from adalora import AdaLoraConfig
from adalora.core.errors import ConfigError, StateError
from adalora.hf import start as start_module
from adalora.hf.layers import adapted_layers

from .models import ARCHITECTURES, VOCABULARY, batch, bert, llama, t5

RANK = 3
Losses = Callable[[nn.Module, Any], Tensor]


class Convolutions(nn.Module):
    """With strides, paddings and activations that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 10, (3, 2), stride=(2, 1))
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(10)
        self.third = nn.Conv1d(10, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.act(self.second(self.act(self.first(x)))).flatten(2)
        h = self.act(self.third(self.norm(h))).mean(2)
        return {"loss": nn.functional.cross_entropy(self.head(h), labels)}


def config(**settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "target_r": 2, "init_r": RANK, "total_step": 20, "initialization": "gradient", "start_batches": 3,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


def adapted(base: nn.Module, targets: Any = "all-linear", **settings: Any) -> Any:
    return adalora.get_peft_model(base, config(target_modules=targets, **settings)).train()


def batches_of(task_type: str, count: int = 3, size: int = 4) -> list[dict[str, Tensor]]:
    return [batch(task_type, seed, size) for seed in range(count)]


def default_loss(model: nn.Module, rows: Any) -> Tensor:
    outputs = model(**rows)
    found: Tensor = outputs["loss"]
    return found


def dense(model: Any, batches: list[Any], loss: Losses = default_loss) -> dict[str, Tensor]:
    """∂L/∂W0 of every adapted matrix, [d_out, d_in], L the mean over batches, in evaluation mode, the long way."""
    other = copy.deepcopy(model).eval()
    name = adalora.hf.layers.adapter_names(other)[0]
    layers = {full: layer.get_base_layer() for full, layer in adapted_layers(other, name)}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for rows in batches:
        (loss(other, rows) / len(batches)).backward()
    found = {}
    for full, layer in layers.items():
        g = layer.weight.grad.float()
        found[full] = g.T if isinstance(layer, (Conv1D, nn.Embedding)) else g.flatten(1)
    return found


def assert_started(model: Any, gradients: dict[str, Tensor], least: float, names: int) -> None:
    """P and Q are orthonormal, −Pᵀ G Q ᵀ is diagonal, positive and falling, and holds this share of the best."""
    ours = adalora.allocator(model)
    assert len(ours.triplets) == len(gradients) == names
    values = ours.started["values"]
    for t, g in zip(ours.triplets, gradients.values(), strict=True):
        p, lam, q = (part.detach().float() for part in t.factors)
        assert not lam.any()
        k = min(t.rank, *t.shape)
        eye = torch.eye(k)
        torch.testing.assert_close(p[:, :k].T @ p[:, :k], eye, rtol=0, atol=1e-4, msg=t.name)
        torch.testing.assert_close(q[:k] @ q[:k].T, eye, rtol=0, atol=1e-4, msg=t.name)
        core = -(p.T @ g @ q.T)[:k, :k]
        best = torch.linalg.svdvals(g)[:k]
        size = float(best[0])
        torch.testing.assert_close(core, torch.diag(core.diagonal()), rtol=0, atol=2e-3 * size, msg=t.name)
        assert float(core.diagonal().sum()) >= least * float(best.sum()), t.name
        torch.testing.assert_close(torch.tensor(values[t.name]), core.diagonal(), rtol=2e-3, atol=2e-3 * size)


# ------------------------------------------------------------------------------------------ against dense ones

LEAST = {2: 0.75, 4: 0.95, 6: 0.98}


@pytest.mark.parametrize("sweeps", [2, 4, 6])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_directions_are_those_of_the_dense_gradient(name: str, sweeps: int) -> None:
    """The output stays the same to the bit, since Λ stays 0."""
    build, targets, task_type = ARCHITECTURES[name]
    model = adapted(build(), targets, task_type=task_type, fan_in_fan_out=name == "gpt2")
    rows = batches_of(task_type)
    gradients = dense(model, rows)
    before = default_loss(model, rows[0])
    told = adalora.start(model, rows, sweeps=sweeps)
    assert torch.equal(default_loss(model, rows[0]), before)
    assert (told["rows"], told["batches"], told["sweeps"]) == (12, 3, sweeps)
    assert_started(model, gradients, LEAST[sweeps], len(gradients))
    whole = sum(float(g.square().sum()) for g in gradients.values())
    held = sum(float(torch.linalg.svdvals(g)[:RANK].square().sum()) for g in gradients.values())
    assert told["share"] == pytest.approx(held / whole, rel=0.25 if sweeps == 2 else 0.1)


def test_convolutions_and_activations_in_place() -> None:
    model = adapted(Convolutions(), ["first", "second", "third"])
    rows = [{"x": torch.randn(4, 3, 12, 12), "labels": torch.tensor([0, 1, 1, 0])} for _ in range(3)]
    running = model.base_model.model.norm.running_mean.clone()
    adalora.start(model, rows)
    assert torch.equal(model.base_model.model.norm.running_mean, running)
    assert_started(model, dense(model, rows), 0.95, 3)


def test_embeddings_and_ranks_above_what_a_matrix_has() -> None:
    """Rank 40 in matrices of 32 columns: the 32 directions that there are, and the rest random."""
    model = adapted(bert(), ["word_embeddings", "position_embeddings", "query", "classifier"], init_r=40, lora_alpha=4)
    rows = batches_of("SEQ_CLS")
    adalora.start(model, rows)
    gradients = dense(model, rows)
    for name, g in gradients.items():
        if name.endswith("word_embeddings"):  # padding has no gradient in the dense one
            g[:, 0] = 0
    assert_started(model, gradients, 0.99, 5)


def test_the_first_step_on_the_singular_values_gains_what_the_formula_says() -> None:
    """s·ρ·η·Σσ, summed over matrices, to first order in η."""
    model = adapted(bert().double(), lora_alpha=6, task_type="SEQ_CLS").double().eval()
    rows = batches_of("SEQ_CLS", 2)
    adalora.start(model, rows, sweeps=6)

    def mean_loss() -> float:
        with torch.no_grad():
            return float(torch.stack([default_loss(model, b) for b in rows]).mean())

    ours, eta = adalora.allocator(model), 1e-7
    scale = 6 / RANK
    gain = sum(scale * t.right.gain * eta * sum(ours.started["values"][t.name]) for t in ours.triplets)
    before = mean_loss()
    with torch.no_grad():
        for t in ours.triplets:
            t.lam.add_(eta)
    assert before - mean_loss() == pytest.approx(gain, rel=5e-3)


# ------------------------------------------------------------------------------------------- nothing else moves


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [{k: v for k, v in vars(m).items() if "drop" in k} for m in model.modules()],
        "configs": [repr(getattr(m, "config", None)) for m in model.modules()],
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "buffers": [b.tolist() for b in model.buffers()],
    }


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "grads":
            for now, then in zip(after[key], value, strict=True):
                assert (now is None and then is None) or torch.equal(now, then)
        else:
            assert after[key] == value, key


@pytest.mark.parametrize("fails", [None, "raises", "is not finite"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_else_is_left_as_it_was(checkpointing: bool, fails: str | None) -> None:
    base = t5()
    base.config.dropout_rate = 0.3
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(base, ["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM", modules_to_save=["final_layer_norm"])
    model.base_model.model.decoder.block[0].eval()  # of mixed modes
    rows = batches_of("SEQ_2_SEQ_LM")
    default_loss(model, rows[0]).backward()
    if checkpointing:
        default_loss(model, rows[0])  # whatever attributes a first pass makes
    before = everything(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    calls = 0

    def loss(model: nn.Module, rows: Any) -> Tensor:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand(), torch.rand(1)
        if fails == "raises" and calls == 2:
            raise ZeroDivisionError
        found = default_loss(model, rows)
        return found * float("nan") if fails and calls == 2 else found

    if fails is None:
        adalora.start(model, rows, loss)
        assert calls == 3 * 4
    else:
        with pytest.raises(ZeroDivisionError if fails == "raises" else StateError):
            adalora.start(model, rows, loss)
        assert adalora.allocator(model).started == {}
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert_same(everything(model), before)


def test_an_optimizer_that_steps_within_the_backward_pass_does_not() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: pytest.fail("a hook on a parameter was called"))
            p.register_post_accumulate_grad_hook(lambda p: pytest.fail("an optimizer stepped"))
    adalora.start(model, batches_of("SEQ_CLS"))
    with pytest.raises(pytest.fail.Exception):
        default_loss(model, batch("SEQ_CLS")).backward()


def test_a_shuffled_loader_gives_the_training_the_order_that_it_would_have_had() -> None:
    def orders(begin: bool, generator: torch.Generator | None) -> list[list[int]]:
        torch.manual_seed(3)
        model = adapted(bert(), task_type="SEQ_CLS")
        rows = batch("SEQ_CLS", 0, 16)
        data = [{**{k: v[i] for k, v in rows.items()}} for i in range(16)]
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        torch.manual_seed(4)
        if begin:
            adalora.start(model, loader)
        return [b["input_ids"][:, 0].tolist() for b in loader]

    assert orders(True, None) == orders(False, None)
    assert orders(True, torch.Generator().manual_seed(7)) == orders(False, torch.Generator().manual_seed(7))


def dropping(kind: str) -> tuple[nn.Module, str]:
    """A model whose dropout is a module's, a function's with a rate of the module, and one of the configuration."""
    base = bert() if kind == "bert" else t5()
    if kind == "bert":
        base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.5
        other = type(base)(base.config)
    else:
        base.config.dropout_rate = 0.5
        other = type(base)(base.config)
    return other, "SEQ_CLS" if kind == "bert" else "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_dropout_is_off_with_either_kind_of_gradient_checkpointing(kind: str, reentrant: bool | None) -> None:
    base, task_type = dropping(kind)
    targets = ARCHITECTURES[kind][1]
    model = adapted(base, targets, task_type=task_type, lora_dropout=0.5)
    rows = batches_of(task_type)
    gradients = dense(model, rows)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    adalora.start(model, rows, sweeps=6)
    assert_started(model, gradients, 0.98, len(gradients))


class Checkpointed(nn.Module):
    """A layer kept in training mode whose dropouts are functions."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.config = type("Config", (), {"attention_dropout": rate})()
        self.config.attention_dropout = rate
        self.resid_drop = rate
        self.gradient_checkpointing = True
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        x = nn.functional.dropout(x, self.config.attention_dropout, self.training)
        return x + nn.functional.dropout(self.linear(x), self.resid_drop, self.training)


class Shared(nn.Module):
    """One module called twice, with its input by name, and a trained layer before it: reentrant checkpointing needs
    that one's gradient."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.block = Checkpointed(rate)
        self.twice = nn.Linear(6, 6)

    def forward(self, ids: Tensor, reentrant: bool = True) -> Tensor:
        x = self.table(ids)
        x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)
        return self.twice(x=torch.tanh(self.twice(x=x))).square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_shared_modules_inputs_by_name_and_trained_embeddings(reentrant: bool) -> None:
    model = adapted(Shared(), ["linear", "twice"], modules_to_save=["table"])
    rows = [torch.randint(0, VOCABULARY, (3, 5)) for _ in range(3)]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        found: Tensor = model(ids, reentrant=reentrant)
        return found

    adalora.start(model, rows, loss)
    assert model.base_model.model.block.config.attention_dropout == model.base_model.model.block.resid_drop == 0.5
    plain = adapted(Shared(0.0), ["linear", "twice"], modules_to_save=["table"])
    plain.load_state_dict(model.state_dict())

    def without_mode(model: Any, ids: Tensor) -> Tensor:
        model.base_model.model.block.train()
        return loss(model, ids)

    assert_started(model, dense(plain, rows, without_mode), 0.99, 2)


# ------------------------------------------------------------------------------------- types of numbers, of layers


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.9), (torch.float16, 0.95)])
@pytest.mark.parametrize("where", ["autocast", "model"])
def test_half_precision(where: str, dtype: torch.dtype, least: float) -> None:
    """Against the dense gradient in float32: what is lost is the rounding of activations."""
    base = bert()
    model = adapted(base, task_type="SEQ_CLS")
    rows = batches_of("SEQ_CLS")
    gradients = dense(model, rows)
    if where == "model":
        model.to(dtype)
        adalora.start(model, rows)
        assert {t.p.dtype for t in adalora.allocator(model).triplets} == {dtype}
    else:
        with torch.autocast("cpu", dtype=dtype):
            adalora.start(model, rows)
    for t, g in zip(adalora.allocator(model).triplets, gradients.values(), strict=True):
        p, _, q = (part.detach().float() for part in t.factors)
        share = -torch.diagonal(p.T @ g @ q.T).sum() / torch.linalg.svdvals(g)[:RANK].sum()
        assert share > least, (t.name, share)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_variants_of_the_layer(settings: dict[str, Any]) -> None:
    model = adapted(bert(), task_type="SEQ_CLS", **settings)
    rows = batches_of("SEQ_CLS")
    before = model(**rows[0]).logits
    adalora.start(model, rows)
    assert torch.equal(model(**rows[0]).logits, before)
    assert_started(model, dense(model, rows), 0.95, 13)


class Experts(nn.Module):
    """Of three experts one is never asked, and one branch has no influence."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.unused = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 1, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = x[:, 0] > 0
        h = torch.cat([self.experts[0](x[rows]), self.experts[1](x[~rows]), self.experts[2](x[:0])])
        self.unused(x)
        h = h + self.attention(h[None], h[None], h[None], need_weights=False)[0][0]
        return {"loss": h.square().mean()}


def test_matrices_without_a_gradient_stay_random_and_are_named_once() -> None:
    model = adapted(Experts(), ["0", "1", "2", "unused", "attention"])
    before = {t.name: [part.clone() for part in t.parameters] for t in adalora.allocator(model).triplets}
    rows = [{"x": torch.randn(8, 6)} for _ in range(3)]
    with pytest.warns(UserWarning) as caught:
        told = adalora.start(model, rows)
    (message,) = [str(w.message) for w in caught if "directions start at random" in str(w.message)]
    assert "4 of 6 matrices have no gradient of their own" in message
    assert "experts.2" in message and "unused" in message and "attention" in message
    assert set(told["values"]) == {"experts.0", "experts.1"}
    for t in adalora.allocator(model).triplets:
        same = [torch.equal(now, then) for now, then in zip(t.parameters, before[t.name], strict=True)]
        assert same == [t.name not in told["values"], True, t.name not in told["values"]]


def test_a_layer_of_transformers_fast_path_is_seen() -> None:
    """In evaluation mode and with frozen weights torch computes this layer past its submodules."""
    base = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    model = adapted(base, ["linear1", "linear2"])
    told = adalora.start(model, [torch.randn(2, 5, 8) for _ in range(3)], lambda m, x: m(x).square().mean())
    assert len(told["values"]) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo asks for it
def test_compiled_models() -> None:
    """Code that was compiled before does not see the hooks, so it is not used."""
    model = adapted(bert(), task_type="SEQ_CLS")
    rows = batches_of("SEQ_CLS")
    gradients = dense(model, rows)
    compiled = torch.compile(model, backend="eager")
    default_loss(compiled, rows[0])
    adalora.start(compiled, rows)
    assert_started(model, gradients, 0.95, len(gradients))
    inner = adapted(bert(), task_type="SEQ_CLS")
    gradients = dense(inner, rows)
    for layer in inner.base_model.model.bert.encoder.layer:
        layer.compile(backend="eager")
    default_loss(inner, rows[0])
    adalora.start(inner, rows)
    assert_started(inner, gradients, 0.95, len(gradients))
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- ways to call it


def test_models_that_hold_the_adapter_in_other_ways() -> None:
    """``add_adapter`` of Transformers, a copy, a pickle, a module around: the same P and Q everywhere."""
    rows = batches_of("SEQ_CLS")
    torch.manual_seed(1)
    plain = bert()
    torch.manual_seed(2)
    wrapped = adapted(copy.deepcopy(plain), ["query", "value"], task_type="SEQ_CLS")
    copied, pickled = copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))
    adalora.start(wrapped, rows)
    plain.add_adapter(config(target_modules=["query", "value"]))
    adalora.start(plain.train(), rows)
    around = nn.Sequential(pickled)
    adalora.start(around, rows, lambda m, b: default_loss(m[0], b))
    adalora.start(copied, rows)
    expected = [t.p for t in adalora.allocator(wrapped).triplets]
    for other in (plain, around, copied):
        found = [t.p for t in adalora.allocator(other).triplets]
        assert len(found) == len(expected) == 4
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoding", "tuple", "generator"])
def test_batches_of_other_kinds(kind: str) -> None:
    model, twin = (adapted(bert(), ["query"], task_type="SEQ_CLS") for _ in range(2))
    twin.load_state_dict(model.state_dict())
    rows = batches_of("SEQ_CLS", 5)
    expected = adalora.start(twin, rows)
    if kind == "encoding":
        told = adalora.start(model, [BatchEncoding(b) for b in rows])
    elif kind == "tuple":
        tuples = [(b["input_ids"], b["labels"]) for b in rows]
        with pytest.raises(StateError, match=r"a batch is a tuple.*loss\(model, batch\)"):
            adalora.start(model, tuples)
        told = adalora.start(model, tuples, lambda m, b: m(input_ids=b[0], labels=b[1]).loss)
    else:
        given = (b for b in rows)
        told = adalora.start(model, given)
        assert len(list(given)) == 2
    assert told["values"] == expected["values"] and told["rows"] == expected["rows"] == 12


def test_several_adapters() -> None:
    model = adapted(bert(), ["query"], task_type="SEQ_CLS")
    model.add_adapter("other", config(target_modules=["query", "value"], init_r=4))
    rows = batches_of("SEQ_CLS")
    with pytest.raises(StateError, match="several AdaLoRA adapters"):
        adalora.start(model, rows)
    with pytest.raises(StateError, match=r"'other' is not active: model.set_adapter\('other'\)"):
        adalora.start(model, rows, adapter_name="other")
    model.set_adapter("other")
    adalora.start(model, rows, adapter_name="other")
    assert adalora.allocator(model, "default").started == {}
    assert len(adalora.allocator(model, "other").started["values"]) == 4


def test_labels_that_do_not_count() -> None:
    """A batch without any is left out of the mean and of the rows; a training set of nothing else is an error."""
    model = adapted(llama(), task_type="CAUSAL_LM")
    rows = batches_of("CAUSAL_LM")
    silent = {**rows[1], "labels": torch.full_like(rows[1]["labels"], -100)}
    first = {**silent, "labels": silent["labels"].clone()}
    first["labels"][:, 0] = 5  # which nothing predicts
    gradients = dense(model, [rows[0]])
    told = adalora.start(model, [rows[0], silent, first])
    assert told["rows"] == 4
    assert_started(model, gradients, 0.95, 14)
    with pytest.raises(StateError, match="none of the batches has a label that counts"):
        adalora.start(adapted(llama(), task_type="CAUSAL_LM"), [silent])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(**b).logits, r"a tensor of shape \[4, 2\], not one number"),
        (lambda m, b: m(**b).loss.item(), "is a float, not one number"),
        (lambda m, b: m(**b).loss.detach(), "depends on nothing trained"),
        (lambda m, b: m(**{k: v for k, v in b.items() if k != "labels"})["logits"].sum() * float("inf"), "is inf|nan"),
        (lambda m, b: torch.ones((), requires_grad=True) * 1, "no adapted layer has a gradient"),
    ],
)
def test_losses_that_are_none(loss: Losses, message: str) -> None:
    model = adapted(bert(), ["query"], task_type="SEQ_CLS")
    with pytest.raises(StateError, match=message):
        adalora.start(model, batches_of("SEQ_CLS"), loss)


def test_a_batch_without_labels_is_an_error_that_says_so() -> None:
    rows = {key: value for key, value in batch("SEQ_CLS").items() if key != "labels"}
    with pytest.raises(StateError, match="gives no loss for a batch of input_ids, attention_mask"):
        adalora.start(adapted(bert(), ["query"], task_type="SEQ_CLS"), [rows])


def test_numbers_that_cannot_be_meant() -> None:
    model = adapted(bert(), ["query"], task_type="SEQ_CLS")
    rows = batches_of("SEQ_CLS")
    with pytest.raises(ConfigError, match="number=0"):
        adalora.start(model, rows, number=0)
    with pytest.raises(ConfigError, match="start_sweeps=0"):
        adalora.start(model, rows, sweeps=0)
    with pytest.raises(StateError, match="no batches"):
        adalora.start(model, [])
    with pytest.raises(StateError, match="batches is a int"):
        adalora.start(model, 5)


def test_within_no_grad_it_looks_all_the_same() -> None:
    model = adapted(bert(), ["query"], task_type="SEQ_CLS")
    with torch.no_grad():
        assert adalora.start(model, batches_of("SEQ_CLS"))["values"]
        assert not torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------- when in a training


def steps(model: Any, count: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(count):
        default_loss(model, batch("SEQ_CLS", i)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_that_forgets_it_is_told_at_the_first_step() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    with pytest.raises(StateError, match=r"call adalora\.start"):
        steps(model, 1)
    adalora.start(model, batches_of("SEQ_CLS"))
    steps(model, 1)
    with pytest.raises(StateError, match="has been trained already"):
        adalora.start(model, batches_of("SEQ_CLS"))


def test_a_resumed_training_does_not_repeat_it(tmp_path: Path) -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    adalora.start(model, batches_of("SEQ_CLS"))
    started = adalora.allocator(model).started
    assert adalora.allocator(model).header()["start"] == started
    adalora.save_state(model, tmp_path)  # before the first step, even
    other = adapted(bert(), task_type="SEQ_CLS")
    adalora.load_state(other, tmp_path)
    assert adalora.allocator(other).started == started
    steps(other, 1)


def test_a_trained_adapter_keeps_its_directions() -> None:
    """``upgrade``, weights that were loaded: nothing waits for a gradient, and a look is refused."""
    base = bert()
    lora = peft_get_peft_model(base, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for _, layer in lora.named_modules():
            if isinstance(layer, LoraLayer):
                layer.lora_B["default"].weight.normal_()
    adalora.upgrade(lora, "default", config(target_modules=["query"]))
    with pytest.raises(StateError, match="has been trained already"):
        adalora.start(lora, batches_of("SEQ_CLS"))
    steps(lora, 1)
    fresh = peft_get_peft_model(bert(), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    adalora.upgrade(fresh, "default", config(target_modules=["query"]))
    with pytest.raises(StateError, match=r"call adalora\.start"):
        steps(fresh, 1)
    adalora.start(fresh, batches_of("SEQ_CLS"))
    steps(fresh, 1)


def test_weights_loaded_into_a_new_adapter_need_no_start(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = bert()
    model = adapted(copy.deepcopy(base), ["query"], task_type="SEQ_CLS")
    adalora.start(model, batches_of("SEQ_CLS"))
    steps(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base, tmp_path, is_trainable=True, config=config(target_modules=["query"], task_type="SEQ_CLS")
    )
    with pytest.warns(UserWarning, match="loaded without their training state"):
        steps(loaded, 1)


def test_with_start_and_other_initial_weights_there_are_two_answers() -> None:
    with pytest.raises(ConfigError, match="both say where P and Q"):
        config(init_lora_weights="pissa")


def test_the_module_knows_no_trainer_where_there_is_none() -> None:
    assert start_module.trainer_of(adalora.AdaLoraCallback()) is None
