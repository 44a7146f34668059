"""What a user does with an AdaLoRA model: make it, look at it, compact it, save it, resume it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft import get_peft_model as peft_get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..core.allocator import Allocator
from ..core.copies import masks_to_save, warn_of_unseen_training
from ..core.errors import ConfigError, StateError
from ..core.sharded import meet, whole
from .config import AdaLoraConfig
from .files import PRUNED, SCORES, replacing, save_tensors
from .layers import (
    adapted_layers,
    adapted_model,
    adapter_names,
    is_trained,
    lora_layers,
    projection,
    triplets_of,
    upgrade_layers,
)
from .plain import PREFIX, Pair, PlainAdapter, listed, shapes_of
from .state_dicts import adopt

STATE_NAME = "adalora_state.safetensors"
_LORA_FIELDS = [f.name for f in fields(LoraConfig) if f.init and f.name != "peft_type"]


def get_peft_model(model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """``peft.get_peft_model`` for an :class:`AdaLoraConfig`; the stock function gives the same model.

    Raises:
        ConfigError: another kind of configuration, or target modules that match nothing (with what could match).
    """
    if not isinstance(config, AdaLoraConfig):
        raise ConfigError(
            f"adalora.get_peft_model takes an AdaLoraConfig, not {type(config).__name__};"
            " use peft.get_peft_model for other methods."
        )
    adapted: PeftModel = peft_get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
    return adapted


def upgrade(model: nn.Module, adapter_name: str, config: AdaLoraConfig) -> Allocator:
    """Take a plain LoRA adapter of this model under a budget: pruning starts from what it has learned.

    Every B A becomes P Λ Q, its singular value decomposition, so the model computes what it did. Make optimizers after
    this: the parameters are new ones.

    Args:
        model: with the LoRA adapter in it, however it came there (PEFT, or ``add_adapter`` of Transformers).
        adapter_name: of the adapter.
        config: says the budget and the schedule. What an adapter is made of (ranks, scale, targets, ...) stays the
            adapter's own; ``init_r`` is its rank. ``initialization`` is for an adapter that has learned nothing yet:
            the directions of a trained one are what it has learned, and no gradient is looked at.

    Raises:
        StateError: there is no such adapter, it is AdaLoRA's already, or it is frozen.
        ConfigError: another kind of adapter or configuration, or a target above the adapter's ranks.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        raise StateError(
            f"this {type(model).__name__} has no adapter {adapter_name!r}"
            f" ({', '.join(adapters) or 'none at all'}): load or make a LoRA adapter first."
        )
    present = adapters[adapter_name]
    if not isinstance(config, AdaLoraConfig):
        raise ConfigError(f"adalora.upgrade takes an AdaLoraConfig, not {type(config).__name__}.")
    if isinstance(present, AdaLoraConfig):
        raise StateError(f"{adapter_name!r} is AdaLoRA's already; its budget is that of its own configuration.")
    if type(present) is not LoraConfig:
        raise ConfigError(
            f"{adapter_name!r} is a {type(present).__name__}; LoRA adapters alone can be upgraded"
            " (a checkpoint of PEFT's AdaLoRA: adalora.convert makes a LoRA adapter of it)."
        )
    if present.target_parameters:
        raise ConfigError(
            f"{adapter_name!r} adapts {', '.join(sorted(present.target_parameters))}: the factors of all experts lie in"
            " one pair of matrices, whose ranks cannot differ, so it stays plain LoRA. A new AdaLoRA adapter can take"
            " the modules beside them (target_modules)."
        )
    inner = adapted_model(model)
    if not any(is_trained(layer, adapter_name) for _, layer in lora_layers(inner, adapter_name)):
        raise StateError(
            f"{adapter_name!r} is frozen, so there is nothing to train: load it with is_trainable=True, or make it"
            " the active adapter."
        )
    if config.target_r is not None and config.target_r > present.r:
        raise ConfigError(
            f"target_r={config.target_r} is above the rank {present.r} of {adapter_name!r}: AdaLoRA only prunes."
        )
    budget = {f.name: getattr(config, f.name) for f in fields(AdaLoraConfig) if f.name not in _LORA_FIELDS}
    lora = {name: getattr(present, name) for name in _LORA_FIELDS}
    upgraded = AdaLoraConfig(**{**lora, **budget, "r": present.r, "init_r": present.r})
    found = upgrade_layers(inner, adapter_name, upgraded, keep_vectors=True)
    adopt(inner, adapter_name, upgraded)
    adapters[adapter_name] = upgraded
    return found


def allocator(model: nn.Module, adapter_name: str | None = None) -> Allocator:
    """The allocator of an adapter; the name may be left out when the model has one AdaLoRA adapter.

    Raises:
        StateError: there is no such adapter, or more than one and no name.
    """
    name = _adapter_name(model, adapter_name)
    _, layer = next(adapted_layers(model, name))
    found: Allocator = projection(layer, name).allocator
    return found


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Live triplets of each adapted module, by its name in the base model."""
    return allocator(model, adapter_name).ranks()


def compact(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, adapter_name: str | None = None) -> None:
    """Slice pruned triplets away in memory, the optimizer's state along with them.

    In training this happens by itself when the final phase begins (``AdaLoraConfig(compact=True)``).

    Raises:
        StateError: pruning is not over, or something pins the shapes of the parameters.
    """
    allocator(model, adapter_name).compact(getattr(optimizer, "optimizer", optimizer))


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    rank: float | None = None,
    pad: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapter as plain LoRA: ``adapter_model.safetensors`` and ``adapter_config.json``.

    B = P, A = s·ρ·Λ Q, and the configuration makes the scale 1, for engines that read rank patterns and for those that
    do not. Both files are written beside their place first. ``model.save_pretrained`` writes the same two. Where
    parameters lie in shards (FSDP2), every process must call this, and the first writes.

    Args:
        model: any model with the adapter in it.
        directory: where to write.
        adapter_name: may be left out when the model has one AdaLoRA adapter.
        rank: keep only the best triplets of all modules together, so many a matrix on average: 0.25 for one in four.
        pad: bring every module to the largest rank with zeros, for engines that want uniform tensors.
        dtype: of the tensors in the file.

    Returns:
        the directory.

    Raises:
        StateError: the model has no such adapter, or its other shards' processes do not take part.
        ConfigError: a rank above what is there, or a type that cannot hold the values.
    """
    name = _adapter_name(model, adapter_name)
    config: AdaLoraConfig = model.peft_config[name]  # type: ignore[assignment, index]
    sharded = allocator(model, name).is_sharded
    if sharded:
        meet("export_lora")
    weights = get_peft_model_state_dict(model, adapter_name=name)
    prefix = "" if all(key.startswith("base_model.model.") for key in weights) else "base_model.model."
    tensors = {prefix + key: whole(value) for key, value in weights.items()}  # of modules_to_save, too
    about = {PRUNED: _pruned(model, name, tensors), SCORES: _scores(model, name, tensors)}
    if sharded and torch.distributed.get_rank() != 0:
        return Path(directory)
    inference_mode, base = config.inference_mode, config.base_model_name_or_path
    with replacing(directory) as beside:
        try:
            config.inference_mode = True
            config.base_model_name_or_path = (
                base or getattr(getattr(model, "config", None), "_name_or_path", None) or None
            )
            config.save_pretrained(str(beside))
        finally:
            config.inference_mode, config.base_model_name_or_path = inference_mode, base
        save_tensors(tensors, beside, about)
        if rank is not None or pad or dtype is not None:
            plain = PlainAdapter.read(beside)
            plain = plain if rank is None else plain.truncate(rank)
            plain = plain.padded() if pad else plain
            (plain if dtype is None else plain.to(dtype)).write(beside)
    return Path(directory)


# ------------------------------------------------------------------------------------------------------- checkpoints


def save_state(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write ``adalora_state.safetensors`` into a checkpoint: all that a bit-for-bit resumption needs of the method.

    Where parameters lie in shards (FSDP2), every process must call this, and the first writes.

    Raises:
        StateError: the model has no such adapter, or its other shards' processes do not take part.
    """
    ours = allocator(model, adapter_name)
    if ours.is_sharded:
        meet("save_state")
    warn_of_unseen_training(ours)
    state = ours.state_dict()
    if ours.is_sharded and torch.distributed.get_rank() != 0:
        return Path(directory) / STATE_NAME
    tensors = {key: value.cpu().contiguous() for key, value in state.pop("tensors").items()}
    with replacing(directory) as beside:
        save_file(tensors, beside / STATE_NAME, metadata={"format": "pt", "adalora": json.dumps(state)})
    return Path(directory) / STATE_NAME


def load_state(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Restore what :func:`save_state` wrote: P, Λ, Q with their ranks, importance, mask, step and schedule.

    The optimizer's own state, and trained parts of the model that are not AdaLoRA's (a classifier, say), are loaded as
    with any other model; the order does not matter.

    Raises:
        StateError: there is no such file, it is not readable, or it belongs to another model.
    """
    path = Path(directory)
    path = path / STATE_NAME if path.is_dir() else path
    if not path.is_file():
        raise StateError(
            f"{path} does not exist: this checkpoint has no AdaLoRA state, so its training cannot be resumed exactly."
            " AdaLoraCallback() writes it under a Trainer, adalora.save_state(model, directory) in a loop of your own."
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["adalora"])
            state["tensors"] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise StateError(f"{path} is not an AdaLoRA state: {error}. Was its writing interrupted?") from error
    allocator(model, adapter_name).load_state_dict(state)


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest *complete* ``checkpoint-N`` in a Trainer's output directory, or None.

    ``AdaLoraCallback`` writes the AdaLoRA state after everything else, so a checkpoint that has it was not cut short.
    """
    root = Path(directory)
    complete = [
        (int(path.parent.name.removeprefix("checkpoint-")), path.parent)
        for path in root.glob(f"checkpoint-*/{STATE_NAME}")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return max(complete)[1] if complete else None


def _pruned(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The modules that have no tensors in the file, with the shapes that these would have."""
    found = {}
    for full, layer in adapted_layers(model, adapter_name):
        name = full.removeprefix(PREFIX)
        if not any(key.startswith(f"{PREFIX}{name}.lora_") for key in tensors):
            p, _, q = triplets_of(layer, adapter_name).parameters
            b, a = torch.zeros(p.shape[0], 0, *p.shape[2:]), torch.zeros(0, *q.shape[1:])
            found[name] = Pair(b, a, adapter_name in layer.lora_embedding_A)
    return shapes_of(found)


def _scores(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Importance of the triplets in the file, by module; nothing before it has been measured."""
    ours = allocator(model, adapter_name)
    scores = ours.scores()
    if not bool(scores.any()):
        return {}
    found = {}
    masks = masks_to_save(ours)
    for triplets, of_all, mask in zip(ours.triplets, torch.split(scores, ours.sizes), masks, strict=True):
        lam = whole(triplets.lam)
        lam = lam if mask is None else lam * mask
        keys = (f"{PREFIX}{triplets.name}.lora_A.weight", f"{PREFIX}{triplets.name}.lora_embedding_A")
        pair = next((tensors[key] for key in keys if key in tensors), None)
        if pair is not None:
            kept = of_all[lam != 0].float().cpu()
            found[triplets.name] = torch.cat([kept, kept.new_zeros(len(pair) - len(kept))])  # padded with zeros
    return listed(found)


def _adapter_name(model: nn.Module, adapter_name: str | None) -> str:
    names = adapter_names(model)
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name in names:
        return str(adapter_name)
    if not names:
        raise StateError(
            f"this {type(model).__name__} has no AdaLoRA adapter. Make one with adalora.get_peft_model(model,"
            " AdaLoraConfig(...)); an adapter that was saved is plain LoRA and is loaded by peft as such."
        )
    wanted = "several AdaLoRA adapters; name one" if adapter_name is None else f"no AdaLoRA adapter {adapter_name!r}"
    raise StateError(f"this model has {wanted}: {', '.join(names)}.")
