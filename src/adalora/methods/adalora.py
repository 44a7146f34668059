"""AdaLoRA, and the same P Λ Q without a budget that moves (the paper's SVD-LoRA, section 4.4)."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from .. import AdaLoraCallback, AdaLoraConfig, allocator, export_lora, get_peft_model, ranks
from ..core.schedule import rounded_up
from ..recipe import AdaLoraSection, Recipe, RecipeError
from .base import Adapted, Job, Precision, Section, Start, head_modules, register
from .budgeted import scale_of
from .precision import load_adapter, whole_in_float32
from .sizes import rank_for, triplet_parameters


@register("adalora")
class AdaLora:
    """The method as the recipe's section ``adalora`` describes it."""

    section: ClassVar[Section | None] = "adalora"
    takes_budget: ClassVar[bool] = True
    base_precision: ClassVar[Precision] = "auto"

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The number itself, as a budget in parameters, said as the average rank, mostly a fraction, at which LoRA has
        so many. What is saved is never more, and less by no more than a triplet. RecipeError when not even one fits."""
        section = recipe.adalora
        each = triplet_parameters(model, section.target_modules, section.exclude_modules).values()
        if parameters < min(each):
            raise RecipeError(
                f"budget: {parameters} parameters are too few for {recipe.method} on {recipe.model}, whose smallest"
                f" triplet has {min(each)}: allow more"
            )
        changed = at_rank(section, parameters / sum(each)).model_copy(update={"budget_unit": "parameters"})
        return recipe if changed == section else recipe.model_copy(update={"adalora": changed})

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """P, Λ, Q on every target; an allocator that hooks into the optimizer."""
        config = self.config(model, job)
        adapted = get_peft_model(model, config)
        whole_in_float32(adapted)
        ours = allocator(adapted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Too few steps")  # the announcement says so
            ours.plan(job.total_steps, job.steps_per_epoch)

        def save(folder: Path) -> None:
            export_lora(adapted, folder)

        return Adapted(
            model=adapted,
            save=save,
            callbacks=[AdaLoraCallback(trace_path=job.trace)],
            schedule=ours.describe(),
            header=ours.header,
            ranks=lambda: ranks(adapted),
            start=Start("P and Q", config.start_batches, config.start_sweeps) if ours.awaits_start else None,
        )

    def config(self, model: PreTrainedModel, job: Job) -> AdaLoraConfig:
        """The section as a configuration. The output layer that the task made is trained whole, not adapted."""
        section = job.recipe.adalora
        to_save = [*(section.modules_to_save or ()), *head_modules(model)]
        return AdaLoraConfig(
            task_type=job.task_type,
            **section.model_dump(exclude={"modules_to_save"}),
            modules_to_save=to_save or None,
        )

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """What is saved is plain LoRA: stock PEFT loads it."""
        return load_adapter(model, folder)


@register("svd_lora")
class SvdLora(AdaLora):
    """P Λ Q at the target rank from the first step to the last, with the orthogonality regulariser."""

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The rank whose LoRA comes nearest."""
        return at_nearest_rank(model, recipe, parameters)

    def config(self, model: PreTrainedModel, job: Job) -> AdaLoraConfig:
        """No rank above the target, so there is nothing to allocate; the scale stays as it was."""
        section = job.recipe.adalora
        rank = whole_rank(section, "svd_lora")
        alpha = scale_of(section) * (math.sqrt(rank) if section.use_rslora else rank)
        fixed = section.model_copy(update={"init_r": rank, "lora_alpha": alpha, "schedule": "constant"})
        return super().config(model, replace(job, recipe=job.recipe.model_copy(update={"adalora": fixed})))


def at_rank(section: AdaLoraSection, target_r: float) -> AdaLoraSection:
    """The section at another rank, with its ratios of initial to target rank and of alpha to initial rank."""
    assert section.init_r is not None and section.lora_alpha is not None  # filled in when it was validated
    if target_r == section.target_r:
        return section  # to the bit, so that a resumed run finds its own recipe
    initial = rounded_up(target_r * section.init_r / section.target_r)
    alpha = section.lora_alpha / section.init_r * initial
    target_r = int(target_r) if target_r == int(target_r) else target_r
    return section.model_copy(update={"target_r": target_r, "init_r": initial, "lora_alpha": alpha})


def at_nearest_rank(model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
    """The recipe with the whole target rank whose LoRA comes nearest, for methods whose budget counts ranks."""
    section = recipe.adalora
    target_modules, exclude_modules = section.target_modules, section.exclude_modules
    target_r = rank_for(model, recipe, parameters, target_modules=target_modules, exclude_modules=exclude_modules)
    return recipe.model_copy(update={"adalora": at_rank(section, target_r)})


def whole_rank(section: AdaLoraSection, method: str) -> int:
    """The target rank, for methods that know no other.

    Raises:
        RecipeError: it is a fraction.
    """
    if not isinstance(section.target_r, int):
        raise RecipeError(
            f"adalora.target_r: {method} gives every matrix ranks of its own accord, so this should be a whole number"
            f" (given: {section.target_r})"
        )
    return section.target_r
