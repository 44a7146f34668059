"""How many triplets, or parameters, may live at each optimizer step (paper, section 3.3, equation 12).

Letters: t step (1 is the first optimizer step), T total steps, t_init warm-up, t_final final phase, ΔT steps between
allocations, b0 initial and bT target budget (triplets or parameters of all matrices together).

    b(t) = b0                                                      t <= t_init
    b(t) = bT + (b0 - bT)·(1 - (t - t_init)/(T - t_init - t_final))³   in between
    b(t) = bT                                                      t > T - t_final
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from .errors import ConfigError, ScheduleError

Span: TypeAlias = int | float | str
"""A length of training: steps (int), a fraction of all steps (float below 1), or epochs (``"2 epochs"``)."""

CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda remaining: remaining**3,
    "linear": lambda remaining: remaining,
    "constant": lambda remaining: 0.0,  # down to the target at once when the warm-up ends
}
"""Share of the surplus b0 - bT that is left, as a function of the share of pruning time that is left (1 -> 0)."""

UNITS = ("triplets", "parameters")
"""What a budget counts. The parameters of a triplet are those that are saved: its column of P and its row of Q."""

FIRST_RANKED = 4
"""The earliest step of a last allocation that can tell triplets apart. Λ is 0 at the first step and, where the learning
rate rises from 0, at the second, so all sensitivities are 0 there; those of the allocation's own step are not used."""

_EPOCHS = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*epochs?\s*", re.IGNORECASE)


def initial_rank(target_rank: float) -> int:
    """The rank to start from, for a target: half as much again, as in the paper, rounded up."""
    return rounded_up(1.5 * target_rank)


def rounded_up(rank: float) -> int:
    """A product of ranks as a whole rank. Not one more where the product misses a whole number by a rounding."""
    return math.ceil(round(rank, 6))


def to_steps(span: Span, *, name: str, total_step: int | None = None, steps_per_epoch: float | None = None) -> int:
    """Resolve a span to optimizer steps; fractions and epochs are rounded to the nearest step.

    Raises:
        ConfigError: the span is negative, not a number, or a unit that is not known.
        ScheduleError: a fraction without ``total_step``, epochs without ``steps_per_epoch``.
    """
    wanted = f"{name}={span!r} is not a length of training; give steps (100), a fraction (0.1) or '2 epochs'."
    if isinstance(span, bool):
        raise ConfigError(wanted)
    if isinstance(span, int):
        if span < 0:
            raise ConfigError(f"{name}={span} is negative; {name} counts optimizer steps from 0 upwards.")
        return span
    if isinstance(span, str):
        match = _EPOCHS.fullmatch(span)
        if match is None:
            raise ConfigError(wanted)
        if steps_per_epoch is None:
            raise ScheduleError(
                f"{name}={span!r} counts epochs, but nobody has said how many optimizer steps an epoch has. Train with"
                " a Trainer and AdaLoraCallback(), call adalora.allocator(model).plan(total_step, steps_per_epoch), or"
                f" give {name} in steps."
            )
        return round(float(match.group(1)) * steps_per_epoch)
    if not isinstance(span, float) or not 0 <= span < 1:
        raise ConfigError(f"{wanted} A float is a fraction of all steps, at least 0 and below 1.")
    if total_step is None:
        raise ScheduleError(f"{name}={span} is a fraction of all steps, and their number is not known yet.")
    return round(span * total_step)


@dataclass(frozen=True)
class Schedule:
    """Step -> budget. All lengths in optimizer steps, all budgets in ``unit``.

    Raises:
        ScheduleError: no step is left for pruning although there is something to prune.
        ConfigError: an unknown curve, or a target above the initial budget.
    """

    initial_budget: int
    target_budget: int
    total_step: int
    t_init: int
    t_final: int
    delta_t: int
    curve: str = "cubic"
    unit: str = "triplets"

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ConfigError(f"schedule={self.curve!r} is not known; choose one of {sorted(CURVES)}.")
        if self.delta_t < 1:
            raise ConfigError(f"deltaT={self.delta_t} must be at least 1 step between two allocations.")
        if self.target_budget > self.initial_budget:
            raise ConfigError(
                f"the target of {self.target_budget} {self.unit} is above the initial {self.initial_budget}: AdaLoRA"
                " only prunes. Raise init_r (or rank_pattern) or lower target_r."
            )
        if self.prunes and self.pruning_steps < 1:
            raise ScheduleError(
                f"no step is left for pruning: of {self.total_step} steps, {self.t_init} are warm-up (tinit) and"
                f" {self.t_final} the final phase (tfinal). Train for more steps, or lower tinit or tfinal so that"
                " tinit + tfinal < total_step."
            )

    @property
    def prunes(self) -> bool:
        return self.target_budget < self.initial_budget

    @property
    def final_step(self) -> int:
        """T - t_final: the step of the last allocation; from here on the mask is frozen."""
        return self.total_step - self.t_final

    @property
    def pruning_steps(self) -> int:
        return self.final_step - self.t_init

    def budget(self, step: int) -> int:
        """What may live after optimizer step ``step``, in ``unit``; fractions are rounded down."""
        if not self.prunes or step <= self.t_init:
            return self.initial_budget
        if step >= self.final_step:
            return self.target_budget
        remaining = 1 - (step - self.t_init) / self.pruning_steps
        surplus = self.initial_budget - self.target_budget
        return int(surplus * CURVES[self.curve](remaining) + self.target_budget)

    def allocates(self, step: int) -> bool:
        """Whether triplets are ranked and masked after this step: on the ΔT grid, and where the final phase begins."""
        if not self.prunes or step <= self.t_init:
            return False
        return step == self.final_step or (step < self.final_step and step % self.delta_t == 0)

    def is_final(self, step: int) -> bool:
        return step >= self.final_step

    @property
    def cannot_rank(self) -> bool:
        """Whether the last allocation comes before gradients have told anything about the triplets."""
        return self.prunes and self.final_step < FIRST_RANKED

    def shortness(self) -> str:
        """In words, that :attr:`cannot_rank`; empty where it can."""
        if not self.cannot_rank:
            return ""
        return (
            f"Too few steps to rank anything: triplets are pruned for the last time after step {self.final_step} of"
            f" {self.total_step}, and gradients tell them apart only when λ has moved, from step {FIRST_RANKED - 1} on."
            " The budget will be shared evenly, or nearly at random: train for more steps, or with a shorter tfinal."
        )

    def describe(self, per_rank: int) -> str:
        """The schedule in words, for a person about to start training.

        Args:
            per_rank: how much of the budget one triplet for every matrix takes.
        """

        def in_all(budget: int) -> str:
            if not per_rank:
                return f"{budget} {self.unit}"
            average = f"{budget / per_rank:.3g}"
            if self.unit == "triplets":
                return f"{budget} triplets ({average} a matrix)"
            return f"{budget:,} {self.unit} (as LoRA of rank {average})"

        if not self.prunes:
            return f"{self.total_step} steps at {in_all(self.initial_budget)}: nothing to prune, LoRA in SVD form."
        first = math.floor(self.t_init / self.delta_t + 1) * self.delta_t
        every = "every step" if self.delta_t == 1 else f"every {self.delta_t} steps"
        start = f"Steps 1 to {self.t_init}: warm-up" if self.t_init else "No warm-up: starts"
        return (
            f"{self.total_step} optimizer steps. {start} with {in_all(self.initial_budget)}; "
            f"steps {self.t_init + 1} to {self.final_step}: {self.curve} pruning to {in_all(self.target_budget)}, "
            f"{every} from step {min(first, self.final_step)}; "
            + (
                f"steps {self.final_step + 1} to {self.total_step}: final phase with the ranks fixed."
                if self.t_final
                else "no final phase."
            )
            + (f" {self.shortness()}" if self.cannot_rank else "")
        )
