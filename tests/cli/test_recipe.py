"""Recipes: what they say, what they refuse, and that the files in ``recipes/`` are what they claim to be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import TrainingArguments

from adalora import AdaLoraConfig
from adalora.reading import completed
from adalora.recipe import (
    TRAIN_TYPE_KEYS,
    AdaLoraSection,
    Recipe,
    RecipeError,
    TrainingSection,
    differences,
    dump,
    validate,
)
from adalora.recipe_text import assigned, demo_raw, parse_yaml, read_raw, with_values

from .conftest import Finished

RECIPES = Path(__file__).parents[2] / "recipes"
LEAST = {"model": "m", "data": {"train": "t.csv"}}


def test_the_demo_is_the_recipe_that_spells_it_out() -> None:
    written = completed(validate(read_raw(RECIPES / "rotten_tomatoes.yaml"), "file"))
    assert differences(written, completed(validate(demo_raw(), "demo"))) == []


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_each_recipe_is_valid_and_survives_being_dumped(path: Path) -> None:
    recipe = validate(read_raw(path), path.name)
    assert validate(parse_yaml(dump(recipe), "dump"), "dump") == recipe


LIKE_NUMBERS = st.from_regex(r"[-+.0-9eE_:]{1,8}", fullmatch=True)


@given(st.lists(st.text() | LIKE_NUMBERS))
@example(
    ["1e3", "2E5", ".5e3", "1e-3", "1.0e+3", "no", "on", "null", "~", "1_000", "12:30:45", "=", "<<", "", "a\x85b"]
)
def test_any_text_in_a_recipe_is_the_same_text_when_it_is_read_again(names: list[str]) -> None:
    """By us, and by readers of YAML 1.1."""
    recipe = validate({**LEAST, "data": {"train": "t.csv", "label_names": names}}, "test")
    assert validate(parse_yaml(dump(recipe), "dump"), "dump") == recipe
    assert yaml.safe_load(dump(recipe))["data"]["label_names"] == names


def test_fields_are_those_of_the_configurations_they_fill() -> None:
    config = {field.name: field for field in dataclasses.fields(AdaLoraConfig)}
    assert set(AdaLoraSection.model_fields) <= set(config)
    arguments = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TrainingSection.model_fields) - {"group_by_length", "eval_rows"} <= arguments
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


# --- train_type: adalora -----------------------------------------------------------------------------

TRAIN_TYPE = {"train_type": "adalora"}
THEIRS = {
    **{"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1},
    **{"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5},
}


def method(raw: dict[str, Any]) -> dict[str, Any]:
    """The section ``adalora`` of the recipe, as resolved."""
    return validate({**LEAST, **raw}, "test").adalora.model_dump()


@pytest.mark.parametrize(
    ("raw", "changed"),
    [
        (TRAIN_TYPE, {}),
        ({"adalora_beta1": 0.9}, {"beta1": 0.9}),  # one key of them is enough
        ({**TRAIN_TYPE, **TRAIN_TYPE_KEYS}, {}),
        ({**TRAIN_TYPE, "adalora_tinit": "2 epochs", "adalora_tfinal": 0.25}, {"tinit": "2 epochs", "tfinal": 0.25}),
        ({**TRAIN_TYPE, "adalora": {"target_r": 4, "policy": "uniform"}}, {"target_r": 4, "policy": "uniform"}),
        ({**TRAIN_TYPE, "adalora": None}, {}),
    ],
)
def test_a_training_type_is_the_section_with_the_defaults_of_its_trainers(raw: dict, changed: dict) -> None:
    assert method(raw) == {**method({"adalora": {"init_r": 12}}), **THEIRS, **changed}


def test_without_a_training_type_our_own_defaults_stand() -> None:
    assert method({})["orth_reg_weight"] != THEIRS["orth_reg_weight"]


@pytest.mark.parametrize("file", [{}, {"adalora": {"target_r": 2, "tinit": 7}}, {"adalora_target_r": 2}])
@pytest.mark.parametrize("key", ["adalora_target_r", "adalora.target_r"])
def test_a_setting_takes_the_place_of_either_spelling(tmp_path: Path, file: dict, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **file}))
    raw = read_raw(path)
    section = validate(with_values(raw, assigned([f"{key}=4"])), "test").adalora
    assert section.target_r == 4
    if "adalora" in file:
        assert section.tinit == 7
    if key == "adalora_target_r" or "adalora_target_r" in file:
        assert (section.init_r, section.orth_reg_weight) == (12, 0.5)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"train_type": "lora"}, "train_type should be adalora, the one method here (given: 'lora')"),
        ({"adalora_tfinal": 1, "adalora": {"tfinal": 2}}, "adalora.tfinal is the same as adalora_tfinal: give one"),
        ({"adalora_traget_r": 1}, "unknown key `adalora_traget_r`: did you mean `adalora_target_r`?"),
        ({**TRAIN_TYPE, "adalora_initr": 1}, "unknown key `adalora_initr`: did you mean `adalora_init_r`?"),
        ({**TRAIN_TYPE, "adalora_init_r": 0}, "adalora.init_r: should be greater than or equal to 1 (given: 0)"),
        ({**TRAIN_TYPE, "adalora": 4}, "adalora: should be a section with keys of its own (given: 4)"),
        ({"adalora": {"adalora_init_r": 3}}, "unknown key `adalora.adalora_init_r`: did you mean `adalora.init_r`?"),
    ],
)
def test_a_training_type_that_cannot_be_meant_is_one_line(raw: dict, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate({**LEAST, **raw}, "r.yaml")
    assert str(caught.value).startswith("r.yaml: ") and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_settings_of_one_value_are_one_line() -> None:
    with pytest.raises(RecipeError, match=r"adalora\.tinit is the same as adalora_tinit: give one of the two"):
        assigned(["adalora_tinit=1", "adalora.tinit=2"])


@pytest.mark.compatibility("Trainers and loops", "recipe keys of trainers with AdaLoRA as a training type")
def test_a_recipe_with_a_training_type_trains(adalora: Callable[..., Finished], tiny_model: Path, files: Path) -> None:
    recipe = {
        "model": str(tiny_model),
        "output": "run",
        "train_type": "adalora",
        "adalora_init_r": 3,
        "adalora_tinit": "1 epoch",
        "adalora_deltaT": 2,
        "data": {"train": str(files / "train.csv"), "eval": str(files / "test.csv"), "max_length": 16},
        "adalora": {"exclude_modules": ".*pooler.*"},
        "training": {"num_train_epochs": 2, "learning_rate": 2e-2, "per_device_train_batch_size": 8},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = adalora("train", "recipe.yaml", "--set", "adalora_target_r=2")
    assert done.code == 0, done.err

    written = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert not [key for key in written if key.startswith(("adalora_", "train_type"))]
    given = {"target_r": 2, "init_r": 3, "tinit": "1 epoch", "deltaT": 2}
    assert written["adalora"].items() >= {**THEIRS, **given}.items()
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["live_triplets"] == 2 * 12
    trace = [json.loads(line) for line in Path("run/trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in trace if "step" in line] == [14, 16, 18, 20, 22, 24]  # after an epoch of 12
