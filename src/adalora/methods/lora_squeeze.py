"""LoRA trained at a larger rank and squeezed to the target by singular value decompositions (arXiv 2602.10993).

    ΔW = s · B A        B: [d_out, r]   A: [r, d_in]   s = lora_alpha / init_r, whatever the rank

Every matrix has the same rank, which falls with AdaLoRA's schedule: b(t) shared out evenly and rounded down. When it
falls to r', BA is replaced by its best approximation of that rank: with B = Q_B R_B and Aᵀ = Q_A R_A, two thin
QR decompositions, and R_B R_Aᵀ = U Σ Vᵀ, a small exact SVD, of whose r' largest singular values

    B ← Q_B U Σ^½      A ← Σ^½ Vᵀ Q_Aᵀ

are kept. s stays, so ΔW changes by what is cut off and by nothing else. What is left of the larger rank is zero in both
factors, has no gradient and stays zero; it is not saved.

An optimizer's averages belong to the old basis. First moments could be turned into the new one, squares could not, and
a mixture of the two scales steps wrongly. So both factors start afresh, with the optimizer's own correction for that:
the rank falls a few times in a training, and each costs a few steps of averaging.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ..core.schedule import Schedule
from ..core.settings import Settings
from ..core.trace import Allocation
from ..recipe import Recipe
from .adalora import at_nearest_rank, whole_rank
from .base import Adapted, Job, register
from .budgeted import ADAPTER, BudgetCallback, check_keys, header, settings_of
from .lora_pruned import HERE, LoraPruned, parameters_each, plain, stock_lora, weights_of

UNIFORM: dict[str, object] = {
    **HERE,
    "importance": "sensitivity_uncertainty",
    "policy": "uniform",
    "budget_unit": "triplets",
    "rank_by": "score",
}
"""Keys of the section that have no meaning where every matrix has the same rank, and what comes nearest."""


@register("lora_squeeze")
class LoraSqueeze(LoraPruned):
    """Stock LoRA of rank ``init_r``, squeezed to ``target_r`` everywhere."""

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The target rank whose LoRA comes nearest."""
        return at_nearest_rank(model, recipe, parameters)

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """B, A on every target, and a callback that squeezes."""
        section = job.recipe.adalora
        check_keys(section, "lora_squeeze", UNIFORM)
        whole_rank(section, "lora_squeeze")
        adapted, layers = stock_lora(model, job)
        settings, ones = settings_of(section), [1] * len(layers)
        initial = next(iter(layers.values())).r[ADAPTER] * len(layers)
        settings.check_budgets(initial, ones)
        schedule = settings.schedule(initial, len(layers), job.total_steps, job.steps_per_epoch)
        squeezer = Squeezer(layers, settings, schedule)

        def save(folder: Path) -> None:
            plain(adapted, squeezer.live).write(folder)

        return Adapted(
            model=adapted,
            save=save,
            callbacks=[_SqueezeCallback(squeezer, job.trace)],
            schedule=schedule.describe(len(layers)).replace("triplets", "doublets"),
            header=squeezer.header,
            ranks=squeezer.ranks,
        )


class Squeezer:
    """The one rank of all matrices of a LoRA model.

    Args:
        layers: the adapted layers by name.
        schedule: step -> budget, in doublets.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], settings: Settings, schedule: Schedule) -> None:
        self.layers, self.settings, self.schedule = dict(layers), settings, schedule
        self.step = 0
        self.initial_rank = self.rank = next(iter(self.layers.values())).r[ADAPTER]
        self.optimizer: Any = None
        """Whose averages of the factors are forgotten when these change their basis; None: there is none."""

    @property
    def live(self) -> dict[str, Tensor]:
        """Which doublets of each matrix live, by its name: bool, [init_r]; the first ones."""
        return {name: torch.arange(self.initial_rank) < self.rank for name in self.layers}

    def ranks(self) -> dict[str, int]:
        """Live doublets of each matrix, by its name."""
        return dict.fromkeys(self.layers, self.rank)

    def header(self) -> dict[str, Any]:
        """See :class:`.budgeted.Budgeted`, as all that follows."""
        sizes = {name: parameters_each(layer) for name, layer in self.layers.items()}
        return header(sizes, self.initial_rank, self.schedule, self.settings) | {"policy": "uniform"}

    def before_step(self) -> None:
        """Nothing is learned from gradients."""

    def after_step(self) -> Allocation | None:
        """Squeeze when the schedule's budget has fallen by a rank."""
        self.step += 1
        if not self.schedule.allocates(self.step):
            return None
        budget = self.schedule.budget(self.step)
        rank = min(self.rank, budget // len(self.layers))
        if rank < self.rank:
            for layer in self.layers.values():
                self._squeeze(layer, rank)
            self.rank = rank
        none = [0] * len(self.layers)
        return Allocation(self.step, budget, list(self.ranks().values()), none, self._error())

    def tensors(self) -> dict[str, Tensor]:
        return {"rank": torch.tensor(self.rank)}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.step, self.rank = step, int(tensors["rank"])

    @torch.no_grad()
    def _squeeze(self, layer: LoraLayer, rank: int) -> None:
        a, b = weights_of(layer)
        left, right = squeezed(b.flatten(1), a.flatten(1), rank)
        for weight, factor in ((a, right), (b, left)):
            weight.copy_(factor.reshape(weight.shape))
            if self.optimizer is not None:
                self.optimizer.state.pop(weight, None)

    @torch.no_grad()
    def _error(self) -> float:
        """Mean over B and A of how far their live directions are from orthonormal, as a trace of AdaLoRA has it."""
        errors = []
        for layer in self.layers.values():
            for factor in (weights_of(layer)[0].flatten(1), weights_of(layer)[1].flatten(1).T):
                live = factor[: self.rank].float()
                errors.append((live @ live.T - torch.eye(len(live), device=live.device)).norm())
        return float(torch.stack(errors).mean())


def squeezed(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of ``b @ a`` of a lower rank, each with half of every singular value; as
    large as they were, with zeros behind.

    Args:
        b: [d_out, r].
        a: [r, d_in].
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = torch.zeros_like(b), torch.zeros_like(a)
    left[:, : len(root)] = (q_b @ (u[:, :rank] * root)).to(b.dtype)
    right[: len(root)] = (root[:, None] * vh[:rank] @ q_a.T).to(a.dtype)
    return left, right


class _SqueezeCallback(BudgetCallback):
    """Hands the optimizer over before each step is counted."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert isinstance(self.budgeted, Squeezer)
        optimizer = kwargs.get("optimizer")
        self.budgeted.optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's wrapper
        super().on_optimizer_step(args, state, control, **kwargs)
