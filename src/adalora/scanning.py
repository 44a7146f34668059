"""Where would parameters help? The singular values of the loss's gradient, matrix by matrix, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch

from . import start
from .methods import head_modules
from .preparation import Prepared
from .recipe import RecipeError
from .report.scanned import Scan

USUAL_RATE = 1e-3  # where the recipe leaves it to a search


def scan(prepared: Prepared, head_steps: int = 0) -> Scan:
    """Look at the gradient on training batches of a run that is prepared with ``initialization: gradient``.

    Args:
        prepared: its model is not fit for training afterwards when ``head_steps`` are taken.
        head_steps: first train the new output layer alone so long, at the recipe's learning rate.

    Raises:
        RecipeError: ``head_steps`` where there is no new output layer.
        StateError: no batch has a loss, or a gradient is not finite.
    """
    if head_steps:
        _train_head(prepared, head_steps)
    seen = start(prepared.model, prepared.batches())
    budget = prepared.budget
    assert budget is not None  # of AdaLoRA there always is one
    values = {name: list(seen["values"].get(name, ())) for name in prepared.initial_ranks}
    return Scan(
        model=prepared.recipe.model,
        train=prepared.recipe.data.train,
        rows=seen["rows"],
        head_steps=head_steps,
        share=seen["share"],
        values=values,
        ranks=largest(values, budget.target_budget),
    )


def largest(values: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """How many of each matrix's values are among the ``budget`` largest of all."""
    every = sorted(((value, name) for name, of in values.items() for value in of), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(values, 0)
    for _, name in every[:budget]:
        ranks[name] += 1
    return ranks


def _train_head(prepared: Prepared, steps: int) -> None:
    model: Any = prepared.model
    heads = head_modules(model.get_base_model())
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and set(heads) & set(name.split("."))
    ]
    if not trained:
        raise RecipeError(
            f"--head-steps: {prepared.recipe.model} has no new output layer for {prepared.recipe.task}: leave it out"
        )
    rate = prepared.recipe.training.learning_rate
    optimizer = torch.optim.AdamW(trained, lr=USUAL_RATE if rate == "auto" else rate)
    model.train()
    for _, batch in zip(range(steps), _again_and_again(prepared), strict=False):
        gradients = torch.autograd.grad(model(**batch).loss, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in trained:
        parameter.grad = None


def _again_and_again(prepared: Prepared) -> Iterator[Mapping[str, torch.Tensor]]:
    return chain.from_iterable(prepared.batches() for _ in repeat(None))
