"""Scores + budget -> which triplets live (paper, section 3.3, equation 11).

A policy is a function of the score vector of the whole model, the budget, the number of triplets of each matrix (their
scores lie one matrix after the other), and what one triplet of each matrix costs of the budget: 1 where it counts
triplets, d_out + d_in where it counts parameters. It returns a boolean mask. To add a policy, register it in
:data:`POLICIES`.

**Costs.** A policy puts all triplets in an order and :func:`keep_what_fits` walks down it: a triplet lives if it fits
into what is left of the budget. One that does not fit is passed over, and smaller ones further down may still live, so
what is left over is less than the smallest of those that were pruned. (Stopping there instead would leave up to the
largest triplet unused, and where the largest exceeds the budget possibly everything.) No triplet ever loses its place
to a lower one of the same cost. Where all cost the same, exactly as many live as fit: the paper's top b(t).

**Ties.** Equal scores, which are common as long as λ is 0, take turns: first those of matrices that have fewer better
triplets. Where a turn cannot be given to all, matrices come in a fixed order in which neighbours lie far apart
(:func:`spread`), so that a budget of less than a triplet a matrix is not spent on the first layers. Scores that are
-inf never live.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Policy(Protocol):
    """Scores, [sum of sizes] -> mask."""

    def __call__(self, scores: Tensor, budget: int, sizes: Sequence[int], costs: Sequence[int]) -> Tensor: ...


class Candidate(NamedTuple):
    """One triplet among all. They sort as the policy :func:`global_topk` ranks them."""

    lowness: float  # -S
    place: int  # among its matrix's own, best first
    turn: int  # of its matrix, where turns are taken
    at: int  # where it is in the score vector
    matrix: int


def global_topk(scores: Tensor, budget: int, sizes: Sequence[int], costs: Sequence[int]) -> Tensor:
    """The paper's: the best triplets of all matrices ranked together."""
    return keep_what_fits(sorted(candidates(scores, sizes)), budget, scores, costs)


def uniform(scores: Tensor, budget: int, sizes: Sequence[int], costs: Sequence[int]) -> Tensor:
    """The ablation: every matrix keeps as many of its own best triplets, as far as the budget divides evenly. Where
    triplets have several costs, that is the same rank, not the same number of parameters."""
    return keep_what_fits(sorted(candidates(scores, sizes), key=lambda c: (c.place, c.turn)), budget, scores, costs)


POLICIES: dict[str, Policy] = {"global_topk": global_topk, "uniform": uniform}


def candidates(scores: Tensor, sizes: Sequence[int]) -> list[Candidate]:
    """All triplets, the best first; of equal ones, the first. Waits for the device."""
    order: list[int] = torch.argsort(scores, descending=True, stable=True).tolist()
    values: list[float] = scores.tolist()
    owner = [matrix for matrix, size in enumerate(sizes) for _ in range(size)]
    turns, seen, found = spread(len(sizes)), [0] * len(sizes), []
    for index in order:
        matrix = owner[index]
        found.append(Candidate(-values[index], seen[matrix], turns[matrix], index, matrix))
        seen[matrix] += 1
    return found


def keep_what_fits(order: Iterable[Candidate], budget: int, scores: Tensor, costs: Sequence[int]) -> Tensor:
    """Walk down and keep each triplet that costs no more than is left."""
    left, lives, least = budget, [False] * len(scores), min(costs, default=0)
    for candidate in order:
        if left < least:
            break
        if costs[candidate.matrix] <= left and candidate.lowness != math.inf:
            lives[candidate.at] = True
            left -= costs[candidate.matrix]
    return torch.tensor(lives, dtype=torch.bool, device=scores.device)


def spread(count: int) -> list[int]:
    """When each of so many matrices has its turn: any first few of the turns are spread over all of them.

    Sorts k·φ⁻¹ mod 1, whose values fill the unit interval evenly for every number of terms (Fibonacci hashing).
    """
    order = sorted(range(count), key=lambda k: k * 0x9E3779B9 % 2**32)
    turns = [0] * count
    for turn, k in enumerate(order):
        turns[k] = turn
    return turns
