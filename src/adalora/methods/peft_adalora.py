"""AdaLoRA as PEFT has it, driven as it must be: the peer that ours is measured against.

    ΔW = s · B (E ∘ A)        A: [r, d_in]   E: [r, 1]   B: [d_out, r]   s = lora_alpha / init_r

The same as ours: matrices, ranks, budget b(t), steps of allocation (counted from 1), smoothing, score, and s: PEFT
divides by ``init_r + 1e-5``, for which its ``lora_alpha`` makes up. What is PEFT's own:

- the regulariser is the mean of un-squared norms, and a part of ``outputs.loss``;
- A and B start Gaussian with standard deviation 0.02, and E has no gain;
- sensitivity is taken at the weights after the update;
- pruning goes by the k-th score, so that ties prune more than the budget asks for.

Driven: ``total_step`` is known; ``update_and_allocate`` runs after each optimizer step and before gradients are gone; a
step that a loss scaler skipped is not counted; the regulariser's gradient comes once in an optimizer step, however many
batches were accumulated; a checkpoint holds every triplet, where PEFT's own leaves out what was masked last and has
grown again since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.schedule import Schedule
from ..core.settings import Settings
from ..core.trace import Allocation
from ..hf.convert import convert
from ..recipe import Recipe, RecipeError
from .adalora import AdaLora, at_nearest_rank, whole_rank
from .base import Adapted, Job, head_modules, register
from .budgeted import ADAPTER, BudgetCallback, check_keys, header, scale_of, settings_of
from .sizes import with_adapter

PEFTS: dict[str, object] = {
    "importance": "sensitivity_uncertainty",
    "policy": "global_topk",
    "budget_unit": "triplets",
    "rank_by": "score",
    "schedule": "cubic",
    "orthogonality": "frobenius",
    "initialization": "gaussian",
    "start_batches": 0,
    "start_sweeps": 0,
    "singular_gain": 1.0,
    "vector_norm": 1.0,
    "sensitivity_at": "after_step",
    "compact": False,
    "kernel": "reference",
}
"""Keys of the section that PEFT has no choice of, and what it does."""
EPSILON = 1e-5  # that PEFT adds to init_r
PARTS = ("lora_A", "lora_B", "lora_E")
AVERAGES = {"sensitivity": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}  # ours and PEFT's names
PATTERN = "pattern/"


@register("peft_adalora")
class PeftAdaLora(AdaLora):
    """``peft.AdaLoraModel``, whose budget counts triplets: the rank whose LoRA comes nearest. Loading is AdaLoRA's."""

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The rank whose LoRA comes nearest."""
        return at_nearest_rank(model, recipe, parameters)

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """PEFT's layers on every target, and a callback that calls what users must."""
        section = job.recipe.adalora
        check_keys(section, "peft_adalora", PEFTS)
        assert section.init_r is not None  # filled in when it was validated
        target_r = whole_rank(section, "peft_adalora")
        if section.init_r <= section.target_r:
            raise RecipeError(
                f"adalora.init_r: PEFT's AdaLoRA only works when there is something to prune, so init_r should be above"
                f" target_r={section.target_r} (given: {section.init_r}); the method svd_lora keeps its ranks"
            )
        for key in ("beta1", "beta2"):
            if getattr(section, key) == 0:
                raise RecipeError(f"adalora.{key}: PEFT's AdaLoRA asks for more than 0 (given: 0)")
        settings = settings_of(section)
        one = settings.schedule(section.init_r, 1, job.total_steps, job.steps_per_epoch)  # of a single matrix
        config = PeftAdaLoraConfig(
            task_type=job.task_type,
            target_r=target_r,
            init_r=section.init_r,
            lora_alpha=scale_of(section) * (section.init_r + EPSILON),  # type: ignore[arg-type]  # it only divides it
            lora_dropout=section.lora_dropout,
            target_modules=section.target_modules,
            exclude_modules=section.exclude_modules,
            modules_to_save=[*(section.modules_to_save or ()), *head_modules(model)] or None,
            tinit=one.t_init,
            tfinal=one.t_final,
            deltaT=one.delta_t,
            total_step=job.total_steps,
            beta1=section.beta1,
            beta2=section.beta2,
            orth_reg_weight=section.orth_reg_weight,
        )
        adapted = with_adapter(model, config)
        driver = Driver(adapted, settings, one)
        _share_regulariser(adapted, config, job.recipe.training.gradient_accumulation_steps)

        def save(folder: Path) -> None:
            with TemporaryDirectory() as beside:
                adapted.save_pretrained(beside)
                convert(beside, folder)

        return Adapted(
            model=adapted,
            save=save,
            callbacks=[BudgetCallback(driver, job.trace)],
            schedule=driver.schedule.describe(len(driver.ranks())),
            header=driver.header,
            ranks=driver.ranks,
        )


class Driver:
    """Calls PEFT's allocator, and keeps its rank pattern out of the configuration: with one there, PEFT saves only
    what it masked last, and what it saved cannot be loaded into a model that is still whole.

    Args:
        model: with PEFT's AdaLoRA.
        settings: importance and policy, for the trace.
        one: the schedule of a single matrix.
    """

    def __init__(self, model: PeftModel, settings: Settings, one: Schedule) -> None:
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[ADAPTER]
        self.settings = settings
        self.step = 0
        self.pattern: dict[str, list[bool]] | None = None  # which triplets live, by name of E; None: all
        self.names = {name: name.rpartition(".lora_E.")[0] for name in self._parameters("lora_E")}
        matrices = len(self.names)
        self.schedule = replace(
            one, initial_budget=matrices * one.initial_budget, target_budget=matrices * one.target_budget
        )

    def ranks(self) -> dict[str, int]:
        """Triplets of each matrix that the last allocation kept, by its name."""
        if self.pattern is None:
            return dict.fromkeys(self.names.values(), self.config.init_r)
        return {matrix: sum(self.pattern[name]) for name, matrix in self.names.items()}

    def header(self) -> dict[str, Any]:
        """See :class:`Budgeted`, as all that follows."""
        rank, factors = self.config.init_r, self._parameters("lora_A", "lora_B")
        sizes = dict.fromkeys(self.names.values(), 0)
        for name, factor in factors.items():
            sizes[re.split(r"\.lora_[AB]\.", name)[0]] += factor.numel() // rank
        return header(sizes, rank, self.schedule, self.settings)

    def before_step(self) -> None:
        """PEFT trips over parameters that the loss does not depend on."""
        for parameter in self._parameters(*PARTS).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def after_step(self) -> Allocation | None:
        """The moment to call PEFT: after the update, while there are gradients."""
        self.step += 1
        before, self.config.rank_pattern = self.pattern, self.pattern
        self.tuner.update_and_allocate(self.step)
        self.pattern, self.config.rank_pattern = self.config.rank_pattern, None
        if self.pattern is before:
            return None
        factors = self._parameters("lora_A", "lora_B")
        products = [w @ w.mT if "lora_A" in name else w.mT @ w for name, w in factors.items()]
        errors = [(product - torch.eye(len(product), device=product.device)).norm() for product in products]
        error = float(torch.stack(errors).mean())
        ranks, returned = list(self.ranks().values()), [self._returned(name, before) for name in self.names]
        return Allocation(self.step, self.schedule.budget(self.step), ranks, returned, error)

    def _returned(self, name: str, before: dict[str, list[bool]] | None) -> int:
        """How many triplets of a matrix live now that did not under the pattern before."""
        if before is None or self.pattern is None:
            return 0
        return sum(now and not earlier for now, earlier in zip(self.pattern[name], before[name], strict=True))

    def tensors(self) -> dict[str, Tensor]:
        allocator = self.tuner.rankallocator
        averages = {
            f"{name}.{ours}": value
            for ours, theirs in AVERAGES.items()
            for name, value in getattr(allocator, theirs).items()
        }
        return averages | {PATTERN + name: torch.tensor(live) for name, live in (self.pattern or {}).items()}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.step = step
        pattern = {key.removeprefix(PATTERN): value.tolist() for key, value in tensors.items() if PATTERN in key}
        self.pattern = pattern or None
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        for name, parameter in self._parameters(*PARTS).items():
            if f"{name}.sensitivity" in tensors:
                allocator.ipt[name] = torch.zeros_like(parameter)  # its presence says that there are averages
                for ours, theirs in AVERAGES.items():
                    getattr(allocator, theirs)[name] = tensors[f"{name}.{ours}"].to(parameter)

    def _parameters(self, *parts: str) -> dict[str, nn.Parameter]:
        """By the names that PEFT's allocator knows them by."""
        ends = tuple(f".{part}.{ADAPTER}" for part in parts)
        return {name: value for name, value in self.tuner.model.named_parameters() if name.endswith(ends)}


def _share_regulariser(model: PeftModel, config: PeftAdaLoraConfig, batches: int) -> None:
    """The regulariser's gradient once in an optimizer step of so many batches.

    It is a part of every batch's loss. A Trainer divides that loss by their number, except where it tells the model how
    many items they hold, so that the model may divide by that; PEFT's regulariser then comes undivided.
    """
    weight = config.orth_reg_weight

    def share(_model: nn.Module, _arguments: Any, inputs: dict[str, Any]) -> None:
        config.orth_reg_weight = weight / batches if "num_items_in_batch" in inputs else weight

    model.register_forward_pre_hook(share, with_kwargs=True)
