"""How large an adapter is, counted on a copy of the model without weights: the model and the random state stay as they
were, and no memory is taken."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from ..hf.injected import linear_module_suffixes
from ..recipe import Recipe, RecipeError
from .base import get, head_modules
from .precision import whole_in_float32

Modules = str | list[str] | None


def parse_budget(budget: int | str, model: PreTrainedModel, recipe: Recipe) -> int:
    """The recipe's ``budget`` in parameters. ``rank 8``: as many as LoRA of rank 8 has on the matrices that the
    recipe's method adapts; for a method that does not adapt single matrices, on those that the section ``lora`` names.
    ``rank 0.25``: a quarter of what it has at rank 1, rounded down.

    Raises:
        RecipeError: neither a number of parameters nor a rank, more than the model has, or target modules that match
            nothing.
    """
    parameters, whole = _parse_budget(budget, model, recipe), sum(weight.numel() for weight in model.parameters())
    if parameters > whole:  # before layers of such a rank take all memory
        raise RecipeError(
            f"budget: {budget} is {parameters:,} parameters, more than the {whole:,} of {recipe.model} itself: allow"
            " fewer, or use the method full"
        )
    return parameters


def _parse_budget(budget: int | str, model: PreTrainedModel, recipe: Recipe) -> int:
    if isinstance(budget, int) and budget >= 1:
        return budget
    rank = re.fullmatch(r"rank\s+(?=.*[1-9])(\d+(?:\.\d+)?|\.\d+)", str(budget).strip())
    if rank is None:
        raise RecipeError(
            f"budget: should be a number of parameters (330000), or a rank (`rank 8`, `rank 0.25`) (given: {budget!r})"
        )
    section = recipe.adalora if get(recipe.method).section == "adalora" else recipe.lora
    one = lora_parameters(model, section.target_modules, section.exclude_modules, 1)
    return math.floor(round(float(rank[1]) * one, 6))


def rank_for(
    model: PreTrainedModel,
    recipe: Recipe,
    parameters: int,
    *,
    target_modules: str | list[str],
    exclude_modules: Modules,
    **lora: Any,
) -> int:
    """The rank whose LoRA adapter comes nearest to so many parameters; of two as near, the smaller.

    Args:
        recipe: for words in an error alone.
        lora: further fields of ``peft.LoraConfig`` that add parameters, such as ``use_dora``.

    Raises:
        RecipeError: rank 1 has twice as many or more, or the target modules match nothing.
    """
    at_1, at_2 = (lora_parameters(model, target_modules, exclude_modules, rank, **lora) for rank in (1, 2))
    return nearest(recipe, "rank", parameters, at_1, at_2)


def nearest(recipe: Recipe, what: str, parameters: int, at_1: int, at_2: int) -> int:
    """The size n >= 1 at which a number of parameters that grows by the same amount with every n comes nearest.

    Args:
        what: name of that size in an error.
        at_1: parameters at n = 1.
        at_2: at n = 2.

    Raises:
        RecipeError: n = 1 has twice as many or more.
    """
    if at_1 >= 2 * parameters:
        raise RecipeError(
            f"budget: {parameters} parameters are too few for {recipe.method} on {recipe.model}, which has {at_1} at "
            f"{what} 1: allow more, or adapt fewer modules"
        )
    more, step = max(0, parameters - at_1), at_2 - at_1
    return 1 + (2 * more + step - 1) // (2 * step)


def lora_parameters(
    model: PreTrainedModel, target_modules: str | list[str], exclude_modules: Modules, rank: int, **lora: Any
) -> int:
    """Parameters of a LoRA adapter of this rank, without those of the output layer and of ``modules_to_save``.

    Args:
        lora: further fields of ``peft.LoraConfig`` that add parameters, such as ``use_dora``.

    Raises:
        RecipeError: the target modules match nothing.
    """
    return sum(_parameters(model, target_modules, exclude_modules, rank, **lora).values())


def triplet_parameters(
    model: PreTrainedModel, target_modules: str | list[str], exclude_modules: Modules
) -> dict[str, int]:
    """Parameters of one triplet of each matrix, by the name of its module. RecipeError when nothing matches."""
    return _parameters(model, target_modules, exclude_modules, 1)


def _parameters(
    model: PreTrainedModel, target_modules: str | list[str], exclude_modules: Modules, rank: int, **lora: Any
) -> dict[str, int]:
    """What LoRA of this rank trains in each module."""
    config = LoraConfig(r=rank, target_modules=target_modules, exclude_modules=exclude_modules, **lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is to be said of the configuration is said where it is used
        adapted = with_adapter(body_without_weights(model), config, low_cpu_mem_usage=True)
    found: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            module = name.partition(".lora_")[0]
            found[module] = found.get(module, 0) + parameter.numel()
    return found


def with_adapter(model: nn.Module, config: LoraConfig, **settings: Any) -> PeftModel:
    """``peft.get_peft_model``, with all that is trained in float32. RecipeError when the target modules match nothing,
    with what could match."""
    wanted, excluded = config.target_modules, config.exclude_modules
    try:
        with warnings.catch_warnings():  # PEFT corrects this by itself for GPT-2's layers
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but")
            adapted: PeftModel = get_peft_model(model, config, **settings)
    except NoMatchingPeftModuleError as error:
        raise RecipeError(
            f"target_modules: {wanted!r} matches nothing in {type(model).__name__}"
            + (f" (exclude_modules: {excluded!r})" if excluded else "")
            + f", whose linear modules are called {', '.join(linear_module_suffixes(model)) or '(none)'}; "
            "'all-linear' takes them all"
        ) from error
    whole_in_float32(adapted)
    return adapted


def body_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose tensors have shapes but no values (they are on torch's device ``meta``), and whose output layer, if
    a task made it, is left out."""
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    empty |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    body = copy.deepcopy(model, empty)
    for name in head_modules(model):
        setattr(body, name, nn.Identity())
    return body
