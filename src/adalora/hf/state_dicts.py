"""State dicts: P, Λ, Q of the live layers <-> the plain LoRA pairs B, A that files hold."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from ..core.copies import masks_to_save, warn_of_masked, warn_of_unseen_training
from ..core.errors import StateError
from ..core.sharded import whole
from ..core.triplets import TRIPLET_DIMS, Factors, Triplets, from_rows, to_product
from .config import AdaLoraConfig
from .layers import Keys, adapted_layers, adapter_names, padded, projection, triplets_of
from .plain import PREFIX
from .plain_config import rank_owner


def fold(
    model: nn.Module, adapter_name: str, config: AdaLoraConfig, state_dict: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A state dict with P, Λ, Q of this adapter -> the same with plain, compact LoRA weights; the model stays as it is.

    Every triplet with λ != 0 is kept, so what is saved computes what is in memory, also between two masks. An adapter
    that has not been trained at all keeps every triplet.

    Returns:
        the new state dict, in which layers of rank 0 are left out, and the rank of each layer by its name.
    """
    folded = {key: whole(value) for key, value in state_dict.items()}
    layers = [
        (name, layer, keys)
        for name, layer in adapted_layers(model, adapter_name)
        if (keys := Keys.of(layer, name, adapter_name)).factors[-1] in folded
    ]
    live, ranks = _ranks([(name, layer, folded[keys.factors[1]]) for name, layer, keys in layers], adapter_name, config)
    for name, layer, keys in layers:
        p, lam, q = (folded.pop(key) for key in keys.factors)
        saved = Keys.of(layer, _alone(name), adapter_name)
        rank = ranks[rank_owner(_alone(name))]
        if rank:
            zeros = rank - len(live[name])
            kept = Factors(
                F.pad(p.flatten(1)[:, live[name]], (0, zeros)),
                F.pad(lam[live[name]], (0, zeros)),
                F.pad(q.flatten(1)[live[name]], (0, 0, 0, zeros)),
            )
            b, a = to_product(kept, layer.scaling[adapter_name] * projection(layer, adapter_name).gain)
            if saved.a in folded:
                raise StateError(
                    f"two layers of {adapter_name!r} would be saved under one name, {_alone(name)}, and one of them be"
                    " lost: PEFT has wrapped one within the other."
                )
            folded[saved.b] = b.reshape(p.shape[0], rank, *p.shape[2:]).contiguous()
            folded[saved.a] = a.reshape(rank, *q.shape[1:]).contiguous()
        if keys.bias in folded:  # lora_bias: PEFT scales it with the rest
            folded[saved.bias] = folded.pop(keys.bias) * layer.scaling[adapter_name]
    return folded, {name.removeprefix(PREFIX): rank for name, rank in ranks.items()}


def _ranks(
    layers: Sequence[tuple[str, LoraLayer, Tensor]], adapter_name: str, config: AdaLoraConfig
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What is saved of each (name, layer, λ): which triplets, int64 [k], by the layer's name, and its rank by the name
    that it is saved under."""
    untrained = not any(not lam.is_meta and bool(lam.any()) for _, _, lam in layers)
    masks = _masks(layers, adapter_name)
    live: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for (name, layer, lam), mask in zip(layers, masks, strict=True):
        kept = lam if mask is None else lam * mask.to(lam.device)
        live[name] = torch.arange(len(lam), device=lam.device) if untrained else kept.nonzero().flatten()
        at_least = int(_must_be_saved(layer, adapter_name, config))
        ranks[rank_owner(_alone(name))] = max(len(live[name]), at_least, ranks.get(rank_owner(_alone(name)), 0))
    return live, ranks


def _masks(layers: Sequence[tuple[str, LoraLayer, Tensor]], adapter_name: str) -> list[Tensor | None]:
    """Of each layer, which triplets may be saved; None for all. What went past the allocator is told of."""
    rights = [projection(layer, adapter_name) for _, layer, _ in layers]
    allocators = {id(right.allocator): right.allocator for right in rights}
    known: dict[int, Tensor | None] = {}
    for ours in allocators.values():
        warn_of_unseen_training(ours)
        masks = masks_to_save(ours)
        known.update((id(t.right), mask) for t, mask in zip(ours.triplets, masks, strict=True))
    found = [
        mask if (mask := known[id(right)]) is not None and mask.shape == lam.shape and not lam.is_meta else None
        for right, (_, _, lam) in zip(rights, layers, strict=True)
    ]
    pairs = [(lam, mask) for mask, (_, _, lam) in zip(found, layers, strict=True) if mask is not None]
    lost = sum(int((lam[~mask.to(lam.device)] != 0).sum()) for lam, mask in pairs)
    for ours in allocators.values():
        warn_of_masked(ours, lost)
    return found


class LiveRanks:
    """The ranks that a file of this adapter would have now, by module: called, it counts them.

    Those of a state dict that PEFT has just asked for come first: it may be of other weights than the live ones (an
    average), or whole where the live ones lie in shards. They count once, and not after another step.
    """

    def __init__(self, model: nn.Module | None, adapter_name: str) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._adapter_name = adapter_name
        self._asked: tuple[Any, dict[str, int]] | None = None

    def asked(self, ranks: dict[str, int]) -> None:
        """To be told the ranks of a state dict that has been handed out."""
        self._asked = self._stamp(), ranks

    def __call__(self, config: AdaLoraConfig) -> dict[str, int] | None:
        asked, self._asked = self._asked, None
        model = None if self._model is None else self._model()
        if model is None:
            return None
        if asked is not None and asked[0] == self._stamp():
            return asked[1]
        layers = [
            (name, layer, whole(projection(layer, self._adapter_name).singular_values).detach())
            for name, layer in adapted_layers(model, self._adapter_name)
        ]
        ranks = _ranks(layers, self._adapter_name, config)[1]
        return {name.removeprefix(PREFIX): rank for name, rank in ranks.items()} or None

    def _stamp(self) -> Any:
        """Differs when λ may have changed."""
        model = None if self._model is None else self._model()
        layers = [] if model is None else [layer for _, layer in adapted_layers(model, self._adapter_name)]
        parts = [projection(layer, self._adapter_name) for layer in layers]
        return [(id(p.singular_values), p.singular_values._version, getattr(p.allocator, "step", 0)) for p in parts]

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveRanks:
        """Of a copied model; a configuration that is copied alone has no live adapter."""
        return LiveRanks(None if self._model is None else memo.get(id(self._model())), self._adapter_name)

    def __reduce__(self) -> Any:
        return LiveRanks, (None, self._adapter_name)


def _must_be_saved(layer: LoraLayer, adapter_name: str, config: AdaLoraConfig) -> bool:
    """A layer of rank 0 may still hold a trained bias or DoRA magnitude."""
    if config.bias != "none" or adapter_name in layer.lora_magnitude_vector:
        return True
    return adapter_name in layer.lora_B and getattr(layer.lora_B[adapter_name], "bias", None) is not None


def _alone(name: str) -> str:
    """The module's name without the adapters of other types that a PeftMixedModel wraps around it."""
    return re.sub(r"(\.base_layer)+$", "", name)


def _present(triplets: Triplets) -> Factors:
    """P, λ, Q as they are; fresh ones for a layer on the meta device, which has no values until it is loaded."""
    p, lam, q = (part.detach() for part in triplets.factors)
    if lam.device.type == "meta":
        p, q = (nn.init.orthogonal_(torch.empty(part.shape)).to(part.dtype) for part in (p, q))
        lam = torch.zeros(lam.shape, dtype=lam.dtype)
    return Factors(p, lam, q)


def unfold(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain LoRA weights as :func:`fold` writes them (keys without the adapter's name) -> P, Λ, Q of the live layers.

    A file may hold fewer triplets than a layer, or leave the layer out: the others get λ = 0 and keep their vectors.
    """
    unfolded = dict(state_dict)
    for name, layer in adapted_layers(model, adapter_name):
        bare = name.removeprefix(PREFIX)
        candidates = [Keys.of(layer, f"{prefix}{bare}", None) for prefix in (PREFIX, "")]
        keys = next((keys for keys in candidates if keys.a in unfolded), candidates[0 if name != bare else 1])
        _unfold_layer(layer, adapter_name, keys, unfolded)
    return unfolded


def _unfold_layer(layer: LoraLayer, adapter_name: str, keys: Keys, tensors: dict[str, Tensor]) -> None:
    """In place: the plain pair of one layer, or nothing, which is rank 0, becomes its P, Λ, Q."""
    triplets = triplets_of(layer, adapter_name)
    live = _present(triplets)
    if keys.a not in tensors:
        factors = live._replace(lam=torch.zeros_like(live.lam))
    else:
        b, a = tensors.pop(keys.b), tensors.pop(keys.a)
        gain = projection(layer, adapter_name).gain
        factors = padded(from_rows(b, a / (layer.scaling[adapter_name] * gain)), live)
        if keys.bias in tensors:
            tensors[keys.bias] = tensors[keys.bias] / layer.scaling[adapter_name]
    rank, shapes = len(factors.lam), (triplets.p.shape, triplets.q.shape)
    wanted = ((shapes[0][0], rank, *shapes[0][2:]), (rank,), (rank, *shapes[1][1:]))
    for key, value, shape in zip(keys.factors, factors, wanted, strict=True):
        tensors[key] = value.reshape(shape)


def adopt(model: nn.Module, adapter_name: str, config: AdaLoraConfig) -> None:
    """What a new adapter needs for files: a configuration that knows its ranks, and a model that takes its plain form
    in ``load_state_dict``, too.

    Args:
        model: that the layers are named in, without PEFT's wrappers.
    """
    config._live = LiveRanks(model, adapter_name)
    known: Any = model._load_state_dict_pre_hooks.values()
    if _take_plain_form not in [hook.hook for hook in known]:
        model.register_load_state_dict_pre_hook(_give_back_what_is_empty)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_take_plain_form)  # type: ignore[no-untyped-call]


def _give_back_what_is_empty(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Writers of safetensors (Accelerate's is one) take all empty tensors for one that is shared, and keep the first:
    where a part of some layer's triplets is left out, layers without any are of rank 0, too."""
    for adapter_name in adapter_names(model):
        layers = [
            (triplets_of(layer, adapter_name), Keys.of(layer, prefix + name, adapter_name).factors)
            for name, layer in adapted_layers(model, adapter_name)
        ]
        found = [[state_dict[key] for key in keys if key in state_dict] for _, keys in layers]
        if not any(0 < len(parts) < len(Factors._fields) and not parts[0].numel() for parts in found):
            continue
        for (triplets, keys), parts in zip(layers, found, strict=True):
            if any(part.numel() for part in parts):
                continue
            for key, parameter, dim in zip(keys, triplets.parameters, TRIPLET_DIMS, strict=True):
                shape = [0 if d == dim else size for d, size in enumerate(parameter.shape)]
                state_dict.setdefault(key, parameter.new_empty(shape, requires_grad=False))


def _take_plain_form(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Trainers that rebuild a model from its checkpoint copy its state dict, in which the adapter is plain LoRA: it is
    taken over whole, or refused before anything is copied."""
    for adapter_name in adapter_names(model):
        layers = [
            (name, layer, Keys.of(layer, prefix + name, adapter_name))
            for name, layer in adapted_layers(model, adapter_name)
        ]
        if not any(keys.a in state_dict and keys.factors[2] not in state_dict for _, _, keys in layers):
            continue
        _check_plain_form(adapter_name, layers, state_dict, prefix)
        for name, layer, keys in layers:
            _unfold_layer(layer, adapter_name, keys, state_dict)
            _wrap_base(prefix + name, state_dict)
            projection(layer, adapter_name).allocator.weights_replaced()


def _check_plain_form(
    adapter_name: str, layers: list[tuple[str, LoraLayer, Keys]], state_dict: dict[str, Tensor], prefix: str
) -> None:
    """StateError unless every pair of plain LoRA has a layer here that it fits."""
    pair = re.compile(rf"{re.escape(prefix)}(.+)\.lora_(?:embedding_)?A\.{re.escape(adapter_name)}(?:\.weight)?")
    said = f"this state dict holds {adapter_name!r} as plain LoRA, and nothing of it was copied:"
    known = {name for name, _, _ in layers}
    for key in state_dict:
        if (match := pair.fullmatch(key)) and match[1] not in known:
            raise StateError(
                f"{said} {match[1]}, which it adapts, is not adapted here. Is it of this model, with these"
                " target_modules?"
            )
    for name, layer, keys in layers:
        triplets = triplets_of(layer, adapter_name)
        if keys.factors[2] in state_dict:
            raise StateError(f"{said} {name} is there as P, Λ and Q beside it. Give one of the two.")
        if keys.a not in state_dict:
            continue
        b, a = state_dict.get(keys.b), state_dict[keys.a]
        wanted = (triplets.p.shape[0], *triplets.p.shape[2:]), triplets.q.shape[1:]
        if b is None or b.ndim < 2 or (a.shape[0], (b.shape[0], *b.shape[2:]), a.shape[1:]) != (b.shape[1], *wanted):
            raise StateError(
                f"{said} {name} has A {list(a.shape)} and B {None if b is None else list(b.shape)}, which do not fit"
                f" [r, {', '.join(map(str, wanted[1]))}] and [{wanted[0][0]}, r]. Is it of this model?"
            )


def _wrap_base(name: str, state_dict: dict[str, Tensor]) -> None:
    """In place: the base weights of a module that is not adapted in the plain form, of rank 0, where they lie here."""
    base = f"{name}.base_layer."
    own = [key for key in state_dict if key.startswith(f"{name}.")]
    if not any(key.startswith(base) for key in own):
        for key in own:
            rest = key.removeprefix(f"{name}.")
            if not rest.startswith("lora_"):
                state_dict[base + rest] = state_dict.pop(key)
