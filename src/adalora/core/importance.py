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

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def sensitivity_(w: Tensor, g: Tensor) -> Tensor:
    """I = |w · g|, in the place of w."""
    return w.mul_(g).abs_()


class Smoothed(NamedTuple):
    """Moving averages of entries of P, Λ and Q; both have one shape, in float32 or wider."""

    sensitivity: Tensor  # Ī
    uncertainty: Tensor  # Ū

    @classmethod
    def zeros_like(cls, entries: Tensor) -> Smoothed:
        return cls(torch.zeros_like(entries), torch.zeros_like(entries))

    def update_(self, sensitivity: Tensor, beta1: float, beta2: float) -> None:
        """One step, in place. If any I is not finite nothing changes, without asking the device.

        Args:
            sensitivity: I, shape of the averages; it is used up.
        """
        sensitivity = sensitivity.to(self.sensitivity.dtype)
        valid = sensitivity.amax().lt_(math.inf)  # 1, or 0 if the largest is infinite or not a number
        sensitivity.nan_to_num_(0.0, 0.0, 0.0)  # 0 times these would not be 0
        take1 = valid * (1 - beta1)
        take2 = take1 if beta2 == beta1 else valid * (1 - beta2)
        keep1 = 1 - take1  # 1 if not valid
        keep2 = keep1 if beta2 == beta1 else 1 - take2
        # lerp_ would be one operation, but rounds so that Ū, a small difference, is ten times further from PEFT's
        self.sensitivity.mul_(keep1).addcmul_(sensitivity, take1)
        self.uncertainty.mul_(keep2).addcmul_(sensitivity.sub_(self.sensitivity).abs_(), take2)


class Magnitudes:
    """Sizes of the parts of every triplet, each [n]; norms are only taken if a metric asks for them.

    Args:
        lam: |λ|
        vectors: -> ‖P_i‖ and ‖Q_i‖
    """

    def __init__(self, lam: Tensor, vectors: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.lam = lam
        self._vectors = vectors

    @functools.cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        return self._vectors()

    @property
    def p(self) -> Tensor:
        return self._norms[0]

    @property
    def q(self) -> Tensor:
        return self._norms[1]


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
