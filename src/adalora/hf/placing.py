"""A plain LoRA adapter on its base model, every tensor of it where it belongs, or an error that names the first that
has no place.

PEFT warns of what it could not place and goes on, and reads names as regular expressions that may be a stranger's:
here, modules are named exactly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError
from .patterns import Chosen, as_keys, is_exactly
from .plain import PREFIX, Pair, PlainAdapter
from .plain_config import rank_owner

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D, nn.MultiheadAttention)
ADVICE = "--base MODEL names the model that the adapter was trained on."


def misplaced(adapter: PlainAdapter, model: nn.Module) -> str:
    """Why this cannot be the adapter's base model, by its modules' names; empty if it can."""
    modules = dict(model.named_modules())
    kind = type(model).__name__
    known = {rank_owner(name): pair for name, pair in (adapter.pruned | adapter.pairs).items()}
    for name in known:
        if name not in modules:
            return f"it adapts {name}, which {kind} does not have."
    if adapter.config.target_modules == "all-linear":
        return ""
    chosen = Chosen(adapter.config)
    for name, module in modules.items():
        if isinstance(module, _ADAPTABLE) and name not in known and name in chosen:
            return f"{kind} has {name}, which its target_modules take in, but it holds no tensors for it."
    return ""


def place(model: Any, adapter: PlainAdapter, prepare: Callable[[PeftModel], object] = lambda model: None) -> PeftModel:
    """The model with the adapter around it, for use and not for training.

    Args:
        prepare: called when the modules are there and before the adapter's tensors are.

    Raises:
        ConfigError: a tensor of the adapter without a place, or of another shape, or a module that the adapter should
            have tensors for and has not. The model is left as it was then, except for shapes that PEFT alone knows.
    """
    if said := misplaced(adapter, model):
        raise ConfigError(f"{said} {ADVICE}")
    _check_shapes(model, adapter)
    config = _exact(adapter)
    config.base_model_name_or_path = getattr(model, "name_or_path", None)  # else PEFT warns of another
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights and the like: what matters is checked
        placed: PeftModel = get_peft_model(model, config)
        prepare(placed)
        tensors = {PREFIX + key: value for key, value in adapter.state_dict().items() if not _is_copy(key)}
        try:
            found: Any = set_peft_model_state_dict(placed, tensors)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ConfigError(f"its tensors cannot be placed: {_last_line(error)}. {ADVICE}") from error
    missing = sorted(key for key in found.missing_keys if key in set(_of_adapter(placed)))
    for key, words in ((next(iter(sorted(found.unexpected_keys)), ""), "is in it and has no place in"),
                       (next(iter(missing), ""), "is not in it, but belongs to it on")):  # fmt: skip
        if key:
            raise ConfigError(f"{key.removeprefix(PREFIX)} {words} {type(model).__name__}. {ADVICE}")
    return placed.eval()


def _is_copy(key: str) -> bool:
    """PEFT saves embeddings that were resized and trained whole a second and a third time."""
    return bool({"modules_to_save", "original_module"} & set(key.split(".")))


def _exact(adapter: PlainAdapter) -> Any:
    """The adapter's configuration, without a name that could be read as a pattern."""
    config: Any = copy.copy(adapter.config)
    ranks, alphas = {}, {}
    for name, pair in adapter.pairs.items():
        ranks[rank_owner(name)] = pair.rank
        alphas[rank_owner(name)] = adapter.alpha(name)
    keys = as_keys(ranks)
    config.r, config.lora_alpha = max(ranks.values()), next(iter(alphas.values()))
    config.rank_pattern = {key: ranks[name] for name, key in keys.items()}
    config.alpha_pattern = {key: alphas[name] for name, key in keys.items()}
    config.target_modules, config.exclude_modules = is_exactly(ranks), None
    config.layers_to_transform, config.layers_pattern = None, None
    config.inference_mode, config.init_lora_weights = True, True
    return config


def _check_shapes(model: nn.Module, adapter: PlainAdapter) -> None:
    """ConfigError naming the first module or tensor of another shape than the model's."""
    modules, state = dict(model.named_modules()), model.state_dict()
    for name, pair in adapter.pairs.items():
        wanted = _shape(modules.get(name), pair)
        found = pair.b.shape[0], *pair.a.shape[1:]
        if wanted is not None and tuple(wanted) != found:
            raise ConfigError(
                f"{name} is {_sizes(wanted)} in {type(model).__name__}, but {_sizes(found)} in the adapter. {ADVICE}"
            )
    for key, value in adapter.rest.items():
        if key in state and state[key].shape != value.shape:
            raise ConfigError(
                f"{key} is {_sizes(state[key].shape)} in {type(model).__name__}, but {_sizes(value.shape)} in the"
                f" adapter. {ADVICE}"
            )


def _shape(module: nn.Module | None, pair: Pair) -> tuple[int, ...] | None:
    """[d_out, d_in], or [out, in, *kernel], of a module, as B and A spell it; None where only PEFT knows."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D) and weight is not None:
        return weight.shape[1], weight.shape[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and weight is not None:
        return tuple(weight.shape)
    return None


def _of_adapter(model: PeftModel) -> Iterator[str]:
    """Keys in a state dict that belong to the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and isinstance(module, LoraLayer):
            yield from (f"{name}.{key}" for key, _ in module.named_parameters() if key.startswith("lora_"))


def _sizes(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


# ------------------------------------------------------------------------------------------------------ vocabularies


def fit_vocabulary(model: Any, adapter: PlainAdapter) -> None:
    """Resize the vocabulary of the base model to the rows that the adapter holds, as it was resized for training.

    Raises:
        ConfigError: it was resized, and the adapter does not hold all rows that came.
    """
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    ids = {id(layer): layer for layer in layers}
    rows = {name: ids[id(layer)].weight.shape[0] for name, layer in model.named_modules() if id(layer) in ids}
    whole = {
        name: weight.shape[0]
        for name in rows
        for part in ("", ".base_layer", ".token_adapter.base_layer")
        if (weight := adapter.rest.get(f"{name}{part}.weight")) is not None and weight.ndim == 2
    }
    held = dict(whole)
    for name in rows:
        if (pair := adapter.pairs.get(name)) is not None:
            held[name] = pair.a.shape[1] if pair.embedding else pair.b.shape[0]
    indices = adapter.config.trainable_token_indices
    numbers = [i for part in indices.values() for i in part] if isinstance(indices, dict) else list(indices or ())
    beyond = max(numbers, default=-1) + 1
    for name, size in held.items():
        beyond = max(beyond, size if size != rows[name] else 0)
    if beyond == 0 or (not any(held[name] != rows[name] for name in held) and beyond <= min(rows.values(), default=0)):
        return
    one_weight = len({id(layer.weight) for layer in layers}) == 1
    if set(held.values()) != {beyond} or (whole.keys() != rows.keys() and not (one_weight and whole)):
        name = next((name for name in rows if name not in whole), next(iter(rows)))
        raise ConfigError(
            f"the vocabulary was resized before training: the adapter was trained on {beyond} rows, the base model has"
            f" {rows[name]} in {name}, and the adapter does not hold the rows that came. --base MODEL names the resized"
            " base model, saved by save_pretrained."
        )
    model.resize_token_embeddings(beyond, mean_resizing=False)


# ------------------------------------------------------------------------------------------------------ tied weights


def tied(model: nn.Module) -> list[set[str]]:
    """Names of modules that share a weight, by weight; PEFT's wrappers are left out of the names."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners.setdefault(id(weight), set()).add(name.removeprefix(PREFIX).removesuffix(".base_layer"))
    return [names for names in owners.values() if len(names) > 1]


def adapted_and_tied(model: nn.Module, adapter_names: Collection[str]) -> dict[str, list[str]]:
    """Each adapted module whose base weight others have too -> those others."""
    found, groups = {}, tied(model)
    for name, module in model.named_modules():
        known = (*module.lora_A, *module.lora_embedding_A) if isinstance(module, LoraLayer) else ()
        if set(known) & set(adapter_names):
            own = name.removeprefix(PREFIX)
            others = {other for group in groups if own in group for other in group} - {own}
            if others:
                found[own] = sorted(others)
    return found


def untie_adapted(model: PeftModel) -> None:
    """Give adapted modules that share their base weight one of their own, so that merging changes no other module."""
    shared = adapted_and_tied(model, list(model.peft_config))
    for name in shared:
        layer: Any = model.get_base_model().get_submodule(name)
        base = layer.get_base_layer()
        for key, weight in list(base._parameters.items()):
            if isinstance(weight, Tensor):
                base._parameters[key] = nn.Parameter(weight.detach().clone(), requires_grad=False)
