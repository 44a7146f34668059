"""Methods that add nothing to the model: all parameters, the biases, or the output layer alone are trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from ..hf.files import replacing
from ..recipe import Recipe, RecipeError
from .base import Adapted, Job, Precision, Section, head_modules, register, train_only
from .saving import load_trained, save_trained


@register("full")
class Full:
    """Every parameter. What is saved is a model of Transformers, which ``from_pretrained`` loads."""

    section: ClassVar[Section | None] = None
    takes_budget: ClassVar[bool] = False
    base_precision: ClassVar[Precision] = "float32"

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """Raises RecipeError: there is no size to choose."""
        raise _no_size(recipe)

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """The model as it is: what its class keeps constant, such as sinusoidal positions, stays so."""

        def save(folder: Path) -> None:
            with replacing(folder) as beside:
                model.save_pretrained(str(beside))

        return Adapted(model, save)

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """The saved model; of ``model`` only its class is used."""
        loaded: PreTrainedModel = type(model).from_pretrained(str(folder))
        return loaded


@register("head", False)
@register("bitfit", True)
class Part:
    """The output layer, with ``biases`` also each bias of the body (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199),
    those of the layer norms included. What is saved is ``adapter_model.safetensors``, the trained parameters alone."""

    section: ClassVar[Section | None] = None
    takes_budget: ClassVar[bool] = False
    base_precision: ClassVar[Precision] = "float32"

    def __init__(self, biases: bool) -> None:
        self._biases = biases

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """Raises RecipeError: there is no size to choose."""
        raise _no_size(recipe)

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """Raises RecipeError when the model has nothing of the kind."""
        self._choose(model, job.recipe)
        return Adapted(model, partial(save_trained, model))

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """The model with the trained parameters; RecipeError when they are others."""
        self._choose(model, recipe)
        return load_trained(model, folder)

    def _choose(self, model: PreTrainedModel, recipe: Recipe) -> None:
        if self._biases and not any(_is_bias(name) for name, _ in model.base_model.named_parameters()):
            raise RecipeError(
                f"method bitfit: {recipe.model} ({type(model).__name__}) has no biases; use another method"
            )
        if not self._biases and not head_modules(model):
            raise RecipeError(
                f"method head: {recipe.model} ({type(model).__name__}) has no output layer of the task's own, since a "
                "language model's was pretrained with it: use another method"
            )
        train_only(model, _is_bias if self._biases else lambda name: False)


def _is_bias(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "bias"


def _no_size(recipe: Recipe) -> RecipeError:
    return RecipeError(f"budget: method {recipe.method} has no rank or width to choose: leave the budget out")
