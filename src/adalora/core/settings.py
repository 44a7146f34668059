"""What an allocator is asked to do, checked as it is made. The public names are those of ``AdaLoraConfig``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from .errors import ConfigError
from .importance import METRICS
from .orthogonality import KINDS, Orthogonality
from .policy import POLICIES
from .schedule import CURVES, UNITS, Schedule, Span, to_steps
from .triplets import Triplets

RANKINGS = ("score", "score_per_parameter")
"""By what triplets are ranked: S, or S over the number of parameters that are saved of a triplet."""


@dataclass(frozen=True)
class Settings:
    """What an allocator is asked to do; lengths are steps, fractions of all steps or epochs (see :data:`Span`).

    Args:
        target_rank: average rank of a matrix at the end, which may be a fraction; None where ``budget`` is given.
        budget: the same as a number of ``budget_unit`` of all matrices together.

    Raises:
        ConfigError: a value outside its range or a name that is not registered.
    """

    target_rank: float | None = None
    t_init: Span = 0.1
    t_final: Span = 0.3
    delta_t: Span = 0.01
    total_step: int | None = None
    curve: str = "cubic"
    beta1: float = 0.85
    beta2: float = 0.85
    metric: str = "sensitivity_uncertainty"
    policy: str = "global_topk"
    budget: int | None = None
    budget_unit: str = "triplets"
    rank_by: str = "score"
    orthogonality_weight: float = 0.1  # γ
    orthogonality: Orthogonality = "squared"
    sensitivity_at: Literal["before_step", "after_step"] = "before_step"
    vector_norm: float = 1.0  # c, the length of singular vectors
    compact: bool = True
    gradient_start: bool = False  # P and Q wait for the loss's gradient before the first step

    def __post_init__(self) -> None:
        for name, value, known in (
            ("importance", self.metric, METRICS),
            ("policy", self.policy, POLICIES),
            ("budget_unit", self.budget_unit, UNITS),
            ("rank_by", self.rank_by, RANKINGS),
            ("schedule", self.curve, CURVES),
            ("orthogonality", self.orthogonality, KINDS),
            ("sensitivity_at", self.sensitivity_at, ("before_step", "after_step")),
        ):
            if value not in list(known):  # a list, too, may have been given
                raise ConfigError(f"{name}={value!r} is not known; choose one of {sorted(known)}.")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not (_is_number(beta) and 0 <= beta < 1):
                raise ConfigError(f"{name}={beta!r} must be a number, at least 0 and below 1; the paper uses 0.85.")
        if not (_is_number(self.orthogonality_weight) and 0 <= self.orthogonality_weight < float("inf")):
            raise ConfigError(f"orth_reg_weight={self.orthogonality_weight!r} must be a number, 0 or above.")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 1):
            raise ConfigError(f"budget={self.budget!r} must be a whole number of {self.budget_unit}, at least 1.")
        if (self.budget is None) == (self.target_rank is None):
            raise ConfigError(
                f"give target_r (an average rank) or budget (a number of {self.budget_unit}), one of the two (given:"
                f" target_r={self.target_rank!r}, budget={self.budget!r})."
            )
        if self.target_rank is not None:
            check_rank("target_r", self.target_rank)
        if not (_is_number(self.vector_norm) and 0 < self.vector_norm < float("inf")):
            raise ConfigError(f"vector_norm={self.vector_norm!r} must be a positive number.")
        if self.total_step is not None and (type(self.total_step) is not int or self.total_step < 1):
            raise ConfigError(f"total_step={self.total_step!r} must be the number of optimizer steps, at least 1.")
        for name, span in (("tinit", self.t_init), ("tfinal", self.t_final), ("deltaT", self.delta_t)):
            to_steps(span, name=name, total_step=1, steps_per_epoch=1.0)  # form only
        if self.delta_t == 0:
            raise ConfigError(f"deltaT={self.delta_t} must be at least 1 step between two allocations.")

    @property
    def may_be_by_hand(self) -> bool:
        """Whether a schedule without the total number of steps can be meant: pruning then ends at step ``t_final``."""
        if self.total_step is not None or type(self.t_final) is not int:
            return False
        return self.t_final > (self.t_init if type(self.t_init) is int else 0)

    @property
    def counts_epochs(self) -> bool:
        """Whether a length is in epochs, so that the schedule must wait for someone who knows theirs."""
        return any(isinstance(span, str) for span in (self.t_init, self.t_final, self.delta_t))

    def costs(self, triplets: Sequence[Triplets]) -> list[int]:
        """What one triplet of each matrix takes of the budget."""
        return self.costs_of([t.parameters_each for t in triplets])

    def costs_of(self, parameters: Sequence[int]) -> list[int]:
        """The same, from the number of parameters of one triplet of each matrix."""
        return list(parameters) if self.budget_unit == "parameters" else [1] * len(parameters)

    def target(self, per_rank: int) -> int:
        """bT.

        Args:
            per_rank: what one triplet for every matrix takes of the budget.
        """
        if self.budget is not None:
            return self.budget
        assert self.target_rank is not None
        return math.floor(round(self.target_rank * per_rank, 6))  # 0.29 * 100 is less than 29 to a computer

    def check_budgets(self, initial_budget: int, costs: Sequence[int]) -> None:
        """Refuse budgets that no choice of triplets can meet.

        Args:
            initial_budget: b0.
            costs: what one triplet of each matrix takes of the budget.

        Raises:
            ConfigError: bT is above b0, or holds no triplet at all.
        """
        target, unit, matrices = self.target(sum(costs)), self.budget_unit, len(costs)
        said = f"target_r={self.target_rank} x {matrices} matrices" if self.budget is None else f"budget={self.budget}"
        if initial_budget < target:
            counts = " (or did you mean budget_unit='parameters'?)" if self.budget and unit == "triplets" else ""
            raise ConfigError(
                f"the initial ranks sum to {initial_budget} {unit}, below the target of {target} ({said}): AdaLoRA only"
                f" prunes. Raise init_r (or rank_pattern) or lower {said.partition('=')[0]}{counts}."
            )
        if target < min(costs):
            raise ConfigError(
                f"a target of {target} {unit} ({said}) leaves nothing to train: the smallest triplet takes {min(costs)}"
                f" of it. Raise {said.partition('=')[0]}, or adapt more matrices."
            )

    def schedule(self, initial_budget: int, per_rank: int, total_step: int, steps_per_epoch: float | None) -> Schedule:
        """The lengths as steps, and the budgets.

        Args:
            initial_budget: b0, in ``budget_unit``.
            per_rank: what one triplet for every matrix takes of the budget: in triplets, the number of matrices.
        """

        def steps(span: Span, name: str) -> int:
            return to_steps(span, name=name, total_step=total_step, steps_per_epoch=steps_per_epoch)

        return Schedule(
            initial_budget=initial_budget,
            target_budget=self.target(per_rank),
            total_step=total_step,
            t_init=steps(self.t_init, "tinit"),
            t_final=steps(self.t_final, "tfinal"),
            delta_t=max(1, steps(self.delta_t, "deltaT")),
            curve=self.curve,
            unit=self.budget_unit,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_rank(name: str, rank: object) -> None:
    """Raises ConfigError unless it can be an average rank: a whole number from 1, or a fraction above 0."""
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not 0 < rank < math.inf:
        raise ConfigError(
            f"{name}={rank!r} must be an average rank above 0: a whole number, or a fraction such as 0.25, one triplet"
            " for every four matrices."
        )
