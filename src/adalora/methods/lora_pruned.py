"""LoRA whose rank-one parts are pruned for good: the paper's ablation of P Λ Q (section 4.4).

    ΔW = s · B A        B: [d_out, r]   A: [r, d_in]   s = lora_alpha / init_r

A *doublet* i is (B_*i, A_i*). Its score is a triplet's without the singular value:

    S_i = mean_j s(B_ji) + mean_j s(A_ij)

All doublets of a model are ranked together under the budget b(t) of AdaLoRA. One that is pruned is set to zero as a
whole. Neither half has a gradient then, so it never returns, as a triplet with λ = 0 can.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.policy import POLICIES
from ..core.regulariser import Regulariser
from ..core.schedule import Schedule
from ..core.scoring import Scoring, shared_evenly
from ..core.settings import Settings
from ..core.stacks import Stacks
from ..core.state import averages_of
from ..core.trace import Allocation
from ..core.triplets import SingularProjection, Triplets
from ..hf.layers import adapted_model, lora_layers
from ..hf.plain import PlainAdapter, without_empty
from ..hf.plain_config import plain_config
from ..recipe import RecipeError
from .adalora import AdaLora
from .base import Adapted, Job, head_modules, register
from .budgeted import ADAPTER, BudgetCallback, check_keys, header, settings_of
from .saving import adapter_of
from .sizes import with_adapter

HERE: dict[str, object] = {
    "orth_reg_weight": 0.0,
    "orthogonality": "squared",
    "initialization": "orthonormal",
    "start_batches": 0,
    "start_sweeps": 0,
    "singular_gain": 1.0,
    "vector_norm": 1.0,
    "sensitivity_at": "before_step",
    "compact": False,
    "kernel": "reference",
}
"""Keys of the section that need P Λ Q or our own layers, and what comes nearest to what happens here."""
OF_SINGULAR_VALUES = ("singular", "magnitude")
"""Importance metrics that look at λ alone."""


@register("lora_pruned")
class LoraPruned(AdaLora):
    """Stock LoRA of rank ``init_r``, pruned to ``target_r`` on average. Budget and loading are AdaLoRA's."""

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """B, A on every target, and a callback that prunes."""
        section = job.recipe.adalora
        check_keys(section, "lora_pruned", HERE)
        if section.importance in OF_SINGULAR_VALUES:
            raise RecipeError(
                f"adalora.importance: {section.importance} looks at singular values, which LoRA does not have: take"
                " another for the method lora_pruned"
            )
        adapted, layers = stock_lora(model, job)
        settings = settings_of(section)
        costs = settings.costs_of([parameters_each(layer) for layer in layers.values()])
        initial = next(iter(layers.values())).r[ADAPTER] * sum(costs)
        settings.check_budgets(initial, costs)
        schedule = settings.schedule(initial, sum(costs), job.total_steps, job.steps_per_epoch)
        pruner = Pruner(layers, settings, schedule)

        def save(folder: Path) -> None:
            plain(adapted, pruner.live).write(folder)

        return Adapted(
            model=adapted,
            save=save,
            callbacks=[BudgetCallback(pruner, job.trace)],
            schedule=schedule.describe(sum(costs)).replace("triplets", "doublets"),
            header=pruner.header,
            ranks=pruner.ranks,
        )


def stock_lora(model: PreTrainedModel, job: Job) -> tuple[PeftModel, dict[str, LoraLayer]]:
    """PEFT's LoRA of rank ``init_r`` as the section ``adalora`` describes it, and its layers by name.

    Raises:
        RecipeError: layers whose factors do not lie in one pair of matrices.
    """
    section = job.recipe.adalora
    assert section.init_r is not None and section.lora_alpha is not None  # filled in when it was validated
    config = LoraConfig(
        task_type=job.task_type,
        r=section.init_r,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=section.lora_dropout,
        use_rslora=section.use_rslora,
        target_modules=section.target_modules,
        exclude_modules=section.exclude_modules,
        modules_to_save=[*(section.modules_to_save or ()), *head_modules(model)] or None,
    )
    adapted = with_adapter(model, config)
    layers = dict(lora_layers(adapted_model(adapted), ADAPTER))
    if experts := [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]:
        raise RecipeError(
            f"adalora.target_modules: {experts[0]} holds fused experts, the factors of all in one pair, which the"
            f" method {job.recipe.method} cannot prune: name the modules beside them"
        )
    if embeddings := [name for name, layer in layers.items() if ADAPTER not in layer.lora_A]:
        raise RecipeError(
            f"adalora.target_modules: {embeddings[0]} is an embedding, whose LoRA the method"
            f" {job.recipe.method} cannot prune: exclude it"
        )
    return adapted, layers


def plain(model: PeftModel, live: Mapping[str, Tensor]) -> PlainAdapter:
    """The adapter without what was pruned, at a scale of 1; modules of which nothing is left are left out.

    Args:
        live: which doublets of each module live: bool, [r].
    """
    config, tensors = adapter_of(model)
    whole = PlainAdapter.of(config, tensors).unscaled()
    pairs = {name: pair.select(live[name].nonzero().flatten()) for name, pair in whole.pairs.items()}
    kept = without_empty(pairs, whole.rest)
    ranks = {name: kept[name].rank if name in kept else 0 for name in pairs}
    pruned = {name: pair for name, pair in pairs.items() if name not in kept}
    return PlainAdapter(plain_config(config, ranks), kept, whole.rest, pruned)


class Pruner:
    """Which doublets of a LoRA model live.

    Args:
        layers: the adapted layers by name; the order is the order of ties and of the trace.
        settings: importance and policy.
        schedule: step -> budget, in doublets or parameters.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], settings: Settings, schedule: Schedule) -> None:
        self.layers = dict(layers)
        self.settings, self.schedule = settings, schedule
        self.step = 0
        self.doublets = [parameters_each(layer) for layer in self.layers.values()]
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool)
        self._scoring: Scoring | None = None
        self._kept: list[Tensor] = []  # for every A and B: which of its doublets live, in its type; empty: all do

    @property
    def sizes(self) -> list[int]:
        """Doublets of each matrix, pruned ones included: they stay in memory as zeros."""
        return [layer.r[ADAPTER] for layer in self.layers.values()]

    @property
    def live(self) -> dict[str, Tensor]:
        """Which doublets of each matrix live, by its name: bool, [r]."""
        return dict(zip(self.layers, torch.split(self.mask, self.sizes), strict=True))

    def ranks(self) -> dict[str, int]:
        """Live doublets of each matrix, by its name."""
        flags = iter(self.mask.tolist())  # one wait for the device, however many matrices
        return {name: sum(islice(flags, size)) for name, size in zip(self.layers, self.sizes, strict=True)}

    def header(self) -> dict[str, Any]:
        """See :class:`Budgeted`, as all that follows."""
        sizes = dict(zip(self.layers, self.doublets, strict=True))
        return header(sizes, self.sizes[0], self.schedule, self.settings)

    def before_step(self) -> None:
        """Update the importance, as long as a ranking that needs it is still to come."""
        if self.schedule.prunes and self.step + 1 < self.schedule.final_step:
            scoring = self._scored()
            parameters = scoring.stacks.parameters()
            if scoring.smooths:
                scoring.update(scoring.gather(parameters), scoring.gradients(parameters))

    def after_step(self) -> Allocation | None:
        """Rank and prune when it is due; hold what was pruned at zero, from where momentum has moved it."""
        self.step += 1
        due = self.schedule.allocates(self.step)
        scores = self._scores() if due else None
        if scores is not None and not bool((scores > 0).any()):  # B is still 0, and with it every sensitivity
            if not self.schedule.is_final(self.step):
                scores = None
            elif not self.schedule.cannot_rank:
                shared_evenly()
        if scores is not None:
            budget, policy = self.schedule.budget(self.step), POLICIES[self.settings.policy]
            self._keep(policy(scores, budget, self.sizes, self.settings.costs_of(self.doublets)))
        self._hold()
        if scores is None:
            return None
        allocation = self._allocation(scores)
        if self.schedule.is_final(self.step):
            self._scoring = None  # the averages have done their work
        return allocation

    def tensors(self) -> dict[str, Tensor]:
        averages = {} if self._scoring is None else self._scoring.averages()
        named = {f"{name}.{key}": value for name, both in averages.items() for key, value in both._asdict().items()}
        return {"mask": self.mask, **named}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.step = step
        scoring = self._scored()
        scoring.restore(averages_of(tensors))
        self._keep(tensors["mask"].to(self.mask.device))

    def _scored(self) -> Scoring:
        """Made when training begins, since by then the model is where it is trained."""
        if self._scoring is None:
            stacks = Stacks([_as_triplets(name, *weights_of(layer)) for name, layer in self.layers.items()])
            self._scoring = Scoring.of(stacks, self.settings)
            self.mask = self.mask.to(stacks.device)
        return self._scoring

    def _scores(self) -> Tensor:
        """S of every doublet; below all others where it was pruned earlier, since nothing but zeros is left of it."""
        scoring = self._scored()
        return scoring.scores(scoring.stacks.parameters()).masked_fill(~self.mask, -torch.inf)

    def _keep(self, mask: Tensor) -> None:
        self.mask = mask
        self._kept = []
        for layer, live in zip(self.layers.values(), self.live.values(), strict=True):
            a, b = weights_of(layer)
            flags = live.to(a.dtype)
            self._kept += [flags.view(-1, *[1] * (a.ndim - 1)), flags.view(-1, *[1] * (b.ndim - 2))]

    @torch.no_grad()
    def _hold(self) -> None:
        """Zeros in the place of every doublet that does not live."""
        if self._kept:
            torch._foreach_mul_([weight for layer in self.layers.values() for weight in weights_of(layer)], self._kept)

    def _allocation(self, scores: Tensor) -> Allocation:
        stacks = self._scored().stacks
        error = float(Regulariser(stacks).errors(stacks.parameters()).mean())
        known = torch.split(scores.clamp(min=0), self.sizes)
        last = Allocation.rounded(known) if self.schedule.is_final(self.step) else None
        none = [0] * len(self.layers)  # pruned for good
        return Allocation(self.step, self.schedule.budget(self.step), list(self.ranks().values()), none, error, last)


def parameters_each(layer: LoraLayer) -> int:
    """Parameters of one doublet."""
    return int(sum(w.numel() for w in weights_of(layer)) // layer.r[ADAPTER])


def weights_of(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A, [r, d_in], and B, [d_out, r], or the kernels of a convolution in their place."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight, b.weight


def _as_triplets(name: str, a: nn.Parameter, b: nn.Parameter) -> Triplets:
    """A doublet is a triplet whose singular value is the constant 1: that has no gradient, so it scores nothing."""
    left, right = nn.Module(), SingularProjection(a.detach())
    left.weight, right.right_vectors = b, a
    right.singular_values = nn.Parameter(torch.ones_like(right.singular_values), requires_grad=False)
    return Triplets(name, left, right)
