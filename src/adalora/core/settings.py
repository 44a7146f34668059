"""What an allocator is asked to do, checked as it is made. The public names are those of ``AdaLoraConfig``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError
from .importance import METRICS
from .orthogonality import KINDS, Orthogonality
from .policy import POLICIES
from .schedule import CURVES, Schedule, Span, to_steps


@dataclass(frozen=True)
class Settings:
    """What an allocator is asked to do; lengths are steps, fractions of all steps or epochs (see :data:`Span`).

    Raises:
        ConfigError: a value outside its range or a name that is not registered.
    """

    target_rank: int
    t_init: Span = 0.1
    t_final: Span = 0.3
    delta_t: Span = 0.01
    total_step: int | None = None
    curve: str = "cubic"
    beta1: float = 0.85
    beta2: float = 0.85
    metric: str = "sensitivity_uncertainty"
    policy: str = "global_topk"
    orthogonality_weight: float = 0.1  # γ
    orthogonality: Orthogonality = "squared"
    sensitivity_at: Literal["before_step", "after_step"] = "before_step"
    compact: bool = True
    gradient_start: bool = False  # P and Q wait for the loss's gradient before the first step

    def __post_init__(self) -> None:
        for name, value, known in (
            ("importance", self.metric, METRICS),
            ("policy", self.policy, POLICIES),
            ("schedule", self.curve, CURVES),
            ("orthogonality", self.orthogonality, KINDS),
            ("sensitivity_at", self.sensitivity_at, ("before_step", "after_step")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known; choose one of {sorted(known)}.")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"{name}={beta} must be at least 0 and below 1; the paper uses 0.85.")
        if not 0 <= self.orthogonality_weight < float("inf"):
            raise ConfigError(f"orth_reg_weight={self.orthogonality_weight} must be a number, 0 or above.")
        if type(self.target_rank) is not int or self.target_rank < 1:
            raise ConfigError(f"target_r={self.target_rank!r} must be a whole number, at least 1: an average rank.")
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

    def schedule(self, initial_budget: int, matrices: int, total_step: int, steps_per_epoch: float | None) -> Schedule:
        def steps(span: Span, name: str) -> int:
            return to_steps(span, name=name, total_step=total_step, steps_per_epoch=steps_per_epoch)

        return Schedule(
            initial_budget=initial_budget,
            target_budget=matrices * self.target_rank,
            total_step=total_step,
            t_init=steps(self.t_init, "tinit"),
            t_final=steps(self.t_final, "tfinal"),
            delta_t=max(1, steps(self.delta_t, "deltaT")),
            curve=self.curve,
        )
