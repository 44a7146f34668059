"""Checkpoints of PEFT's own AdaLoRA -> plain LoRA.

    PEFT's:  ΔW = lora_alpha / (init_r + 1e-5) · B (E ∘ A)        A: [r, d_in]   E: [r, 1]   B: [d_out, r]

``lora_alpha`` is the rank itself where it is not positive; PEFT keeps dividing by ``init_r`` when a rank shrinks.
What the versions of PEFT wrote since 0.3, all of which is read:

- keys ``<module>.lora_A``; or ``<module>.lora_A.<adapter>`` in states that were not saved by ``save_pretrained``, where
  heads are ``<head>.modules_to_save.<adapter>.weight`` and ``<module>.ranknum.<adapter>`` holds ``init_r``;
- ``rank_pattern`` in the configuration from the first mask on, a list of booleans for each ``<module>.lora_E``, with
  the adapter's name behind it or not; the tensors are sliced by it, or not yet;
- a trained bias of an adapted module as ``<module>.bias`` (before 0.7) or ``<module>.base_layer.bias``;
- ``adapter_model.bin`` (before 0.6) or ``adapter_model.safetensors``;
- ``target_modules`` that matched any end of a name, in the middle of a word too (before 0.4).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..core.errors import ConfigError
from .checked import MOST, check_rank_pattern, short
from .files import ADAPTER_FILES, read_settings, read_tensors
from .patterns import Chosen
from .plain import PREFIX, Pair, PlainAdapter, without_empty
from .plain_config import plain_config

_TRIPLET_KEY = re.compile(r"(?P<name>.+)\.(?P<part>lora_[ABE]|ranknum)(?:\.(?P<adapter>[^.]+))?")
_SAVED_KEY = re.compile(r"(?P<name>.+)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
_CARRIED = (
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "target_modules", "exclude_modules",
    "modules_to_save", "fan_in_fan_out", "bias", "lora_dropout", "layers_to_transform", "layers_pattern",
    "trainable_token_indices",
)  # fmt: skip


def convert(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, base_model: nn.Module | None = None
) -> Path:
    """Write a checkpoint of PEFT's AdaLoRA as plain LoRA: the update is the one that PEFT's own loading gives.

    Modules that were pruned to rank 0 are left out and excluded; heads and biases are carried along. Half-precision
    weights become float32, in which PEFT computes with them.

    Args:
        source: the checkpoint's folder, of any version of PEFT.
        out: folder for ``adapter_model.safetensors`` and ``adapter_config.json``.
        base_model: needed for convolutions alone: PEFT stores their A as [r, in·height·width], which looks like a
            linear layer's. Where it is given, every shape is checked against it.

    Returns:
        the folder.

    Raises:
        ConfigError: no such checkpoint, an adapter that needs no conversion, a pickle with more than tensors in it, or
            tensors that are missing or do not fit.
    """
    if Path(source).resolve() == Path(out).resolve():
        raise ConfigError(f"{out} is the checkpoint itself: give another folder to write to.")
    return read_peft_adalora(source, base_model).write(out)


def read_peft_adalora(source: str | os.PathLike[str], base_model: nn.Module | None = None) -> PlainAdapter:
    """The checkpoint as a plain LoRA adapter in memory; arguments and errors as :func:`convert`."""
    path = Path(source)
    settings = read_settings(path)
    if settings.get("peft_type") == "LORA":
        raise ConfigError(f"{path} is plain LoRA already and needs no conversion: PEFT and adalora export read it.")
    if settings.get("peft_type") != "ADALORA":
        raise ConfigError(f"{path} holds an adapter of type {short(settings.get('peft_type'))}, not PEFT's ADALORA.")
    check_rank_pattern(settings, path / ADAPTER_FILES[1])
    triplets, rest = _sorted(read_tensors(path)[0], path)
    pattern = _patterns(settings.get("rank_pattern"), triplets, path)
    trained = any(bool(parts["lora_E"].any()) for parts in triplets.values())
    pairs = {}
    for name, parts in triplets.items():
        pair = _pair(name, parts, pattern.get(name), settings, trained)
        pairs[name] = pair if base_model is None else _shaped(name, pair, base_model)
        if f"{name}.bias" in rest:
            rest[f"{name}.base_layer.bias"] = rest.pop(f"{name}.bias")
    kept = without_empty(pairs, rest)
    ranks = {name: kept[name].rank if name in kept else 0 for name in pairs}
    pruned = {name: pair for name, pair in pairs.items() if name not in kept}
    return PlainAdapter(_config(settings, ranks), kept, rest, pruned)


def _sorted(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(A, B, E of each module, everything else), without the adapter's name."""
    triplets: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    adapters = set()
    for key, value in tensors.items():
        key = key.removeprefix(PREFIX)
        here, part = rest, key
        if match := _TRIPLET_KEY.fullmatch(key):
            here, part = triplets.setdefault(match["name"], {}), match["part"]
            adapters |= {match["adapter"]} if match["part"] != "ranknum" else set()
        elif match := _SAVED_KEY.fullmatch(key):
            part = f"{match['name']}.{match['rest']}"
        elif ".original_module." in key:
            continue
        if part in here and len(adapters) < 2:
            raise ConfigError(f"{path} holds {key} twice: one of two layers would be lost.")
        here[part] = value
    if not triplets:
        shown = ", ".join(sorted(tensors)[:2]) or "nothing"
        raise ConfigError(f"{path} says ADALORA, but its weights hold no lora_A, lora_E and lora_B: {shown}.")
    if len(adapters) > 1:
        raise ConfigError(
            f"{path} holds several adapters, {', '.join(sorted(map(str, adapters)))}: save them one by one."
        )
    for name, parts in triplets.items():
        if missing := {"lora_A", "lora_B", "lora_E"} - parts.keys():
            raise ConfigError(f"{path}: {name} has no {', '.join(sorted(missing))}; was its writing interrupted?")
    return triplets, rest


def _patterns(pattern: Any, triplets: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """``rank_pattern`` as masks, bool [init_r], by module."""
    masks = {}
    for key, value in (pattern or {}).items():
        name = key.removeprefix(PREFIX).rpartition(".lora_E")[0]
        masks[name] = torch.as_tensor(value, dtype=torch.bool).flatten()
        if name not in triplets and bool(masks[name].any()):
            raise ConfigError(f"{path}: rank_pattern names {name or key}, but the weights have no such module.")
    return masks


def _pair(
    name: str, parts: Mapping[str, Tensor], mask: Tensor | None, settings: Mapping[str, Any], trained: bool
) -> Pair:
    """B and A at scale 1, [d_out, r] and [r, d_in]; triplets with λ = 0 add nothing and are left out."""
    a, b, lam = (parts[part] for part in ("lora_A", "lora_B", "lora_E"))
    rank = len(lam) if lam.ndim else 0
    floating = all(part.is_floating_point() for part in (a, b, lam)) and 0 not in (a.shape[-1:] + b.shape[:1])
    if not floating or a.ndim != 2 or b.ndim != 2 or lam.numel() != rank or (a.shape[0], b.shape[1]) != (rank, rank):
        raise ConfigError(
            f"{name} has lora_A {list(a.shape)}, lora_E {list(lam.shape)} and lora_B {list(b.shape)}; expected"
            " [r, d_in], [r, 1] and [d_out, r], of floating point numbers."
        )
    a, b, lam = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (a, b, lam.flatten()))
    if mask is not None:
        if rank == len(mask):  # as it was in memory: PEFT slices when it saves
            a, b, lam = a[mask], b[:, mask], lam[mask]
        elif rank != int(mask.sum()):
            raise ConfigError(
                f"{name} has rank {rank}, but its rank_pattern keeps {int(mask.sum())} of {len(mask)}: weights and"
                " adapter_config.json do not belong together."
            )
    alpha = settings.get("lora_alpha")
    alpha = 8 if alpha is None else alpha
    ranknum = parts.get("ranknum")
    init_r = float(ranknum) if ranknum is not None and ranknum.numel() == 1 else float(settings.get("init_r") or 12)
    if not 0 < init_r < MOST:
        raise ConfigError(f"{name} has a ranknum of {init_r}, but it should be the rank that training began with.")
    scale = (alpha if alpha > 0 else float(len(lam))) / (init_r + 1e-5)
    live = (lam if trained else torch.ones_like(lam)).nonzero().flatten()
    return Pair(b, (scale * lam).unsqueeze(1) * a).select(live)


def _shaped(name: str, pair: Pair, base_model: nn.Module) -> Pair:
    """The pair in the shapes that PEFT's LoRA has for this module."""
    try:
        module = base_model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"the base model {type(base_model).__name__} has no module {name}.") from error
    weight = getattr(module, "weight", None)
    expected: tuple[int, int] | None = None
    if isinstance(module, nn.Conv2d):
        expected = module.out_channels, module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    elif isinstance(module, nn.Linear):
        expected = module.out_features, module.in_features
    elif type(module).__name__ == "Conv1D" and weight is not None:
        expected = weight.shape[1], weight.shape[0]
    if expected is not None and (pair.b.shape[0], pair.a.shape[1]) != expected:
        raise ConfigError(
            f"{name} is {type(module).__name__} {list(expected)} in the base model, but [{pair.b.shape[0]},"
            f" {pair.a.shape[1]}] in the checkpoint: is it the right base model?"
        )
    if not isinstance(module, nn.Conv2d):
        return pair
    if set(module.dilation) != {1}:
        raise ConfigError(
            f"{name} is a convolution with dilation {module.dilation}, which PEFT's LoRA leaves out of its own: merge"
            " the checkpoint with PEFT instead (merge_and_unload)."
        )
    a = pair.a.reshape(pair.rank, module.in_channels, *module.kernel_size)
    return Pair(pair.b.reshape(module.out_channels, pair.rank, 1, 1), a)


def _config(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig:
    """PEFT's plain configuration, which must choose exactly these modules."""
    known = {key: settings[key] for key in _CARRIED if settings.get(key) is not None}
    kept = sorted(name for name, rank in ranks.items() if rank)
    config = plain_config(LoraConfig(**{"target_modules": kept, **known}), ranks)
    chosen = Chosen(config)
    if not all(name in chosen for name in kept):
        config.target_modules, config.layers_to_transform, config.layers_pattern = kept, None, None
    return config
