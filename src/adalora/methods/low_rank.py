"""LoRA and its variants of fixed rank, by PEFT."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.start import BATCHES, SWEEPS
from ..hf.layers import adapted_model, lora_layers
from ..hf.start import look_at_gradient
from ..recipe import Recipe, RecipeError
from .base import Adapted, Job, Precision, Section, Start, head_modules, register
from .precision import load_adapter
from .saving import adapter_of, save_adapter
from .sizes import rank_for, with_adapter

EVA_BATCHES = 100  # that are looked at, again and again
EVA_STEPS = 400  # until the directions must have settled; a few dozen are usual


@register("lora", {})  # Hu et al. 2022, arXiv 2106.09685
@register("rslora", {"use_rslora": True})  # Kalajdzievski 2023, arXiv 2312.03732: scale alpha / sqrt(r)
@register("dora", {"use_dora": True})  # Liu et al. 2024, arXiv 2402.09353: a trained norm for each output
@register("pissa", {"init_lora_weights": "pissa"})  # Meng et al. 2024, arXiv 2404.02948
@register("eva", {"init_lora_weights": "eva", "eva_config": EvaConfig()})  # Paischer et al. 2024, arXiv 2410.07170
@register("lora_gradient", {"init_lora_weights": "gradient"})  # decision 016
class LowRank:
    """An update B A of fixed rank beside each matrix, saved as the LoRA adapter that PEFT writes.

    ``pissa`` starts from the r largest singular triplets of each matrix, which it takes out of the base. What is saved
    is the difference to the base as it was: a LoRA of rank 2 r. A budget counts the r that are trained.

    ``eva`` starts A from the main directions of each matrix's inputs on training batches, and gives more rank to
    matrices whose inputs those directions explain better, up to twice ``lora.r`` (PEFT's defaults). The sum of the
    ranks stays; the number of parameters moves a little, as matrices are not all of one size.

    ``lora_gradient`` starts A from the right singular vectors of the loss's gradient, as unit rows, with B = 0: what
    AdaLoRA's gradient start is for LoRA.
    """

    section: ClassVar[Section | None] = "lora"
    takes_budget: ClassVar[bool] = True
    base_precision: ClassVar[Precision] = "auto"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """``settings``: fields of ``peft.LoraConfig`` that make the variant."""
        self._settings = dict(settings)

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The recipe with the rank that comes nearest, and ``lora_alpha`` in the same proportion to it; RecipeError
        when rank 1 has twice as many parameters."""
        lora = recipe.lora
        rank = rank_for(
            model,
            recipe,
            parameters,
            target_modules=lora.target_modules,
            exclude_modules=lora.exclude_modules,
            use_dora="use_dora" in self._settings,
        )
        if rank == lora.r:
            return recipe  # to the bit, so that a resumed run finds its own recipe
        assert lora.lora_alpha is not None  # the section fills it in
        changed = lora.model_copy(update={"r": rank, "lora_alpha": lora.lora_alpha * rank / lora.r})
        return recipe.model_copy(update={"lora": changed})

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """RecipeError when the target modules match nothing, a matrix has fewer directions than ``pissa`` or ``eva``
        look for, or EVA's do not settle."""
        settings = job.recipe.lora.model_dump() | self._settings
        settings["modules_to_save"] = [*head_modules(model), *(settings["modules_to_save"] or [])] or None
        initial = self._settings.get("init_lora_weights")
        if initial == "gradient":  # ours, not PEFT's
            settings["init_lora_weights"] = True
        config = LoraConfig(task_type=job.task_type, **settings)
        adapted = with_adapter(model, config, low_cpu_mem_usage=initial == "eva")  # EVA makes the weights anew
        names = list(_ranks(adapted))
        if initial:
            _check_directions(adapted, job.recipe, 2 if initial == "eva" else 1)
        if initial == "eva":
            _start_from_data(adapted, job)
        if initial == "gradient":
            _start_from_gradient(adapted, job)
        start = {k: v.clone() for k, v in adapter_of(adapted)[1].items()} if initial == "pissa" else None
        return Adapted(
            adapted,
            partial(_save, adapted, start),
            ranks=lambda: dict.fromkeys(names, 0) | _ranks(adapted),
            start=Start("A", BATCHES, SWEEPS) if initial == "gradient" else None,
        )

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """The model with the adapter, by PEFT alone."""
        return load_adapter(model, folder)


def _ranks(model: PeftModel) -> dict[str, int]:
    """Rank of each matrix that has an adapter."""
    adapter = model.active_adapter
    return {name: layer.r[adapter] for name, layer in lora_layers(adapted_model(model), adapter)}


def _check_directions(model: PeftModel, recipe: Recipe, times: int) -> None:
    """RecipeError unless each matrix has ``times`` lora.r singular triplets."""
    layers: Any = lora_layers(adapted_model(model), model.active_adapter)
    for name, layer in layers:
        most = min(layer.in_features, layer.out_features) // times
        if recipe.lora.r > most:
            raise RecipeError(
                f"lora.r: method {recipe.method} finds at most {most} directions in {name}, of {layer.out_features} x "
                f"{layer.in_features} (given: {recipe.lora.r})"
            )


def _save(model: PeftModel, start: Mapping[str, Tensor] | None, folder: Path) -> None:
    """Write the adapter. ``start``: what the base has lost to it, s B0 A0: the update is s (B A - B0 A0)."""
    config, tensors = adapter_of(model)
    if start is not None:
        for name, value in tensors.items():
            if ".lora_A." in name:
                tensors[name] = torch.cat([value, start[name].to(value)])
            elif ".lora_B." in name:
                tensors[name] = torch.cat([value, -start[name].to(value)], dim=1)
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    save_adapter(config, tensors, folder)


# --- from the gradient ------------------------------------------------------------------------------


def _start_from_gradient(model: PeftModel, job: Job) -> None:
    """A ← the right singular vectors of ∂L/∂W0, with B = 0 as it was."""
    adapter = model.active_adapter
    layers = dict(lora_layers(adapted_model(model), adapter))
    batches = [dict(batch) for batch in itertools.islice(job.batches(), BATCHES)]
    seen = look_at_gradient(model, layers, adapter, _ranks(model), batches)
    for name, found in seen.directions.items():
        a: Any = layers[name].lora_A[adapter].weight
        with torch.no_grad():
            a[: len(found.right)].copy_(found.right.view(-1, *a.shape[1:]))
    if seen.without:
        warnings.warn(
            f"{len(seen.without)} matrices have no gradient on the {seen.rows} rows looked at, so their A starts at"
            f" random: {', '.join(seen.without[:5])}.",
            stacklevel=2,
        )


# --- EVA --------------------------------------------------------------------------------------------


def _start_from_data(model: PeftModel, job: Job) -> None:
    """PEFT's EVA on training batches."""
    initialize_lora_eva_weights(
        model,
        _Batches(job),
        prepare_model_inputs_fn=_real_tokens,
        prepare_layer_inputs_fn=_at_real_tokens,
        show_progress_bar=False,
    )
    layers: Any = lora_layers(adapted_model(model), model.active_adapter)
    for _, layer in layers:  # PEFT makes them anew in the base's precision
        layer.lora_A.float()
        layer.lora_B.float()


class _Batches:
    """What EVA reads: the same batches again and again, but not for ever, as PEFT would."""

    def __init__(self, job: Job) -> None:
        self._recipe = job.recipe
        self._batches = [dict(batch) for batch in itertools.islice(job.batches(), EVA_BATCHES)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from itertools.islice(itertools.cycle(self._batches), EVA_STEPS)
        raise RecipeError(
            f"method eva: the main directions of the inputs of some matrix did not settle in {EVA_STEPS} batches. Each "
            f"batch must hold more inputs of each matrix than 2 x lora.r ({2 * self._recipe.lora.r}): raise "
            "training.per_device_train_batch_size, lower lora.r, or leave matrices that see one input a row, such as a "
            "pooler's, out by lora.exclude_modules"
        )


def _real_tokens(batch: Mapping[str, Tensor], config: LoraConfig) -> list[Tensor]:
    """Masks, each [rows, tokens], of the tokens that count: not padding and, where each has a label, with one that is
    not ignored (PEFT's default). An encoder-decoder has a second mask, of what it writes."""
    read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        return [read]
    assert config.eva_config is not None
    written = torch.ne(labels, config.eva_config.label_mask_value)
    return [read & written] if written.shape == read.shape else [read, written]


def _at_real_tokens(inputs: Any, masks: list[Tensor], name: str) -> Tensor:
    """The inputs of a matrix at tokens that count, [inputs, d_in]; all, where they are not of tokens."""
    x: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    return (x.flatten(0, -2) if mask is None else x[mask]).contiguous()  # which PEFT relies on
