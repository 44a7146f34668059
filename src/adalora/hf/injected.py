"""What PEFT makes of a configuration when it meets a model, looked at before it touches that model."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from ..core.errors import ConfigError
from .config import AdaLoraConfig


def check_injected(model: nn.Module, config: AdaLoraConfig) -> None:
    """ConfigError where PEFT would rewrite this configuration into one that AdaLoRA refuses.

    Transformers 5 keeps the experts of a mixture in one parameter, and PEFT then turns the usual names of their
    matrices, or ``all-linear``, into ``target_parameters``.
    """
    try:
        config.check_kind()
        rewritten = _rewritten(model, config)
        if rewritten.target_parameters:
            names = sorted(name for name in rewritten.target_modules or () if name in linear_module_suffixes(model))
            raise ConfigError(
                f"target_modules={_shown(config)} takes in experts of {type(model).__name__}"
                f" ({', '.join(sorted(rewritten.target_parameters))}), whose weights are fused: PEFT keeps the factors"
                " of all experts in one pair of matrices, whose ranks cannot differ. Adapt the modules beside them:"
                f" target_modules={names or linear_module_suffixes(model)}."
            )
    except ConfigError:
        not_adapted_after_all(model)
        raise


def not_adapted_after_all(model: nn.Module) -> None:
    """Transformers' ``add_adapter`` notes an adapter before it is made, and looks for it at the next attempt."""
    if getattr(model, "_hf_peft_config_loaded", False) and not getattr(model, "peft_config", None):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _rewritten(model: Any, config: AdaLoraConfig) -> AdaLoraConfig:
    """A copy of the configuration as PEFT would inject it."""
    found = copy.copy(config)
    found.rank_pattern, found.alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    if hasattr(getattr(model, "config", None), "model_type"):
        try:
            convert_peft_config_for_transformers(found, model, get_model_conversion_mapping(model))
        except ValueError as error:  # of matrices that are fused, some without the others
            raise ConfigError(
                f"target_modules={_shown(config)} takes in experts of {type(model).__name__}, whose weights are fused:"
                f" {error} AdaLoRA adapts no fused experts; these modules can be adapted:"
                f" target_modules={linear_module_suffixes(model)}."
            ) from error
    return found


def _shown(config: AdaLoraConfig) -> str:
    wanted = config.target_modules
    return repr(wanted if isinstance(wanted, str) or wanted is None else sorted(wanted))


def linear_module_suffixes(model: nn.Module) -> list[str]:
    """The names that target_modules could give: last parts of all linear modules, without the numbered ones."""
    suffixes = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(suffix for suffix in suffixes if suffix and not re.fullmatch(r"\d+", suffix))
