"""Recipes: what they say, what they refuse, and that the files in ``recipes/`` are what they claim to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from adalora import AdaLoraConfig
from adalora.recipe import (
    AdaLoraSection,
    Recipe,
    RecipeError,
    TrainingSection,
    assigned,
    demo_raw,
    differences,
    dump,
    parse_yaml,
    read_raw,
    validate,
    with_values,
)

RECIPES = Path(__file__).parents[2] / "recipes"
LEAST = {"model": "m", "data": {"train": "t.csv"}}


def test_the_demo_is_the_recipe_that_spells_it_out() -> None:
    written = validate(read_raw(RECIPES / "rotten_tomatoes.yaml"), "file")
    assert differences(written, validate(demo_raw(), "demo")) == []


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_each_recipe_is_valid_and_survives_being_dumped(path: Path) -> None:
    recipe = validate(read_raw(path), path.name)
    assert validate(parse_yaml(dump(recipe), "dump"), "dump") == recipe


def test_fields_are_those_of_the_configurations_they_fill() -> None:
    config = {field.name: field for field in dataclasses.fields(AdaLoraConfig)}
    assert set(AdaLoraSection.model_fields) <= set(config)
    arguments = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TrainingSection.model_fields) - {"group_by_length"} <= arguments
    own = {"target_r", "lora_alpha", "target_modules"}  # AdaLoraConfig leaves these to PEFT, or to the user
    for name, field in AdaLoraSection.model_fields.items():
        if name not in own:
            assert field.default == config[name].default, name


def test_every_field_is_documented() -> None:
    for section in (Recipe, *(f.annotation for n, f in Recipe.model_fields.items() if n in {"adalora", "training"})):
        assert all(field.description for name, field in section.model_fields.items() if name != "data")


def test_ranks_follow_the_target() -> None:
    recipe = validate({**LEAST, "adalora": {"target_r": 5}}, "test")
    assert (recipe.adalora.init_r, recipe.adalora.lora_alpha) == (8, 16.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5E4", 15000.0),
        ("-2e-1", -0.2),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("12", 12),
        ("2 epochs", "2 epochs"),
        ("[no, yes]", ["no", "yes"]),
    ],
)
def test_yaml_values_are_what_people_mean(text: str, value: object) -> None:
    assert parse_yaml(text, "test") == value


def test_settings_reach_into_sections_and_leave_the_rest_alone() -> None:
    raw = {"model": "m", "data": {"train": "t.csv", "text": "a"}}
    changed = with_values(raw, assigned(["data.text=b", "training.learning_rate=3e-4", "adalora.tinit=2 epochs"]))
    recipe = validate(changed, "test")
    assert (recipe.data.train, recipe.data.text) == ("t.csv", "b")
    assert (recipe.training.learning_rate, recipe.adalora.tinit) == (3e-4, "2 epochs")
    assert raw == {"model": "m", "data": {"train": "t.csv", "text": "a"}}


def test_steps_keep_their_unit() -> None:
    section = AdaLoraSection.model_validate({"tinit": 200, "tfinal": 0.25, "deltaT": "0.5 epochs"})
    assert [type(value) for value in (section.tinit, section.tfinal, section.deltaT)] == [int, float, str]


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match="3 faults") as caught:
        validate({**LEAST, "sed": 1, "seed": -1, "training": {"warmup_steps": 1.5}}, "r.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and any("`sed`: did you mean `seed`?" in line for line in lines)


def test_differences_name_the_key_and_both_values() -> None:
    before = validate(LEAST, "before")
    after = validate({**LEAST, "seed": 3, "output": "elsewhere"}, "after")
    assert differences(before, after, ignore={"output"}) == ["seed was 0, is 3"]
