"""PEFT's LoRA layers, upgraded in place. The one file that touches PEFT's internals.

PEFT builds its LoRA model for an :class:`AdaLoraConfig` as for any other ``LoraConfig``, on whatever base layer it
supports. Afterwards ``lora_A[adapter]`` of each layer is replaced by a :class:`SingularProjection` (Q and Λ, with a
``weight`` property for all that reads it) and ``lora_B[adapter]`` becomes P. Three methods of ``LoraModel`` are taught
about the configuration (docs/decisions/001 says why these); for any other configuration they do what they did:

- ``inject_adapter``: upgrades the layers and makes the allocator, for every way in which PEFT adds an adapter;
- ``_get_adapter_state_dict``: what is saved is a plain LoRA adapter;
- ``_remap_adapter_state_dict_for_load``: a plain LoRA adapter is loaded as triplets.

and it gains ``update_and_allocate(step)``, for loops written for PEFT's AdaLoRA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..core.allocator import Allocator
from ..core.errors import ConfigError, StateError
from ..core.triplets import Factors, SingularProjection, Triplets, from_product, from_rows, to_product
from .config import AdaLoraConfig
from .hooks import drive

PEFT_PREFIX = "base_model.model."


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(module name in ``model``, layer) of every layer whose ``adapter_name`` is AdaLoRA's, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(_part(module.lora_A, adapter_name), SingularProjection):
            yield name, module


def projection(layer: LoraLayer, adapter_name: str) -> SingularProjection:
    """Q and Λ of one adapter in one layer."""
    part = layer.lora_A[adapter_name]
    assert isinstance(part, SingularProjection)
    return part


def _part(parts: nn.ModuleDict, adapter_name: str) -> nn.Module | None:
    return parts[adapter_name] if adapter_name in parts else None  # noqa: SIM401 (ModuleDict has no get)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the AdaLoRA adapters of this model."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            names.update((key, None) for key, part in module.lora_A.items() if isinstance(part, SingularProjection))
    return list(names)


# -------------------------------------------------------------------------------------------------------- upgrading


def upgrade(model: nn.Module, adapter_name: str, config: AdaLoraConfig) -> Allocator:
    """Turn the LoRA layers of one adapter into AdaLoRA's and put an allocator over them.

    Raises:
        ConfigError: a layer is not linear, or the budget does not fit the ranks.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    ]
    unsupported = [
        f"{name} ({type(layer.get_base_layer()).__name__})"
        for name, layer in layers
        if adapter_name not in layer.lora_A or type(layer.lora_A[adapter_name]) is not nn.Linear
    ]
    if unsupported:
        raise ConfigError(
            f"AdaLoRA adapts linear layers; target_modules also matched {', '.join(unsupported[:5])}. Leave them out of"
            " target_modules, or name them in exclude_modules."
        )
    triplets = [_upgrade_layer(layer, adapter_name, name, config) for name, layer in layers]
    allocator = Allocator(triplets, config.settings())
    for part in triplets:
        part.right.allocator = allocator
    drive(allocator)
    return allocator


def _upgrade_layer(layer: LoraLayer, adapter_name: str, name: str, config: AdaLoraConfig) -> Triplets:
    lora_a, lora_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    assert isinstance(layer, nn.Module) and isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
    gain = config.gain(lora_b.out_features)
    right = SingularProjection(torch.empty_like(lora_a.weight), gain)
    right.requires_grad_(lora_a.weight.requires_grad)
    layer.lora_A[adapter_name] = right
    triplets = Triplets(name, lora_b, right)
    if lora_a.weight.device.type != "meta":  # on meta, weights will be loaded
        if bool(lora_b.weight.any()):  # PiSSA and its like start from B A != 0: the same update as triplets
            p, lam, q = from_product(lora_b.weight.detach(), lora_a.weight.detach())
            triplets.assign(Factors(p, lam / gain, q))
        else:
            triplets.reset(config.initialization)
    known: Any = layer._load_state_dict_pre_hooks.values()
    if _resize_to_state_dict not in [hook.hook for hook in known]:
        layer.register_load_state_dict_pre_hook(_resize_to_state_dict)  # type: ignore[no-untyped-call]
    return triplets


def _triplets(layer: LoraLayer, adapter_name: str) -> Triplets:
    return Triplets("", layer.lora_B[adapter_name], projection(layer, adapter_name))


def _must_be_saved(layer: LoraLayer, adapter_name: str, config: AdaLoraConfig) -> bool:
    """A layer of rank 0 may still hold a trained bias or DoRA magnitude."""
    if config.bias != "none":
        return True
    return adapter_name in layer.lora_magnitude_vector or getattr(layer.lora_B[adapter_name], "bias", None) is not None


def _resize_to_state_dict(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Ranks differ between the moments of a training: take the shapes of what is about to be loaded."""
    assert isinstance(layer, LoraLayer)
    for adapter_name, right in layer.lora_A.items():
        stored = [
            state_dict.get(f"{prefix}{part}")
            for part in (
                f"lora_B.{adapter_name}.weight",
                f"lora_A.{adapter_name}.singular_values",
                f"lora_A.{adapter_name}.right_vectors",
            )
        ]
        if isinstance(right, SingularProjection) and all(part is not None for part in stored):
            factors = Factors(*(part for part in stored if part is not None))
            triplets = _triplets(layer, adapter_name)
            if (factors.p.shape[0], factors.q.shape[1]) == (triplets.p.shape[0], triplets.q.shape[1]):
                triplets.assign(factors)


# -------------------------------------------------------------------------------------------- plain LoRA state dicts


def fold(
    model: nn.Module, adapter_name: str, config: AdaLoraConfig, state_dict: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A state dict with P, Λ, Q of this adapter -> the same with plain, compact LoRA weights; the model stays as it is.

    Every triplet with λ != 0 is kept, so what is saved computes what is in memory, also between two masks. An adapter
    that has not been trained at all keeps every triplet.

    Returns:
        the new state dict, in which layers of rank 0 are left out, and the rank of each layer by its name.
    """
    folded, ranks = dict(state_dict), {}
    untrained = not any(
        bool(value.any()) for key, value in folded.items() if key.endswith(f"lora_A.{adapter_name}.singular_values")
    )
    for name, layer in adapted_layers(model, adapter_name):
        key_a, key_b = f"{name}.lora_A.{adapter_name}", f"{name}.lora_B.{adapter_name}.weight"
        if f"{key_a}.right_vectors" not in folded:
            continue
        factors = Factors(
            folded.pop(key_b), folded.pop(f"{key_a}.singular_values"), folded.pop(f"{key_a}.right_vectors")
        )
        live = (torch.ones_like(factors.lam) if untrained else factors.lam).nonzero().flatten()
        kept = Factors(factors.p[:, live], factors.lam[live], factors.q[live])
        if not len(live) and _must_be_saved(layer, adapter_name, config):
            p, lam, q = factors
            kept = Factors(p.new_zeros(p.shape[0], 1), lam.new_zeros(1), q.new_zeros(1, q.shape[1]))
        rank = len(kept.lam)
        ranks[name.removeprefix(PEFT_PREFIX)] = rank
        if rank:
            b, a = to_product(kept, layer.scaling[adapter_name] * projection(layer, adapter_name).gain)
            folded[key_b], folded[f"{key_a}.weight"] = b.contiguous(), a.contiguous()
        key_bias = f"{name}.lora_B.{adapter_name}.bias"
        if key_bias in folded:  # lora_bias: PEFT scales it with the rest
            folded[key_bias] = folded[key_bias] * layer.scaling[adapter_name]
    return folded, ranks


def unfold(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain LoRA weights as :func:`fold` writes them (keys without the adapter's name) -> P, Λ, Q of the live layers.

    A file may hold fewer triplets than a layer, or leave the layer out: the others get λ = 0 and keep their vectors.
    """
    unfolded = dict(state_dict)
    for name, layer in adapted_layers(model, adapter_name):
        bare = name.removeprefix(PEFT_PREFIX)
        prefix = next((p for p in (PEFT_PREFIX, "") if f"{p}{bare}.lora_A.weight" in unfolded), None)
        live = Factors(*(part.detach() for part in _triplets(layer, adapter_name).parameters))
        if prefix is None:
            prefix, factors = PEFT_PREFIX if name != bare else "", live._replace(lam=torch.zeros_like(live.lam))
        else:
            b, a = unfolded.pop(f"{prefix}{bare}.lora_B.weight"), unfolded.pop(f"{prefix}{bare}.lora_A.weight")
            loaded = from_rows(b, a / (layer.scaling[adapter_name] * projection(layer, adapter_name).gain))
            factors = _padded(loaded, live)
            key_bias = f"{prefix}{bare}.lora_B.bias"
            if key_bias in unfolded:
                unfolded[key_bias] = unfolded[key_bias] / layer.scaling[adapter_name]
        unfolded[f"{prefix}{bare}.lora_B.weight"] = factors.p
        unfolded[f"{prefix}{bare}.lora_A.singular_values"] = factors.lam
        unfolded[f"{prefix}{bare}.lora_A.right_vectors"] = factors.q
    return unfolded


def _padded(loaded: Factors, live: Factors) -> Factors:
    rank = len(loaded.lam)
    if rank >= len(live.lam):
        return loaded
    p, q = live.p.to(loaded.p)[:, rank:], live.q.to(loaded.q)[rank:]
    return Factors(
        torch.cat([loaded.p, p], 1), torch.cat([loaded.lam, p.new_zeros(p.shape[1])]), torch.cat([loaded.q, q])
    )


# ------------------------------------------------------------------------------------------------------ installation


def linear_module_suffixes(model: nn.Module) -> list[str]:
    """The names that target_modules could give: last parts of all linear modules, without the numbered ones."""
    suffixes = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(suffix for suffix in suffixes if suffix and not re.fullmatch(r"\d+", suffix))


def install() -> None:
    """Teach ``LoraModel`` about :class:`AdaLoraConfig`; safe to call again."""
    if getattr(LoraModel, "_knows_adalora", False):
        return
    inject = LoraModel.inject_adapter
    get_state_dict = LoraModel.__dict__["_get_adapter_state_dict"].__func__
    remap_state_dict = LoraModel.__dict__["_remap_adapter_state_dict_for_load"].__func__

    @functools.wraps(inject)
    def inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, AdaLoraConfig):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        wanted = config.target_modules
        try:
            inject(self, model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise ConfigError(
                f"target_modules={wanted!r} matches nothing in {type(model).__name__}"
                + (f" (exclude_modules={config.exclude_modules!r})" if config.exclude_modules else "")
                + f". It has linear modules called {', '.join(linear_module_suffixes(model)) or '(none)'};"
                " 'all-linear' takes them all."
            ) from error
        upgrade(model, adapter_name, config)

    def _get_adapter_state_dict(
        cls: type[LoraModel],
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = get_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names)
        if isinstance(config, AdaLoraConfig):
            selected, ranks = fold(model, adapter_name, config, selected)
            config._exported = config.plain(ranks)
        return selected  # type: ignore[no-any-return]

    def _remap_adapter_state_dict_for_load(
        cls: type[LoraModel], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(config, AdaLoraConfig):
            state_dict = unfold(model, adapter_name, state_dict)
            for _, layer in adapted_layers(model, adapter_name):
                projection(layer, adapter_name).allocator.weights_replaced()
        return remap_state_dict(cls, model, config, adapter_name, state_dict)  # type: ignore[no-any-return]

    def update_and_allocate(self: LoraModel, step: int) -> None:
        """Allocate by hand, after ``optimizer.step()``, for every active AdaLoRA adapter; replaces the hook."""
        ours = [name for name in self.active_adapters if name in adapter_names(self.model)]
        if not ours:
            raise StateError(f"no active adapter is AdaLoRA's (active: {self.active_adapters}).")
        for name in ours:
            _, layer = next(adapted_layers(self.model, name))
            projection(layer, name).allocator.update_and_allocate(step)

    taught: dict[str, Any] = {
        "inject_adapter": inject_adapter,
        "_get_adapter_state_dict": classmethod(functools.wraps(get_state_dict)(_get_adapter_state_dict)),
        "_remap_adapter_state_dict_for_load": classmethod(
            functools.wraps(remap_state_dict)(_remap_adapter_state_dict_for_load)
        ),
        "update_and_allocate": update_and_allocate,
        "_knows_adalora": True,
    }
    for name, value in taught.items():
        setattr(LoraModel, name, value)
