"""What an adapter changes: the singular values of each update ΔW, and how much of it a lower rank would keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .grid import place


class Update(NamedTuple):
    """ΔW = scale · B A of one matrix."""

    name: str  # of the module in the base model
    kind: str  # linear, convolution or embedding
    shape: tuple[int, int]  # of ΔW as a matrix: outputs by inputs
    rank: int
    parameters: int
    singular_values: list[float]  # σ, descending; empty at rank 0

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F = √Σσ²."""
        return math.sqrt(math.fsum(value**2 for value in self.singular_values))

    @property
    def spectral(self) -> float:
        """‖ΔW‖₂ = σ₁."""
        return max(self.singular_values, default=0.0)

    @property
    def effective_rank(self) -> float:
        """exp(-Σ p ln p) with p = σ / Σσ (Roy and Vetterli, EUSIPCO 2007): how many singular values of equal size would
        be spread as widely. 0 of no update."""
        total = math.fsum(self.singular_values)
        if not total:
            return 0.0
        shares = [value / total for value in self.singular_values]
        return math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))

    def energy(self, rank: int) -> float:
        """The share of ‖ΔW‖_F² that is left of the best approximation of this rank. 1 of no update."""
        return energy([self], [rank])

    def as_json(self) -> dict[str, Any]:
        """Every figure by its name."""
        where = place(self.name)
        return {
            **self._asdict(),
            "stack": where.stack,
            "layer": where.layer,
            "module": where.module,
            "frobenius": self.frobenius,
            "spectral": self.spectral,
            "effective_rank": self.effective_rank,
        }


class Cut(NamedTuple):
    """What is left at an average rank."""

    rank: int
    whole: float  # share of Σ‖ΔW‖_F² when the singular values of all matrices are ranked together
    each: float  # when every matrix is cut at this rank


@dataclass(frozen=True)
class Adapter:
    """What can be said of an adapter without its base model."""

    folder: str
    base_model: str | None
    method: str  # in words
    settings: dict[str, Any]
    other_parameters: int  # trained beside the updates: heads, biases, DoRA's magnitudes
    notes: list[str]
    updates: list[Update]  # matrices that were pruned to rank 0 included, as far as they are known

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each matrix by its name."""
        return {update.name: update.rank for update in self.updates}

    @property
    def parameters(self) -> int:
        """Numbers in all B and A."""
        return sum(update.parameters for update in self.updates)

    def cuts(self) -> list[Cut]:
        """At ranks 1, 2, 4, ... and the largest."""
        highest = max(self.ranks.values(), default=0)
        powers = [2**power for power in range(highest.bit_length()) if 2**power < highest]
        return [self.cut(rank) for rank in [*powers, highest] if rank]

    def cut(self, rank: int) -> Cut:
        """What is left at an average rank."""
        chosen = kept(self.updates, rank)
        return Cut(rank, energy(self.updates, chosen), energy(self.updates, [rank] * len(self.updates)))

    def at(self, rank: int) -> dict[str, Any]:
        """What an average rank keeps, of the whole and of each matrix."""
        counts = kept(self.updates, rank)
        modules = {
            update.name: {"rank": count, "energy": update.energy(count)}
            for update, count in zip(self.updates, counts, strict=True)
        }
        return {**self.cut(rank)._asdict(), "modules": modules}

    def as_json(self) -> dict[str, Any]:
        """Everything, with all singular values."""
        return {
            "folder": self.folder,
            "base_model": self.base_model,
            "method": self.method,
            "settings": self.settings,
            "notes": self.notes,
            "matrices": len(self.updates),
            "triplets": sum(self.ranks.values()),
            "parameters": {"adapter": self.parameters, "other": self.other_parameters},
            "energy": [cut._asdict() for cut in self.cuts()],
            "modules": [update.as_json() for update in self.updates],
        }


def kept(updates: Sequence[Update], rank: int) -> list[int]:
    """How many triplets of each matrix are among the ``rank`` x matrices largest singular values of all."""
    values = np.concatenate([np.asarray(update.singular_values) for update in updates])
    owners = np.repeat(np.arange(len(updates)), [len(update.singular_values) for update in updates])
    best = np.argsort(-values, kind="stable")[: rank * len(updates)]
    counts: list[int] = np.bincount(owners[best], minlength=len(updates)).tolist()
    return counts


def energy(updates: Sequence[Update], ranks: Sequence[int]) -> float:
    """The share of Σ‖ΔW‖_F² that these ranks keep. 1 where nothing was changed."""
    squares = [[value**2 for value in update.singular_values] for update in updates]
    total = math.fsum(value for own in squares for value in own)
    left = math.fsum(value for own, rank in zip(squares, ranks, strict=True) for value in own[:rank])
    return left / total if total else 1.0
