"""What a saved training holds of the method: names of its tensors, and what makes it fit a model.

Tensors are called "matrix/p", "matrix/lam", "matrix/q", "matrix/mask", in the final phase also "matrix/score"; averages
"matrix/p.sensitivity" ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import StateError
from .importance import Smoothed
from .settings import Settings
from .sharded import whole
from .stacks import split
from .triplets import Factors, Triplets

STATE_VERSION = 1


def to_tensors(
    triplets: Sequence[Triplets], mask: Tensor, last_scores: Tensor | None, averages: Mapping[str, Smoothed]
) -> dict[str, Tensor]:
    """Copies of P, Λ, Q, the mask, the last scores and the averages of every matrix, by name."""
    tensors = {
        f"{t.name}/{key}": value.detach().clone()
        for t in triplets
        for key, value in Factors(*map(whole, t.parameters))._asdict().items()
    }
    sizes = [t.rank for t in triplets]
    for key, vector in (("mask", mask), ("score", last_scores)):
        if vector is not None:
            parts = zip(triplets, split(vector, sizes), strict=True)
            tensors.update((f"{t.name}/{key}", part.clone()) for t, part in parts)
    for name, smoothed in averages.items():
        tensors.update((f"{name}.{key}", value.clone()) for key, value in smoothed._asdict().items())
    return tensors


def factors_of(tensors: Mapping[str, Tensor], name: str) -> Factors:
    return Factors(*(tensors[f"{name}/{key}"] for key in Factors._fields))


def averages_of(tensors: Mapping[str, Tensor]) -> dict[str, Smoothed]:
    names = [key.removesuffix(".sensitivity") for key in tensors if key.endswith(".sensitivity")]
    return {name: Smoothed(*(tensors[f"{name}.{field}"] for field in Smoothed._fields)) for name in names}


def last_scores_of(tensors: Mapping[str, Tensor], triplets: Sequence[Triplets], device: torch.device) -> Tensor | None:
    """[sum of sizes], if the final phase had begun."""
    parts = [tensors.get(f"{t.name}/score") for t in triplets]
    found = [part for part in parts if part is not None]
    return torch.cat(found).to(device) if len(found) == len(parts) else None


def check_fit(state: Mapping[str, Any], triplets: Sequence[Triplets], settings: Settings) -> None:
    """Refuse a state that is not of this model.

    Raises:
        StateError: it is of another model, metric, unit or version, or its ranks cannot be taken over now.
    """
    tensors: Mapping[str, Tensor] = state["tensors"]
    theirs, ours = {key.split("/")[0] for key in tensors}, {t.name for t in triplets}
    if state["version"] != STATE_VERSION:
        raise StateError(f"this state has version {state['version']}, this adalora reads {STATE_VERSION}.")
    if theirs != ours:
        raise StateError(
            f"this state is of another model or other target modules: it lacks {sorted(ours - theirs)[:3]} and has"
            f" {sorted(theirs - ours)[:3]} that are not adapted here."
        )
    unit = state.get("budget_unit", "triplets")  # older states do not say
    for name, theirs_is, ours_is in (
        ("importance", state["metric"], settings.metric),
        ("budget_unit", unit, settings.budget_unit),
    ):
        if theirs_is != ours_is:
            raise StateError(
                f"this state was made with {name}={theirs_is!r}, this model has {ours_is!r};"
                f" train with the same {name} to resume."
            )
    for t in triplets:
        p, _, q = factors_of(tensors, t.name)
        theirs_shape, ours_shape = (p.shape[0], *q.shape[1:]), (t.p.shape[0], *t.q.shape[1:])
        if theirs_shape != ours_shape:
            raise StateError(
                f"the state's {t.name} is {' x '.join(map(str, theirs_shape))},"
                f" the model's {' x '.join(map(str, ours_shape))}."
            )
        if len(q) != t.rank and not t.is_resizable():
            raise StateError(
                f"the state has rank {len(q)} for {t.name}, which has {t.rank} here and is still held by a graph"
                " or a distributed model: load the state before the first forward pass, and before the model is"
                " sharded."
            )
