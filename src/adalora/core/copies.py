"""Weights that change past the allocator: an optimizer that holds copies of the parameters, and averages of weights.

The first trains without any allocation, which is told of when the adapter is saved. The second bring back what the
budget has pruned, so what is saved of them is masked as the model that they are averages of.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import StateError

if TYPE_CHECKING:
    from .allocator import Allocator


class Origin:
    """What an allocator was copied from, what it has sliced away, and whether a save has warned."""

    def __init__(self, source: Allocator | None = None) -> None:
        self._source = None if source is None else weakref.ref(source)
        self._step = 0 if source is None else source.step
        self.sliced: tuple[list[int], list[Tensor]] | None = None  # ranks before the last compaction, and what was kept
        self.unseen_told = False
        self.masked_told = False

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:  # in another process, the source is not there
        self.__init__()  # type: ignore[misc]

    def followed(self, ours: Allocator) -> Allocator | None:
        """The allocator that ``ours`` was copied from, if that one alone has stepped since: an average's model."""
        source = None if self._source is None else self._source()
        return source if source is not None and ours.step == self._step < source.step else None


def warn_of_unseen_training(ours: Allocator) -> None:
    """At a save: weights have moved since the adapter was made or loaded, and the allocator has not seen a step."""
    origin = ours.origin
    if ours.step or origin.unseen_told or ours.is_sharded or origin.followed(ours) is not None:
        return
    if any(t.have_moved for t in ours.triplets):
        origin.unseen_told = True
        warnings.warn(
            "this adapter has been trained, but no optimizer step of its parameters was seen: nothing has been pruned"
            f" (budget {ours.initial_budget} {ours.settings.budget_unit}, {ours.target_budget} at the end), and the"
            " regulariser was not added. Does the optimizer hold copies of the parameters (DeepSpeed, offloading), or"
            " is this an average of a model that is gone? Give the optimizer the model's own parameters, or call"
            " adalora.allocator(model).before_step() and after_step() around each step (docs/guides/loop.md).",
            stacklevel=3,
        )


def masks_to_save(ours: Allocator) -> list[Tensor | None]:
    """Of each matrix, which triplets the budget has left for good, bool [r]; None where that is not known (yet).

    Of an average, those of the model that it follows.
    """
    keeper = ours.origin.followed(ours) or ours
    masks = None if ours.is_sharded else keeper.final_masks
    return [None] * len(ours.triplets) if masks is None else [*masks]


def warn_of_masked(ours: Allocator, count: int) -> None:
    """``count``: triplets with λ != 0 that are left out of what is saved."""
    if count and not ours.origin.masked_told:
        ours.origin.masked_told = True
        warnings.warn(
            f"{count} triplets that the budget had pruned are not 0 any more, as happens when averaged weights are"
            " copied into a model: they are left out of what is saved. adalora.compact(model) drops them in memory,"
            " too; weights that should be taken as they are go through load_state_dict.",
            stacklevel=4,
        )


def follow(average: Allocator) -> None:
    """Slice an average as the model that it follows has been sliced.

    Raises:
        StateError: the ranks of the two differ for another reason.
    """
    source = average.origin.followed(average)
    if source is None or source.sizes == average.sizes:
        return
    if source.origin.sliced is None or source.origin.sliced[0] != average.sizes:
        raise StateError(
            f"this average has {sum(average.sizes)} triplets and its model {sum(source.sizes)}, which were not pruned"
            " away in one go since it was made: make a new average of the model as it is now, or train with"
            " AdaLoraConfig(compact=False), which keeps the shapes."
        )
    for triplets, index in zip(average.triplets, source.origin.sliced[1], strict=True):
        triplets.keep(index.to(triplets.lam.device))
