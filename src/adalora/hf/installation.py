"""Methods of ``LoraModel``, and what loads EVA's vectors and makes LoRA+'s groups, know :class:`AdaLoraConfig`.

For any other configuration they do what they did (docs/decisions/001 says why these):

- ``inject_adapter``, also of ``MixedModel``: upgrades the layers and makes the allocator, for every way in which PEFT
  adds an adapter;
- ``_get_adapter_state_dict``: what is saved is a plain LoRA adapter;
- ``_remap_adapter_state_dict_for_load``: a plain LoRA adapter is loaded as triplets;
- ``add_weighted_adapter``: says that it needs exported adapters, and what to do when their ranks do not fit;
- ``merge_adapter``, ``merge_and_unload``: warn where the base weight is another module's too;
- ``hotswap_adapter``: says that it needs an exported adapter;
- ``create_loraplus_optimizer``: all factors of an embedding are in its group;

and they gain ``update_and_allocate(step)``, for loops written for PEFT's AdaLoRA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from peft.optimizers import loraplus
from peft.tuners.lora import LoraLayer, LoraModel, eva
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..core.errors import ConfigError, StateError
from .averages import install_averages
from .config import AdaLoraConfig
from .injected import check_injected, linear_module_suffixes, not_adapted_after_all
from .layers import (
    EmbeddingRight,
    adapted_layers,
    adapted_model,
    adapter_names,
    downgrade_layer,
    projection,
    remove_layers,
    upgrade_layers,
)
from .placing import adapted_and_tied
from .state_dicts import LiveRanks, adopt, fold, unfold

ADDS_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # ways of weighting B and A apart


def _unequal_ranks(model: Any, adapters: list[str]) -> list[str]:
    """The modules that these plain LoRA adapters, whose configurations name one rank, adapt with several."""
    if len({model.peft_config[name].r for name in adapters if name in model.peft_config}) > 1:
        return []  # PEFT says so itself
    unequal = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parts: list[Any] = [layer.lora_A[adapter] for adapter in adapters if adapter in layer.lora_A]
            if len({part.weight.shape[0] for part in parts}) > 1:
                unequal.append(name)
    return unequal


def install() -> None:
    """Teach ``LoraModel`` about :class:`AdaLoraConfig`; safe to call again."""
    if getattr(LoraModel, "_knows_adalora", False):
        return
    get_state_dict = LoraModel.__dict__["_get_adapter_state_dict"].__func__
    remap_state_dict = LoraModel.__dict__["_remap_adapter_state_dict_for_load"].__func__
    add_weighted = LoraModel.add_weighted_adapter
    load_eva = eva._load_eva_state_dict
    swap = hotswap.hotswap_adapter_from_state_dict

    def upgrading(inject: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(inject)
        def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            config = self.peft_config[adapter_name]
            if not isinstance(config, AdaLoraConfig):
                inject(self, model, adapter_name, *args, **kwargs)
                return
            wanted = config.target_modules
            check_injected(model, config)
            trained = [(weight, weight.requires_grad) for weight in model.parameters()]
            try:
                inject(self, model, adapter_name, *args, **kwargs)
                tied: Any = getattr(config, "target_modules_to_tie", None)
                if tied:
                    raise ConfigError(
                        f"ensure_weight_tying would make {', '.join(tied)} share the factors of the"
                        " embedding, and both would be pruned: adapt one of the two, with ensure_weight_tying=False."
                    )
                upgrade_layers(model, adapter_name, config, keep_vectors=config.init_lora_weights == "eva")
                adopt(model, adapter_name, config)
            except NoMatchingPeftModuleError as error:
                not_adapted_after_all(model)
                raise ConfigError(
                    f"target_modules={wanted!r} matches nothing in {type(model).__name__}"
                    + (f" (exclude_modules={config.exclude_modules!r})" if config.exclude_modules else "")
                    + f". It has linear modules called {', '.join(linear_module_suffixes(model)) or '(none)'};"
                    " 'all-linear' takes them all."
                ) from error
            except ConfigError:
                remove_layers(model, adapter_name)
                for weight, requires_grad in trained:
                    weight.requires_grad_(requires_grad)
                not_adapted_after_all(model)
                raise

        return inject_adapter

    def _get_adapter_state_dict(
        cls: type[LoraModel],
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = get_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names)
        if isinstance(config, AdaLoraConfig):
            selected, ranks = fold(model, adapter_name, config, selected)
            config._live = config._live if isinstance(config._live, LiveRanks) else LiveRanks(model, adapter_name)
            config._live.asked(ranks)
        return selected  # type: ignore[no-any-return]

    def _remap_adapter_state_dict_for_load(
        cls: type[LoraModel], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(config, AdaLoraConfig):
            state_dict = unfold(model, adapter_name, state_dict)
            for _, layer in adapted_layers(model, adapter_name):
                projection(layer, adapter_name).allocator.weights_replaced()
        return remap_state_dict(cls, model, config, adapter_name, state_dict)  # type: ignore[no-any-return]

    def update_and_allocate(self: LoraModel, step: int) -> None:
        """Allocate by hand, after ``optimizer.step()``, for every active AdaLoRA adapter; replaces the hook."""
        ours = [name for name in self.active_adapters if name in adapter_names(self.model)]
        if not ours:
            raise StateError(f"no active adapter is AdaLoRA's (active: {self.active_adapters}).")
        for name in ours:
            _, layer = next(adapted_layers(self.model, name))
            projection(layer, name).allocator.update_and_allocate(step)

    @functools.wraps(add_weighted)
    def add_weighted_adapter(
        self: LoraModel,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **kwargs: Any,
    ) -> None:
        live = [name for name in adapters if isinstance(self.peft_config.get(name), AdaLoraConfig)]
        if live:
            raise ConfigError(
                f"add_weighted_adapter combines plain LoRA adapters, and {', '.join(live)} is still AdaLoRA's: write it"
                " with adalora.export_lora(model, directory, adapter_name) and load that with model.load_adapter."
            )
        unequal = _unequal_ranks(self, adapters)
        if unequal and combination_type in ADDS_FACTORS:
            raise ConfigError(
                f"combination_type={combination_type!r} adds the factors of {', '.join(adapters)} up, and the ranks of"
                f" {unequal[0]} (one of {len(unequal)}) differ. Use 'cat' or 'svd', which take any ranks, or load"
                " adapters written by adalora.export_lora(..., pad=True) with the same largest rank."
            )
        add_weighted(self, adapters, weights, adapter_name, combination_type, **kwargs)

    def warning(merge: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(merge)
        def merging(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
            ours = adapter_names(self.model)
            if merge.__name__ == "merge_adapter" or kwargs.get("merge", args[0] if args else True):
                for name, others in adapted_and_tied(self.model, ours).items():
                    warnings.warn(
                        f"{name} shares its weight with {', '.join(others)}, which merging changes too, so the merged"
                        " model is not the trained one. `adalora export --format merged` gives each its own weight.",
                        stacklevel=3,
                    )
            return merge(self, *args, **kwargs)

        return merging

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if adapter_name in adapter_names(model):
            raise StateError(
                f"{adapter_name} is still AdaLoRA's, whose ranks are being learned: it cannot be swapped in place."
                " Write it with adalora.export_lora(model, directory, pad=True), load that with model.load_adapter and"
                " swap into the loaded one."
            )
        swap(model, state_dict, adapter_name, *args, **kwargs)

    @functools.wraps(load_eva)
    def _load_eva_state_dict(model: nn.Module, eva_state_dict: dict[str, Tensor], adapter_name: str) -> None:
        config = model.peft_config[adapter_name]  # type: ignore[index]
        if isinstance(config, AdaLoraConfig):  # EVA chooses other ranks, makes layers anew and writes to their A
            for _, layer in list(adapted_layers(model, adapter_name)):
                downgrade_layer(layer, adapter_name)
        load_eva(model, eva_state_dict, adapter_name)
        if isinstance(config, AdaLoraConfig):
            upgrade_layers(adapted_model(model), adapter_name, config, keep_vectors=True)

    taught: dict[str, Any] = {
        "inject_adapter": upgrading(LoraModel.inject_adapter),
        "_get_adapter_state_dict": classmethod(functools.wraps(get_state_dict)(_get_adapter_state_dict)),
        "_remap_adapter_state_dict_for_load": classmethod(
            functools.wraps(remap_state_dict)(_remap_adapter_state_dict_for_load)
        ),
        "add_weighted_adapter": add_weighted_adapter,
        "update_and_allocate": update_and_allocate,
        "merge_adapter": warning(LoraModel.merge_adapter),
        "_unload_and_optionally_merge": warning(LoraModel._unload_and_optionally_merge),
        "_knows_adalora": True,
    }
    for name, value in taught.items():
        setattr(LoraModel, name, value)
    MixedModel.inject_adapter = upgrading(MixedModel.inject_adapter)  # type: ignore[method-assign]
    MixedModel.update_and_allocate = update_and_allocate  # type: ignore[attr-defined]
    eva._load_eva_state_dict = _load_eva_state_dict
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    plus: Any = loraplus  # it asks what holds a parameter, isinstance(module, Embedding)
    plus.Embedding = (plus.Embedding, EmbeddingRight)
    install_averages()
