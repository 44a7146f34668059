"""What a user does with an AdaLoRA model: make it, look at it, compact it, save it, resume it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft import get_peft_model as peft_get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..core.allocator import Allocator
from ..core.errors import ConfigError, StateError
from .config import AdaLoraConfig
from .layers import adapted_layers, adapter_names, projection

STATE_NAME = "adalora_state.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


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


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write the adapter as plain LoRA: ``adapter_model.safetensors`` and ``adapter_config.json``.

    B = P, A = s·ρ·Λ Q, and the configuration makes the scale 1, for engines that read rank patterns and for those that
    do not. Both files are written beside their place first. ``model.save_pretrained`` writes the same two.

    Returns:
        the directory.

    Raises:
        StateError: the model has no such adapter.
    """
    name = _adapter_name(model, adapter_name)
    config: AdaLoraConfig = model.peft_config[name]  # type: ignore[assignment, index]
    weights = {key: value.contiguous() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
    prefix = "" if all(key.startswith("base_model.model.") for key in weights) else "base_model.model."
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
    inference_mode, base = config.inference_mode, config.base_model_name_or_path
    try:
        save_file(
            {prefix + key: value.detach().clone() for key, value in weights.items()},
            beside / ADAPTER_FILES[0],
            metadata={"format": "pt"},
        )
        config.inference_mode = True
        config.base_model_name_or_path = base or getattr(getattr(model, "config", None), "_name_or_path", None) or None
        config.save_pretrained(str(beside))
        weights_file, config_file = (beside / file for file in ADAPTER_FILES)
        weights_file.chmod(config_file.stat().st_mode)  # safetensors writes for its owner alone; servers are others
        for file in ADAPTER_FILES:
            (beside / file).replace(target / file)
    finally:
        config.inference_mode, config.base_model_name_or_path = inference_mode, base
        shutil.rmtree(beside, ignore_errors=True)
    return target


# ------------------------------------------------------------------------------------------------------- checkpoints


def save_state(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write ``adalora_state.safetensors`` into a checkpoint: all that a bit-for-bit resumption needs of the method.

    Raises:
        StateError: the model has no such adapter.
    """
    state = allocator(model, adapter_name).state_dict()
    tensors = {key: value.cpu().contiguous() for key, value in state.pop("tensors").items()}
    path = Path(directory) / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    save_file(tensors, beside, metadata={"format": "pt", "adalora": json.dumps(state)})
    beside.replace(path)
    return path


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
