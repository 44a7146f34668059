"""Settings are checked when they are made, and the message names the public setting."""

from __future__ import annotations

from typing import Any

import pytest

from adalora.core.errors import ConfigError, ScheduleError
from adalora.core.importance import METRICS
from adalora.core.orthogonality import KINDS
from adalora.core.policy import POLICIES
from adalora.core.schedule import CURVES, UNITS, Schedule
from adalora.core.settings import RANKINGS, Settings

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("metric", "taylor", "importance='taylor'.*choose one of.*sensitivity_uncertainty"),
        ("policy", "random", "policy='random'.*global_topk"),
        ("policy", [], "policy=\\[\\].*global_topk"),
        ("curve", "sqrt", "schedule='sqrt'.*cubic"),
        ("orthogonality", "l1", "orthogonality='l1'.*squared"),
        ("sensitivity_at", "never", "sensitivity_at='never'.*before_step"),
        *(("beta1", beta, f"beta1={beta}") for beta in (-0.1, 1.0, 1.5, NAN, True, None)),
        *(("beta2", beta, f"beta2={beta}") for beta in (-0.1, 1.0, 1.5, NAN)),
        *(("orthogonality_weight", weight, f"orth_reg_weight={weight}") for weight in (-0.1, INF, NAN, True, None)),
        ("orthogonality_weight", "much", "orth_reg_weight='much'"),
        *(("target_rank", rank, f"target_r={rank}") for rank in (0, -1, -0.5, True, NAN, INF)),
        *(("budget", budget, f"budget={budget}") for budget in (0, -1, 2.5, True)),
        ("budget", 100, "one of the two \\(given: target_r=2, budget=100"),
        ("target_rank", None, "one of the two \\(given: target_r=None, budget=None"),
        ("budget_unit", "bytes", "budget_unit='bytes'.*parameters.*triplets"),
        ("rank_by", "size", "rank_by='size'.*score_per_parameter"),
        *(("total_step", total, f"total_step={total}") for total in (0, -5, True, 10.5, NAN)),
        *(("t_init", span, "tinit=") for span in (-1, -0.5, 1.0, True, "soon", NAN)),
        *(("t_final", span, "tfinal=") for span in (-1, -0.5, 1.0, True, "soon", NAN)),
        *(("delta_t", span, "deltaT=") for span in (0, 0.0, -1, 1.0, True, "soon", NAN)),
    ],
)
def test_values_that_cannot_be_meant(field: str, value: Any, words: str) -> None:
    others = {} if field == "budget" and value != 100 else {"target_rank": 2}
    with pytest.raises(ConfigError, match=words):
        Settings(**{**others, field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [("metric", METRICS), ("policy", POLICIES), ("curve", CURVES), ("orthogonality", KINDS),
     ("budget_unit", UNITS), ("rank_by", RANKINGS), ("sensitivity_at", ("before_step", "after_step"))],
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


# ------------------------------------------------------------------------------------------------ the target


@pytest.mark.parametrize(
    ("settings", "per_rank", "target"),
    [
        ({"target_rank": 2}, 36, 72),
        ({"target_rank": 0.25}, 36, 9),
        ({"target_rank": 0.29}, 100, 29),  # 0.29 * 100 is 28.999999999999996
        ({"target_rank": 1 / 3}, 36, 12),
        ({"target_rank": 2.99}, 1, 2),
        ({"target_rank": 82945 / 41472, "budget_unit": "parameters"}, 41472, 82945),
        ({"budget": 82944, "budget_unit": "parameters"}, 41472, 82944),
        ({"budget": 9}, 36, 9),
    ],
)
def test_the_target_is_an_average_rank_or_a_number(settings: dict[str, Any], per_rank: int, target: int) -> None:
    assert Settings(**settings).target(per_rank) == target


def test_any_number_of_parameters_can_be_said_as_a_rank() -> None:
    """What ``--budget 123457`` does: the number over that of rank 1, and back without a loss."""
    for parameters in (1, 7, 123_457, 999_999_937):
        for per_rank in (1, 768, 41_472, 99_991_111):
            settings = Settings(target_rank=parameters / per_rank, budget_unit="parameters")
            assert settings.target(per_rank) == parameters


def test_costs_are_those_of_the_unit() -> None:
    assert Settings(target_rank=1).costs_of([10, 30]) == [1, 1]
    assert Settings(target_rank=1, budget_unit="parameters").costs_of([10, 30]) == [10, 30]
    schedule = Settings(target_rank=1.5, budget_unit="parameters").schedule(120, 40, 100, None)
    assert (schedule.unit, schedule.initial_budget, schedule.target_budget) == ("parameters", 120, 60)


@pytest.mark.parametrize(
    ("settings", "initial", "costs", "words"),
    [
        (
            {"target_rank": 4},
            9,
            [1, 1, 1],
            r"sum to 9 triplets.*target of 12 \(target_r=4 x 3 matrices\).*lower target_r",
        ),
        ({"budget": 500}, 9, [1, 1, 1], r"target of 500 \(budget=500\).*did you mean budget_unit='parameters'\?"),
        ({"budget": 500, "budget_unit": "parameters"}, 90, [10, 30], r"sum to 90 parameters.*lower budget\.$"),
        ({"target_rank": 0.25}, 3, [1, 1, 1], r"target of 0 triplets \(target_r=0.25 x 3 matrices\) leaves nothing"),
        ({"budget": 9, "budget_unit": "parameters"}, 90, [10, 30], "smallest triplet takes 10 of it. Raise budget"),
    ],
)
def test_budgets_that_cannot_be_met(settings: dict[str, Any], initial: int, costs: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**settings).check_budgets(initial, costs)
