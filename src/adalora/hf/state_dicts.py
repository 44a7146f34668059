"""State dicts: P, Λ, Q of the live layers <-> the plain LoRA pairs B, A that files hold."""

from __future__ import annotations

import re

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from ..core.errors import StateError
from ..core.triplets import Factors, Triplets, from_rows, to_product
from .config import AdaLoraConfig
from .layers import Keys, adapted_layers, padded, projection, triplets_of
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
    folded = dict(state_dict)
    layers = [
        (name, layer, keys)
        for name, layer in adapted_layers(model, adapter_name)
        if (keys := Keys.of(layer, name, adapter_name)).factors[-1] in folded
    ]
    untrained = not any(not (lam := folded[keys.factors[1]]).is_meta and bool(lam.any()) for _, _, keys in layers)
    live: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer, keys in layers:
        lam = folded[keys.factors[1]]
        live[name] = torch.arange(len(lam), device=lam.device) if untrained else lam.nonzero().flatten()
        at_least = int(_must_be_saved(layer, adapter_name, config))
        ranks[rank_owner(_alone(name))] = max(len(live[name]), at_least, ranks.get(rank_owner(_alone(name)), 0))
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
        keys = next((keys for keys in candidates if keys.a in unfolded), None)
        triplets = triplets_of(layer, adapter_name)
        live = _present(triplets)
        if keys is None:
            keys = candidates[0 if name != bare else 1]
            factors = live._replace(lam=torch.zeros_like(live.lam))
        else:
            b, a = unfolded.pop(keys.b), unfolded.pop(keys.a)
            gain = projection(layer, adapter_name).gain
            factors = padded(from_rows(b, a / (layer.scaling[adapter_name] * gain)), live)
            if keys.bias in unfolded:
                unfolded[keys.bias] = unfolded[keys.bias] / layer.scaling[adapter_name]
        rank, shapes = len(factors.lam), (triplets.p.shape, triplets.q.shape)
        for key, value, shape in zip(
            keys.factors,
            factors,
            ((shapes[0][0], rank, *shapes[0][2:]), (rank,), (rank, *shapes[1][1:])),
            strict=True,
        ):
            unfolded[key] = value.reshape(shape)
    return unfolded
