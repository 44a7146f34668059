"""The regulariser's gradient for all matrices of a model at once; its formulas are in :mod:`.orthogonality`.

One product takes all factors of one length, which asks for one rank: where ranks differ, factors are filled up with
rows of zeros, which touch nothing. XXᵀ of all factors, whatever their length, then lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from .orthogonality import Orthogonality, minus_identity_, norms, slope_
from .sharded import like, shards_of
from .stacks import Parts, Stack, Stacks, common_dtype, split, wide

FILLING = 4  # rows of factors filled up with zeros, in multiples of the rows that they have: at most so many


class Level:
    """Factors that are given one common rank.

    Args:
        blocks: by length; taken as they are if each factor has this rank.
        like: says device and type.
        live: of each matrix, which of its rows count; the others must be 0. All of them, if not given.
    """

    def __init__(
        self,
        rank: int,
        blocks: Sequence[Stack],
        like: Tensor,
        live: Sequence[Tensor] | None = None,
        vector_norm: float = 1.0,
    ) -> None:
        factors = [factor for block in blocks for factor in block.factors]
        self.rank = rank
        self.per_square = vector_norm**-2
        self.even = all(factor.rank == rank for factor in factors)
        self.stacks = blocks
        if not self.even:
            zero = like.new_zeros(())
            self.stacks = [Stack(block.length, block.factors, rank, zero) for block in blocks]
        self.counts = [len(stack.factors) for stack in self.stacks]
        self.identity: Tensor | int = 1  # its diagonal, [factors, rank], 0 in rows that fill up
        of_stacks = [factor for stack in self.stacks for factor in stack.factors]
        if live is not None:
            rows = [live[factor.matrix] for factor in of_stacks]
            self.identity = torch.stack([F.pad(row.to(like.device).byte(), (0, rank - len(row))) for row in rows])
        elif not self.even:
            ranks = torch.tensor([factor.rank for factor in of_stacks])
            self.identity = (torch.arange(rank) < ranks.unsqueeze(1)).byte().to(like.device)

    def gather(self, parts: Sequence[Parts]) -> list[Tensor]:
        """[rows, d] of each stack"""
        return [wide(stack.gather(parts)) for stack in self.stacks]

    def factors(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """X, [m, rank, d], of each stack."""
        return [block.view(count, self.rank, -1) for block, count in zip(rows, self.counts, strict=True)]

    def deviation(self, xs: Sequence[Tensor]) -> Tensor:
        """XXᵀ/c² - I of all factors: [factors, rank, rank]."""
        products = torch.cat([x @ x.mT for x in xs])
        return minus_identity_(products if self.per_square == 1 else products.mul_(self.per_square), self.identity)


class Regulariser:
    """For the ranks that ``stacks`` is laid out for.

    Args:
        live: [sum of sizes], where pruned triplets are 0 altogether: they do not count, as if they were sliced away.
        vector_norm: c, the length that singular vectors are held to: R is taken of X/c.
    """

    def __init__(self, stacks: Stacks, live: Tensor | None = None, vector_norm: float = 1.0) -> None:
        self.count = 2 * len(stacks.triplets)  # of all factors, those at rank 0 too
        self.counts_all = live is None
        ranks = common_ranks(factor.rank for block in stacks.blocks for factor in block.factors)
        self.even = len(set(stacks.sizes) - {0}) == 1
        self.levels = []
        for lower, rank in zip([*ranks[1:], 0], ranks, strict=True):
            blocks = stacks.blocks if self.even else _between(stacks.blocks, lower, rank)
            of_matrices = None if live is None else split(live, stacks.sizes)
            self.levels.append(Level(rank, blocks, stacks.triplets[0].lam.data, of_matrices, vector_norm))

    @torch.no_grad()
    def add_gradient(
        self,
        parameters: Sequence[Parts],
        weight: float,
        kind: Orthogonality,
        grad_scale: Tensor | None = None,
        rows: Sequence[Tensor] | None = None,
        trained: Sequence[tuple[bool, bool, bool]] | None = None,
    ) -> None:
        """Add γ·∂R/∂P and γ·∂R/∂Q to the gradients of those parameters that are trained.

        Args:
            weight: γ
            trained: of P, λ and Q of each matrix, if it is not what requires a gradient.
            grad_scale: factor by which a loss scaler has multiplied the gradients.
            rows: the blocks of ``stacks``, if they have been gathered already.
        """
        if trained is None:
            trained = [(p.requires_grad, lam.requires_grad, q.requires_grad) for p, lam, q in parameters]
        updates: list[tuple[Tensor, Tensor]] = []
        for level in self.levels:
            if not any(trained[f.matrix][f.side] for stack in level.stacks for f in stack.factors):
                continue
            xs = level.factors(rows if rows is not None and self.even else level.gather(parameters))
            slopes = slope_(level.deviation(xs), kind, self.count, weight * level.per_square)
            if grad_scale is not None:
                slopes.mul_(grad_scale)
            for stack, x, slope in zip(level.stacks, xs, torch.split(slopes, level.counts), strict=True):
                ws = [parameters[factor.matrix][factor.side] for factor in stack.factors]
                update = (slope.to(x.dtype) @ x).flatten(0, 1).to(common_dtype(ws))  # rounded once, all together
                wanted = (trained[factor.matrix][factor.side] for factor in stack.factors)
                updates += compress(zip(ws, stack.scatter(update), strict=True), wanted)
        _add_to_gradients(updates)

    @torch.no_grad()
    def errors(self, parameters: Sequence[Parts]) -> Tensor:
        """‖XXᵀ/c² - I‖_F of every P and Q that has vectors left."""
        found = [norms(level.deviation(level.factors(level.gather(parameters)))) for level in self.levels]
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.zeros(1)


def common_ranks(ranks: Iterable[int]) -> list[int]:
    """To which ranks factors are filled up, descending: one for all, unless few are far above the rest."""
    levels: list[int] = []
    filled = own = 0
    for rank in sorted(ranks, reverse=True):
        if not levels or filled + levels[-1] > FILLING * (own + rank):
            levels.append(rank)
            filled = own = 0
        filled, own = filled + levels[-1], own + rank
    return sorted(set(levels), reverse=True)


def _between(blocks: Sequence[Stack], lower: int, rank: int) -> list[Stack]:
    """The factors above one rank and up to another, by length."""
    parts = [(block.length, [f for f in block.factors if lower < f.rank <= rank]) for block in blocks]
    return [Stack(length, factors) for length, factors in parts if factors]


def _add_to_gradients(updates: list[tuple[Tensor, Tensor]]) -> None:
    """Add matrices to the gradients of parameters; where there is none yet, it is made."""
    missing = [w for w, _ in updates if w.grad is None]
    if missing:
        # One operation for all of them. What is not finite there is not finite in the update, either.
        for w, zeros in zip(missing, torch._foreach_mul(missing, 0.0), strict=True):
            w.grad = zeros
    matrices = [update if w.ndim == 2 else update.view_as(w) for w, update in updates]
    gradients = [w.grad for w, _ in updates if w.grad is not None]
    if gradients:
        torch._foreach_add_(gradients, matrices)
    for w, _ in updates:
        if (shards := shards_of(w)) is not None and w.grad is not None:
            shards.grad = like(shards, w.grad)
