"""The scores of all triplets of a model by one metric, with the moving averages that it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from .importance import METRICS, Magnitudes, Metric, Smoothed, all_finite, mean_over_vectors
from .stacks import Stacks, split


class Scoring:
    """Two averages for every entry that the metric smooths: of P, Λ and Q, of λ alone, or none.

    Args:
        stacks: the triplets; averages lie in the same blocks.
        metric_name: an entry of :data:`METRICS`; its name, so that models can be pickled whatever it is made of.
    """

    def __init__(self, stacks: Stacks, metric_name: str) -> None:
        self.stacks = stacks
        self.metric_name = metric_name
        self.lam: Smoothed | None = None  # [sum of sizes]
        self.factors: list[Smoothed] = []  # one for each block, [m, r, d]

    @property
    def metric(self) -> Metric:
        return METRICS[self.metric_name]

    @torch.no_grad()
    def begin(self) -> None:
        """Start all averages at zero."""
        if self.metric.entries != "none":
            self.lam = Smoothed.zeros_like(self.stacks.lam())
        if self.metric.entries == "all":
            self.factors = [Smoothed.zeros_like(block.values()) for block in self.stacks.blocks]

    @torch.no_grad()
    def update(self, beta1: float, beta2: float, grad_scale: Tensor | None = None) -> None:
        """Take in the present weights and gradients; a gradient that is not finite leaves every average as it is."""
        if self.metric.entries == "none":
            return
        if self.lam is None:
            self.begin()
        assert self.lam is not None
        entries = [(self.lam, self.stacks.lam(), self.stacks.lam_gradient())]
        for smoothed, block in zip(self.factors, self.stacks.blocks, strict=False):  # none for metrics of λ alone
            entries.append((smoothed, block.values(), block.gradients()))
        valid = all_finite([g for _, _, g in entries])
        for smoothed, w, g in entries:
            smoothed.update_(w, g if grad_scale is None else g / grad_scale.to(g.dtype), beta1, beta2, valid)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """S of every triplet, matrix after matrix: [sum of sizes]."""
        if self.metric.value is not None:
            return self.metric.value(self._magnitudes())
        if self.lam is None or self.metric.entry is None:
            return torch.zeros_like(self.stacks.lam())
        scores = self.metric.entry(self.lam)
        for smoothed, block in zip(self.factors, self.stacks.blocks, strict=False):
            scores = scores.index_add(0, block.positions, mean_over_vectors(self.metric.entry(smoothed)))
        return scores

    def averages(self) -> dict[str, Smoothed]:
        """Views by factor: "name/p", "name/lam", "name/q" -> [r, d] (singular vectors as rows) or [r]."""
        named: dict[str, Smoothed] = {}
        triplets = self.stacks.triplets
        if self.lam is not None:
            parts = [split(average, self.stacks.sizes) for average in self.lam]
            named.update((f"{t.name}/lam", Smoothed(*both)) for t, *both in zip(triplets, *parts, strict=True))
        for smoothed, block in zip(self.factors, self.stacks.blocks, strict=False):
            for place, (k, side) in enumerate(block.members):
                named[f"{triplets[k].name}/{side}"] = Smoothed(*(average[place] for average in smoothed))
        return named

    def _magnitudes(self) -> Magnitudes:
        lam = self.stacks.lam().abs()
        norms = {"p": torch.zeros_like(lam), "q": torch.zeros_like(lam)}
        for block in self.stacks.blocks:
            lengths = block.values().norm(dim=-1).flatten()
            for side, norm in norms.items():
                ours = block.of_side(side)
                norm.index_add_(0, block.positions[ours], lengths[ours])
        return Magnitudes(lam, norms["p"], norms["q"])
