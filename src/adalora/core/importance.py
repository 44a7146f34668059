"""How much each triplet matters (paper, section 3.2, equations 6 to 10).

Letters: w an entry of P, Λ or Q, g its gradient, Ī smoothed sensitivity, Ū smoothed uncertainty, β1 and β2 their decay
rates, S the score of a triplet.

    I(w) = |w · g|                     sensitivity
    Ī ← β1 Ī + (1 - β1) I              smoothed sensitivity
    Ū ← β2 Ū + (1 - β2) |I - Ī|        uncertainty (Ī is the new one)
    s(w) = Ī · Ū
    S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)

A metric says what an entry's score is and which entries have one. To add a metric, register it here: the allocator,
the configuration and the conformance tests find it in :data:`METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Smoothed(NamedTuple):
    """Moving averages of one block of entries; both have the block's shape, in float32 or wider."""

    sensitivity: Tensor  # Ī
    uncertainty: Tensor  # Ū

    @classmethod
    def zeros_like(cls, block: Tensor) -> Smoothed:
        return cls(torch.zeros_like(block), torch.zeros_like(block))

    def update_(self, w: Tensor, g: Tensor, beta1: float, beta2: float, valid: Tensor) -> None:
        """One step, in place. Where ``valid`` (a boolean scalar) is false nothing changes, without asking the device.

        Args:
            w: entries, shape of the block; g: their gradients, the same shape.
        """
        sensitivity = (w * g).abs_().nan_to_num_(0.0, 0.0, 0.0)
        _smooth_(self.sensitivity, sensitivity, beta1, valid)
        _smooth_(self.uncertainty, sensitivity.sub_(self.sensitivity).abs_(), beta2, valid)


def _smooth_(average: Tensor, new: Tensor, beta: float, valid: Tensor) -> None:
    keep, take, one = average.new_full((), beta), average.new_full((), 1 - beta), average.new_ones(())
    average.mul_(torch.where(valid, keep, one)).add_(new * (take * valid))


class Magnitudes(NamedTuple):
    """Sizes of the parts of every triplet, each [n]."""

    lam: Tensor  # |λ|
    p: Tensor  # ‖P_i‖
    q: Tensor  # ‖Q_i‖


@dataclass(frozen=True)
class Metric:
    """One way to score triplets.

    Args:
        entries: which entries are smoothed and scored: all of P, Λ and Q; Λ alone; or none.
        entry: (Ī, Ū) -> s(w), elementwise; for metrics with entries.
        value: sizes -> S, [n]; for metrics of the present values alone.
    """

    name: str
    entries: Literal["all", "singular_values", "none"]
    entry: Callable[[Smoothed], Tensor] | None = None
    value: Callable[[Magnitudes], Tensor] | None = None


RATIO_EPSILON = 1e-12
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("sensitivity_uncertainty", "all", entry=lambda s: s.sensitivity * s.uncertainty),
        Metric("sensitivity", "all", entry=lambda s: s.sensitivity),
        Metric("uncertainty", "all", entry=lambda s: s.uncertainty),
        Metric("ratio", "all", entry=lambda s: s.sensitivity / (s.uncertainty + RATIO_EPSILON)),
        Metric("singular", "singular_values", entry=lambda s: s.sensitivity * s.uncertainty),
        Metric("magnitude", "none", value=lambda m: m.lam),
        Metric("norm_product", "none", value=lambda m: m.p * m.lam * m.q),
    )
}


def mean_over_vectors(scores: Tensor) -> Tensor:
    """Entry scores of singular vectors -> one number a triplet: [m, r, d] -> [m·r]."""
    return scores.mean(dim=-1).flatten()


def all_finite(blocks: list[Tensor]) -> Tensor:
    """One boolean scalar, left on the device."""
    return torch.stack([block.isfinite().all() for block in blocks]).all()
