"""What a method is: it makes a model trainable, and what it learned can be saved and loaded.

A method is a class marked ``@register("name")`` in a file of this folder. Methods know nothing of tasks, metrics or
folders of runs; ``training`` gives them a model with its output layer, and a job.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..recipe import Recipe, RecipeError

Section = Literal["adalora", "lora", "bottleneck"]
Precision = Literal["auto", "float32"]


@dataclass(frozen=True)
class Job:
    """What a method may know about the training that it is for."""

    recipe: Recipe
    task_type: str  # PEFT's: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM or SEQ_2_SEQ_LM
    total_steps: int  # optimizer steps
    steps_per_epoch: int
    batches: Callable[[], Iterable[Mapping[str, torch.Tensor]]]  # training batches, for methods that look at data first
    trace: Path  # where a method that moves its budget writes what it did


class Start(NamedTuple):
    """Forward and backward passes before the first step."""

    what: str  # starts from the gradient: "P and Q"
    batches: int
    sweeps: int  # over each of them


@dataclass(frozen=True)
class Adapted:
    """A model that a method has made trainable."""

    model: nn.Module
    save: Callable[[Path], None]
    """Writes what was learned into a folder: each file whole or not at all."""
    callbacks: Sequence[TrainerCallback] = ()
    """What the method does while a Trainer trains."""
    schedule: str = ""
    """What will happen to the budget, in words."""
    header: Callable[[], dict[str, Any]] | None = None
    """What the trace of its budget begins with; None of a method that has no budget."""
    ranks: Callable[[], dict[str, int]] = field(default=dict)
    """Rank of each adapted matrix now, by the name of its module in the base model. Empty without ranks."""
    start: Start | None = None
    """What it looks at before the first step, where it costs forward and backward passes."""


class Method(Protocol):
    """One way to fine-tune."""

    section: ClassVar[Section | None]
    """The recipe's section that it reads."""
    takes_budget: ClassVar[bool]
    """Whether its size can be chosen, by ``budget``, so that methods can be compared at equal parameters."""
    base_precision: ClassVar[Precision]
    """Of the model that it is given: ``auto`` is the checkpoint's own, for a method that leaves the model as it is and
    trains in float32 beside it; ``float32`` for one that trains the model's own weights, whose small steps half
    precision would round away."""

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The recipe with the rank or width whose adapter, as saved and without the output layer, comes nearest to
        so many parameters; of a method that can divide any number, with at most so many. The model is left as it was.
        RecipeError when even the smallest has twice as many, or more than so many where any number can be divided."""
        ...

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """Freeze what stays, add what is learned; the output layer is always trained."""
        ...

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """The model with what ``Adapted.save`` wrote, ready to answer."""
        ...


_REGISTRY: dict[str, Method] = {}
_T = TypeVar("_T", bound=type)


def register(name: str, *args: Any) -> Callable[[_T], _T]:
    """Class decorator: recipes may say ``method: name``. ``args`` go to the class, which may be registered under
    several names."""

    def add(cls: _T) -> _T:
        _REGISTRY[name] = cls(*args)
        return cls

    return add


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_REGISTRY)


def get(name: str) -> Method:
    """The method called ``name``; RecipeError naming the nearest when there is none."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, names(), n=1)
    advice = f"did you mean {near[0]}?" if near else f"known methods are {', '.join(names())}"
    raise RecipeError(f"unknown method {name!r}: {advice}")


# --- what methods share -----------------------------------------------------------------------------


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the direct children beside the pretrained body that hold parameters: the output layer that a task
    made. Empty for a language model, whose output layer was pretrained with it."""
    body = model.base_model
    if body is model or _is_language_model(model):
        return []
    beside = {name: child for name, child in model.named_children() if child is not body}
    return [name for name, child in beside.items() if next(child.parameters(), None) is not None]


def train_only(model: PreTrainedModel, chosen: Callable[[str], bool]) -> None:
    """Freeze every parameter except those whose names ``chosen`` picks and those of the output layer."""
    heads = tuple(f"{name}." for name in head_modules(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads) or chosen(name))


def _is_language_model(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]
