"""AdaLoRA, and the same P Λ Q without a budget that moves (the paper's SVD-LoRA, section 4.4)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from .. import AdaLoraCallback, AdaLoraConfig, allocator, export_lora, get_peft_model, ranks
from ..recipe import AdaLoraSection, Recipe
from .base import Adapted, Job, Precision, Section, head_modules, register
from .budgeted import scale_of
from .precision import load_adapter, whole_in_float32
from .sizes import rank_for


@register("adalora")
class AdaLora:
    """The method as the recipe's section ``adalora`` describes it."""

    section: ClassVar[Section | None] = "adalora"
    takes_budget: ClassVar[bool] = True
    base_precision: ClassVar[Precision] = "auto"

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The target rank whose LoRA comes nearest. Which matrices keep the triplets is decided in training, so where
        their sizes differ, what is saved differs a little."""
        section = recipe.adalora
        target_modules, exclude_modules = section.target_modules, section.exclude_modules
        target_r = rank_for(model, recipe, parameters, target_modules=target_modules, exclude_modules=exclude_modules)
        return recipe.model_copy(update={"adalora": at_rank(section, target_r)})

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """P, Λ, Q on every target; an allocator that hooks into the optimizer."""
        adapted = get_peft_model(model, self.config(model, job))
        whole_in_float32(adapted)
        ours = allocator(adapted)
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

    def config(self, model: PreTrainedModel, job: Job) -> AdaLoraConfig:
        """No rank above the target, so there is nothing to allocate; the scale stays as it was."""
        section = job.recipe.adalora
        rank = section.target_r
        alpha = scale_of(section) * (math.sqrt(rank) if section.use_rslora else rank)
        fixed = section.model_copy(update={"init_r": rank, "lora_alpha": alpha, "schedule": "constant"})
        return super().config(model, replace(job, recipe=job.recipe.model_copy(update={"adalora": fixed})))


def at_rank(section: AdaLoraSection, target_r: int) -> AdaLoraSection:
    """The section at another rank, with its ratios of initial to target rank and of alpha to initial rank."""
    assert section.init_r is not None and section.lora_alpha is not None  # filled in when it was validated
    initial = math.ceil(target_r * section.init_r / section.target_r)
    alpha = section.lora_alpha / section.init_r * initial
    return section.model_copy(update={"target_r": target_r, "init_r": initial, "lora_alpha": alpha})
