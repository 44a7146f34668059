"""The fused product in PEFT's layers: the same numbers as ``kernel="reference"``, whatever is around the layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from benchmarks.operations import OperationCounter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

import adalora
from adalora import AdaLoraConfig
from adalora.core.errors import ConfigError
from adalora.hf.kernels import _FusedLayer, fuse_layers

from .models import ARCHITECTURES, VOCABULARY, batch, bert


def adapted(name: str, kernel: str, *, seed: int = 0, **settings: Any) -> nn.Module:
    """With Λ != 0, so that all factors have gradients; the same weights for every kernel."""
    build, targets, task_type = ARCHITECTURES[name]
    torch.manual_seed(seed)
    values: dict[str, Any] = {"target_r": 2, "init_r": 4, "total_step": 40, "tinit": 4, "tfinal": 10, "deltaT": 3}
    values |= {"target_modules": targets, "task_type": task_type, "fan_in_fan_out": name == "gpt2", **settings}
    model = adalora.get_peft_model(build(), AdaLoraConfig(kernel=kernel, **values))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for t in adalora.allocator(model).triplets:
            t.lam.copy_(0.05 * torch.randn(t.lam.shape, generator=generator))
    return model


def both(name: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    return adapted(name, "fused", **settings), adapted(name, "reference", **settings)


def fused_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _FusedLayer)]


@contextmanager
def fused_calls() -> Iterator[list[str]]:
    """Names of the fused functions that run inside, so that a test of them cannot pass on PEFT's path."""
    from adalora.hf import kernels

    calls: list[str] = []
    originals = {name: getattr(kernels, name) for name in ("adapted_linear", "add_update")}

    def counting(name: str) -> Any:
        def call(*args: Any) -> Tensor:
            calls.append(name)
            return originals[name](*args)  # type: ignore[no-any-return]

        return call

    for name in originals:
        setattr(kernels, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def run(model: nn.Module, inputs: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # for dropout
    model.zero_grad()
    loss = model(**inputs).loss
    (scale * loss).backward()
    return loss.detach(), gradients(model)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest entry of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        scale = expected.abs().max().float().clamp_min(1e-6)  # some are zero but for rounding
        assert (ours[name] - expected).abs().max().float() <= tolerance * scale, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_the_reference(name: str, dropout: bool) -> None:
    ours, theirs = both(name, lora_dropout=dropout)
    inputs = batch(ARCHITECTURES[name][2], 3)
    for mode in (True, False):
        with fused_calls() as calls:
            loss, found = run(ours.train(mode), inputs)
        assert calls == ["adapted_linear"] * len(calls)
        assert len(calls) >= len(fused_layers(ours)) == len(adalora.allocator(ours).triplets)
        expected, theirs_found = run(theirs.train(mode), inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert_close(found, theirs_found)
        with torch.no_grad():
            expected = theirs.eval()(**inputs).logits
            torch.testing.assert_close(ours.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_dropout_goes_by_its_own_mode() -> None:
    """Monte Carlo dropout: on, in a model that is otherwise in evaluation mode."""
    inputs, losses = batch("SEQ_CLS", 3), []
    for model in both("bert", lora_dropout=0.5):
        model.eval()
        quiet = model(**inputs).loss
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        losses.append(run(model, inputs)[0])
        assert not torch.allclose(losses[-1], quiet)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_whole_training_has_the_same_masks(name: str) -> None:
    """In float64, where both sides differ by the order of summation alone, through pruning, compaction and after."""
    models = [model.double() for model in both(name)]
    optimizers = [torch.optim.AdamW([w for w in m.parameters() if w.requires_grad], lr=5e-3) for m in models]
    for step in range(40):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**batch(ARCHITECTURES[name][2], step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ours, theirs = (adalora.allocator(m) for m in models)
        assert torch.equal(ours.mask, theirs.mask), f"step {step}"
    assert ours.frozen
    assert [a.ranks for a in ours.trace] == [a.ranks for a in theirs.trace]
    for mine, other in zip(ours.triplets, theirs.triplets, strict=True):
        torch.testing.assert_close(mine.delta(), other.delta(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["float32 under autocast", "float32 adapters on a half base", "all half"])
@pytest.mark.compatibility(
    "Optimizers and precision", "bfloat16 and float16: under autocast, beside float32 adapters, throughout"
)
def test_half_precision(dtype: torch.dtype, weights: str) -> None:
    """As far from float64 as the reference is, or less: both round, each in its own places."""
    inputs = batch("SEQ_CLS", 3)
    scale = 2.0**12  # small gradients would vanish in float16
    _, exact = run(adapted("bert", "reference").double(), inputs, scale)
    errors = []
    for kernel in ("fused", "reference"):
        model = adapted("bert", kernel)
        if weights != "float32 under autocast":
            for name, w in model.named_parameters():
                if weights == "all half" or not ("lora_" in name or "classifier" in name):
                    w.data = w.data.to(dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=weights != "all half"):
            _, found = run(model, inputs, scale)
        assert all(found[name].dtype == w.dtype for name, w in model.named_parameters() if name in found)
        errors.append([float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact])
    assert max(errors[0]) < 1.5 * max(errors[1])
    assert max(errors[0]) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpoints(reentrant: bool, dropout: float) -> None:
    inputs = batch("CAUSAL_LM", 3)
    ours, theirs = both("llama", lora_dropout=dropout)
    ours.enable_input_require_grads()  # type: ignore[operator]
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    ours.train(), theirs.train()
    for _ in range(2):
        loss, found = run(ours, inputs)
        expected, theirs_found = run(theirs, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert_close(found, theirs_found)


def test_accumulated_batches_and_losses_of_two_passes() -> None:
    """Two batches in one step, one loss over two passes, and two losses whose graphs live side by side."""
    ours, theirs = both("bert")
    found = []
    for model in (ours, theirs):
        first, second, third, fourth, fifth = (model(**batch("SEQ_CLS", k)).loss for k in range(5))
        (first + second).backward()
        fourth.backward()
        third.backward()
        fifth.backward(retain_graph=True)
        fifth.backward()
        found.append(gradients(model))
    assert_close(*found)


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model = adapted("bert", "fused")
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    first, second = (model(**batch("SEQ_CLS", k)).loss for k in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"in.?place"):
        second.backward()


class Two(nn.Module):
    """Plain enough for function transforms and second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def two(kernel: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    values: dict[str, Any] = {"target_modules": ["first", "second"], "target_r": 2, "init_r": 3, **settings}
    config = AdaLoraConfig(total_step=40, kernel=kernel, **values)  # type: ignore[arg-type]
    model = adalora.get_peft_model(Two(), config).double()
    for t in adalora.allocator(model).triplets:
        nn.init.constant_(t.lam, 0.3)
    return model


@pytest.mark.compatibility("Trainers and loops", "second derivatives (`create_graph=True`)")
def test_second_derivatives() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for kernel in ("fused", "reference"):
        model = two(kernel)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(gradients(model))
    assert_close(*found, tolerance=1e-12)


@pytest.mark.compatibility(
    "Trainers and loops", "`torch.func` (per-example gradients by `vmap`) and forward-mode derivatives"
)
def test_function_transforms() -> None:
    """Gradients of every example by vmap, and forward-mode derivatives: PEFT's own operations, which have rules."""
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, tangents = [], []
    for kernel in ("fused", "reference"):
        model = two(kernel)
        trained = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}

        def loss(parameters: dict[str, Tensor], row: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (row[None],)).square().sum()  # type: ignore[no-any-return]

        found.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x))
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append({"tangent": forward_ad.unpack_dual(out).tangent.detach()})
    assert_close(*found, tolerance=1e-12)
    assert_close(*tangents, tolerance=1e-12)


@pytest.mark.compatibility(
    "Trainers and loops", "`torch.compile(fullgraph=True)`: forward and backward without a graph break"
)
def test_compiled_without_a_graph_break() -> None:
    inputs = batch("SEQ_CLS", 3)
    ours, theirs = both("bert")
    with fused_calls() as calls:
        loss, found = run(torch.compile(ours, fullgraph=True), inputs)  # type: ignore[arg-type]
    assert calls == ["add_update"] * len(fused_layers(ours))
    expected, theirs_found = run(theirs, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = {name.removeprefix("_orig_mod."): g for name, g in found.items()}
    assert_close(found, theirs_found, tolerance=3e-5)  # the compiler sums in another order


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_B.default", "everywhere"])
@pytest.mark.compatibility("Layers", "hooks on `base_layer`, `lora_A`, `lora_B`: each sees its own part's output")
def test_hooks_see_what_they_saw(where: str) -> None:
    """A hook on a part of a layer gets that part's own output: the base product without the update, for one."""
    inputs, seen = batch("SEQ_CLS", 3), []
    for model in both("bert"):
        model.eval()
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        outputs: list[Tensor] = []

        def keep(module: nn.Module, _: Any, output: Any, outputs: list[Tensor] = outputs) -> None:
            if isinstance(output, Tensor) and isinstance(module, (nn.Linear, LoraLayer)):
                outputs.append(output)

        if where == "everywhere":
            handle = torch.nn.modules.module.register_module_forward_hook(keep)
        else:
            name = where.replace("default", layer.active_adapters[0])
            handle = layer.get_submodule(name).register_forward_hook(keep)  # type: ignore[attr-defined]
            outputs.append(torch.zeros(1))
        model(**inputs)
        handle.remove()
        seen.append({str(k): out.detach() for k, out in enumerate(outputs)})
    assert len(seen[0]) >= 1
    assert_close(*seen)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str) -> None:
    inputs = batch("SEQ_CLS", 3)
    model = adapted("bert", "fused")
    model(**inputs)  # leaves a graph behind
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert len(fused_layers(other)) == len(fused_layers(model)) > 0
    assert repr(other) == repr(model) == repr(adapted("bert", "reference"))
    with torch.no_grad():
        for t in adalora.allocator(other).triplets:
            t.lam.zero_()
    loss, found = run(model, inputs)
    expected, theirs = run(adapted("bert", "reference"), inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close(found, theirs)
    _, of_copy = run(other, inputs)
    assert not any(g.any() for name, g in of_copy.items() if "right_vectors" in name), "it has its own λ = 0"


def test_layers_that_are_not_linear_stay_as_they_are() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(8, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 6))
    config = AdaLoraConfig(target_modules=["0", "1", "2"], target_r=1, init_r=2, total_step=40)
    model = adalora.get_peft_model(base, config)
    assert [type(layer.get_base_layer()) for layer in fused_layers(model)] == [nn.Linear]
    assert not fused_layers(adapted("bert", "reference"))


@pytest.mark.parametrize("case", ["dora", "merged", "disabled", "two active", "trained base", "bias of the adapter"])
def test_whatever_is_not_the_common_case_is_the_same_too(case: str) -> None:
    x, found = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for kernel in ("fused", "reference"):
        settings = {"dora": {"use_dora": True}, "bias of the adapter": {"lora_bias": True}}.get(case, {})
        if case == "bias of the adapter":
            settings["target_modules"] = ["first"]
        model: Any = two(kernel, **settings)
        if case == "merged":
            model.merge_adapter()
        elif case == "disabled":
            model.base_model.disable_adapter_layers()
        elif case == "two active":
            torch.manual_seed(1)
            model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
            model.double().base_model.set_adapter(["default", "other"])
        elif case == "trained base":
            model.base_model.model.first.base_layer.bias.requires_grad_(True)
        rows = x.clone().requires_grad_()
        out = model(rows)
        out.square().sum().backward()
        assert rows.grad is not None
        found.append({**gradients(model), "x": rows.grad, "y": out.detach()})
    assert_close(*found, tolerance=1e-12)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
@pytest.mark.compatibility(
    "Trainers and loops", "tensors in the place of parameters, as FSDP1 and DataParallel put them"
)
def test_parameters_that_a_wrapper_has_taken_out(part: str) -> None:
    """FSDP1 and DataParallel put tensors, as plain attributes, where parameters were."""
    x, found = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for kernel in ("fused", "reference"):
        model: Any = two(kernel)
        for layer in (model.base_model.model.first, model.base_model.model.second):
            module = layer.get_submodule(part)
            for name, w in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, w.detach() * 2)
        rows = x.clone().requires_grad_()
        model(rows).square().sum().backward()
        assert rows.grad is not None
        found.append({**gradients(model), "x": rows.grad})
    assert_close(*found, tolerance=1e-12)


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_quantized_bases_get_it_too(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    found, calls_of = [], []
    for kernel in ("fused", "reference"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 32))
        quantized = (
            bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
            if kind == "4 bits"
            else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        )
        quantized.load_state_dict(base[0].state_dict())
        config = AdaLoraConfig(target_modules=["0"], target_r=2, init_r=3, total_step=40, kernel=kernel)  # type: ignore[arg-type]
        model = adalora.get_peft_model(nn.Sequential(quantized).to("cpu"), config)
        for t in adalora.allocator(model).triplets:
            nn.init.constant_(t.lam, 0.3)
        rows = x.clone().requires_grad_()
        with fused_calls() as calls:
            model(rows).square().sum().backward()
        assert rows.grad is not None
        found.append({**gradients(model), "x": rows.grad})
        calls_of.append(calls)
    assert calls_of == [["add_update"], []]
    assert_close(*found)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernel='fast' is not known; choose one of \['fused', 'reference'\]"):
        AdaLoraConfig(kernel="fast")  # type: ignore[arg-type]


def test_plain_lora_on_our_kernels() -> None:
    """The third line of the benchmark: what the budget costs beside the kernels."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        bert(), peft.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    )
    ours = copy.deepcopy(theirs)
    fuse_layers(ours)
    inputs = batch("SEQ_CLS", 3)
    with fused_calls() as calls:
        loss, found = run(ours, inputs)
    assert len(calls) == len(fused_layers(ours)) > 0
    expected, theirs_found = run(theirs, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close(found, theirs_found)


def test_six_operations_a_matrix() -> None:
    """Beside what the frozen model takes; a step of an 18 times larger model has not one operation more than these."""

    def operations(layers: int, frozen: bool) -> int:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 64}
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape))
        settings: dict[str, Any] = {"target_modules": "all-linear", "target_r": 2, "init_r": 4}
        if frozen:
            model.requires_grad_(False)
            embedded = model.get_input_embeddings()(batch("CAUSAL_LM", 3)["input_ids"]).requires_grad_()
            inputs: dict[str, Any] = {"inputs_embeds": embedded, "labels": batch("CAUSAL_LM", 3)["labels"]}
        else:
            model = adalora.get_peft_model(model, AdaLoraConfig(total_step=40, **settings))
            model.enable_input_require_grads()
            inputs = batch("CAUSAL_LM", 3)
        with OperationCounter() as counter:
            model(**inputs).loss.backward()
        return counter.total

    growth = [operations(20, frozen) - operations(2, frozen) for frozen in (False, True)]
    assert growth[0] - growth[1] == 18 * 7 * 6


# ------------------------------------------------------------------------------------------------ rank 0


class Mixed(nn.Module):
    """An embedding, a convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.words(ids).mT).mT
        out: Tensor = self.last(self.first(x))
        return out


MIXED = ["words", "conv", "first", "last"]


def only_one_left(layer: str, kernel: str = "fused") -> nn.Module:
    """Pruned to one triplet in all, of this layer, and compacted."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        target_modules=MIXED, target_r=0.25, init_r=2, total_step=9, tinit=1, tfinal=1, deltaT=9, kernel=kernel
    )
    model = adalora.get_peft_model(Mixed(), config)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    triplets = {t.name: t for t in adalora.allocator(model).triplets}
    for _ in range(9):
        model(torch.arange(8).view(2, 4)).square().mean().backward()
        for name, t in triplets.items():
            if name != layer:
                t.lam.grad = torch.zeros_like(t.lam)
                t.p.grad = t.q.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert adalora.ranks(model) == {name: int(name == layer) for name in MIXED}
    return model


def operations_of(model: nn.Module) -> Any:
    model.zero_grad()  # else a gradient that is there is added to
    with OperationCounter() as counter:
        model(torch.arange(8).view(2, 4)).square().mean().backward()
    return counter.by_name


@pytest.mark.parametrize("left", ["words", "conv", "first"])
def test_a_layer_of_rank_0_leaves_the_graph(left: str) -> None:
    """Forwards and backwards, not one operation more than with the base layer in its place."""
    model = only_one_left(left)
    bare = copy.deepcopy(model)
    for name in MIXED:
        if name != left:
            setattr(bare.base_model.model, name, getattr(bare.base_model.model, name).base_layer)
    x = torch.arange(8).view(2, 4)
    assert torch.equal(model(x), bare(x))
    assert operations_of(model) == operations_of(bare)
    again = pickle.loads(pickle.dumps(model))
    assert operations_of(again) == operations_of(bare)


def test_a_convolution_of_rank_0_runs_with_either_kernel() -> None:
    """There is no convolution with no outputs."""
    operations_of(only_one_left("first", "reference"))


def test_a_layer_of_rank_0_with_a_bias_or_a_magnitude_of_its_own_stays() -> None:
    for settings in ({"lora_bias": True}, {"use_dora": True}):
        config = AdaLoraConfig(target_modules=["first"], target_r=1, init_r=1, total_step=9, **settings)
        model = adalora.get_peft_model(Mixed(), config)
        layer = model.base_model.model.first
        (triplets,) = adalora.allocator(model).triplets
        triplets.keep(torch.tensor([], dtype=torch.int64))
        with torch.no_grad():
            if "lora_bias" in settings:
                layer.lora_B["default"].bias.fill_(1.0)
            else:
                layer.lora_magnitude_vector["default"].weight.mul_(2.0)
        x = torch.randn(2, 6)
        assert not torch.allclose(layer(x), layer.base_layer(x))
