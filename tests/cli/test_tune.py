"""``learning_rate: auto`` and ``adalora tune``: what they choose, that they go on, and what they leave alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import optuna
import pytest
import yaml

from adalora import tuning
from adalora.recipe import validate
from adalora.recipe_text import read_raw

from .conftest import Finished, reviews, write_csv

Run = Callable[..., Finished]


def words(finished: Finished) -> str:
    return " ".join((finished.out + finished.err).split())


def trials(finished: Finished) -> list[str]:
    """What was said of each trial that was run."""
    return [line.strip() for line in finished.out.splitlines() if line.startswith("  learning rate")]


@pytest.mark.parametrize("best", [1e-5, 1e-4, 5e-4, 1e-3, 4e-3, 1e-2, 1e-1, 1e3])
def test_the_walk_ends_at_the_lowest_rate_within_reach(best: float) -> None:
    """Of losses with one minimum; half a decade from step to step, at most five trials."""
    study, tried = optuna.create_study(), []
    for rate in tuning._walk(1e-3, study):
        tried.append(rate)
        loss = abs(math.log10(rate) - math.log10(best))
        parameters = {"learning_rate": optuna.distributions.FloatDistribution(1e-8, 1e2, log=True)}
        study.add_trial(
            optuna.create_trial(params={"learning_rate": rate}, distributions=parameters, value=min(loss, 3))
        )
    reach = [rate for rate in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1) if rate >= min(tried)]
    assert len(tried) == len(set(tried)) <= 5
    nearest = min(reach, key=lambda rate: abs(math.log10(rate) - math.log10(best)))
    if 3e-5 < best < 3e-2:
        assert min(tried, key=lambda rate: abs(math.log10(rate) - math.log10(best))) == nearest


def test_tune_writes_the_recipe_to_train(adalora: Run, tiny_run: list[object]) -> None:
    """Trials are run once, and belong to their recipe."""
    tuned = adalora("tune", *tiny_run, "--json")
    assert tuned.code == 0, tuned.err
    found = json.loads(tuned.out)
    losses = {trial["rate"]: trial["loss"] for trial in found["trials"]}
    assert 3 <= len(losses) <= 5 and found["learning_rate"] == min(losses, key=losses.__getitem__)
    assert (found["steps"], found["total_steps"], found["rows"]) == (12, 36, 19)
    assert sorted(path.name for path in Path("run").rglob("[!.]*")) == ["recipe.yaml", "study.log", "tuning"]

    again = adalora("tune", *tiny_run)
    assert not trials(again) and f"learning rate {found['learning_rate']:g}: loss" in words(again)
    assert f"adalora train {found['recipe']}" in words(again)
    other = adalora("tune", *tiny_run, "--seed", 1)
    assert other.code == 2 and "was for another recipe: seed was 0, is 1" in words(other) and "--overwrite" in other.err
    trained = adalora("train", found["recipe"], "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["learning_rate"] == found["learning_rate"]


def test_a_search_that_was_killed_goes_on(adalora: Run, tiny_run: list[object]) -> None:
    """No finished trial is run again, and what comes out is the same; held-out rows have no say."""
    write_csv(Path("other.csv"), reviews(8, seed=9))
    whole = adalora("tune", *tiny_run, "-o", "whole", "--eval", "other.csv", "--json")
    run, count = tuning._Runner.run, 0

    def interrupted(runner: tuning._Runner, rate: float) -> optuna.trial.FrozenTrial:
        nonlocal count
        count += 1
        if count == 3:  # in the middle of a trial
            with mock.patch.object(tuning._Watch, "on_step_end", side_effect=KeyboardInterrupt):
                return run(runner, rate)
        return run(runner, rate)

    with mock.patch.object(tuning._Runner, "run", interrupted):
        assert adalora("tune", *tiny_run).code == 130
    rest = adalora("tune", *tiny_run, "--json")
    first, second = json.loads(whole.out), json.loads(rest.out)
    assert {**first, "seconds": 0, "recipe": ""} == {**second, "seconds": 0, "recipe": ""}
    assert (
        len([line for line in rest.err.splitlines() if line.startswith("  learning rate")]) == len(first["trials"]) - 2
    )


def test_auto_searches_and_trains_and_resumes(adalora: Run, tiny_run: list[object]) -> None:
    auto = [*tiny_run, "--lr", "auto"]
    plan = adalora("plan", *auto)
    assert "learning rate auto" in words(plan) and "at most 5 trials of 12 steps each" in words(plan)
    assert not Path("run").exists()

    with mock.patch.object(tuning._Watch, "on_step_end", side_effect=KeyboardInterrupt):
        stopped = adalora("train", *auto)
    assert stopped.code == 130 and "adalora train --resume --output run" in stopped.err
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["training"]["learning_rate"] == "auto"
    assert "holds a run already: --resume" in adalora("train", *auto).err

    resumed = adalora("train", *auto, "--resume")
    assert resumed.code == 0 and 3 <= len(trials(resumed)) <= 5, resumed.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    rate, search = metrics["learning_rate"], metrics["learning_rate_search"]
    assert rate == min(search["trials"], key=lambda trial: trial["loss"])["rate"]
    assert f"learning rate {rate:g}: loss" in words(resumed)
    recipe = validate(read_raw(Path("run/recipe.yaml")), "run")
    assert recipe.training.learning_rate == rate and recipe.facts is not None
    assert recipe.facts.learning_rate is not None and recipe.facts.learning_rate.model_dump() == search

    Path("run/metrics.json").unlink()
    shutil.rmtree("run/tuning")
    for options in (["--output", "run"], auto):  # auto means what was found
        again = adalora("train", "--resume", *options)
        assert again.code == 0 and not trials(again), again.err
        Path("run/metrics.json").unlink()
    other = adalora("train", "--resume", *tiny_run, "--lr", 0.5)
    assert other.code == 2 and "training.learning_rate was" in other.err


@pytest.mark.parametrize("value", ["fast", "0", "-1", "nan"])
def test_what_is_no_rate(adalora: Run, tiny_run: list[object], value: str) -> None:
    refused = adalora("train", *tiny_run, "--lr", value)
    assert refused.code == 2 and "should be a number above 0, or auto" in words(refused)
    assert refused.err.count("\n") == 1
