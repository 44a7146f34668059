"""Modules that are trained whole beside an adapter, in float32 whatever the precision of the model around them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ConfigError
from ..hf.placing import place
from ..hf.plain import PlainAdapter


def whole_in_float32(model: PeftModel) -> bool:
    """Make float32 of modules in half precision that are trained whole beside an adapter, the output layer above all,
    as PEFT does with the adapter. They take inputs of the base's precision; those inside the model answer in it too.

    Returns:
        Whether any was in half precision.
    """
    changed = False
    for name, wrapper in model.get_base_model().named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            given = {parameter.dtype for parameter in module.parameters()} & {torch.float16, torch.bfloat16}
            if not given:
                continue
            changed = True
            module.float().register_forward_pre_hook(_take_any_precision, with_kwargs=True)
            if "." in name:  # not the model's own output
                module.register_forward_hook(partial(_answer_in, given.pop()))
    return changed


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the plain LoRA adapter in ``folder``, every tensor in its place, and modules that were trained
    whole in float32 beside a base in half precision. ConfigError when it cannot be read or does not fit."""
    try:
        return place(model, PlainAdapter.read(folder), whole_in_float32)
    except ConfigError as error:
        raise ConfigError(f"the adapter in {folder} cannot be loaded: {error}") from error


def _take_any_precision(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return _cast(args, torch.float32), {name: _cast(value, torch.float32) for name, value in kwargs.items()}


def _answer_in(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Numbers of a tensor, or of those in a tuple, in another precision."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
