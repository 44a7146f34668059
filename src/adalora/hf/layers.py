"""PEFT's LoRA layers, upgraded in place.

PEFT builds its LoRA model for an :class:`AdaLoraConfig` as for any other ``LoraConfig``, on whatever base layer it
supports. Afterwards ``lora_A[adapter]`` of each layer is replaced by a :class:`SingularProjection` (Q and Λ, with a
``weight`` property for all that reads it) and ``lora_B[adapter]`` becomes P. What this file, ``state_dicts.py`` and
``installation.py`` know of PEFT's internals, no other does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from ..core.allocator import Allocator
from ..core.errors import ConfigError
from ..core.fused import Products
from ..core.triplets import Factors, HasWeight, SingularProjection, Triplets, from_product
from .config import AdaLoraConfig
from .hooks import drive
from .kernels import fuse, pass_when_empty

FSDP_PREFIX = "_fsdp_wrapped_module."  # FullyShardedDataParallel leaves it out of the names in a state dict
CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_UNUSUAL = ("groups", "dilation")  # of a convolution: PEFT groups lora_B alone, and dilates neither


class _EmbeddingProjection(SingularProjection):
    """Q and Λ of an embedding. PEFT goes through the entries of ``lora_embedding_A`` and asks them what it would ask of
    the bare parameter there."""

    @property
    def requires_grad(self) -> bool:
        return self.right_vectors.requires_grad

    @property
    def device(self) -> torch.device:
        return self.right_vectors.device


class EmbeddingRight(nn.ParameterDict):
    """``lora_embedding_A`` of a layer where some adapters are AdaLoRA's: for these, ``[name]`` is ρ·Λ Q, [r, d_in].

    PEFT keeps the two factors of an embedding as bare parameters, so there is no module with a ``weight`` to replace.
    """

    def singular(self, name: str) -> SingularProjection | None:
        """Q and Λ of an adapter, if it is AdaLoRA's."""
        entry = self._modules.get(name)
        return entry if isinstance(entry, SingularProjection) else None

    def put(self, name: str, entry: SingularProjection | nn.Parameter) -> None:
        """Replace the entry of an adapter by one of the other kind."""
        if name in self:
            del self[name]
        super().__setitem__(name, entry)

    def __getitem__(self, name: str) -> Any:
        singular = self.singular(name)
        return super().__getitem__(name) if singular is None else singular.weight

    def __setitem__(self, name: str, value: Any) -> None:
        singular = self.singular(name)
        if singular is None:
            super().__setitem__(name, value)
        else:  # PEFT moves and casts an entry by assigning it anew
            singular.to(value.device, value.dtype)

    def items(self) -> Any:
        """(adapter, what holds its parameters): PEFT goes through these to freeze and to train."""
        return [(name, self.singular(name) or super(EmbeddingRight, self).__getitem__(name)) for name in self]

    def values(self) -> Any:
        return [entry for _, entry in self.items()]


class _EmbeddingLeft(NamedTuple):
    """P of an embedding as something with a ``weight``."""

    parameters: nn.ParameterDict
    name: str

    @property
    def weight(self) -> Any:
        return self.parameters[self.name]


class Keys(NamedTuple):
    """Where one adapter's parts of one layer lie in a state dict."""

    right: str  # of Q and Λ; what follows is ".right_vectors" or ".singular_values"
    a: str
    b: str
    bias: str

    @classmethod
    def of(cls, layer: LoraLayer, name: str, adapter_name: str | None) -> Keys:
        """``adapter_name`` None: as in a file, where it is left out."""
        dot = "" if adapter_name is None else f".{adapter_name}"
        if isinstance(layer.lora_embedding_A, EmbeddingRight):
            right = f"{name}.lora_embedding_A{dot}"
            return cls(right, right, f"{name}.lora_embedding_B{dot}", "")
        right, left = f"{name}.lora_A{dot}", f"{name}.lora_B{dot}"
        return cls(right, f"{right}.weight", f"{left}.weight", f"{left}.bias")

    @property
    def factors(self) -> tuple[str, str, str]:
        return self.b, f"{self.right}.singular_values", f"{self.right}.right_vectors"


def _singular(layer: LoraLayer, adapter_name: str) -> SingularProjection | None:
    if isinstance(layer.lora_embedding_A, EmbeddingRight):
        return layer.lora_embedding_A.singular(adapter_name)
    part = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None  # noqa: SIM401 (it has no get)
    return part if isinstance(part, SingularProjection) else None


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(module name in ``model``, layer) of every layer whose ``adapter_name`` is AdaLoRA's, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _singular(module, adapter_name) is not None:
            yield name.replace(FSDP_PREFIX, ""), module


def projection(layer: LoraLayer, adapter_name: str) -> SingularProjection:
    """Q and Λ of one adapter in one layer."""
    part = _singular(layer, adapter_name)
    assert part is not None
    return part


def adapted_model(model: nn.Module) -> nn.Module:
    """What lies within PEFT's wrappers, if there are any: modules are named from there."""
    inner = model.base_model.model if isinstance(model, PeftModel) else getattr(model, "model", None)
    return inner if isinstance(model, (PeftModel, LoraModel)) and isinstance(inner, nn.Module) else model


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the AdaLoRA adapters of this model."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            known = (*module.lora_A, *module.lora_embedding_A)
            names.update((name, None) for name in known if _singular(module, name) is not None)
    return list(names)


# -------------------------------------------------------------------------------------------------------- upgrading


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(module name in ``model``, layer) of every layer that has this adapter, AdaLoRA's or not."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A):
            yield name, module


def is_trained(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter's parameters in this layer have gradients."""
    if adapter_name in layer.lora_embedding_B:
        return bool(layer.lora_embedding_B[adapter_name].requires_grad)
    return any(w.requires_grad for w in layer.lora_B[adapter_name].parameters())


def upgrade_layers(model: nn.Module, adapter_name: str, config: AdaLoraConfig, *, keep_vectors: bool) -> Allocator:
    """Turn the LoRA layers of one adapter into AdaLoRA's and put an allocator over them.

    Args:
        keep_vectors: where B A = 0, let Q span what the rows of A do, instead of starting from new ones.

    Raises:
        ConfigError: a layer of another kind, or the budget does not fit the ranks.
    """
    layers = list(lora_layers(model, adapter_name))
    unsupported = [f"{name} ({_kind(layer)})" for name, layer in layers if not _is_upgradable(layer, adapter_name)]
    if unsupported:
        raise ConfigError(
            "AdaLoRA adapts linear layers, convolutions without groups or dilation, and embeddings; target_modules also"
            " matched"
            f" {', '.join(unsupported[:5])}. Leave them out of target_modules, or name them in exclude_modules."
        )
    triplets = [_upgrade_layer(layer, adapter_name, name, config, keep_vectors) for name, layer in layers]
    allocator = Allocator(triplets, config.settings())
    for part in triplets:
        part.right.allocator = allocator
    if config.kernel == "fused":
        linear = [part for part, (_, layer) in zip(triplets, layers, strict=True) if fuse(layer)]
        products = Products(linear)
        for part in linear:
            part.right.fused = functools.partial(products.take, part)
    for _, layer in layers:
        if adapter_name not in layer.lora_A or type(layer.lora_B[adapter_name]) is not nn.Linear:
            pass_when_empty(layer)
    drive(allocator)
    return allocator


def _kind(layer: LoraLayer) -> str:
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return f"{layer.parameter_name} of {type(base).__name__}"
    unusual = [f"{name}={getattr(base, name)}" for name in _UNUSUAL if _is_unusual(getattr(base, name, 1))]
    return type(base).__name__ + (f" with {', '.join(unusual)}" if unusual else "")


def _is_unusual(value: int | tuple[int, ...]) -> bool:
    return value != 1 if isinstance(value, int) else set(value) != {1}


def _is_upgradable(layer: LoraLayer, adapter_name: str) -> bool:
    if isinstance(layer, ParamWrapper):  # of fused experts, all in one pair
        return False
    if adapter_name in layer.lora_embedding_A:
        return isinstance(layer.lora_embedding_A[adapter_name], nn.Parameter)
    kind, base = type(layer.lora_A[adapter_name]), layer.get_base_layer()
    return kind is nn.Linear or (
        kind in CONVOLUTIONS and not any(_is_unusual(getattr(base, name)) for name in _UNUSUAL)
    )


def _upgrade_layer(
    layer: LoraLayer, adapter_name: str, name: str, config: AdaLoraConfig, keep_vectors: bool
) -> Triplets:
    assert isinstance(layer, nn.Module)
    left: HasWeight
    apply: Callable[..., Tensor] = F.linear
    if adapter_name in layer.lora_embedding_A:  # where PEFT looks the rows of A up itself
        left, a = _EmbeddingLeft(layer.lora_embedding_B, adapter_name), layer.lora_embedding_A[adapter_name]
    else:
        lora_a: Any = layer.lora_A[adapter_name]
        left, a = layer.lora_B[adapter_name], lora_a.weight
        if type(lora_a) in CONVOLUTIONS:
            apply = functools.partial(CONVOLUTIONS[type(lora_a)], stride=lora_a.stride, padding=lora_a.padding)
    b: Any = left.weight
    gain, c = config.gain(b.shape[0]), config.vector_norm
    kind = _EmbeddingProjection if adapter_name in layer.lora_embedding_A else SingularProjection
    right = kind(torch.empty_like(a), gain, apply)
    right.requires_grad_(a.requires_grad)
    if adapter_name in layer.lora_embedding_A:
        if not isinstance(layer.lora_embedding_A, EmbeddingRight):
            layer.lora_embedding_A = EmbeddingRight(layer.lora_embedding_A)
        layer.lora_embedding_A.put(adapter_name, right)
    else:
        layer.lora_A[adapter_name] = right
    triplets = Triplets(name, left, right)
    if a.device.type != "meta":  # on meta, weights will be loaded
        is_zero = not bool(a.any()) or not bool(b.any())
        if not is_zero:  # PiSSA, its like, and trained adapters start from B A != 0: the same update as triplets
            p, lam, q = from_product(b.detach(), a.detach())
            triplets.reset(config.initialization, c)  # the rank of B A may be lower: the others start with λ = 0
            learned = Factors(c * p, lam / (gain * c**2), c * q)
            triplets.assign(padded(learned, Factors(*(part.detach() for part in triplets.factors))))
        else:
            triplets.reset(config.initialization, c)
            if keep_vectors and bool(a.any()) and triplets.rank <= triplets.shape[1]:
                basis, _ = torch.linalg.qr(a.detach().flatten(1).mT.float())
                right.right_vectors.data.copy_(c * basis.mT.view_as(a))
    known: Any = layer._load_state_dict_pre_hooks.values()
    if _resize_to_state_dict not in [hook.hook for hook in known]:
        layer.register_load_state_dict_pre_hook(_resize_to_state_dict)  # type: ignore[no-untyped-call]
        layer.register_load_state_dict_post_hook(_remember_what_was_loaded)  # type: ignore[no-untyped-call]
    return triplets


def downgrade_layer(layer: LoraLayer, adapter_name: str) -> None:
    """Plain LoRA parts again, A = Q and B = ρ·P Λ, for code of PEFT that writes to A. It makes convolutions anew."""
    triplets = triplets_of(layer, adapter_name)
    if triplets.q.ndim > 2:
        return
    with torch.no_grad():
        triplets.p.mul_(triplets.right.gain * triplets.lam)
    if isinstance(layer.lora_embedding_A, EmbeddingRight):
        layer.lora_embedding_A.put(adapter_name, triplets.q)
    else:
        plain = nn.Linear(triplets.q.shape[1], triplets.rank, bias=False)
        plain.weight = triplets.q
        layer.lora_A[adapter_name] = plain


def remove_layers(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the model again, and out of the way what it alone had wrapped."""
    for name, layer in list(lora_layers(model, adapter_name)):
        assert isinstance(layer, nn.Module)
        layer.delete_adapter(adapter_name)
        if not layer.lora_A and not layer.lora_embedding_A:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base_layer)


def triplets_of(layer: LoraLayer, adapter_name: str) -> Triplets:
    if isinstance(layer.lora_embedding_A, EmbeddingRight):
        return Triplets("", _EmbeddingLeft(layer.lora_embedding_B, adapter_name), projection(layer, adapter_name))
    return Triplets("", layer.lora_B[adapter_name], projection(layer, adapter_name))


def _resize_to_state_dict(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Ranks differ between the moments of a training: take the shapes of what is about to be loaded, and tell the
    allocator, whose state comes by another way."""
    assert isinstance(layer, LoraLayer)
    for adapter_name in (*layer.lora_A, *layer.lora_embedding_A):
        if _singular(layer, adapter_name) is None:
            continue
        stored = [state_dict.get(key) for key in Keys.of(layer, prefix.removesuffix("."), adapter_name).factors]
        if all(part is not None for part in stored):
            factors = Factors(*(part for part in stored if part is not None))
            triplets = triplets_of(layer, adapter_name)
            if (factors.p.shape[0], factors.q.shape[1:]) == (triplets.p.shape[0], triplets.q.shape[1:]):
                triplets.right.allocator.weights_replaced()
                triplets.right.known = None
                if len(factors.lam) != triplets.rank and not triplets.is_sharded:
                    triplets.assign(factors)


def _remember_what_was_loaded(layer: nn.Module, *_: Any) -> None:
    assert isinstance(layer, LoraLayer)
    for adapter_name in (*layer.lora_A, *layer.lora_embedding_A):
        right = _singular(layer, adapter_name)
        if right is not None and right.known is None:
            triplets_of(layer, adapter_name).remember()


def padded(loaded: Factors, live: Factors) -> Factors:
    """``loaded``, and from ``live`` the triplets that it lacks, with λ = 0."""
    rank = len(loaded.lam)
    if rank >= len(live.lam):
        return loaded
    p, q = live.p.to(loaded.p)[:, rank:], live.q.to(loaded.q)[rank:]
    return Factors(
        torch.cat([loaded.p, p], 1), torch.cat([loaded.lam, p.new_zeros(p.shape[1])]), torch.cat([loaded.q, q])
    )
