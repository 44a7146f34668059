"""What every method promises, whatever it is: a new one is tested here the moment it is registered."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from adalora import methods
from adalora.methods import Adapted, Method, head_modules
from adalora.recipe import Recipe, RecipeError

from .jobs import adapt, job_for, outputs, recipe_for, rows, saved_parameters, tiny_bert, trainer_for

NAMES = methods.names()
SIZED = [name for name in NAMES if methods.get(name).takes_budget]
RANKED = [name for name in SIZED if methods.get(name).section in ("adalora", "lora")]
DIVIDE_ANY = ["adalora", "lora_pruned"]  # whose budget counts parameters
BODY_TRAINED = {"full": lambda name: True, "bitfit": lambda name: name.endswith(".bias")}  # else nothing of it


class Trained(NamedTuple):
    method: Method
    recipe: Recipe
    adapted: Adapted
    folder: Path
    losses: tuple[float, float]  # before and after


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny BERT after some steps of each method, saved."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    recipe = recipe_for(request.param)
    method, adapted = adapt(request.param, folder)
    before = outputs(adapted.model).loss.item()
    trainer_for(adapted, folder).train()
    adapted.save(folder / "saved")
    return Trained(method, recipe, adapted, folder / "saved", (before, outputs(adapted.model).loss.item()))


@pytest.mark.parametrize("name", NAMES)
def test_the_body_stays_frozen_and_the_output_layer_is_trained(name: str, tmp_path: Path) -> None:
    model = tiny_bert()
    body = dict(model.base_model.named_parameters())
    adapted = methods.get(name).adapt(model, job_for(recipe_for(name), tmp_path))
    trains = BODY_TRAINED.get(name, lambda name: False)
    assert {key for key, parameter in body.items() if parameter.requires_grad} == set(filter(trains, body))
    trainable = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    assert any(parameter.shape == (2, 32) for parameter in trainable), "the output layer"
    others = sum(parameter.numel() for parameter in trainable) - 66
    assert others == 0 if name == "head" else others > 0


def test_training_lowers_the_loss(trained: Trained) -> None:
    before, after = trained.losses
    assert after < 0.9 * before


def test_what_was_saved_gives_the_same_answers_in_a_fresh_model(trained: Trained) -> None:
    torch.manual_seed(1)  # another output layer
    loaded = trained.method.load(tiny_bert(), trained.recipe, trained.folder)
    assert not loaded.training
    expected = outputs(trained.adapted.model).logits
    torch.testing.assert_close(outputs(loaded).logits, expected, atol=1e-6, rtol=0)  # sums in another order, no more


def test_nothing_but_what_was_learned_is_saved(trained: Trained) -> None:
    """And a second save replaces the first."""
    known = {"adapter_config.json", "adapter_model.safetensors"}
    expected = {"config.json", "model.safetensors"} if trained.recipe.method == "full" else known
    trained.adapted.save(trained.folder)
    assert {file.name for file in trained.folder.iterdir()} <= expected
    assert any(file.suffix == ".safetensors" for file in trained.folder.iterdir())


def test_ranks_are_of_the_adapted_matrices(trained: Trained) -> None:
    ranks = trained.adapted.ranks()
    if trained.recipe.method not in RANKED:
        assert ranks == {}
        return
    linear = {name for name, module in tiny_bert().named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(ranks) == linear - {"bert.pooler.dense", "classifier"}
    assert sum(ranks.values()) == 4 * len(ranks), "the default rank, on average"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_without_allocation_the_scale_is_that_of_adalora(use_rslora: bool, tmp_path: Path) -> None:
    recipes = [
        recipe_for(name, adalora={"target_r": 4, "init_r": 6, "lora_alpha": 12, "use_rslora": use_rslora})
        for name in ("adalora", "svd_lora")
    ]
    models = [adapt(recipe.method, tmp_path, recipe)[1].model for recipe in recipes]
    scales = [m.scaling["default"] for model in models for m in model.modules() if isinstance(m, LoraLayer)]
    assert scales == pytest.approx([12 / 6**0.5 if use_rslora else 2] * 2 * 12)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("parameters", [1000, 1700], ids=["below", "above"])
def test_the_saved_size_is_the_nearest_to_the_budget(name: str, parameters: int, tmp_path: Path) -> None:
    """Ranks 1 and 2 have 768 and 1536 parameters (1152 and 1920 with DoRA's norms); adapters have 65 a unit."""
    model, recipe = tiny_bert(), recipe_for(name)
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    sized = methods.get(name).with_budget(model, recipe, parameters)
    assert torch.equal(state, torch.get_rng_state()), "the random state is as it was"
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert recipe == recipe_for(name)

    _, adapted = adapt(name, tmp_path, sized, steps=6)
    trainer_for(adapted, tmp_path, steps=6).train()
    adapted.save(tmp_path / "saved")
    saved = saved_parameters(tmp_path / "saved")
    saved = saved // 2 if name == "pissa" else saved  # the difference of two adapters of the trained size
    if name in DIVIDE_ANY:
        assert parameters - 64 < saved <= parameters, "within a triplet, and never more"
        return
    step = 12 * 64 if name in RANKED else {"houlsby": 4, "pfeiffer": 2}[name] * 65
    assert abs(saved - parameters) <= step / 2


@pytest.mark.parametrize("name", SIZED)
def test_a_budget_below_half_of_the_smallest_size_is_refused(name: str) -> None:
    """Of a method that divides any number, below one triplet."""
    few = 63 if name in DIVIDE_ANY else 90
    with pytest.raises(RecipeError, match=rf"budget: {few} parameters are too few for {name} on tiny"):
        methods.get(name).with_budget(tiny_bert(), recipe_for(name), few)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SIZED)))
def test_a_method_without_a_size_refuses_a_budget(name: str) -> None:
    with pytest.raises(RecipeError, match=f"budget: method {name} has no rank or width"):
        methods.get(name).with_budget(tiny_bert(), recipe_for(name), 10_000)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout in the base."""

    def run(place: str, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        _, adapted = adapt(name, tmp_path / place, steps=6)
        trainer = trainer_for(adapted, tmp_path / place, steps=6, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        assert trainer.state.global_step == 6
        adapted.save(tmp_path / place / "saved")
        file = next((tmp_path / place / "saved").glob("*.safetensors"))
        return load_file(file)

    whole = run("whole")
    checkpoint = tmp_path / "resumed" / "checkpoints" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-3", checkpoint)
    resumed = run("resumed", checkpoint)
    assert list(whole) == list(resumed)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_the_rows_can_be_learned_from_words_alone() -> None:
    """The tests above ask for something that is there."""
    data = rows()
    assert all((min(row["input_ids"]) > 4) == (max(row["input_ids"]) > 4) == bool(row["labels"]) for row in data)
    assert head_modules(tiny_bert()) == ["classifier"]
