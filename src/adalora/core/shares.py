"""Which parameters take part in a step: those that are trained, each in the step of the optimizer that holds it.

Usually one optimizer holds a whole adapter. Where several share it (Muon for matrices beside AdamW for λ, say), each
part is dealt with in its own optimizer's step, and the allocator's step is over when all have stepped.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import ConfigError
from .policy import Policy
from .stacks import LAM, Parts
from .triplets import Triplets

Share: TypeAlias = frozenset[int] | None
"""ids of those parameters of an adapter that an optimizer holds; None for all of them."""
Flags: TypeAlias = list[tuple[bool, bool, bool]]
"""Of P, λ and Q of each matrix: whether something is so."""


class OpenStep:
    """The step that is going on: of which parameters it has begun, and of which it is over."""

    def __init__(self) -> None:
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # that have taken part
        self.again = 0  # how often an optimizer stepped again while it waited for the others
        self.others_overflow = False  # they may wait since their gradients are not finite
        self._whole = False
        self._begun: frozenset[int] = frozenset()
        self._over: frozenset[int] = frozenset()

    def has_begun(self, share: Share) -> bool:
        """Whether this share's part of the step is announced already: by an optimizer that wraps another, say."""
        return self._whole or (bool(self._begun) if share is None else share <= self._begun)

    def is_over(self, share: Share) -> bool:
        """Whether this share has stepped already, and others are waited for."""
        return share is not None and share <= self._over

    def begin(self, share: Share) -> None:
        if share is None:
            self._whole = True
        else:
            self._begun |= share

    def repeat(self, share: frozenset[int]) -> None:
        """The same share once more, before the others."""
        self.again += 1
        self.forget(share)

    def forget(self, share: Share) -> None:
        """It will not come to its end: the optimizer raised an error."""
        if share is None:
            self._whole, self._begun, self._over = False, frozenset(), frozenset()
        else:
            self._begun, self._over = self._begun - share, self._over - share

    def end(self, share: Share, optimizer: torch.optim.Optimizer | None, trained: frozenset[int]) -> bool:
        """This share has stepped; whether all that is trained has, so that another step may begin."""
        if optimizer is not None:
            self.optimizers.append(weakref.ref(optimizer))
        self._over |= trained if share is None else share
        if not trained <= self._over:
            return False
        self.again, self.others_overflow = 0, False
        self.forget(None)
        return True

    def take_optimizers(self) -> list[weakref.ref[torch.optim.Optimizer]]:
        """Those of the step that is over."""
        taken, self.optimizers = self.optimizers, []
        return taken

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]  # a copy begins with a step of its own


class Members:
    """Which matrices share the budget: those whose singular values are trained.

    What is frozen is not pruned, and what has been pruned could not come back, so it stands outside.
    """

    def __init__(self, triplets: Sequence[Triplets]) -> None:
        self.triplets = triplets
        self.trained: Flags = []  # when the last step began
        self.outside: frozenset[int] = frozenset()

    def look(self, parameters: Sequence[Parts] | None = None) -> bool:
        """Whether matrices were frozen, or trained again, since the last look.

        Args:
            parameters: given when a step begins; what cannot be trained is refused then.
        """
        trained = [(t.p.requires_grad, t.lam.requires_grad, t.q.requires_grad) for t in self.triplets]
        if trained == self.trained:
            return False
        outside = _without_lam(trained)
        if parameters is not None:
            check_singular_values(self.triplets, parameters, trained)
            self.trained = trained
        if outside == self.outside or len(outside) == len(self.triplets):
            return False
        self.outside = outside
        return True

    def held(self, share: Share) -> Flags:
        """Of the parameters that are trained, those of a share."""
        if share is None:
            return self.trained
        return [
            (p and id(t.p) in share, lam and id(t.lam) in share, q and id(t.q) in share)
            for t, (p, lam, q) in zip(self.triplets, self.trained, strict=True)
        ]

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Of numbers of all matrices, those of the members."""
        return [number for k, number in enumerate(numbers) if k not in self.outside]

    def within(self, mask: Tensor, sizes: Sequence[int]) -> Tensor:
        """Which triplets are under the budget: [sum of sizes]."""
        inside = [k not in self.outside for k, size in enumerate(sizes) for _ in range(size)]
        return torch.tensor(inside, dtype=torch.bool, device=mask.device)

    def choose(
        self, policy: Policy, scores: Tensor, budget: int, sizes: list[int], costs: list[int], before: Tensor
    ) -> Tensor:
        """The mask that a policy wants; for matrices outside the budget as it was ``before``."""
        if not self.outside:
            return policy(scores, budget, sizes, costs)
        inside, mask = self.within(before, sizes), before.clone()
        mask[inside] = policy(scores[inside], budget, self.of(sizes), self.of(costs))
        return mask


def _without_lam(flags: Flags) -> frozenset[int]:
    """Matrices whose λ is frozen. An adapter that is frozen as a whole is one that is not active for the time being."""
    if not any(any(of_matrix) for of_matrix in flags):
        return frozenset()
    return frozenset(k for k, (_, lam, _) in enumerate(flags) if not lam)


def check_singular_values(triplets: Sequence[Triplets], parameters: Sequence[Parts], flags: Flags) -> None:
    """Refuse to train singular vectors around values that are 0 and stay so, where no gradient would reach them, and a
    budget over nothing.

    Raises:
        ConfigError: λ of a matrix is frozen while all of it is 0, or λ of all matrices is frozen.
    """
    frozen = _without_lam(flags)
    stuck = [
        triplets[k].name
        for k in sorted(frozen)
        if any(flags[k]) and len(parameters[k][LAM]) and not bool(parameters[k][LAM].any())
    ]
    if stuck:
        raise ConfigError(
            f"the singular values of {len(stuck)} of {len(triplets)} matrices ({', '.join(stuck[:3])}, ...) are frozen"
            " while they are 0: no gradient reaches their vectors, so nothing would be learned. Train the parameters"
            " called singular_values (they are part of lora_A, which LoRA-FA and its like freeze); to hold the right"
            " vectors fixed, freeze right_vectors alone."
        )
    if len(frozen) == len(triplets):
        raise ConfigError(
            f"the singular values of all {len(triplets)} matrices are frozen, so there is nothing to divide a budget"
            " over. Train the parameters called singular_values, or train this adapter as plain LoRA."
        )


def trained_ids(triplets: Sequence[Triplets]) -> frozenset[int]:
    return frozenset(id(w) for t in triplets for w in t.parameters if w.requires_grad)


def entries_of(flags: Flags, parameters: Sequence[Parts]) -> list[Parts]:
    """Tensors of the parameters' shapes, 1 where a parameter is flagged and 0 elsewhere (one number each in memory)."""

    def like(flag: bool, w: Tensor) -> Tensor:
        return w.new_full((), float(flag), requires_grad=False).expand(w.shape)

    return [
        (like(p, parts[0]), like(lam, parts[1]), like(q, parts[2]))
        for (p, lam, q), parts in zip(flags, parameters, strict=True)
    ]
