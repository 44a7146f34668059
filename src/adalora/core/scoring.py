"""The scores of all triplets of a model by one metric, with the moving averages that it needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .importance import METRICS, Magnitudes, Metric, Smoothed, sensitivity_
from .settings import Settings
from .stacks import LAM, P, Parts, Stacks, gradients_of, split, wide


class Scoring:
    """Two averages for every entry that the metric smooths: of P, Λ and Q, of λ alone, or none.

    Args:
        stacks: the triplets; averages lie in its order.
        metric_name: an entry of :data:`METRICS`; its name, so that models can be pickled whatever it is made of.
        beta1, beta2: decay rates of Ī and Ū.
        per_parameter: S over the number of parameters of a triplet as saved, instead of S.
    """

    def __init__(
        self, stacks: Stacks, metric_name: str, beta1: float, beta2: float, per_parameter: bool = False
    ) -> None:
        self.stacks = stacks
        self.per_parameter = per_parameter
        self.metric_name = metric_name
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed: Smoothed | None = None  # of all entries, or [sum of sizes]

    @classmethod
    def of(cls, stacks: Stacks, settings: Settings) -> Scoring:
        """As these settings ask for."""
        by_size = settings.rank_by == "score_per_parameter"
        return cls(stacks, settings.metric, settings.beta1, settings.beta2, per_parameter=by_size)

    @property
    def metric(self) -> Metric:
        return METRICS[self.metric_name]

    @property
    def of_all_entries(self) -> bool:
        return self.metric.entries == "all"

    @property
    def smooths(self) -> bool:
        """Whether gradients are asked for at all."""
        return self.metric.entries != "none" and bool(self.stacks.triplets_count)

    def gather(self, parts: Sequence[Parts]) -> Tensor:
        """The entries that are smoothed, as one vector."""
        return self.stacks.gather(parts) if self.of_all_entries else self.stacks.gather_lam(parts)

    def gradients(self, parameters: Sequence[Parts], grad_scale: Tensor | None = None) -> Tensor:
        """The present gradients of the entries that are smoothed, as one vector.

        Args:
            grad_scale: factor by which a loss scaler has multiplied them.
        """
        gradients = self.gather(gradients_of(parameters))
        return gradients if grad_scale is None else gradients.div_(grad_scale)

    @torch.no_grad()
    def update(self, weights: Tensor, gradients: Tensor, part: Tensor | None = None) -> None:
        """Take in these entries and their gradients; one that is not finite leaves every average as it is.

        Args:
            weights: used up.
            part: 1 for the entries that are meant; the averages of the others, where it is 0, stay as they are.
        """
        if self.smoothed is None:
            self.smoothed = Smoothed.zeros_like(weights)
        sensitivity = sensitivity_(weights, gradients)
        if part is None:
            self.smoothed.update_(sensitivity, self.beta1, self.beta2)
            return
        updated = Smoothed(*(average.clone() for average in self.smoothed))
        updated.update_(torch.where(part != 0, sensitivity, 0.0), self.beta1, self.beta2)
        for average, new in zip(self.smoothed, updated, strict=True):
            average.copy_(torch.where(part != 0, new, average))

    @torch.no_grad()
    def scores(self, parameters: Sequence[Parts]) -> Tensor:
        """S of every triplet, matrix after matrix: [sum of sizes]."""
        scores = self._scores(parameters)
        return scores / self._parameters_each().to(scores) if self.per_parameter else scores

    @torch.no_grad()
    def for_allocation(self, parameters: Sequence[Parts], last: bool, told: bool = False) -> Tensor | None:
        """What an allocation goes by: S, or None if it should wait. Waits for the device.

        As long as λ is 0, the loss has no gradient but λ's, and Ī(λ) is 0: scores then are those of the regulariser's
        gradient, a rounding where P and Q start orthonormal. To prune by these would be to choose at random, and would
        set directions back for nothing. The last allocation cannot wait: to it, all triplets are equal, which is warned
        of unless it has been ``told`` before training.
        """
        scores = self.scores(parameters)
        known = self._of_lam(parameters) if any(part[LAM].requires_grad for part in parameters) else scores
        if bool(known.any()):
            return scores
        if not last:
            return None
        if not told:
            shared_evenly()
        return torch.zeros_like(scores)

    def _of_lam(self, parameters: Sequence[Parts]) -> Tensor:
        """Ī of every λ, or its size for metrics that go by it: [sum of sizes]."""
        if self.metric.entries == "none" or self.smoothed is None:
            lam = self.stacks.gather_lam(parameters)
            return lam if self.metric.entries == "none" else torch.zeros_like(lam)
        sensitivity = self.smoothed.sensitivity
        return self.stacks.split(sensitivity)[0] if self.of_all_entries else sensitivity

    def _parameters_each(self) -> Tensor:
        """Parameters of every triplet: [sum of sizes]."""
        each = torch.tensor([t.parameters_each for t in self.stacks.triplets])
        return each.repeat_interleave(torch.tensor(self.stacks.sizes))

    def _scores(self, parameters: Sequence[Parts]) -> Tensor:
        if self.metric.value is not None:
            lam = self.stacks.gather_lam(parameters).abs_()
            return self.metric.value(Magnitudes(lam, lambda: self._norms(parameters, lam)))
        if self.smoothed is None or self.metric.entry is None:
            return torch.zeros_like(self.stacks.gather_lam(parameters))
        scores = self.metric.entry(self.smoothed)
        if not self.of_all_entries:
            return scores
        lam, blocks = self.stacks.split(scores)
        return self.stacks.by_triplet(lam, [rows.mean(dim=-1) for rows in blocks]).sum(dim=0)

    def averages(self) -> dict[str, Smoothed]:
        """Views by factor: "name/p", "name/lam", "name/q" -> [r, d] (singular vectors as rows) or [r]."""
        if self.smoothed is None:
            return {}
        parts = [self._by_name(average) for average in self.smoothed]
        return {name: Smoothed(*(part[name] for part in parts)) for name in parts[0]}

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Smoothed]) -> None:
        """Take over what :meth:`averages` gave, from any device."""
        if not averages:
            return
        self.smoothed = Smoothed.zeros_like(self.gather(self.stacks.parameters()))
        for name, ours in self.averages().items():
            for average, saved in zip(ours, averages[name], strict=True):
                average.copy_(saved)

    def _by_name(self, entries: Tensor) -> dict[str, Tensor]:
        names = [t.name for t in self.stacks.triplets]
        lam, blocks = self.stacks.split(entries) if self.of_all_entries else (entries, [])
        named = {f"{name}/lam": part for name, part in zip(names, split(lam, self.stacks.sizes), strict=True)}
        for block, rows in zip(self.stacks.blocks if blocks else [], blocks, strict=True):
            for factor, part in zip(block.factors, torch.split(rows, block.sizes), strict=True):
                named[f"{names[factor.matrix]}/{'p' if factor.side == P else 'q'}"] = part
        return named

    @torch.no_grad()
    def _norms(self, parameters: Sequence[Parts], lam: Tensor) -> tuple[Tensor, Tensor]:
        """‖P_i‖ and ‖Q_i‖ of every triplet: [sum of sizes] each."""
        norms = [wide(block.gather(parameters)).norm(dim=-1) for block in self.stacks.blocks]
        _, p, q = self.stacks.by_triplet(lam, norms)
        return p, q


def shared_evenly() -> None:
    """Warn that a last allocation had nothing to go by."""
    warnings.warn(
        "at the last allocation no gradient had told triplets apart, since λ had not moved before: the budget is"
        " shared out evenly. Was the training too short, the learning rate 0, or nothing trained?",
        stacklevel=5,
    )
