"""Steps to budgets: units, bounds, curves, and which steps allocate."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adalora.core.errors import ConfigError, ScheduleError
from adalora.core.schedule import CURVES, Schedule, to_steps

curves = pytest.mark.parametrize("curve", list(CURVES))


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Every schedule with something to prune and room to do it."""
    t_init, pruning, t_final = draw(st.integers(0, 30)), draw(st.integers(1, 60)), draw(st.integers(0, 30))
    target = draw(st.integers(0, 200))
    return {
        "initial_budget": target + draw(st.integers(1, 200)),
        "target_budget": target,
        "total_step": t_init + pruning + t_final,
        "t_init": t_init,
        "t_final": t_final,
        "delta_t": draw(st.integers(1, 40)),
    }


# ------------------------------------------------------------------------------------------------ budgets


@curves
@given(layout=layouts())
def test_the_budget_falls_from_start_to_target(curve: str, layout: dict[str, Any]) -> None:
    """b0 during the warm-up, never rising, never outside [bT, b0], exactly bT from T - t_final on."""
    schedule = Schedule(**layout, curve=curve)
    budgets = [schedule.budget(step) for step in range(schedule.total_step + 3)]
    assert all(isinstance(b, int) for b in budgets)
    assert set(budgets[: schedule.t_init + 1]) == {schedule.initial_budget}
    assert set(budgets[schedule.final_step :]) == {schedule.target_budget}
    assert all(later <= earlier for earlier, later in pairwise(budgets))
    assert schedule.prunes and schedule.final_step == layout["total_step"] - layout["t_final"]


@given(layout=layouts())
def test_the_cubic_is_the_published_one(layout: dict[str, Any]) -> None:
    """The formula of the authors' ``RankAllocator.schedule_threshold`` and of PEFT's ``budget_schedule``, each step."""
    schedule = Schedule(**layout)
    initial, target = layout["initial_budget"], layout["target_budget"]
    initial_warmup, final_warmup, total_step = layout["t_init"], layout["t_final"], layout["total_step"]
    for step in range(total_step + 1):
        if step <= initial_warmup:
            published = initial
        elif step > total_step - final_warmup:
            published = target
        else:
            mul_coeff = 1 - (step - initial_warmup) / (total_step - final_warmup - initial_warmup)
            published = int((initial - target) * mul_coeff**3 + target)
        assert schedule.budget(step) == published, step


@given(layout=layouts())
def test_linear_and_constant(layout: dict[str, Any]) -> None:
    """Linear: the straight line, rounded down, give or take the last float digit. Constant: the target at once."""
    linear, constant = Schedule(**layout, curve="linear"), Schedule(**layout, curve="constant")
    surplus = layout["initial_budget"] - layout["target_budget"]
    for step in range(linear.t_init + 1, linear.final_step):
        line = layout["target_budget"] + surplus * (1 - Fraction(step - linear.t_init, linear.pruning_steps))
        assert linear.budget(step) in (math.floor(line), math.ceil(line) - 1)
        assert constant.budget(step) == layout["target_budget"]


@curves
def test_a_curve_runs_from_all_to_nothing(curve: str) -> None:
    """A share of the surplus: 0 when no time is left, never rising, within [0, 1]."""
    shares = [CURVES[curve](1 - k / 50) for k in range(51)]
    assert shares[-1] == 0
    assert all(0 <= later <= earlier <= 1 for earlier, later in pairwise(shares))


# ------------------------------------------------------------------------------------------------ allocations


@given(layout=layouts())
def test_allocations_lie_on_the_grid_and_where_the_final_phase_begins(layout: dict[str, Any]) -> None:
    """Multiples of ΔT after the warm-up, and T - t_final whether or not it is one; nothing afterwards."""
    schedule = Schedule(**layout)
    steps = {step for step in range(schedule.total_step + 5) if schedule.allocates(step)}
    grid = {s for s in range(0, schedule.final_step, schedule.delta_t) if s > schedule.t_init}
    assert steps == grid | {schedule.final_step}
    assert [schedule.is_final(step) for step in (schedule.final_step - 1, schedule.final_step)] == [False, True]


@given(layout=layouts())
def test_nothing_to_prune_never_allocates(layout: dict[str, Any]) -> None:
    """At equal budgets any lengths do, also ones that leave no room."""
    layout = {**layout, "target_budget": layout["initial_budget"], "t_final": layout["total_step"] + 1}
    schedule = Schedule(**layout)
    steps = range(schedule.total_step + 5)
    assert not schedule.prunes and not any(map(schedule.allocates, steps))
    assert {schedule.budget(step) for step in steps} == {schedule.initial_budget}


# ------------------------------------------------------------------------------------------------ refusals

VALID: dict[str, Any] = {
    "initial_budget": 24, "target_budget": 12, "total_step": 100, "t_init": 10, "t_final": 20, "delta_t": 5,
}  # fmt: skip


@pytest.mark.parametrize(("t_init", "t_final"), [(80, 20), (100, 0), (0, 100), (50, 60), (200, 0)])
def test_no_room_to_prune(t_init: int, t_final: int) -> None:
    """The message has the three numbers and what to change."""
    with pytest.raises(ScheduleError, match=rf"100 steps, {t_init} .*tinit.* {t_final} .*tfinal.*lower") as caught:
        Schedule(**{**VALID, "t_init": t_init, "t_final": t_final})
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curve": "quartic"}, "schedule='quartic'.*constant.*cubic.*linear"),
        ({"delta_t": 0}, "deltaT=0"),
        ({"target_budget": 25}, "target of 25.*initial 24"),
    ],
)
def test_values_that_cannot_be_meant(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Schedule(**{**VALID, **changes})


# ------------------------------------------------------------------------------------------------ units


@given(st.integers(0, 10**6))
def test_an_int_is_steps(steps: int) -> None:
    assert to_steps(steps, name="tinit") == steps
    assert to_steps(steps, name="tinit", total_step=10, steps_per_epoch=3.0) == steps


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**6))
def test_a_fraction_is_a_share_of_all_steps(share: float, total: int) -> None:
    """To the nearest step, so never outside the training."""
    steps = to_steps(share, name="tinit", total_step=total)
    assert isinstance(steps, int) and 0 <= steps <= total and abs(steps - share * total) <= 0.5


@pytest.mark.parametrize(
    ("span", "steps"),
    [("2 epochs", 20), ("1 epoch", 10), ("1.5 epochs", 15), (".5 epoch", 5), ("2. epochs", 20), ("  3EPOCHS ", 30),
     ("0 epochs", 0), ("0.26 Epochs", 3)],
)  # fmt: skip
def test_epochs_in_words(span: str, steps: int) -> None:
    assert to_steps(span, name="tinit", steps_per_epoch=10) == steps


@pytest.mark.parametrize(
    "span",
    [True, False, -1, -0.1, 1.0, 1.5, float("nan"), float("inf"), "", "2", "2 steps", "epochs", "-1 epochs",
     "2 epochss", "1e3 epochs", "two epochs", "50%", None, [1], 1j],
)  # fmt: skip
def test_what_is_no_length_of_training(span: Any) -> None:
    """The message names the setting and repeats the value."""
    with pytest.raises(ConfigError, match=re.escape(f"tfinal={span!r} ")) as caught:
        to_steps(span, name="tfinal", total_step=100, steps_per_epoch=10)
    assert not isinstance(caught.value, ScheduleError)


def test_units_that_nobody_has_explained() -> None:
    with pytest.raises(ScheduleError, match=r"tinit=0\.5 .*number is not known"):
        to_steps(0.5, name="tinit")
    with pytest.raises(ScheduleError, match=r"tinit='1 epoch'.*plan\(total_step, steps_per_epoch\)"):
        to_steps("1 epoch", name="tinit", total_step=100)


# ------------------------------------------------------------------------------------------------ in words


@given(layout=layouts(), matrices=st.integers(1, 9))
def test_the_description_is_true(layout: dict[str, Any], matrices: int) -> None:
    """Every number in it is one of the schedule's; the first allocation it names is the first there is."""
    schedule = Schedule(**layout)
    text = schedule.describe(matrices)
    assert text.startswith(f"{schedule.total_step} optimizer steps")
    for budget in (schedule.initial_budget, schedule.target_budget):
        assert f"{budget} triplets ({budget / matrices:.3g} a matrix)" in text
    first = next(step for step in range(schedule.total_step + 1) if schedule.allocates(step))
    assert f"from step {first};" in text
    assert ("every step" if schedule.delta_t == 1 else f"every {schedule.delta_t} steps") in text
    assert f"steps {schedule.t_init + 1} to {schedule.final_step}: cubic pruning" in text
    if schedule.t_final:
        assert f"steps {schedule.final_step + 1} to {schedule.total_step}: final phase" in text
    else:
        assert "no final phase" in text


def test_the_description_reads_well() -> None:
    assert Schedule(**VALID).describe(3) == (
        "100 optimizer steps. Steps 1 to 10: warm-up with 24 triplets (8 a matrix); steps 11 to 80: cubic pruning to 12"
        " triplets (4 a matrix), every 5 steps from step 15; steps 81 to 100: final phase with the ranks fixed."
    )
    assert "Steps no warm-up" not in Schedule(**{**VALID, "t_init": 0}).describe(3)
    assert Schedule(**{**VALID, "target_budget": 24}).describe(0) == (
        "100 steps at 24 triplets: nothing to prune, LoRA in SVD form."
    )


@given(layout=layouts())
def test_schedules_are_values(layout: dict[str, Any]) -> None:
    """Equal when laid out alike, and immutable: what a trace recorded stays true."""
    schedule = Schedule(**layout)
    assume(layout["initial_budget"] > 1)
    assert schedule == Schedule(**layout) != Schedule(**{**layout, "delta_t": layout["delta_t"] + 1})
    with pytest.raises(AttributeError):
        schedule.total_step = 1  # type: ignore[misc]
