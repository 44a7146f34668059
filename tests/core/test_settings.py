"""Settings are checked when they are made, and the message names the public setting."""

from __future__ import annotations

from typing import Any

import pytest

from adalora.core.errors import ConfigError, ScheduleError
from adalora.core.importance import METRICS
from adalora.core.orthogonality import KINDS
from adalora.core.policy import POLICIES
from adalora.core.schedule import CURVES, Schedule
from adalora.core.settings import Settings

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("metric", "taylor", "importance='taylor'.*choose one of.*sensitivity_uncertainty"),
        ("policy", "random", "policy='random'.*global_topk"),
        ("curve", "sqrt", "schedule='sqrt'.*cubic"),
        ("orthogonality", "l1", "orthogonality='l1'.*squared"),
        ("sensitivity_at", "never", "sensitivity_at='never'.*before_step"),
        *(("beta1", beta, f"beta1={beta}") for beta in (-0.1, 1.0, 1.5, NAN)),
        *(("beta2", beta, f"beta2={beta}") for beta in (-0.1, 1.0, 1.5, NAN)),
        *(("orthogonality_weight", weight, f"orth_reg_weight={weight}") for weight in (-0.1, INF, NAN)),
        *(("target_rank", rank, f"target_r={rank}") for rank in (0, -1, 2.5, NAN)),
        *(("total_step", total, f"total_step={total}") for total in (0, -5, True, 10.5, NAN)),
        *(("t_init", span, "tinit=") for span in (-1, -0.5, 1.0, True, "soon", NAN)),
        *(("t_final", span, "tfinal=") for span in (-1, -0.5, 1.0, True, "soon", NAN)),
        *(("delta_t", span, "deltaT=") for span in (0, 0.0, -1, 1.0, True, "soon", NAN)),
    ],
)
def test_values_that_cannot_be_meant(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**{"target_rank": 2, field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [("metric", METRICS), ("policy", POLICIES), ("curve", CURVES), ("orthogonality", KINDS),
     ("sensitivity_at", ("before_step", "after_step"))],
)  # fmt: skip
def test_every_registered_name_is_accepted(field: str, values: Any) -> None:
    for value in values:
        assert getattr(Settings(**{"target_rank": 2, field: value}), field) == value


def test_defaults_need_nothing_but_a_target() -> None:
    """The paper's decay rates and γ; a schedule of fractions that fits trainings of any length from two steps on."""
    settings = Settings(target_rank=2)
    assert (settings.beta1, settings.beta2, settings.orthogonality_weight) == (0.85, 0.85, 0.1)
    for total in (2, 3, 10, 100, 12345):
        schedule = settings.schedule(24, 8, total, None)
        assert (schedule.initial_budget, schedule.target_budget, schedule.total_step) == (24, 16, total)
        assert schedule.delta_t >= 1 and schedule.pruning_steps >= 1


def test_all_units_become_steps() -> None:
    settings = Settings(target_rank=2, t_init="1 epoch", t_final=0.25, delta_t=3)
    assert settings.schedule(12, 4, 80, 20.0) == Schedule(12, 8, 80, 20, 20, 3)
    with pytest.raises(ScheduleError, match="tinit='1 epoch'"):
        settings.schedule(12, 4, 80, None)


@pytest.mark.parametrize("delta_t", [0.001, "0.01 epochs", "0 epochs"])
def test_a_distance_that_rounds_to_nothing_is_every_step(delta_t: Any) -> None:
    assert Settings(target_rank=2, delta_t=delta_t).schedule(12, 4, 80, 20.0).delta_t == 1
