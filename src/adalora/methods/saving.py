"""What a method learned, in a folder and back: a plain LoRA adapter, or the trained parameters by their names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import replacing
from ..hf.files import ADAPTER_FILES, save_tensors
from ..hf.files import replacing as replacing_files
from ..recipe import RecipeError

TRAINED = ADAPTER_FILES[0]  # without the configuration that would make it PEFT's
_Model = TypeVar("_Model", bound=nn.Module)


def adapter_of(model: PeftModel) -> tuple[Any, dict[str, torch.Tensor]]:
    """A copy of the configuration of the active adapter, for use after training, and its tensors with those of the
    modules trained in full, by their names in a file."""
    config: Any = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.init_lora_weights, config.eva_config = True, None  # how training began
    for name in ("target_modules", "exclude_modules", "modules_to_save"):  # PEFT's sets have another order in each run
        value = getattr(config, name)
        setattr(config, name, sorted(value) if isinstance(value, set) else value)
    return config, get_peft_model_state_dict(model)


def save_adapter(config: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter as PEFT does, ``adapter_model.safetensors`` and ``adapter_config.json``, and nothing beside."""
    with replacing_files(folder) as beside:
        config.save_pretrained(str(beside))
        save_tensors(tensors, beside, {})


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the parameters that are trained to ``adapter_model.safetensors``, by their names in the model."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in _trained(model).items()}
    with replacing(folder / TRAINED) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})


def load_trained(model: _Model, folder: Path) -> _Model:
    """The model, whose parameters to train are those of the file, with what :func:`save_trained` wrote.

    Raises:
        RecipeError: the file is not there, cannot be read, or holds other parameters.
    """
    file, wanted = folder / TRAINED, _trained(model)
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. Was the run finished?") from error
    differing = sorted(
        name
        for name in {*wanted, *found}
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    )
    if differing:
        raise RecipeError(
            f"{file} does not fit the model: {differing[0]} (one of {len(differing)}) is missing on one side or has "
            "another shape. Was the recipe or the base model changed after training?"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    return model.eval()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
