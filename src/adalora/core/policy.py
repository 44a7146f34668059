"""Scores + budget -> which triplets live (paper, section 3.3, equation 11).

A policy is a function of the score vector of the whole model, the budget, and the number of triplets of each matrix
(their scores lie one matrix after the other). It returns a boolean mask with exactly ``budget`` true entries; ties go
to the triplet that comes first. To add a policy, register it in :data:`POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Policy: TypeAlias = Callable[[Tensor, int, Sequence[int]], Tensor]


def global_topk(scores: Tensor, budget: int, sizes: Sequence[int]) -> Tensor:
    """The paper's: the ``budget`` best triplets of all matrices ranked together."""
    best = torch.argsort(scores, descending=True, stable=True)[:budget]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)


def uniform(scores: Tensor, budget: int, sizes: Sequence[int]) -> Tensor:
    """The ablation: every matrix keeps as many of its own best triplets, as far as the budget divides evenly."""
    shares = torch.tensor(equal_shares(budget, sizes), device=scores.device)
    counts = torch.tensor(list(sizes), device=scores.device)
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=scores.device), counts)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]  # by matrix, best first within each
    place = torch.arange(len(order), device=scores.device) - (counts.cumsum(0) - counts)[owner[order]]
    return torch.zeros_like(scores, dtype=torch.bool).index_copy_(0, order, place < shares[owner[order]])


def equal_shares(budget: int, sizes: Sequence[int]) -> list[int]:
    """Split a budget as evenly as the sizes allow; what does not divide goes to the matrices that come first."""
    shares = [0] * len(sizes)
    left = min(budget, sum(sizes))
    while left > 0:
        open_matrices = [k for k, size in enumerate(sizes) if shares[k] < size]
        each = max(1, left // len(open_matrices))
        for k in open_matrices[:left]:
            grant = min(each, sizes[k] - shares[k])
            shares[k] += grant
            left -= grant
    return shares


POLICIES: dict[str, Policy] = {"global_topk": global_topk, "uniform": uniform}
