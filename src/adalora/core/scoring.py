"""The scores of all triplets of a model by one metric, with the moving averages that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .importance import METRICS, Magnitudes, Metric, Smoothed, sensitivity_
from .stacks import P, Parts, Stacks, gradients_of, split, wide


class Scoring:
    """Two averages for every entry that the metric smooths: of P, Λ and Q, of λ alone, or none.

    Args:
        stacks: the triplets; averages lie in its order.
        metric_name: an entry of :data:`METRICS`; its name, so that models can be pickled whatever it is made of.
        beta1, beta2: decay rates of Ī and Ū.
    """

    def __init__(self, stacks: Stacks, metric_name: str, beta1: float, beta2: float) -> None:
        self.stacks = stacks
        self.metric_name = metric_name
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed: Smoothed | None = None  # of all entries, or [sum of sizes]

    @property
    def metric(self) -> Metric:
        return METRICS[self.metric_name]

    @property
    def of_all_entries(self) -> bool:
        return self.metric.entries == "all"

    def gather(self, parts: Sequence[Parts]) -> Tensor:
        """The entries that are smoothed, as one vector."""
        return self.stacks.gather(parts) if self.of_all_entries else self.stacks.gather_lam(parts)

    @torch.no_grad()
    def update(
        self, parameters: Sequence[Parts], grad_scale: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Take in the present gradients; one that is not finite leaves every average as it is.

        Args:
            grad_scale: factor by which a loss scaler has multiplied the gradients.
            weights: the entries, if they have been gathered already; they are used up.
        """
        if self.metric.entries == "none" or not self.stacks.triplets_count:
            return
        if weights is None:
            weights = self.gather(parameters)
        gradients = self.gather(gradients_of(parameters))
        if grad_scale is not None:
            gradients.div_(grad_scale)
        if self.smoothed is None:
            self.smoothed = Smoothed.zeros_like(weights)
        self.smoothed.update_(sensitivity_(weights, gradients), self.beta1, self.beta2)

    @torch.no_grad()
    def scores(self, parameters: Sequence[Parts]) -> Tensor:
        """S of every triplet, matrix after matrix: [sum of sizes]."""
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
